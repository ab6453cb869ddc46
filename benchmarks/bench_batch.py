"""How often does a request have other tokens in a batch than alone?

In float32 never, which the tests hold it to. In bfloat16 a matrix product may round differently for another number of
rows, and a confidence near the threshold, or two tokens nearly alike, then fall the other way.

    python benchmarks/bench_batch.py --json results.jsonl

Problems of the bundled models are decoded one by one and 32 at a time; the figures are the shares of requests whose
tokens differ, and whose answers are right either way.
"""

import argparse
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

from common import environment, write_lines
from problems import find_source

import vllm_osdt

CONCURRENCY = 32
SETTINGS: dict[str, dict[str, Any]] = {"greedy": {}, "temperature 1": {"temperature": 1.0}}


def main() -> None:
    """Print one line for each model, dtype and setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["llada-mini", "sdar-mini"], help="bundled models")
    parser.add_argument("--problems", type=int, default=64, help="of each task")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--json", type=Path, help="append JSON lines to this file")
    args = parser.parse_args()

    from vllm import LLM

    lines, engines = [], []  # engines of a process share vLLM's process groups: the first one must live
    print("model, dtype, setting: requests with other tokens, right alone, right in a batch")
    for name in args.model:
        source = find_source(name)
        for dtype in args.dtype:
            osdt = {"osdt": {"profile_dir": ""}}
            llm = LLM(source.path, dtype=dtype, max_num_seqs=CONCURRENCY, additional_config=osdt)
            engines.append(llm)
            problems = [one for draw in source.tasks.values() for one in draw(args.problems, 7)]
            for setting, values in SETTINGS.items():
                params = [
                    vllm_osdt.sampling_params(
                        max_tokens=source.gen_length, policy="static_threshold", seed=index, **values
                    )
                    for index in range(len(problems))
                ]
                prompts = [one.prompt for one in problems]
                together = [one.outputs[0] for one in llm.generate(prompts, params, use_tqdm=False)]
                alone = [
                    llm.generate([prompt], one, use_tqdm=False)[0].outputs[0]
                    for prompt, one in zip(prompts, params, strict=True)
                ]
                pairs = list(zip(problems, alone, together, strict=True))
                differ = sum(one.token_ids != other.token_ids for _, one, other in pairs) / len(pairs)
                right = [
                    sum(problem.is_right(found[index].text) for problem, *found in pairs) / len(pairs)
                    for index in range(2)
                ]
                shares = ", ".join(f"{100 * share:.1f} %" for share in (differ, *right))
                print(f"{source.label}, {dtype}, {setting}: {shares}", flush=True)
                line = {"bench": "batch", "model": source.label, "dtype": dtype, "setting": setting}
                lines.append({**line, "differ": differ, "alone": right[0], "batch": right[1], **environment()})
    if args.json:
        write_lines(args.json, lines)


if __name__ == "__main__":
    main()
