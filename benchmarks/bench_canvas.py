"""What does a request cost whose limit is longer than its answer, and is the answer as good?

Decodes the same problems with ``max_tokens`` of the model's usual length, with 400, and with none, where the canvas
begins that long and grows; and with a canvas of 400 positions from the start (``gen_length``).

    python benchmarks/bench_canvas.py --json results.jsonl

Forwards (NFE) are the engine's count. Tokens per second are of runs in turn, over all problems of a task.
"""

import argparse
import os
import statistics
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

from common import environment, write_lines
from problems import find_source

import vllm_osdt

LONG = 416  # 400 in whole blocks of 32


def settings(usual: int) -> dict[str, dict[str, Any]]:
    """Sampling parameters by name."""
    return {
        f"max_tokens {usual}": {"max_tokens": usual},
        "max_tokens 400": {"max_tokens": 400},
        "no max_tokens": {"max_tokens": None},
        f"gen_length {LONG}": {"max_tokens": 400, "gen_length": LONG},
    }


def main() -> None:
    """Print one line for each task and setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llada-mini", help="a bundled model, or a rung of the ladder")
    parser.add_argument("--problems", type=int, default=200, help="of each task")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3, help="runs of each setting, in turn")
    parser.add_argument("--json", type=Path, help="append JSON lines to this file")
    args = parser.parse_args()

    from vllm import LLM

    source = find_source(args.model)
    osdt = {"osdt": {"profile_dir": ""}}
    llm = LLM(source.path, dtype="float32", max_num_seqs=args.concurrency, additional_config=osdt)
    encode, decode = llm.get_tokenizer().encode, llm.get_tokenizer().decode
    lines = []
    print(f"{'task':16} {'setting':16} {'right':>7} {'NFE':>6} {'tokens':>7} {'tokens/s':>9}")
    for task, draw in source.tasks.items():
        problems = draw(args.problems, 11)
        requests = [{"prompt_token_ids": encode(problem.prompt)} for problem in problems]
        found: dict[str, dict[str, Any]] = {}
        for _ in range(args.repeats):
            for name, options in settings(source.gen_length).items():
                params = vllm_osdt.sampling_params(policy="static_threshold", threshold=0.9, **options)
                start = time.perf_counter()
                outputs = [one.outputs[0] for one in llm.generate(requests, params, use_tqdm=False)]
                seconds = time.perf_counter() - start
                texts = [decode(one.token_ids, skip_special_tokens=True) for one in outputs]
                right = [problem.is_right(text) for problem, text in zip(problems, texts, strict=True)]
                tokens = sum(len(one.token_ids) for one in outputs)
                row = found.setdefault(name, {"tokens_per_s": []})
                row["right"] = sum(right) / len(right)
                row["nfe"] = statistics.mean(vllm_osdt.describe(one)["nfe"] for one in outputs)
                row["tokens"] = tokens / len(outputs)
                row["tokens_per_s"].append(tokens / seconds)
        for name, row in found.items():
            speed = statistics.median(row["tokens_per_s"])
            print(
                f"{task:16} {name:16} {100 * row['right']:6.1f}% {row['nfe']:6.2f} {row['tokens']:7.1f} {speed:9.1f}",
                flush=True,
            )
            line = {"bench": "canvas", "model": source.label, "task": task, "setting": name, **row}
            lines.append({**line, "concurrency": args.concurrency, **environment()})
    if args.json:
        write_lines(args.json, lines)


if __name__ == "__main__":
    main()
