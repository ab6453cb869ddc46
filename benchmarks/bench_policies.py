"""Every decoding policy on one engine: at its authors' defaults, and tuned by one small budget.

Each policy decodes the same held-out problems of every task with its default options, and with the setting that a small
search finds on other problems (``--tuning-problems``): of the settings that ``vllm-osdt tune`` tries, from cautious to
bold, the one with the fewest forwards whose accuracy there is at most ``--margin`` below that of static 0.9. Prints
accuracy with its 95 % interval, forwards (NFE), tokens per forward and per second, the processor's time per forward
against the static threshold's, and the bytes that the policy keeps of each request. A rule is dominated on a task if
another one has fewer forwards and no lower accuracy there; one that is dominated everywhere is listed at the end.

    python benchmarks/bench_policies.py --model llada-mini --model sdar-mini --json results.jsonl --pictures pictures

- Accuracies are compared in pairs with static 0.9: exact McNemar test, two-sided.
- What the search decodes is reported too, as ``policies_search``; with ``--sensitivity`` it tries the rest of the
  settings after one that loses too much.
- Time per forward is of the whole engine and depends on how many requests share a step; compare it between rules with
  about as many forwards. ``--overhead`` compares rules in equal steps (``policy_overhead.py``), ``--overhead-only``
  does nothing else.
- ``learned_filter`` gets a filter that is trained on the requests that calibrate the tasks.
- ``policy_report.py`` makes tables and pictures of the JSON lines, also of several runs.
- ``--calibrated``: no search; every policy that can has the thresholds of the task's profile (``calibrated``).
- ``--setting '{"policy": "ete", "explore_rank": 0.5}'``: no search and no defaults; these settings beside static 0.9.
- A policy that a model's attention does not allow is left out, and named with the reason.

Another model: ``--model PATH --task-file FILE``, JSON lines with ``task``, ``prompt`` and ``answer``; a completion
is right when it contains the answer, or with ``--checker MODULE:FUNCTION``, called as ``function(row, completion)``.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import policy_overhead
import policy_report
from common import environment, write_lines
from decoding import Bench, Outcome, add_engine_arguments, mcnemar
from problems import CALIBRATION_SEED, Problem, find_source, user_problems

from vllm_osdt.cli.train_filter import samples_of, train
from vllm_osdt.cli.tuning.candidates import CANDIDATES, calibrates
from vllm_osdt.options import DEFAULTS, policies_of
from vllm_osdt.policies import POLICIES

MAX_UPDATES = 3000  # of a filter's weights
STATIC = {"policy": "static_threshold", "threshold": 0.9}
# Where the default of an option that policies share is not the authors' of this one; where the authors' canvas has
# several blocks in flight, as many parts of a block (d3LLM: 8 of 256 positions), by their scripts.
AUTHORS: dict[str, Mapping[str, Any]] = {
    "confidence_adaptive": {"threshold": 0.95},
    "dimple": {"threshold": 0.95},
    "multi_block": {"part_length": 4, "multi_block_rule": "release", "enter_share": 0.1},
    "s2d2": {"threshold": 0.85},
}
# What makes a policy's threshold count, where its default does without one.
OF_THRESHOLDS: dict[str, Mapping[str, Any]] = {"freedave": {"freedave_base": "threshold"}}
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
        str(setting["policy"]), bench.llm.llm_engine.model_config.get_vocab_size()
    )
    return outcome


def kept_bytes(policy: str, vocabulary: int) -> int:
    """Bytes that a policy keeps of each request on the device, besides constants; float32 logits, of blocks of 32."""
    from vllm_osdt.geometry import MAX_BLOCK_LENGTH
    from vllm_osdt.policies.base import MAX_CARRY, MAX_STATE

    found = POLICIES[policy]
    num_logits = found.num_steps_before * vocabulary * policy_overhead.LENGTH if found.reads_step_before else 0
    numbers = MAX_STATE + MAX_CARRY + MAX_BLOCK_LENGTH * found.memory_size + num_logits
    return 4 * numbers if found.adjusts else 0


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


def search(bench: Bench, policy: str, task: str, split: list[Problem], base: Outcome) -> list[Outcome]:
    """The settings of the search on ``split``, up to one that loses more than ``margin``, or all."""
    tried = []
    for setting in CANDIDATES.get(policy, ()):
        own = for_task(policy, setting, f"{task} tuning")
        calibrate(bench, policy, own, task)
        outcome = compared(bench.run(task, split, f"{policy}, {words(setting)}", **own), base)
        tried.append(outcome)
        if outcome.accuracy < base.accuracy - bench.args.margin and not bench.args.sensitivity:
            break
    return tried


def found_setting(tried: list[Outcome], base: Outcome, margin: float) -> dict[str, Any]:
    """The setting that the search finds: the fewest forwards before one loses more than ``margin``."""
    best, fewest = {}, float("inf")
    for outcome in tried:
        if outcome.accuracy < base.accuracy - margin:
            break
        if outcome.mean_nfe < fewest:
            best, fewest = outcome.options, outcome.mean_nfe
    return {name: value for name, value in best.items() if name not in ("policy", "task")}


def compared(outcome: Outcome, static: Outcome) -> Outcome:
    """With the answers that it loses and wins against static 0.9."""
    pairs = list(zip(outcome.right, static.right, strict=True))
    outcome.notes["lost"] = sum(old and not new for new, old in pairs)
    outcome.notes["won"] = sum(new and not old for new, old in pairs)
    outcome.notes["p_against_static_0.9"] = mcnemar(outcome.right, static.right)
    return outcome


def calibrate(bench: Bench, policy: str, options: Mapping[str, Any], task: str) -> None:
    """Have a task's calibrating requests decoded, where the policy has such."""
    if calibrates({"policy": policy, **options}):
        bench.decode(bench.calibrating[task][: num_calibrating(options)], **options)  # type: ignore[attr-defined]


