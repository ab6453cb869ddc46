"""Every decoding policy on one engine: at its authors' defaults, and tuned by one small budget.

Each policy decodes the same held-out problems of every task with its default options, and with the setting that a small
search finds on other problems (``--tuning-problems``): of the settings that ``vllm-osdt tune`` tries, from cautious to
bold, the one with the fewest forwards whose accuracy there is at most ``--margin`` below that of static 0.9. Prints
accuracy with its 95 % interval, forwards (NFE), tokens per forward and per second, the processor's time per forward
against the static threshold's, and the bytes that the policy keeps of each request. A rule is dominated on a task if
another one has fewer forwards and no lower accuracy there; one that is dominated everywhere is listed at the end.

    python benchmarks/bench_policies.py --model llada-mini --model sdar-mini --json results.jsonl --pictures pictures

- Accuracies are compared in pairs with static 0.9: exact McNemar test, two-sided.
- ``--sensitivity`` decodes the held-out problems with every setting of the search, and the pictures show them.
- Time per forward is of the whole engine and depends on how many requests share a step; compare it between rules with
  about as many forwards. ``--overhead`` compares rules: each has a setting under which every step decides one position,
  so that all have the same steps.
- ``--calibrated``: no search; every policy that can has the thresholds of the task's profile (``calibrated``).
- A policy that a model's attention does not allow is left out, and named with the reason.

Another model: ``--model PATH --task-file FILE``, JSON lines with ``task``, ``prompt`` and ``answer``; a completion
is right when it contains the answer, or with ``--checker MODULE:FUNCTION``, called as ``function(row, completion)``.
"""

import argparse
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import environment, write_lines
from decoding import Bench, Outcome, add_engine_arguments, mcnemar, pareto
from problems import CALIBRATION_SEED, Problem, find_source, user_problems

from vllm_osdt.cli.tuning.candidates import CANDIDATES, calibrates
from vllm_osdt.options import DEFAULTS, policies_of
from vllm_osdt.policies import POLICIES

STATIC = {"policy": "static_threshold", "threshold": 0.9}
# Settings under which a step decides one position, for the time that a rule takes.
ONE_POSITION: dict[str, dict[str, Any]] = {
    "static_threshold": {"threshold": 1.0},
    "factor": {"factor": 1e-9},
    "joint_bound": {"delta": 0.999999},
    "entropy_bound": {"entropy": 1e-9},
    "local_leap": {"anchor_threshold": 1.0, "relaxed_threshold": 1.0},
    "bacd": {"max_threshold": 1.0, "min_threshold": 1.0},
    "prophet": {"prophet_early": 1e9, "prophet_middle": 1e9, "prophet_late": 1e9},
    "sched": {"sched_high": 1e9, "sched_low": 1e9},
    "fixed_steps": {},
    "confidence_adaptive": {"threshold": 1.0},
    "entropy_threshold": {"max_entropy": 1e-9},
    "streaming": {"threshold": 1.0, "relaxation": 0.0},
    "less": {"persistence": 128},
    "klass": {"kl_steps": 128},
    "stable": {"stable_steps": 128},
    "ccd": {"ccd_dynamic": False},
    "wedlm": {"adjusted_entropy": 1e-9},
}
REPORTED = ("task", "name", "options", "seconds", "notes")
HEADER = (
    f"{'':<44}{'right':>8} {'95 %':>9}{'p':>7}{'NFE':>7}{'vs 0.9':>8}{'tok/fw':>8}{'tok/s':>8}{'ms/fw':>8}{'bytes':>8}"
)


def measure(bench: Bench, task: str, problems: list[Problem], name: str, setting: Mapping[str, Any]) -> Outcome:
    """One setting on one task, with the processor's time."""
    start = time.process_time()
    outcome = bench.run(task, problems, name, **setting)
    outcome.notes["cpu_ms_per_forward"] = 1e3 * (time.process_time() - start) / sum(outcome.nfe)
    outcome.notes["bytes_per_request"] = kept_bytes(
        str(setting["policy"]), bench.llm.llm_engine.model_config.get_hidden_size()
    )
    return outcome


