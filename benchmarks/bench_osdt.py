"""Is OSDT's default better than any static threshold, and at what risk?

Decodes held-out problems with static thresholds (the honest baseline: its whole curve), Fast-dLLM++ (joint bound), the
factor rule, the paper's setting (one request, lower quartile) and OSDT with several numbers of requests and risks, each
calibrated on several choices of requests. Models: the bundled ones and a weak one that is nearly always wrong; others
with ``--model`` and ``--ladder``. Then sends requests in many orders and draws the saving by requests recorded.

    python benchmarks/bench_osdt.py --json results.jsonl --picture anytime.png

- All settings decode the same problems. "lost" are answers that static 0.9 has right and a setting wrong, over all
  choices of the calibrating requests; p is McNemar's exact test, two-sided. A problem counts once for each choice, so p
  is too small rather than too large.
- "best static" is the static threshold with the fewest forwards among those that do not answer measurably fewer
  problems than static 0.9 (p >= 0.05). That choice sees the answers, which no user has.
- Calibrating requests are none of the problems. They decode like static 0.9, so a calibration costs what a user of the
  best static threshold would have saved on them; "paid back" is the number of requests after which OSDT has made up.
- Forwards (NFE) are the engine's count. Tokens per second are of runs in turn, static 0.9, best static and OSDT, and
  the median of their ratios; the engine decodes ``--concurrency`` requests at a time.
"""

import argparse
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from anytime import draw, measure
from common import environment, write_lines
from decoding import Bench, Outcome, add_engine_arguments, is_measurably_worse, mcnemar
from problems import CALIBRATION_SEED, WEAK, Problem, Source, find_source

from vllm_osdt.mini import MODELS
from vllm_osdt.options import DecodingOptions

STATIC = (0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5)
OTHERS: dict[str, dict[str, Any]] = {
    "joint bound 0.25": {"policy": "joint_bound", "delta": 0.25},
    "factor 0.5": {"policy": "factor", "factor": 0.5},
}
DEFAULT = "OSDT (default)"
CALIBRATED: dict[str, dict[str, Any]] = {
    "OSDT, 1 request, Q1": {"num_calibration_requests": 1, "statistic": "q1", "slack": 0.1},
    "OSDT, 32 requests, risk 4 %": {"num_calibration_requests": 32, "risk": 0.04},
    DEFAULT: {},
}
NUM_TIMED = 3  # choices whose speed is measured
ANYTIME = (("text-mini", "stories"), ("llada-mini", "word_problems"))
NUM_ORDERS, NUM_AFTER = 20, 20


@dataclass
class Row:
    """A setting on one task.

    Attributes:
        model, task, setting: What was decoded.
        outcomes: One for each choice of calibrating requests, or one.
        speed: Tokens per second over those of static 0.9, of runs in turn; None where not measured.
        best: Whether it is the best static threshold with hindsight.
        notes: More figures, by name.
    """

    model: str
    task: str
    setting: str
    outcomes: list[Outcome]
    speed: float | None = None
    best: bool = False
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def nfe(self) -> float:
        """Forward passes per request."""
        return float(np.mean([outcome.mean_nfe for outcome in self.outcomes]))

    def as_line(self) -> dict[str, Any]:
        """What is kept of it."""
        about = {"model": self.model, "task": self.task, "setting": self.setting, "best": self.best}
        notes = {name: value for name, value in self.notes.items() if name != "reference"}
        return {"bench": "osdt", **about, "speed": self.speed, **notes}

    def against(self, static: Outcome) -> tuple[int, int, int, float]:
        """Answers lost and won against another outcome of the same problems, how many were asked, p."""
        right = [value for outcome in self.outcomes for value in outcome.right]
        before = static.right * len(self.outcomes)
        lost = sum(a and not b for a, b in zip(before, right, strict=True))
        won = sum(b and not a for a, b in zip(before, right, strict=True))
        return lost, won, len(right), mcnemar(before, right)


