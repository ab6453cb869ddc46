"""What a request's extras cost: traces, log probabilities, filters and penalties, beside plain requests.

    python benchmarks/bench_requests.py --json results.jsonl

Every extra is decoded in turn with the plain requests, ``--rounds`` times, in one process: the figure is the median of
the ratios of the processor's time, which other work on the machine disturbs less than seconds do. Requests sample at
temperature 1, as rollouts do, with the same seeds, so that an extra that changes no token has the same forwards.
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

CONCURRENCY = (32, 128)
EXTRAS: dict[str, dict[str, Any]] = {
    "trace": {"return_trace": True},
    "logprobs=0": {"logprobs": 0},
    "logprobs=0, trace": {"logprobs": 0, "return_trace": True},
    "logprobs=5": {"logprobs": 5},
    "top_p=1-1e-9": {"top_p": 1 - 1e-9},  # nothing is left out, so the tokens are the same
    "presence_penalty": {"presence_penalty": 1e-9},
}


def decode(llm: Any, prompts: list[list[int]], extra: dict[str, Any]) -> tuple[float, list[list[int]], int]:
    """Seconds of the processor, tokens, and forwards of all requests."""
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    params = [
        vllm_osdt.sampling_params(
            temperature=1.0, seed=index, max_tokens=64, ignore_eos=True, policy="static_threshold", **extra
        )
        for index in range(len(prompts))
    ]
    start = time.process_time()
    outputs = [output.outputs[0] for output in llm.generate(requests, params, use_tqdm=False)]
    seconds = time.process_time() - start
    return seconds, [list(one.token_ids) for one in outputs], sum(vllm_osdt.describe(one)["nfe"] for one in outputs)


def main() -> None:
    """Print one line for each model, number of requests and extra."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["llada-mini", "sdar-mini"], help="bundled models")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="append JSON lines to this file")
    args = parser.parse_args()

    from vllm import LLM

    lines, engines = [], []  # engines of a process share vLLM's process groups: the first one must live
    print("model, requests, extra: processor's time over that of plain requests; forwards of both")
    for name in args.model:
        source = find_source(name)
        osdt = {"osdt": {"profile_dir": ""}}
        llm = LLM(source.path, dtype="float32", max_num_seqs=max(CONCURRENCY), additional_config=osdt)
        engines.append(llm)
        encode = llm.get_tokenizer().encode
        draws = [draw(max(CONCURRENCY), 7) for draw in source.tasks.values()]
        prompts = [encode(one.prompt) for problems in zip(*draws, strict=True) for one in problems]
        for number in CONCURRENCY:
            decode(llm, prompts[:number], {})
            for extra, values in EXTRAS.items():
                ratios = []
                for _ in range(args.rounds):
                    plain, plain_tokens, plain_nfe = decode(llm, prompts[:number], {})
                    with_extra, tokens, nfe = decode(llm, prompts[:number], values)
                    ratios.append(with_extra / plain)
                assert tokens == plain_tokens, f"{extra} changes tokens"
                ratio = statistics.median(ratios)
                print(f"{source.label}, {number}, {extra}: {ratio:.3f}; {nfe} and {plain_nfe}", flush=True)
                line = {"bench": "requests", "model": source.label, "concurrency": number, "extra": extra}
                lines.append({**line, "ratio": ratio, "ratios": ratios, "nfe": nfe, **environment()})
    if args.json:
        write_lines(args.json, lines)


if __name__ == "__main__":
    main()