def kept_bytes(policy: str, hidden_size: int) -> int:
    """Bytes that a policy keeps of each request on the device, besides constants; hidden states in float32."""
    from vllm_osdt.geometry import MAX_BLOCK_LENGTH
    from vllm_osdt.policies.base import MAX_STATE

    found = POLICIES[policy]
    num_hidden = found.num_steps_before * hidden_size if found.reads_step_before else 0
    return 4 * (2 * MAX_STATE + MAX_BLOCK_LENGTH * (found.memory_size + num_hidden)) if found.adjusts else 0


def words(setting: Mapping[str, Any]) -> str:
    """A setting in words."""
    return " ".join(f"{name} {value:g}" for name, value in setting.items() if not isinstance(value, str | bool))


def for_task(policy: str, setting: Mapping[str, Any], task: str) -> dict[str, Any]:
    """A setting as requests of a task send it."""
    own: dict[str, Any] = {"policy": policy, **setting}
    if calibrates(own):
        own["task"] = f"{task} {words(setting)}".strip()
    return own


def refusal(bench: Bench, policy: str, problem: Problem) -> str | None:
    """Why the model does not take a policy; None if it does."""
    try:
        bench.generate([problem], [{"policy": policy, **({"task": "try"} if calibrates({"policy": policy}) else {})}])
    except ValueError as error:
        return str(error)
    return None


def tuned(bench: Bench, policy: str, task: str, split: list[Problem], base: Outcome, margin: float) -> dict[str, Any]:
    """The setting that the search finds on ``split``: the fewest forwards without losing more than ``margin``."""
    best, fewest = {}, float("inf")
    for setting in CANDIDATES.get(policy, ()):
        own = for_task(policy, setting, f"{task} tuning")
        calibrate(bench, policy, own, task)
        outcome = bench.run(task, split, "", **own)
        if outcome.accuracy < base.accuracy - margin:
            break
        if outcome.mean_nfe < fewest:
            best, fewest = dict(setting), outcome.mean_nfe
    return best


def calibrate(bench: Bench, policy: str, options: Mapping[str, Any], task: str) -> None:
    """Have a task's calibrating requests decoded, where the policy has such."""
    if calibrates({"policy": policy, **options}):
        number = int(options.get("num_calibration_requests", DEFAULTS["num_calibration_requests"]))
        bench.decode(bench.calibrating[task][:number], **options)  # type: ignore[attr-defined]


def report(outcome: Outcome, static: Outcome) -> str:
    """A row of the table."""
    low, high = outcome.interval()
    return (
        f"{outcome.name[:43]:<44}{outcome.accuracy:>8.1%} {f'{low:.0%}-{high:.0%}':>9}"
        f"{mcnemar(outcome.right, static.right):>7.3f}{outcome.mean_nfe:>7.2f}"
        f"{static.mean_nfe / outcome.mean_nfe - 1:>+8.0%}{outcome.tokens_per_forward:>8.2f}"
        f"{outcome.tokens_per_second:>8.0f}{outcome.notes['cpu_ms_per_forward']:>8.2f}"
        f"{outcome.notes['bytes_per_request']:>8.0f}"
    )


def measure_task(
    bench: Bench, task: str, problems: list[Problem], split: list[Problem], policies: list[str]
) -> list[Outcome]:
    """All policies on one task; prints its table."""
    args = bench.args
    bench.decode(problems[:8], **STATIC)  # warm
    static = measure(bench, task, problems, "static 0.9", STATIC)
    base = bench.run(task, split, "", **STATIC)
    outcomes = [static]
    print(f"\n{task}: {len(problems)} problems, tuned on {len(split)}\n{HEADER}\n{report(static, static)}", flush=True)
    for policy in policies:
        best = {} if args.calibrated else tuned(bench, policy, task, split, base, args.margin)
        settings: list[tuple[str, Mapping[str, Any]]] = [(f"{policy}, defaults", {})]
        if args.calibrated and policy in policies_of("calibrated"):
            settings = [(f"{policy}, calibrated", {"calibrated": True})]
        if best:
            settings.append((f"{policy}, {words(best)}", best))
        if args.sensitivity:
            settings += [(f"{policy} ({words(one)})", one) for one in CANDIDATES.get(policy, ()) if dict(one) != best]
        for name, setting in settings:
            own = for_task(policy, setting, task)
            if own.keys() <= STATIC.keys() and {**STATIC, **own} == STATIC:
                continue  # the first row
            calibrate(bench, policy, own, task)
            outcome = measure(bench, task, problems, name, own)
            outcome.notes["p_against_static_0.9"] = mcnemar(outcome.right, static.right)
            outcome.notes["is_candidate"] = float(name.endswith(")"))
            outcomes.append(outcome)
            if not name.endswith(")") or args.verbose:
                print(report(outcome, static), flush=True)
    return outcomes


