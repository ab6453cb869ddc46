"""When does a calibrated threshold pay, and against what?

Decodes held-out problems of each task with every static threshold (the honest baseline: its whole curve), the factor
rule, Fast-dLLM++ (joint bound) and OSDT: the defaults (conformal metric, several calibrating requests), other numbers
of requests and risks, the paper's statistics over several requests, and calibration on one request (mode x metric x
record, cap x slack, floor). Every setting is tried with several choices of the calibrating requests. Prints accuracy
with its interval, forward passes, tokens per forward and tokens per second, with the gain over static 0.9 and over the
best static threshold chosen with hindsight.

    python benchmarks/bench_settings.py --json results.jsonl --pictures pictures

- Every configuration decodes the same problems, so accuracies are compared in pairs: exact McNemar test, two-sided.
  "Best static with hindsight" is the static threshold with the fewest forwards among those that do not answer
  measurably fewer problems than static 0.9 (p >= 0.05); that choice sees the answers, which no user has.
- OSDT's figures leave the calibrating requests out: they are none of the problems, but drawn from the same split with
  another seed. "cal" says which choice of them.
- A calibrated table that is constant over all blocks and steps is a static threshold under another name; such rows are
  marked "= static T" and count as no gain of OSDT.
- Forward passes are counted by the engine. Tokens per second are of one run each on this machine; forwards and accuracy
  are what to compare.
- The transfer matrix uses the profile of one task for another. The signature's similarity is the cosine of two
  requests' mean confidences by block and step, over the cells that both have. Vectors without a negative entry are
  alike almost by construction: read it beside the transfer matrix.

Another model: ``--model PATH --task-file FILE``, JSON lines with ``task``, ``prompt`` and ``answer``; a completion
is right when it contains the answer, or with ``--checker MODULE:FUNCTION``, called as ``function(row, completion)``.
"""

import argparse
import itertools
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from common import environment, write_lines
from decoding import Bench, Outcome, add_engine_arguments, is_measurably_worse, mcnemar, pareto
from problems import CALIBRATION_SEED, Problem, find_source, user_problems

from vllm_osdt.geometry import DecodeShape
from vllm_osdt.options import DecodingOptions
from vllm_osdt.policies import POLICIES

STATIC = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)
FACTORS = (0.25, 0.5, 0.75, 1.0, 1.5)
DELTAS = (0.5, 0.25, 0.1, 0.0)
MODES, RECORDS = ("block", "step_block"), ("masked", "committed")
METRICS = ("mean", "q1", "q2", "q3", "min_whisker")
MARGINS = (0.0, 0.05, 0.2, 0.3)
NUM_REQUESTS_AND_RISKS = ((16, 0.06), (32, 0.04), (64, 0.05), (64, 0.1), (128, 0.01))
CAPS, SLACKS = (0.95, 0.9, 0.8, 0.75), (0.0, 0.1, 0.2)
FLOORS = (0.3, 0.4, 0.5, 0.6, 0.7)
REPORTED = ("task", "name", "options", "seconds", "constant", "calibration", "notes")


def osdt_settings(only_defaults: bool) -> list[dict[str, Any]]:
    """Settings to try, the defaults first; then one group of options at a time."""
    one_shot = {"num_calibration_requests": 1, "statistic": "q1", "slack": 0.1}
    several = {**one_shot, "num_calibration_requests": 32}
    if only_defaults:
        return [{}, one_shot]
    return [
        {},
        *({"margin": margin} for margin in MARGINS),
        *({"num_calibration_requests": number, "risk": risk} for number, risk in NUM_REQUESTS_AND_RISKS),
        {"granularity": "step_block"},
        *({**several, "statistic": metric} for metric in METRICS),
        *(
            {**one_shot, "granularity": mode, "statistic": metric, "record": record}
            for mode, metric, record in itertools.product(MODES, METRICS, RECORDS)
        ),
        *({**one_shot, "threshold_cap": cap, "slack": slack} for cap, slack in itertools.product(CAPS, SLACKS)),
        *({**one_shot, "floor": floor} for floor in FLOORS),
    ]


