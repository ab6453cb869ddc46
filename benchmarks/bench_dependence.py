"""Which rules commit tokens together that depend on each other?

Decodes the list tasks of lists-mini, or of another model that has them, with one token per step, static thresholds and
other rules. A task with one right answer is answered by every rule. One that leaves a choice is answered only if no two
positions choose apart: a shuffled list repeats an item, an edit is made twice or not at all, a square breaks.

    python benchmarks/bench_dependence.py --json results.jsonl

- Every rule decodes the same held-out problems. Valid is what the task's exact checker accepts.
- Forwards (NFE) are the engine's count, for a canvas of 16 positions: 3 to 7 tokens, or 9 of a square, then the end of
  the text, which all rules but one token per step fill at once. Tokens per forward count the end token.
- OSDT has calibrated on other problems of the same task, as many as its default asks for.
"""

import argparse
import sys
from typing import Any

from common import environment, write_lines
from decoding import Bench, Outcome, add_engine_arguments
from problems import CALIBRATION_SEED, find_source

from vllm_osdt.mini.tasks.lists import OPEN_TASKS
from vllm_osdt.options import DecodingOptions

RULES: dict[str, dict[str, Any]] = {
    "one per step": {"policy": "fixed_steps"},
    **{f"static {value:g}": {"policy": "static_threshold", "threshold": value} for value in (0.9, 0.7, 0.5, 0.3)},
    "factor": {"policy": "factor"},
    "joint bound": {"policy": "joint_bound"},
    "entropy bound": {"policy": "entropy_bound"},
    "LocalLeap": {"policy": "local_leap"},
    "BACD": {"policy": "bacd"},
    "OSDT": {"policy": "osdt"},
}


def main() -> None:
    """Parse arguments, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="lists-mini", help="a bundled model, or a folder whose name begins as one's")
    parser.add_argument("--task", action="append", help="default: all that the model has")
    parser.add_argument("--problems", type=int, default=300, help="per task")
    parser.add_argument("--seed", type=int, default=0, help="which held-out problems")
    add_engine_arguments(parser)
    args = parser.parse_args()
    source = find_source(args.model)
    tasks = args.task or list(source.tasks)
    bench = Bench(args, source.path, source.gen_length)
    record = environment(dtype=args.dtype, cache_mode=args.cache, model=source.label)
    print(f"{record}\nvalid answers, NFE, tokens per forward; {args.problems} problems a task; * leaves a choice")
    print(f"| Task | {' | '.join(RULES)} |\n|---|{'---|' * len(RULES)}")
    lines: list[dict[str, Any]] = []
    for task in tasks:
        problems = source.tasks[task](args.problems, args.seed)
        calibrating = source.tasks[task](DecodingOptions().num_calibration_requests, CALIBRATION_SEED + args.seed)
        bench.decode(calibrating, policy="osdt", task=task)
        outcomes = [bench.run(task, problems, name, task=task, **options) for name, options in RULES.items()]
        cells = " | ".join(
            f"{100 * outcome.accuracy:.1f} %, {outcome.mean_nfe:.2f}, {outcome.tokens_per_forward:.2f}"
            for outcome in outcomes
        )
        print(f"| {task}{'*' if task in OPEN_TASKS else ''} | {cells} |", flush=True)
        lines += [line_of(outcome) for outcome in outcomes]
    if args.json:  # the environment once, for all lines that follow it
        write_lines(args.json, [{"bench": "dependence_run", **record, "arguments": sys.argv[1:]}, *lines])


def line_of(outcome: Outcome) -> dict[str, Any]:
    """What is kept of a rule on a task."""
    return {
        "bench": "dependence",
        "task": outcome.task,
        "rule": outcome.name,
        "options": outcome.options,
        "accuracy": outcome.accuracy,
        "interval": outcome.interval(),
        "nfe": outcome.mean_nfe,
        "tokens_per_forward": outcome.tokens_per_forward,
        "num_problems": len(outcome.right),
    }


if __name__ == "__main__":
    main()