def measure_overhead(bench: Bench, problems: list[Problem], policies: list[str], repeats: int) -> dict[str, float]:
    """The processor's time of a rule, relative to the static threshold's, where every step decides one position."""
    times: dict[str, list[float]] = defaultdict(list)
    nfe: dict[str, int] = {}
    names = ["static_threshold", *(name for name in policies if name in ONE_POSITION and name != "static_threshold")]
    for _ in range(repeats + 1):
        for name in names:
            start = time.process_time()
            _, forwards, _, _ = bench.decode(problems, policy=name, **ONE_POSITION[name])
            times[name].append(time.process_time() - start)
            nfe[name] = sum(forwards)
    base = statistics.median(times["static_threshold"][1:])
    found = {}
    print(f"\nevery step decides one position, {len(problems)} requests, median of {repeats} (static: {base:.2f} s)")
    for name in names:
        same = (
            "" if nfe[name] == nfe["static_threshold"] else f"   ({nfe[name]} forwards, not {nfe['static_threshold']})"
        )
        ratio = statistics.median(times[name][1:]) / base * nfe["static_threshold"] / nfe[name]
        found[name] = ratio
        print(f"{name:<24}{ratio:>6.3f}{same}", flush=True)
    return found


def dominated(outcomes: list[Outcome]) -> list[str]:
    """Rules that on every task have another with fewer forwards and no lower accuracy, by their best rows."""
    by_task: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        if not outcome.notes.get("is_candidate"):
            by_task[outcome.task].append(outcome)
    never = None
    for own in by_task.values():
        beaten = {str(one.options["policy"]) for one in own} - {str(one.options["policy"]) for one in pareto(own)}
        never = beaten if never is None else never & beaten
    return sorted(never or ())


