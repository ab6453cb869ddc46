"""Makes models of several strengths: `python -m examples.mini.ladder`.

A training of each model keeps its checkpoints. Of these the ladder takes those whose accuracy comes nearest to each of
LEVELS, with one token per step on held-out problems, all tasks together.
"""

import argparse
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from examples.mini.evaluate import ONE_PER_STEP, evaluate, static_rule
from examples.mini.model import MiniLLaDA
from examples.mini.train import read_options, train
from vllm_osdt.mini import gen_length_of, tasks_of
from vllm_osdt.mini.tasks import generate

LEVELS = (50, 70, 85, 95)  # percent
# Options of the trainings.
RUNS = {
    "llada-mini": ("--steps", "1800", "--evaluate-every", "60"),
    "sdar-mini": ("--steps", "700", "--evaluate-every", "25", "--batch", "64"),
    "lists-mini": ("--steps", "2600", "--evaluate-every", "50", "--batch", "64", "--pool", "16000"),
    "sdar-lists-mini": ("--steps", "3000", "--evaluate-every", "50", "--pool", "24000"),
}
# Those that are made unless others are named.
USUAL = ("llada-mini", "sdar-mini")
NUM_PROBLEMS, SEED = 60, 21
# Percent points; a snapshot this close is taken without looking at its neighbours.
CLOSE = 3.0
# Snapshots measured for one level.
MAX_MEASURED = 4
OUT = Path("build/ladder")
# Written into a checkpoint's folder: step and accuracy by task.
RECORD = "ladder.json"

Accuracies = dict[str, float]  # by task, in [0, 1]


def mean_percent(accuracies: Mapping[str, float]) -> float:
    """Accuracy over all tasks, in percent."""
    return 100 * sum(accuracies.values()) / len(accuracies)


def choose(screened: Mapping[int, float], level: float, measure: Callable[[int], float]) -> int | None:
    """The step whose measured accuracy comes nearest to a level.

    Args:
        screened: A rough accuracy of every snapshot, in percent; tells where to look first.
        level: In percent.
        measure: Accuracy of a snapshot, in percent; expensive.

    Returns:
        None if no snapshot is known to reach the level, or to come close from below.
    """
    measured: dict[int, float] = {}
    steps = sorted(screened)
    candidates, error = steps, 0.0
    while candidates and len(measured) < MAX_MEASURED:
        step = min(candidates, key=lambda step: abs(screened[step] - error - level))
        measured[step] = measure(step)
        if abs(measured[step] - level) <= CLOSE:
            return step
        # The screening is as wrong nearby. Accuracy grows with the steps, so the level lies between the last snapshot
        # below it and the next one above.
        error = screened[step] - measured[step]
        low = max((step for step in measured if measured[step] < level), default=-1)
        high = min((step for step in measured if measured[step] > level and step > low), default=steps[-1] + 1)
        candidates = [step for step in steps if low < step < high and step not in measured]
    if not measured or max(measured.values()) < level - CLOSE:
        return None
    return min(measured, key=lambda step: abs(measured[step] - level))


def screen(run: Path) -> dict[int, float]:
    """What the learning curve says of the snapshots of a run, or lets expect: step -> accuracy in percent."""
    curve = run / "learning_curve.jsonl"
    entries = [json.loads(line) for line in curve.read_text().splitlines()] if curve.exists() else []
    # Of a run that was begun anew, the last entry of a step counts.
    logged = {entry["step"]: entry["decoded_accuracy"] for entry in entries if "decoded_accuracy" in entry}
    accuracies = {0: 0.0} | {step: mean_percent(by_task) for step, by_task in sorted(logged.items())}
    # A snapshot that is being written lacks the last of its files.
    steps = sorted(int(path.parent.name) for path in run.glob("snapshots/*/generation_config.json"))
    return {step: float(np.interp(step, list(accuracies), list(accuracies.values()))) for step in steps}


def snapshot(run: Path, step: int) -> Path:
    """The folder of a snapshot."""
    return run / "snapshots" / f"{step:05d}"


def measure_snapshot(name: str, folder: Path, num_problems: int) -> Accuracies:
    """Decodes held-out problems with one token per step; what a folder was once measured with is kept in it."""
    record = folder / RECORD
    if record.exists():
        kept = json.loads(record.read_text())
        if kept["num_problems"] == num_problems:
            return kept["accuracy"]
    model, rule = MiniLLaDA.load(folder), static_rule(ONE_PER_STEP)
    accuracies = {
        task: evaluate(model, generate(task, "held_out", num_problems, SEED), rule, gen_length_of(name)).accuracy
        for task in tasks_of(name)
    }
    entry = {"step": int(folder.name), "num_problems": num_problems, "accuracy": accuracies}
    record.write_text(json.dumps(entry) + "\n")
    print(f"{name} step {folder.name}: {mean_percent(accuracies):.1f} %", flush=True)
    return accuracies


def climb(name: str, run: Path, out: Path, levels: tuple[int, ...], num_problems: int) -> None:
    """Copies the snapshots nearest to the levels to `out`, except where one is there already."""

    def measure(step: int) -> float:
        return mean_percent(measure_snapshot(name, snapshot(run, step), num_problems))

    for level in levels:
        rung = out / f"{name}-{level}"
        if rung.exists():
            continue
        step = choose(screen(run), level, measure)
        if step is None:
            print(f"{rung}: no snapshot of {run} comes near {level} %", flush=True)
            continue
        unfinished = rung.with_suffix(".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(snapshot(run, step), unfinished)
        unfinished.rename(rung)


def table(out: Path) -> str:
    """The models of a ladder with their accuracy; a new head where other tasks begin."""
    rows: list[str] = []
    tasks: list[str] = []
    for record in sorted(out.glob(f"*/{RECORD}")):
        entry = json.loads(record.read_text())
        accuracies = entry["accuracy"]
        if tasks != list(accuracies):
            tasks = list(accuracies)
            rows.append(f"{'model':<16}{'step':>6}{'n':>5}{'mean':>8}" + "".join(f"{task:>17}" for task in tasks))
        shares = "".join(f"{accuracy:>17.1%}" for accuracy in accuracies.values())
        row = f"{record.parent.name:<16}{entry['step']:>6}{entry['num_problems']:>5}"
        rows.append(f"{row}{mean_percent(accuracies):>7.1f}%{shares}")
    return "\n".join(rows)


def main() -> None:
    """Trains what is missing, chooses, prints the accuracies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the ladder; what is in it is not made again")
    parser.add_argument("--models", nargs="*", choices=RUNS, default=USUAL)
    parser.add_argument("--levels", type=int, nargs="*", default=LEVELS, help="accuracies in percent")
    parser.add_argument("--problems", type=int, default=NUM_PROBLEMS, help="held-out problems per task and snapshot")
    parser.add_argument(
        "--from", dest="runs", type=Path, help="folder of runs with snapshots, DIR/MODEL; nothing is trained then"
    )
    options = parser.parse_args()
    for name in options.models:
        if all((options.out / f"{name}-{level}").exists() for level in options.levels):
            continue
        run = (options.runs or options.out / "runs") / name
        if options.runs is None:
            train(read_options(["--model", name, "--out", str(run), "--snapshots", *RUNS[name]]))
        climb(name, run, options.out, tuple(options.levels), options.problems)
    print(table(options.out))


if __name__ == "__main__":
    main()
