"""Does it pay to have vLLM compile a model?

    python benchmarks/bench_compile.py --json results.jsonl

Problems of a bundled model are decoded by an engine that compiles nothing, which is the default, and by one that does
(``--compilation-config '{"mode": 3}'``), in turns. The figures are the processor's milliseconds per forward of the
whole engine, the median over the turns, and the seconds that each engine takes to start. Tokens must be the same.
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

MODES = (0, 3)  # CompilationMode.NONE, VLLM_COMPILE


def main() -> None:
    """Print one line for each model and number of requests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["llada-mini", "sdar-mini"], help="bundled models")
    parser.add_argument("--running", type=int, nargs="+", default=[1, 8, 32], help="numbers of requests at a time")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path, help="append JSON lines to this file")
    args = parser.parse_args()

    from vllm import LLM

    lines, kept = [], []  # engines of a process share vLLM's process groups: the first one must live
    for name in args.model:
        source = find_source(name)
        problems = [one for draw in source.tasks.values() for one in draw(max(args.running), 7)]
        params = vllm_osdt.sampling_params(max_tokens=source.gen_length, policy="static_threshold", threshold=0.9)
        engines, starts = {}, {}
        for mode in MODES:
            began = time.perf_counter()
            engines[mode] = LLM(
                source.path,
                dtype=args.dtype,
                max_num_seqs=max(args.running),
                disable_log_stats=False,
                compilation_config={"mode": mode},
                additional_config={"osdt": {"profile_dir": ""}},
            )
            starts[mode] = time.perf_counter() - began
        kept += engines.values()
        print(f"{source.label}: starts in {starts[0]:.0f} s, compiled in {starts[3]:.0f} s")
        for running in args.running:
            prompts = [one.prompt for one in problems[:: len(problems) // running]][:running]
            times: dict[int, list[float]] = {mode: [] for mode in MODES}
            tokens: dict[int, Any] = {}
            for turn in range(args.turns + 1):
                for mode, llm in engines.items():
                    began = time.process_time()
                    found = [one.outputs[0] for one in llm.generate(prompts, params, use_tqdm=False)]
                    seconds = time.process_time() - began
                    tokens[mode] = [one.token_ids for one in found]
                    if turn:
                        times[mode].append(1e3 * seconds / sum(vllm_osdt.describe(one)["nfe"] for one in found))
            assert tokens[0] == tokens[3], "a compiled model decodes otherwise"
            plain, compiled = (statistics.median(times[mode]) for mode in MODES)
            ratio = statistics.median(b / a for a, b in zip(times[0], times[3], strict=True))
            figures = f"{plain:.2f} ms a forward, compiled {compiled:.2f} ({ratio - 1:+.0%})"
            print(f"{source.label}, {running} requests: {figures}")
            lines.append(
                {
                    **environment(dtype=args.dtype),
                    "bench": "compile",
                    "model": source.label,
                    "running": running,
                    "start_s": starts[0],
                    "start_compiled_s": starts[3],
                    "cpu_ms_per_forward": plain,
                    "cpu_ms_per_forward_compiled": compiled,
                    "ratio": ratio,
                }
            )
    if args.json:
        write_lines(args.json, lines)


if __name__ == "__main__":
    main()