def num_calibrating(options: Mapping[str, Any]) -> int:
    """Requests that calibrate a task; those behind them use its profile."""
    return int(options.get("num_calibration_requests", DEFAULTS["num_calibration_requests"]))


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
) -> tuple[list[Outcome], list[Outcome]]:
    """All policies on one task, and what the search tried; prints the task's table."""
    args = bench.args
    bench.decode(problems[:8], **STATIC)  # warm
    static = measure(bench, task, problems, "static 0.9", STATIC)
    base = bench.run(task, split, "", **STATIC)
    outcomes, searched = [static], [compared(base, base)]
    print(f"\n{task}: {len(problems)} problems, tuned on {len(split)}\n{HEADER}\n{report(static, static)}", flush=True)
    for own in args.setting or ():
        calibrate(bench, own["policy"], own, task)
        name = f"{own['policy']}, {words(own)}"
        outcomes.append(compared(measure(bench, task, problems, name, own), static))
        print(report(outcomes[-1], static), flush=True)
    for policy in () if args.setting else policies:
        tried = [] if args.calibrated else search(bench, policy, task, split, base)
        searched += tried
        best = found_setting(tried, base, args.margin)
        settings: list[tuple[str, Mapping[str, Any]]] = [(f"{policy}, defaults", AUTHORS.get(policy, {}))]
        if args.calibrated and policy in policies_of("calibrated"):
            settings = [(f"{policy}, calibrated", {"calibrated": True, **OF_THRESHOLDS.get(policy, {})})]
        if best:
            settings.append((f"{policy}, {words(best)}", best))
        for name, setting in settings:
            own = for_task(policy, setting, task)
            if own.keys() <= STATIC.keys() and {**STATIC, **own} == STATIC:
                continue  # the first row
            calibrate(bench, policy, own, task)
            outcomes.append(compared(measure(bench, task, problems, name, own), static))
            print(report(outcomes[-1], static), flush=True)
    return outcomes, searched


def measure_overhead(bench: Bench, label: str, problems: list[Problem], policies: list[str]) -> list[dict[str, Any]]:
    """What a rule's step costs; prints tables."""
    lines = []
    for num_requests in bench.args.overhead_requests:
        args = bench.args
        found = policy_overhead.measure(bench, problems, policies, num_requests, args.overhead, args.overhead_steps)
        print("\n" + policy_overhead.table(found, num_requests), flush=True)
        about = {"model": label, "requests": num_requests, "pairs": bench.args.overhead}
        lines.append({"bench": "policies_overhead", **about, **found})
    return lines


def make_filter(args: argparse.Namespace, model: str, gen_length: int, calibrating: list[list[Problem]]) -> Path:
    """The file of a filter for ``learned_filter``, trained on the record of requests that calibrate.

    Args:
        args: The program's.
        model: Folder of the checkpoint.
        gen_length: Positions of a canvas.
        calibrating: Each task's requests.
    """
    from safetensors.torch import save_file

    from vllm_osdt import profiles
    from vllm_osdt.cli.common import find_profiles

    folder = Path(tempfile.mkdtemp(prefix="filter"))
    bench = Bench(args, model, gen_length, profile_dir=str(folder))
    for number, requests in enumerate(calibrating):
        bench.decode(requests, policy="osdt", task=f"task {number}")
    profiles(bench.llm)  # has them written
    del bench
    samples = samples_of([one.profile.record for one in find_profiles(folder)])
    weights, outcome = train(samples, DEFAULTS["filter_threshold"], 0, MAX_UPDATES)
    print(f"filter: {samples.request.max() + 1} requests, {outcome}")
    save_file(weights, folder / "filter.safetensors")
    return folder / "filter.safetensors"


