"""Whether verified drafts (``s2d2``) pay: forward passes, computed rows and right answers beside other policies.

Decodes held-out problems of every task of a block-causal model with static thresholds, OSDT, and ``s2d2`` under its
routers; and from left to right, one token after the other, each by what a verification says of it: ``s2d2`` with spans
of one position, always verified. Verifying all of a draft takes the same tokens at temperature 0 (``same``: in how many
answers), so it answers no fewer problems. Blocks of one position (``block_length`` 1) are the model's other way of
decoding autoregressively: there it sees prompt and finished blocks causally, too.

    python benchmarks/bench_verification.py --model sdar-mini --problems 100 --json results.jsonl

- Rows are positions that forward passes computed, prompts among them, a problem.
- p is the exact two-sided McNemar p-value that the answers are as often right as from left to right.
"""

import argparse
from typing import Any

from common import environment, write_lines
from decoding import Bench, add_engine_arguments, mcnemar, wilson
from problems import CALIBRATION_SEED, find_source

from vllm_osdt.engine.statistics import num_forwards

SEED = 11
LEFT_TO_RIGHT = {"policy": "s2d2", "verify_router": "span", "verify_max_span": 1}
ALWAYS = {"policy": "s2d2", "verify_router": "span"}
HYSTERESIS = {"policy": "s2d2", "verify_router": "hysteresis", "verify_cost_per": "confident_position"}
SETTINGS: dict[str, dict[str, Any]] = {
    "left to right": LEFT_TO_RIGHT,
    "blocks of one": {"policy": "fixed_steps", "block_length": 1},
    "static 0.9": {"policy": "static_threshold", "threshold": 0.9},
    "static 0.85": {"policy": "static_threshold", "threshold": 0.85},
    "osdt": {"policy": "osdt"},
    "s2d2, always": ALWAYS,
    "s2d2, spans of 4": {**ALWAYS, "verify_max_span": 4},
    "s2d2, score 0, cost 1": {"policy": "s2d2", "threshold": 0.85},
    "s2d2, score 0, cost 2": {"policy": "s2d2", "threshold": 0.85, "verify_cost": 2.0},
    "s2d2, runs of at least 4": {**ALWAYS, "threshold": 0.85, "verify_min_span": 4},
    "s2d2, hysteresis": {**HYSTERESIS, "threshold": 0.9},
    "s2d2, bandit": {"policy": "s2d2", "verify_router": "bandit"},
    "s2d2, score, cost a position": {"policy": "s2d2", "threshold": 0.9, "verify_cost_per": "confident_position"},
}


class RowCounter:
    """Counts the rows that an engine of this process computes."""

    def __init__(self, llm: Any) -> None:
        runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.model_runner
        self.num_rows, prepare = 0, runner.prepare_inputs

        def count(*args: Any, **kwargs: Any) -> Any:
            batch = prepare(*args, **kwargs)
            self.num_rows += batch.num_tokens
            return batch

        runner.prepare_inputs = count

    def take(self) -> int:
        """Rows since the last call."""
        taken, self.num_rows = self.num_rows, 0
        return taken


def main() -> None:
    """Measure, print, and write lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_engine_arguments(parser)
    parser.add_argument("--model", default="sdar-mini", help="see problems.find_source")
    parser.add_argument("--problems", type=int, default=100, help="of each task")
    parser.add_argument("--settings", nargs="*", choices=SETTINGS, default=list(SETTINGS), help="beside left to right")
    args = parser.parse_args()
    settings = {name: one for name, one in SETTINGS.items() if name in ("left to right", *args.settings)}
    source = find_source(args.model)
    bench = Bench(args, source.path, source.gen_length)
    counter, lines = RowCounter(bench.llm), []
    print("| task | setting | NFE | rows | right | p | same |\n| --- | --- | --- | --- | --- | --- | --- |")
    for task, draw in source.tasks.items():
        problems = draw(args.problems, SEED)
        reference: list[bool] = []
        texts: list[str] = []
        for name, setting in settings.items():
            own = {**setting, "task": task} if name == "osdt" else setting
            if name == "osdt":
                bench.decode(draw(64, CALIBRATION_SEED), **own)
            bench.llm.reset_prefix_cache()
            counter.take()
            found = bench.generate(problems, [own] * len(problems))
            rows = counter.take() / len(problems)
            right = [problem.is_right(one.text) for problem, one in zip(problems, found, strict=True)]
            nfe = sum(map(num_forwards, found)) / len(problems)
            if not reference:
                reference, texts = right, [one.text for one in found]
            same = sum(one.text == text for one, text in zip(found, texts, strict=True))
            p = mcnemar(reference, right)
            print(
                f"| {task} | {name} | {nfe:.1f} | {rows:.0f} | {sum(right)} of {len(right)} | {p:.2f} | {same} |",
                flush=True,
            )
            low, high = wilson(sum(right), len(right))
            about = environment(dtype=args.dtype, model=source.label, benchmark="verification")
            lines.append(
                {
                    **about,
                    "task": task,
                    "problems": len(problems),
                    "setting": name,
                    "options": setting,
                    "nfe": nfe,
                    "rows": rows,
                    "right": sum(right),
                    "interval": [low, high],
                    "p": p,
                    "same": same,
                }
            )
    if args.json:
        write_lines(args.json, lines)


if __name__ == "__main__":
    main()