class Comparison:
    """All settings on the tasks of one model.

    Args:
        source: The model.
        args: Of the command.
    """

    def __init__(self, source: Source, args: argparse.Namespace) -> None:
        self.source = source
        self.args = args
        self.bench = Bench(args, source.path, source.gen_length)

    def run(self, task: str) -> list[Row]:
        """Every setting on one task; prints the table."""
        args, bench, draw_problems = self.args, self.bench, self.source.tasks[task]
        problems = [problem for seed in range(args.seeds) for problem in draw_problems(args.problems, seed)]
        bench.decode(problems[: args.concurrency], policy="static_threshold")  # warm
        rows = [
            self._row(task, f"static {value:g}", [bench.run(task, problems, "", **_static(value))]) for value in STATIC
        ]
        reference = rows[0].outcomes[0]
        best = min(
            (row for row in rows if not is_measurably_worse(row.outcomes[0], reference)), key=lambda row: row.nfe
        )
        best.best = True
        rows += [self._row(task, name, [bench.run(task, problems, "", **options)]) for name, options in OTHERS.items()]
        for name, setting in CALIBRATED.items():
            rows.append(self._calibrated(task, name, setting, problems, STATIC[rows.index(best)]))
        for row in rows:
            self._report(row, reference, best)
        return rows

    def _row(self, task: str, setting: str, outcomes: list[Outcome]) -> Row:
        return Row(self.source.label, task, setting, outcomes)

    def _calibrated(
        self, task: str, name: str, setting: dict[str, Any], problems: list[Problem], best_static: float
    ) -> Row:
        """OSDT on several choices of calibrating requests; the speed of the default against static thresholds."""
        bench, outcomes = self.bench, []
        speeds: dict[str, list[float]] = {"osdt": [], "best": []}
        number = DecodingOptions(**setting).num_calibration_requests
        for choice in range(self.args.choices):
            options = {"policy": "osdt", "task": f"{task} {choice} {name}", "early": False, **setting}
            if "statistic" in setting:
                del options["early"]
            bench.decode(self.source.tasks[task](number, CALIBRATION_SEED + choice), **options)
            is_timed = name == DEFAULT and choice < NUM_TIMED
            if is_timed:
                before = bench.run(task, problems, "", **_static(0.9)).tokens_per_second
                at_best = bench.run(task, problems, "", **_static(best_static)).tokens_per_second
                speeds["best"].append(at_best / before)
            outcomes.append(bench.run(task, problems, "", **options))
            if is_timed:
                speeds["osdt"].append(outcomes[-1].tokens_per_second / before)
        row = self._row(task, name, outcomes)
        row.notes["num_calibrating"] = number
        if speeds["osdt"]:
            row.speed = statistics.median(speeds["osdt"])
            row.notes["speed_of_best_static"] = statistics.median(speeds["best"])
        return row

    def _report(self, row: Row, reference: Outcome, best: Row) -> None:
        lost, won, number, p = row.against(reference)
        right = float(np.mean([outcome.accuracy for outcome in row.outcomes]))
        row.notes |= {"right": right, "lost": lost, "won": won, "num_answers": number, "p": p, "nfe": row.nfe}
        row.notes["nfe_by_choice"] = [round(outcome.mean_nfe, 2) for outcome in row.outcomes]
        words = f"{self.source.label} {row.task}"
        text = (
            f"| {words:<28} | {row.setting + (' *' if row.best else ''):<27} | {right:>6.1%} | {lost:>3}, {won:>3} of "
        )
        text += f"{number:>4} | {p:>6.4f} | {row.nfe:>5.2f} | {row.nfe / best.nfe - 1:>+5.0%} |"
        if "num_calibrating" in row.notes:
            row.notes["paid_back_after"] = paid_back(row, reference.mean_nfe, best.nfe)
            text += f" {row.notes['paid_back_after'] or 'never'} |"
        if row.speed is not None:
            text += f" {row.speed - 1:+.0%} (best static {row.notes['speed_of_best_static'] - 1:+.0%}) |"
        print(text, flush=True)


def _static(value: float) -> dict[str, Any]:
    return {"policy": "static_threshold", "threshold": value}


def paid_back(row: Row, static_nfe: float, best_nfe: float) -> int | None:
    """Requests, calibrating ones included, after which OSDT has taken no more forwards than the best static threshold.

    Early thresholds, which pay on the way, are not counted.
    """
    number = row.notes["num_calibrating"]
    if row.nfe >= best_nfe:
        return None
    return number + int(np.ceil(number * (static_nfe - best_nfe) / (best_nfe - row.nfe)))