def sweep_osdt(bench: Bench, task: str, problems: list[Problem], calibrating: list[list[Problem]]) -> list[Outcome]:
    """OSDT with every setting and choice of calibrating requests; settings that give one table are decoded once."""
    outcomes: list[Outcome] = []
    for index, requests in enumerate(calibrating):
        decoded: dict[tuple, Outcome] = {}
        for setting in osdt_settings(bench.args.only_defaults):
            full = DecodingOptions(**setting)
            name = f"{task} #{index} of {full.num_calibration_requests}"
            options = {"policy": "osdt", "task": name, **setting}
            bench.calibrate(requests, full, options)
            shape = DecodeShape(-(-bench.gen_length // full.block_length), full.block_length)
            table = POLICIES["osdt"].schedule(full, shape, bench.thresholds(full, options, problems[0]))
            used = tuple(np.round(table.parameters, 6).ravel())
            if used not in decoded:
                decoded[used] = bench.run(task, problems, "", **options)
            first = decoded[used]
            constant = float(table.parameters.flat[0]) if np.ptp(table.parameters) < 1e-6 else None
            measured = (first.right, first.nfe, first.num_tokens, first.seconds)
            outcomes.append(Outcome(task, label(full), options, *measured, constant, index))
    return outcomes


def label(options: DecodingOptions) -> str:
    """A setting in words."""
    statistic = options.statistic
    if statistic == "conformal":
        statistic += f" {options.risk:g} {options.margin:g}"
    limits = [f"{options.threshold_cap:g}", f"{options.slack:g}"]
    parts = [f"{options.num_calibration_requests}x", options.granularity, statistic, options.record, *limits]
    return " ".join([*parts, f"floor {options.floor:g}"] if options.floor else parts)


def similarity(left: np.ndarray, right: np.ndarray) -> float:
    """Cosine of two signatures over the cells that both have."""
    num_blocks, num_steps = np.minimum(left.shape, right.shape)
    left, right = left[:num_blocks, :num_steps], right[:num_blocks, :num_steps]
    both = ~np.isnan(left) & ~np.isnan(right)
    a, b = left[both], right[both]
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def signatures(bench: Bench, task: str, problems: list[Problem]) -> list[np.ndarray]:
    """Mean confidence by block and step of several requests, each decoded with the static threshold."""
    found = []
    for index, problem in enumerate(problems):
        name = f"{task} signature {index}"
        bench.decode([problem], policy="osdt", task=name, num_calibration_requests=1, statistic="q1")
        profile = bench.profile(name)
        assert profile is not None
        found.append(np.array(profile["mean_confidence"], dtype=float))
    return found


def report(outcome: Outcome, static: Outcome, best: Outcome) -> str:
    """A row of the table."""
    low, high = outcome.interval()
    same = "" if outcome.constant is None else f"  = static {outcome.constant:.3g}"
    return (
        f"{outcome.name:<44}{outcome.calibration if outcome.calibration >= 0 else '':>4}{outcome.accuracy:>8.1%} "
        f"{f'{low:.0%}-{high:.0%}':>9}{outcome.mean_nfe:>7.2f}{outcome.tokens_per_forward:>8.2f}"
        f"{outcome.tokens_per_second:>8.0f}{static.mean_nfe / outcome.mean_nfe - 1:>+9.0%}"
        f"{best.mean_nfe / outcome.mean_nfe - 1:>+9.0%}{mcnemar(outcome.right, static.right):>8.3f}{same}"
    )


HEADER = (
    f"{'':<44}{'cal':>4}{'right':>8} {'95 %':>9}{'NFE':>7}{'tok/fw':>8}{'tok/s':>8}{'vs 0.9':>9}{'vs best':>9}{'p':>8}"
)


def draw(folder: Path, task: str, outcomes: list[Outcome], found: list[np.ndarray]) -> None:
    """Accuracy over forwards of all configurations, and the requests' signatures side by side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    figure, axis = plt.subplots(figsize=(7, 5))
    for family, marker in (("static_threshold", "o"), ("factor", "s"), ("joint_bound", "^"), ("osdt", ".")):
        own = [outcome for outcome in outcomes if outcome.options["policy"] == family]
        own.sort(key=lambda outcome: outcome.mean_nfe)
        line = "-" if family == "static_threshold" else ""
        axis.plot([o.mean_nfe for o in own], [o.accuracy for o in own], line, marker=marker, label=family, alpha=0.7)
    front = pareto(outcomes)
    axis.plot([o.mean_nfe for o in front], [o.accuracy for o in front], ":", color="black", label="Pareto front")
    axis.set(title=task, xlabel="forward passes per request", ylabel="accuracy")
    axis.legend()
    figure.tight_layout()
    figure.savefig(folder / f"pareto_{task}.png", dpi=110)
    columns = min(6, len(found))
    figure, axes = plt.subplots(1, columns, figsize=(2.4 * columns, 2.6), squeeze=False)
    for axis, signature in zip(axes[0], found, strict=False):
        used = ~np.isnan(signature)
        axis.imshow(signature[used.any(axis=1)][:, used.any(axis=0)], vmin=0, vmax=1, aspect="auto")
        axis.set(xlabel="step", ylabel="block")
    figure.suptitle(f"{task}: mean confidence of several requests")
    figure.tight_layout()
    figure.savefig(folder / f"signatures_{task}.png", dpi=110)
    plt.close("all")


def measure_task(bench: Bench, task: str, problems: list[Problem], calibrating: list[list[Problem]]) -> list[Outcome]:
    """Everything about one task; prints its table."""
    bench.decode(problems, policy="static_threshold", threshold=0.9)  # warm
    outcomes = [
        bench.run(task, problems, f"static {value:g}", policy="static_threshold", threshold=value) for value in STATIC
    ]
    outcomes += [bench.run(task, problems, f"factor {value:g}", policy="factor", factor=value) for value in FACTORS]
    outcomes += [
        bench.run(task, problems, f"joint bound {value:g}", policy="joint_bound", delta=value) for value in DELTAS
    ]
    static = next(outcome for outcome in outcomes if outcome.options.get("threshold") == 0.9)
    statics = [outcome for outcome in outcomes if outcome.options["policy"] == "static_threshold"]
    best = min(
        (outcome for outcome in statics if not is_measurably_worse(outcome, static)),
        key=lambda outcome: outcome.mean_nfe,
    )
    outcomes += sweep_osdt(bench, task, problems, calibrating)
    print(f"\n{task}: {len(problems)} problems; best static with hindsight: {best.name}\n{HEADER}")
    for outcome in outcomes:
        outcome.notes = {
            "gain_over_static_0.9": static.mean_nfe / outcome.mean_nfe - 1,
            "gain_over_best_static": best.mean_nfe / outcome.mean_nfe - 1,
            "p_against_static_0.9": mcnemar(outcome.right, static.right),
        }
        is_default = outcome.options.keys() <= {"policy", "task"} or outcome.options.get("policy") != "osdt"
        if bench.args.verbose or is_default:
            print(report(outcome, static, best), flush=True)
    return outcomes


def transfer(bench: Bench, tasks: dict[str, list[Problem]]) -> list[dict[str, Any]]:
    """Accuracy and forwards of every task with the profile of every other."""
    print(f"\nprofiles moved between tasks: accuracy / NFE\n{'problems of':<18}" + "".join(f"{t:>20}" for t in tasks))
    rows = []
    for task, problems in tasks.items():
        cells = []
        for other in tasks:
            name = f"{other} #0 of {DecodingOptions().num_calibration_requests}"
            moved = bench.run(task, problems, f"profile of {other}", policy="osdt", task=name)
            cells.append(f"{moved.accuracy:.1%} / {moved.mean_nfe:.2f}")
            row = {"task": task, "profile_of": other, "accuracy": moved.accuracy, "nfe": moved.mean_nfe}
            rows.append({"bench": "osdt_transfer", **row})
        print(f"{task:<18}" + "".join(f"{cell:>20}" for cell in cells), flush=True)
    return rows


def main() -> None:
    """Parse arguments, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llada-mini", help="a bundled model, 'weak', or a folder of your own")
    parser.add_argument("--task", action="append", help="default: all that the model has")
    parser.add_argument("--task-file", help="problems of your own instead of the bundled tasks")
    parser.add_argument("--checker", metavar="MODULE:FUNCTION", help="how to check a completion of --task-file")
    parser.add_argument("--problems", type=int, default=200, help="per task")
    parser.add_argument("--calibrations", type=int, default=3, help="choices of the calibrating requests")
    parser.add_argument("--seed", type=int, default=0, help="which held-out problems")
    parser.add_argument("--gen-length", type=int, help="of --task-file; default: 96")
    add_engine_arguments(parser)
    parser.add_argument("--only-defaults", action="store_true", help="OSDT with default options and one request only")
    parser.add_argument("--verbose", action="store_true", help="print every setting, not only the defaults")
    parser.add_argument("--pictures", type=Path, help="folder for the pictures")
    args = parser.parse_args()
    most = max(DecodingOptions(**setting).num_calibration_requests for setting in osdt_settings(args.only_defaults))
    model, gen_length = args.model, args.gen_length or 96
    if args.task_file:
        tasks, calibrating = {}, {}
        for task, found in user_problems(args.task_file, args.checker).items():
            first = args.calibrations * most
            if len(found) <= first:
                parser.error(f"{args.task_file} has {len(found)} problems of {task!r}; {first} are for calibration")
            calibrating[task] = [found[start : start + most] for start in range(0, first, most)]
            tasks[task] = found[first:][: args.problems]
    else:
        source = find_source(args.model)
        model, gen_length = source.path, source.gen_length
        names = args.task or list(source.tasks)
        tasks = {task: source.tasks[task](args.problems, args.seed) for task in names}
        seeds = [CALIBRATION_SEED + args.seed + choice for choice in range(args.calibrations)]
        calibrating = {task: [source.tasks[task](most, seed) for seed in seeds] for task in names}

    bench = Bench(args, model, gen_length)
    record = environment(dtype=args.dtype, cache_mode=args.cache, model=os.path.basename(model.rstrip("/")))
    print(record)
    lines: list[dict[str, Any]] = []
    for task, problems in tasks.items():
        outcomes = measure_task(bench, task, problems, calibrating[task])
        found_signatures = signatures(bench, task, problems[: max(2, min(12, len(problems)))])
        pairs = [similarity(a, b) for a, b in itertools.combinations(found_signatures, 2)]
        print(f"cosine of two requests' signatures: lowest {min(pairs):.3f}, median {np.median(pairs):.3f}")
        lines.append(
            {"bench": "osdt_similarity", "task": task, "lowest": min(pairs), "median": float(np.median(pairs))}
        )
        front = {id(outcome) for outcome in pareto(outcomes)}
        for outcome in outcomes:
            values = {name: getattr(outcome, name) for name in REPORTED}
            values |= {"accuracy": outcome.accuracy, "interval": outcome.interval(), "nfe": outcome.mean_nfe}
            values |= {"tokens_per_forward": outcome.tokens_per_forward, "num_problems": len(outcome.right)}
            values |= {"tokens_per_second": outcome.tokens_per_second, "on_front": id(outcome) in front}
            lines.append({"bench": "osdt", **values})
        if args.pictures:
            draw(args.pictures, task, outcomes, found_signatures)
    if len(tasks) > 1:
        lines += transfer(bench, tasks)
    if args.json:  # the environment once, for all lines that follow it
        write_lines(args.json, [{"bench": "osdt_run", **record, "arguments": sys.argv[1:]}, *lines])


if __name__ == "__main__":
    main()
