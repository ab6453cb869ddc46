"""What the cache modes of a model whose positions see the whole canvas cost and save.

Decodes the same held-out problems of the bundled model llada-mini with every cache mode, with intervals between
refreshes and with refreshes after unsure steps, and counts: right answers, forward passes (NFE), and rows, that is
positions that the model computed, for each request. Greedy, static threshold.

    python benchmarks/bench_cache_modes.py --json results.jsonl

The tokens of a request depend neither on the batch nor on the machine's load, so one run gives the counts. Tokens per
second are those of the run, all settings in one process one after another; they are not compared side by side.
"""

import argparse
import os
import time
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

from common import environment, write_lines
from vllm import LLM

import vllm_osdt
from vllm_osdt.mini import model_path
from vllm_osdt.mini.tasks import TASKS, check, generate

SETTINGS: dict[str, dict[str, Any]] = {
    "none": {"cache_mode": "none"},
    "prefix": {"cache_mode": "prefix"},
    "dual": {"cache_mode": "dual"},
    **{f"{mode}, refresh_interval {k}": {"cache_mode": mode, "refresh_interval": k}
       for mode in ("dual", "prefix") for k in (2, 3, 6)},
    **{f"dual, refresh_confidence {c:g}": {"cache_mode": "dual", "refresh_confidence": c} for c in (0.5, 0.7, 0.9)},
    **{f"dual, interval 3, confidence {c:g}": {"cache_mode": "dual", "refresh_interval": 3, "refresh_confidence": c}
       for c in (0.7, 0.9)},
}  # fmt: skip


def count_rows(llm: LLM) -> list[int]:
    """A list that gets the rows of every step from now on."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    schedule, rows = scheduler.schedule, []

    def counting(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        rows.append(output.total_num_scheduled_tokens)
        return output

    scheduler.schedule = counting
    return rows


def main() -> None:
    """Parse arguments, decode, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=200, help="held-out problems per task")
    parser.add_argument("--block-length", type=int, nargs="+", default=[32, 16, 8])
    parser.add_argument("--threshold", type=float, default=0.9)
    parser.add_argument("--gen-length", type=int, default=96)
    parser.add_argument("--seed", type=int, default=0, help="which held-out problems")
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--json", help="file to append JSON lines to")
    args = parser.parse_args()
    llm = LLM(
        model_path("llada-mini"), dtype="float32", max_num_seqs=args.concurrency, max_num_batched_tokens=16384,
        additional_config={"osdt": {"profile_dir": "", "run_ahead": False}},
    )  # fmt: skip
    rows, lines = count_rows(llm), []
    head = f"{'block':>5} {'cache mode':<34} {'task':<16} {'right':>6} {'NFE':>7} {'rows':>7} {'tokens/s':>9}"
    print(f"{head}\n{'-' * len(head)}")
    for block_length in args.block_length:
        for name, options in SETTINGS.items():
            for task in TASKS:
                problems = generate(task, "held_out", args.problems, args.seed)
                params = vllm_osdt.sampling_params(
                    policy="static_threshold", threshold=args.threshold, block_length=block_length,
                    gen_length=args.gen_length, **options,
                )  # fmt: skip
                rows.clear()
                start = time.perf_counter()
                outputs = llm.generate([problem.prompt for problem in problems], params, use_tqdm=False)
                seconds = time.perf_counter() - start
                completions = [output.outputs[0] for output in outputs]
                right = sum(check(problem, one.text) for problem, one in zip(problems, completions, strict=True))
                line = {
                    "bench": "cache_modes", "block_length": block_length, "cache_mode": name, "task": task,
                    "problems": len(problems), "right": right,
                    "nfe": sum(vllm_osdt.describe(one)["nfe"] for one in completions) / len(problems),
                    "rows": sum(rows) / len(problems),
                    "tokens_per_second": sum(len(one.token_ids) for one in completions) / seconds,
                }  # fmt: skip
                lines.append(line)
                print(
                    f"{block_length:>5} {name:<34} {task:<16} {right / len(problems):>6.1%} {line['nfe']:>7.2f} "
                    f"{line['rows']:>7.0f} {line['tokens_per_second']:>9.0f}",
                    flush=True,
                )
    if args.json:
        record = environment(dtype="float32", model="llada-mini", concurrency=args.concurrency)
        write_lines(args.json, [{"bench": "cache_modes_run", **record}, *lines])


if __name__ == "__main__":
    main()