def loss(rows: list[Row]) -> tuple[float, float]:
    """The share of answers that a setting loses over all tasks, and half of its 95 % interval.

    A problem's choices count as one observation: their mean.
    """
    values: list[float] = []
    for row in rows:
        before = np.array(row.notes["reference"], dtype=float)
        values += list(before - np.mean([outcome.right for outcome in row.outcomes], axis=0))
    return float(np.mean(values)), float(1.96 * np.std(values, ddof=1) / np.sqrt(len(values)))


def summarize(rows: list[Row]) -> list[dict[str, Any]]:
    """What every calibrated setting costs and brings over all tasks; prints it."""
    found = []
    for name in CALIBRATED:
        own = [row for row in rows if row.setting == name]
        share, half = loss(own)
        before = [value for row in own for value in row.notes["reference"] * len(row.outcomes)]
        after = [value for row in own for outcome in row.outcomes for value in outcome.right]
        ratio = [row.nfe / row.notes["best_nfe"] for row in own]
        summary = {
            "setting": name,
            "loss": share,
            "loss_interval": [share - half, share + half],
            "p": mcnemar(before, after),
            "num_answers": len(after),
            "nfe_over_best_static": float(np.exp(np.mean(np.log(ratio)))),
            "worst_nfe_over_best_static": max(ratio),
        }
        found.append(summary)
        print(
            f"{name}: loses {share:+.2%} of answers (95 % interval {share - half:+.2%} to {share + half:+.2%}; p "
            f"{summary['p']:.3f} of {len(after)}); NFE over that of the best static threshold: "
            f"{summary['nfe_over_best_static']:.2f} in the geometric mean, {max(ratio):.2f} at worst"
        )
    return found


def run_anytime(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Saving by requests recorded."""
    results = []
    for name, task in ANYTIME:
        source = find_source(name)
        number = DecodingOptions().num_calibration_requests
        length = 2 * number + 2 + NUM_AFTER
        orders = [source.tasks[task](length, CALIBRATION_SEED + order) for order in range(NUM_ORDERS)]
        bench = Bench(args, source.path, source.gen_length)
        results.append({"model": name, **measure(bench, task, orders, number, NUM_AFTER)})
        del bench
    if args.picture:
        draw(args.picture, results)
    return results


def main() -> None:
    """Parse arguments, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", action="append", help=f"a bundled model, {WEAK!r} or a rung; default: all of the former"
    )
    parser.add_argument("--ladder", type=Path, help="folder of `make ladder`; its models as well")
    parser.add_argument("--problems", type=int, default=40, help="of each seed and task")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--choices", type=int, default=10, help="choices of the calibrating requests")
    parser.add_argument("--no-anytime", action="store_true", help="leave out the saving by requests recorded")
    parser.add_argument("--picture", type=Path, help="draw that saving")
    add_engine_arguments(parser)
    args = parser.parse_args()
    names = args.model or ([] if args.ladder else [*MODELS, WEAK])
    if args.ladder:
        names += sorted(str(path.parent) for path in args.ladder.glob("*-mini-*/config.json"))
    record = environment(dtype=args.dtype, cache_mode=args.cache)
    print(record)
    print("| model and task | setting | right | lost, won | p | NFE | to best static | paid back | tokens/s |")
    rows: list[Row] = []
    for name in names:
        comparison = Comparison(find_source(name), args)
        for task in comparison.source.tasks:
            own = comparison.run(task)
            for row in own:
                row.notes["reference"] = own[0].outcomes[0].right
                row.notes["best_nfe"] = next(one.nfe for one in own if one.best)
            rows += own
        del comparison
    summary = summarize(rows)
    lines = [row.as_line() for row in rows]
    lines += [{"bench": "osdt_summary", **one} for one in summary]
    if not args.no_anytime:
        lines += [{"bench": "anytime", **one} for one in run_anytime(args)]
    if args.json:  # the environment once, for all lines that follow it
        arguments = [Path(argument).name for argument in sys.argv[1:]]
        write_lines(args.json, [{"bench": "osdt_run", **record, "arguments": arguments}, *lines])


if __name__ == "__main__":
    main()