def draw(folder: Path, label: str, task: str, outcomes: list[Outcome]) -> None:
    """Accuracy over forwards, a line for each policy."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    figure, axis = plt.subplots(figsize=(8, 5.5))
    by_policy: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        by_policy[str(outcome.options["policy"])].append(outcome)
    for index, (policy, own) in enumerate(by_policy.items()):
        own.sort(key=lambda outcome: outcome.mean_nfe)
        marker = "os^vD<>pP*Xhd"[index % 13]
        axis.plot([o.mean_nfe for o in own], [o.accuracy for o in own], "-", marker=marker, label=policy, alpha=0.7)
    front = pareto(outcomes)
    axis.plot([o.mean_nfe for o in front], [o.accuracy for o in front], ":", color="black", label="Pareto front")
    axis.set(title=f"{label}: {task}", xlabel="forward passes per request", ylabel="accuracy")
    axis.legend(fontsize="small", ncols=2)
    figure.tight_layout()
    figure.savefig(folder / f"policies_{label}_{task}.png", dpi=110)
    plt.close(figure)


def tasks_of_model(args: argparse.Namespace, model: str) -> tuple[str, str, int, dict[str, tuple[list[Problem], ...]]]:
    """Label, folder and canvas of a model, and by task: problems, those of the search, and those that calibrate."""
    calibrating = DEFAULTS["num_calibration_requests"]
    if args.task_file:
        tasks = {}
        for task, found in user_problems(args.task_file, args.checker).items():
            first = calibrating + args.tuning_problems
            if len(found) <= first:
                raise SystemExit(f"{args.task_file} has {len(found)} problems of {task!r}; {first} are not decoded")
            tasks[task] = (found[first:][: args.problems], found[calibrating:first], found[:calibrating])
        return Path(model).name, model, args.gen_length or 96, tasks
    source = find_source(model)
    names = args.task or list(source.tasks)
    return (
        source.label,
        source.path,
        source.gen_length,
        {
            task: (
                source.tasks[task](args.problems, args.seed),
                source.tasks[task](args.tuning_problems, CALIBRATION_SEED + 500),
                source.tasks[task](calibrating, CALIBRATION_SEED),
            )
            for task in names
        },
    )


def main() -> None:
    """Parse arguments, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help="a bundled model, 'weak', or a folder (default: llada-mini)")
    parser.add_argument("--task", action="append", help="default: all that the model has")
    parser.add_argument("--task-file", help="problems of your own instead of the bundled tasks")
    parser.add_argument("--checker", metavar="MODULE:FUNCTION", help="how to check a completion of --task-file")
    parser.add_argument("--policy", action="append", choices=tuple(POLICIES), help="default: all")
    parser.add_argument("--problems", type=int, default=200, help="per task")
    parser.add_argument("--tuning-problems", type=int, default=64, help="per task, other ones")
    parser.add_argument("--margin", type=float, default=0.01, help="accuracy that a setting may lose there")
    parser.add_argument("--seed", type=int, default=0, help="which held-out problems")
    parser.add_argument("--gen-length", type=int, help="of --task-file; default: 96")
    parser.add_argument("--calibrated", action="store_true", help="with a profile's thresholds instead of a search")
    parser.add_argument("--sensitivity", action="store_true", help="decode all settings of the search")
    parser.add_argument("--overhead", type=int, default=0, metavar="N", help="repeat the measurement of time N times")
    add_engine_arguments(parser)
    parser.add_argument("--verbose", action="store_true", help="print every setting")
    parser.add_argument("--pictures", type=Path, help="folder for the pictures")
    args = parser.parse_args()
    lines: list[dict[str, Any]] = []
    for model in args.model or ["llada-mini"]:
        label, folder, gen_length, tasks = tasks_of_model(args, model)
        bench = Bench(args, folder, gen_length)
        bench.calibrating = {task: own[2] for task, own in tasks.items()}  # type: ignore[attr-defined]
        record = environment(dtype=args.dtype, cache_mode=args.cache, model=label, batch=args.concurrency)
        print(f"\n== {label} {record}")
        first = next(iter(tasks.values()))[0][0]
        refused = {policy: why for policy in args.policy or POLICIES if (why := refusal(bench, policy, first))}
        for policy, why in refused.items():
            print(f"left out: {policy}: {why}")
        policies = [policy for policy in args.policy or POLICIES if policy not in refused]
        outcomes: list[Outcome] = []
        for task, (problems, split, _) in tasks.items():
            outcomes += measure_task(bench, task, problems, split, policies)
            if args.pictures:
                draw(args.pictures, label, task, [one for one in outcomes if one.task == task])
        print(f"\ndominated on every task: {', '.join(dominated(outcomes)) or 'none'}")
        lines.append({"bench": "policies_run", **record, "arguments": sys.argv[1:], "left_out": refused})
        for outcome in outcomes:
            values = {name: getattr(outcome, name) for name in REPORTED}
            values |= {"accuracy": outcome.accuracy, "interval": outcome.interval(), "nfe": outcome.mean_nfe}
            values |= {"tokens_per_forward": outcome.tokens_per_forward, "num_problems": len(outcome.right)}
            lines.append({"bench": "policies", "model": label, **values})
        if args.overhead:
            ratios = measure_overhead(bench, next(iter(tasks.values()))[0][:32], policies, args.overhead)
            lines.append({"bench": "policies_overhead", "model": label, "cpu_over_static": ratios})
        del bench
    if args.json:
        write_lines(args.json, lines)


if __name__ == "__main__":
    main()