def line(label: str, bench: str, outcome: Outcome) -> dict[str, Any]:
    """An outcome as a JSON line; where a task calibrates, behind how many requests."""
    values = {name: getattr(outcome, name) for name in REPORTED}
    values |= {"accuracy": outcome.accuracy, "interval": outcome.interval(), "nfe": outcome.mean_nfe}
    values |= {"tokens_per_forward": outcome.tokens_per_forward, "num_problems": len(outcome.right)}
    if calibrates(outcome.options):
        values["calibrating_requests"] = num_calibrating(outcome.options)
    return {"bench": bench, "model": label, **values}


def search_line(label: str, outcome: Outcome, *, whole: bool) -> dict[str, Any]:
    """What the search saw of a setting, as a JSON line; ``whole``: it was let try all settings."""
    about = {"bench": "policies_search", "model": label, "task": outcome.task, "name": outcome.name, "whole": whole}
    found = {"accuracy": outcome.accuracy, "nfe": outcome.mean_nfe, "num_problems": len(outcome.right)}
    return {**about, "policy": outcome.options["policy"], **found}


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
    parser.add_argument(
        "--model", action="append", help="a bundled model, 'weak', 'random-130m', or a folder (default: llada-mini)"
    )
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
    parser.add_argument("--sensitivity", action="store_true", help="have the search try all of its settings")
    parser.add_argument("--setting", action="append", type=json.loads, metavar="JSON", help="measure this, no search")
    parser.add_argument("--overhead", type=int, default=0, metavar="N", help="measure the time of each rule N times")
    parser.add_argument("--overhead-requests", type=int, nargs="+", default=[1, 8], help="at once, each by itself")
    parser.add_argument("--overhead-steps", type=int, default=32, help="steps of each request, a divisor of 32")
    parser.add_argument("--overhead-only", action="store_true", help="measure nothing else")
    parser.add_argument("--filter-file", help="for learned_filter (default: one is trained)")
    add_engine_arguments(parser)
    parser.add_argument("--pictures", type=Path, help="folder for the pictures")
    args = parser.parse_args()
    lines: list[dict[str, Any]] = []
    num_written = 0

    def write() -> None:
        nonlocal num_written
        if args.json:
            write_lines(args.json, lines[num_written:])
        num_written = len(lines)

    for model in args.model or ["llada-mini"]:
        label, folder, gen_length, tasks = tasks_of_model(args, model)
        filter_file = args.filter_file
        if filter_file is None and "learned_filter" in (args.policy or POLICIES) and not args.setting:
            filter_file = str(make_filter(args, folder, gen_length, [own[2] for own in tasks.values()]))
        bench = Bench(args, folder, gen_length, filter_file=filter_file)
        bench.calibrating = {task: own[2] for task, own in tasks.items()}  # type: ignore[attr-defined]
        record = environment(dtype=args.dtype, cache_mode=args.cache, model=label, batch=args.concurrency)
        print(f"\n== {label} {record}")
        first = next(iter(tasks.values()))[0][0]
        asked = [own["policy"] for own in args.setting or ()] or args.policy or list(POLICIES)
        refused = {policy: why for policy in asked if (why := refusal(bench, policy, first))}
        for policy, why in refused.items():
            print(f"left out: {policy}: {why}")
        policies = [policy for policy in asked if policy not in refused]
        arguments = [Path(one).name for one in sys.argv[1:]]  # no folders of this machine
        lines.append({"bench": "policies_run", **record, "arguments": arguments, "left_out": refused})
        for task, (problems, split, _) in {} if args.overhead_only else tasks.items():
            found, searched = measure_task(bench, task, problems, split, policies)
            lines += [line(label, "policies", one) for one in found]
            lines += [search_line(label, one, whole=args.sensitivity) for one in searched]
            write()
        if args.overhead:
            lines += measure_overhead(bench, label, next(iter(tasks.values()))[0], policies)
            write()
        del bench
    results = policy_report.read(lines)
    if results.rows:
        print(f"\nrules that others dominate\n\n{policy_report.dominance(results)}")
        if args.pictures:
            policy_report.draw(results, args.pictures)


if __name__ == "__main__":
    main()
