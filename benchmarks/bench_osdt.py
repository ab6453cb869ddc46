"""Is OSDT's default better than any static threshold, and at what risk?

Decodes held-out problems with static thresholds (the honest baseline: its whole curve), Fast-dLLM++ (joint bound), the
factor rule, the paper's setting (one request, lower quartile) and OSDT with several numbers of requests and risks, each
calibrated on several choices of requests. Models: the bundled ones and a weak one that is nearly always wrong; others
with ``--model`` and ``--ladder``. Then sends requests in many orders and draws the saving by requests recorded.

    python benchmarks/bench_osdt.py --json results.jsonl --picture anytime.png

- All settings decode the same problems, each choice of calibrating requests its own share of them. "lost" are answers
  that static 0.9 has right and a setting wrong; p is McNemar's exact test, two-sided.
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

from vllm_osdt.options import DecodingOptions

COMPARED = ("llada-mini", "sdar-mini", "text-mini", WEAK)
STATIC = (0.9, 0.8, 0.75, 0.7, 0.6, 0.5)
OTHERS: dict[str, dict[str, Any]] = {"joint bound 0.25": {"policy": "joint_bound", "delta": 0.25}}
DEFAULT = "OSDT (default)"
CALIBRATED: dict[str, dict[str, Any]] = {
    "OSDT, 1 request, Q1": {"num_calibration_requests": 1, "statistic": "q1", "slack": 0.1},
    "OSDT, 32 requests, risk 4 %": {"num_calibration_requests": 32, "risk": 0.04},
    DEFAULT: {},
}
TIMED_PROBLEMS = 150  # that are decoded where speed is measured
ANYTIME = (("text-mini", "stories"), ("llada-mini", "word_problems"))
NUM_ORDERS, NUM_AFTER = 20, 20


@dataclass
class Row:
    """A setting on one task.

    Attributes:
        model, task, setting: What was decoded.
        outcome: On all problems.
        best: Whether it is the best static threshold with hindsight.
        notes: Figures, by name.
    """

    model: str
    task: str
    setting: str
    outcome: Outcome
    best: bool = False
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def nfe(self) -> float:
        """Forward passes per request."""
        return self.outcome.mean_nfe

    def as_line(self) -> dict[str, Any]:
        """What is kept of it."""
        about = {"model": self.model, "task": self.task, "setting": self.setting, "best": self.best}
        return {"bench": "osdt", **about, **self.notes}


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
        bench = self.bench
        shares = [self.source.tasks[task](self.args.problems, seed) for seed in range(self.args.choices)]
        problems = [problem for share in shares for problem in share]
        bench.decode(problems[: self.args.concurrency], policy="static_threshold")  # warm
        rows = [self._row(f"static {value:g}", bench.run(task, problems, "", **_static(value))) for value in STATIC]
        reference = rows[0].outcome
        best = min((row for row in rows if not is_measurably_worse(row.outcome, reference)), key=lambda row: row.nfe)
        best.best = True
        rows += [self._row(name, bench.run(task, problems, "", **options)) for name, options in OTHERS.items()]
        rows += [self._calibrated(task, name, setting, shares) for name, setting in CALIBRATED.items()]
        self._time(task, rows[-1], problems[:TIMED_PROBLEMS], STATIC[rows.index(best)])
        for row in rows:
            self._report(row, reference, best)
        return rows

    def _row(self, setting: str, outcome: Outcome) -> Row:
        return Row(self.source.label, outcome.task, setting, outcome)

    def _calibrated(self, task: str, name: str, setting: dict[str, Any], shares: list[list[Problem]]) -> Row:
        """OSDT on several choices of calibrating requests, each with its share of the problems."""
        number = DecodingOptions(**setting).num_calibration_requests
        found = Outcome(task, name, setting, [], [], [], 0.0)
        by_choice = []
        for choice, share in enumerate(shares):
            options = self._options(task, name, choice)
            self.bench.decode(self.source.tasks[task](number, CALIBRATION_SEED + choice), **options)
            outcome = self.bench.run(task, share, "", **options)
            by_choice.append(round(outcome.mean_nfe, 2))
            found.right += outcome.right
            found.nfe += outcome.nfe
            found.num_tokens += outcome.num_tokens
            found.seconds += outcome.seconds
        row = self._row(name, found)
        row.notes = {"num_calibrating": number, "nfe_by_choice": by_choice}
        return row

    def _options(self, task: str, name: str, choice: int) -> dict[str, Any]:
        """Early thresholds are off, so that all of the first requests record."""
        setting = CALIBRATED[name]
        early = {} if "statistic" in setting else {"early": False}
        return {"policy": "osdt", "task": f"{task} {choice} {name}", **early, **setting}

    def _time(self, task: str, row: Row, problems: list[Problem], best_static: float) -> None:
        """Tokens per second of the default and of the best static threshold over those of static 0.9, in turn."""
        speeds: dict[str, list[float]] = {"speed": [], "speed_of_best_static": []}
        for choice in range(min(self.args.timed, self.args.choices)):
            before = self.bench.run(task, problems, "", **_static(0.9)).tokens_per_second
            at_best = self.bench.run(task, problems, "", **_static(best_static)).tokens_per_second
            osdt = self.bench.run(task, problems, "", **self._options(task, DEFAULT, choice)).tokens_per_second
            speeds["speed"].append(osdt / before)
            speeds["speed_of_best_static"].append(at_best / before)
        row.notes |= {name: statistics.median(values) for name, values in speeds.items() if values}

    def _report(self, row: Row, reference: Outcome, best: Row) -> None:
        right = row.outcome.right
        lost = sum(a and not b for a, b in zip(reference.right, right, strict=True))
        won = sum(b and not a for a, b in zip(reference.right, right, strict=True))
        p, share = mcnemar(reference.right, right), row.outcome.accuracy
        row.notes |= {"right": share, "lost": lost, "won": won, "num_answers": len(right), "p": p, "nfe": row.nfe}
        row.notes["nfe_of_best_static"] = best.nfe
        words = f"{self.source.label} {row.task}"
        text = (
            f"| {words:<28} | {row.setting + (' *' if row.best else ''):<27} | {share:>6.1%} | {lost:>3}, {won:>3} of "
        )
        text += f"{len(right):>4} | {p:>6.4f} | {row.nfe:>5.2f} | {row.nfe / best.nfe - 1:>+5.0%} |"
        if "num_calibrating" in row.notes:
            row.notes["paid_back_after"] = paid_back(row, reference.mean_nfe, best.nfe)
            text += f" {row.notes['paid_back_after'] or 'never'} |"
        if "speed" in row.notes:
            text += f" {row.notes['speed'] - 1:+.0%} (best static {row.notes['speed_of_best_static'] - 1:+.0%}) |"
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


def summarize(rows: list[Row]) -> list[dict[str, Any]]:
    """What every calibrated setting costs and brings over all tasks; prints it."""
    found = []
    for name in CALIBRATED:
        own = [row for row in rows if row.setting == name]
        lost, won = (sum(row.notes[what] for row in own) for what in ("lost", "won"))
        number = sum(row.notes["num_answers"] for row in own)
        share, half = (lost - won) / number, 1.96 * np.sqrt(lost + won) / number
        ratio = [row.nfe / row.notes["nfe_of_best_static"] for row in own]
        summary = {
            "setting": name,
            "lost": lost,
            "won": won,
            "num_answers": number,
            "p": mcnemar([True] * lost + [False] * won, [False] * lost + [True] * won),
            "loss_interval": [share - half, share + half],
            "nfe_over_best_static": float(np.exp(np.mean(np.log(ratio)))),
            "worst_nfe_over_best_static": max(ratio),
        }
        found.append(summary)
        print(
            f"{name}: {lost} lost, {won} won of {number} (p {summary['p']:.3f}; a loss of {share:+.2%}, 95 % interval "
            f"{share - half:+.2%} to {share + half:+.2%}); NFE over that of the best static threshold: "
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
        "--model",
        action="append",
        help=f"a bundled model, {WEAK!r} or a rung; default: {', '.join(COMPARED)}",
    )
    parser.add_argument("--ladder", type=Path, help="folder of `make ladder`; its models as well")
    parser.add_argument("--choices", type=int, default=10, help="choices of the calibrating requests")
    parser.add_argument("--problems", type=int, default=30, help="of each task for each of them")
    parser.add_argument("--timed", type=int, default=3, help="choices whose speed is measured as well")
    parser.add_argument("--no-anytime", action="store_true", help="leave out the saving by requests recorded")
    parser.add_argument("--picture", type=Path, help="draw that saving")
    add_engine_arguments(parser)
    args = parser.parse_args()
    names = args.model or ([] if args.ladder else [*COMPARED])
    if args.ladder:
        names += sorted(str(path.parent) for path in args.ladder.glob("*-mini-*/config.json"))
    record = environment(dtype=args.dtype, cache_mode=args.cache)
    print(record)
    print("| model and task | setting | right | lost, won | p | NFE | to best static | paid back | tokens/s |")
    rows: list[Row] = []
    for name in names:
        comparison = Comparison(find_source(name), args)
        for task in comparison.source.tasks:
            rows += comparison.run(task)
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
