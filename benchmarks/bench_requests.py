"""How many requests must calibrate a task, and what is left of the answers?

Decodes the same held-out problems with static thresholds and with OSDT, each of its settings calibrated on several
choices of requests. Prints the answers lost and won against static 0.9 over all choices together, with McNemar's exact
p, and the forwards of every choice.

    python benchmarks/bench_requests.py --model PATH --task stories --gen-length 64

- A setting is (number of calibrating requests, risk). Early thresholds are off, so that all of them record.
- Pooled over choices, the same problem counts several times: p is then too small rather than too large.
"""

import argparse
import os
import sys
from typing import Any

import numpy as np
from bench_osdt import CALIBRATION_SEED, Bench, Outcome, mcnemar, own_problems
from common import environment, write_lines

STATIC = (0.8, 0.75, 0.7, 0.6, 0.5)
SETTINGS = ((32, 0.04), (64, 0.02), (128, 0.01))


def against(outcomes: list[Outcome], static: Outcome) -> dict[str, Any]:
    """Answers lost and won by outcomes of the same problems, pooled."""
    right = [value for outcome in outcomes for value in outcome.right]
    before = static.right * len(outcomes)
    return {
        "lost": sum(a and not b for a, b in zip(before, right, strict=True)),
        "won": sum(b and not a for a, b in zip(before, right, strict=True)),
        "num_answers": len(right),
        "p": mcnemar(before, right),
        "nfe": float(np.mean([outcome.mean_nfe for outcome in outcomes])),
        "nfe_by_choice": [round(outcome.mean_nfe, 2) for outcome in outcomes],
        "accuracy": float(np.mean(right)),
    }


def measure(bench: Bench, task: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One task; prints its table."""
    problems = own_problems(task, args.problems, args.seed)
    static = bench.run(task, problems, "static 0.9", policy="static_threshold", threshold=0.9)
    rows = [{"task": task, "name": "static 0.9", **against([static], static)}]
    for value in STATIC:
        lower = bench.run(task, problems, "", policy="static_threshold", threshold=value)
        rows.append({"task": task, "name": f"static {value:g}", **against([lower], static)})
    for number, risk in args.setting or SETTINGS:
        outcomes = []
        for choice in range(args.choices):
            options = {
                "policy": "osdt", "task": f"{task} {choice} {number} {risk}", "early": False,
                "num_calibration_requests": number, "risk": risk,
            }  # fmt: skip
            bench.decode(own_problems(task, number, CALIBRATION_SEED + choice), **options)
            outcomes.append(bench.run(task, problems, "", **options))
        rows.append({"task": task, "name": f"OSDT, {number} requests, risk {risk:g}", **against(outcomes, static)})
    for row in rows:
        print(
            f"{task:<17}{row['name']:<30}{row['accuracy']:>7.1%}  lost {row['lost']:>3} won {row['won']:>3} of "
            f"{row['num_answers']:>5} (p {row['p']:.4f})  NFE {row['nfe']:6.2f}  {row['nfe_by_choice']}",
            flush=True,
        )
    return rows


def parse_setting(text: str) -> tuple[int, float]:
    """``NUMBER:RISK``."""
    number, _, risk = text.partition(":")
    return int(number), float(risk)


def main() -> None:
    """Parse arguments, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="default: the bundled llada-mini")
    parser.add_argument("--task", action="append", help="bundled tasks; default: the three of llada-mini")
    parser.add_argument("--problems", type=int, default=300, help="per task")
    parser.add_argument("--choices", type=int, default=8, help="choices of the calibrating requests")
    parser.add_argument("--setting", type=parse_setting, action="append", metavar="NUMBER:RISK")
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--cache", choices=("none", "prefix", "dual", "block"), help="default: the model's")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--gen-length", type=int, default=96)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--max-num-batched-tokens", type=int, default=16384)
    parser.add_argument("--json", help="append JSON lines to this file")
    args = parser.parse_args()
    from vllm_osdt.mini import model_path
    from vllm_osdt.mini.tasks import TASKS

    args.model = args.model or model_path("llada-mini")
    bench = Bench(args)
    record = environment(dtype=args.dtype, cache_mode=args.cache, model=os.path.basename(args.model.rstrip("/")))
    rows = [row for task in args.task or TASKS for row in measure(bench, task, args)]
    if args.json:
        lines = [{"bench": "requests", **row} for row in rows]
        write_lines(args.json, [{"bench": "requests_run", **record, "arguments": sys.argv[1:]}, *lines])


if __name__ == "__main__":
    main()
