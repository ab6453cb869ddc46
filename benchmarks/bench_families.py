"""What the two kinds of attention cost on the bundled models, and what fused commits and prefix caching save.

Decodes the same held-out problems with llada-mini (every position sees the whole canvas) and with sdar-mini
(block-causal): one token per step, static threshold 0.9, OSDT; sdar-mini with and without fused commits, and
autoregressively, that is in blocks of one. Then the time of a forward with the rows of one and of two blocks, and the
time from a request to its first block, for prompts that share five worked examples, with and without prefix caching.

    python benchmarks/bench_families.py --json results.jsonl

- All engines live in one process and take turns, repetition by repetition; medians of the repetitions are printed, with
  the 20th and 80th percentile.
- Forward passes (NFE) are counted by the engine, a commit that is not fused among them.
- The time to the first block is that of requests of one block, one at a time, after one request that fills the cache.
  The prompts are longer than the model was trained on, so their answers mean nothing; the time does not depend on them.
"""

import argparse
import os
import random
import statistics
import time
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

from common import environment, percentiles, summary, write_lines
from vllm import LLM, SamplingParams

from vllm_osdt.engine.statistics import num_forwards
from vllm_osdt.mini import model_path
from vllm_osdt.mini.tasks import TASKS, check, generate
from vllm_osdt.options import DecodingOptions

MAX_TOKENS = 96
CALIBRATION_SEED = 1000
ONE_PER_STEP = {"policy": "fixed_steps"}
STATIC = {"policy": "static_threshold", "threshold": 0.9}
OSDT = {"policy": "osdt"}
# engine, policy -> options
SETTINGS: dict[tuple[str, str], dict[str, Any]] = {
    ("llada-mini", "one token per step"): ONE_PER_STEP,
    ("llada-mini", "static 0.9"): STATIC,
    ("llada-mini", "OSDT"): OSDT,
    ("sdar-mini", "autoregressive"): {**ONE_PER_STEP, "block_length": 1},
    ("sdar-mini", "one token per step"): ONE_PER_STEP,
    ("sdar-mini", "static 0.9"): STATIC,
    ("sdar-mini", "OSDT"): OSDT,
    ("sdar-mini, not fused", "static 0.9"): STATIC,
    ("sdar-mini, not fused", "OSDT"): OSDT,
}


def start(name: str, concurrency: int, **arguments: Any) -> LLM:
    """An engine of a bundled model that keeps no profiles."""
    osdt = {"profile_dir": "", **arguments.pop("osdt", {})}
    return LLM(
        model_path(name),
        dtype="float32",
        max_num_seqs=concurrency,
        max_num_batched_tokens=16384,
        additional_config={"osdt": osdt},
        **arguments,
    )


def decode(llm: LLM, problems: list[Any], options: dict[str, Any], task: str) -> dict[str, float]:
    """Decode problems; what it took, and how many were right."""
    extra = {f"osdt_{name}": value for name, value in {**options, "task": task}.items()}
    params = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, extra_args=extra)
    begin = time.perf_counter()
    outputs = llm.generate([problem.prompt for problem in problems], params, use_tqdm=False)
    seconds = time.perf_counter() - begin
    completions = [output.outputs[0] for output in outputs]
    num_tokens = sum(len(c.token_ids) for c in completions)
    nfe = sum(map(num_forwards, completions))
    right = sum(check(problem, c.text) for problem, c in zip(problems, completions, strict=True))
    return {
        "accuracy": right / len(problems),
        "nfe": nfe / len(problems),
        "tokens_per_forward": num_tokens / nfe,
        "tokens_per_second": num_tokens / seconds,
    }


def compare_policies(args: argparse.Namespace, conditions: dict[str, Any]) -> None:
    """Every engine and policy on every task, at each number of concurrent requests."""
    concurrency = max(args.running)
    engines = {
        "llada-mini": start("llada-mini", concurrency),
        "sdar-mini": start("sdar-mini", concurrency),
        "sdar-mini, not fused": start("sdar-mini", concurrency, osdt={"fused_commit": False}),
    }
    for task in TASKS:
        calibrating = generate(task, "held_out", DecodingOptions().num_calibration_requests, CALIBRATION_SEED)
        for llm in engines.values():
            decode(llm, calibrating, OSDT, task)
    header = f"{'engine':<22} {'policy':<19} {'right':>7} {'NFE':>7} {'tok/fw':>7} {'tok/s':>7}   20 % - 80 %"
    for running in args.running:
        for task in TASKS:
            problems = generate(task, "held_out", max(args.problems, running) if running > 1 else args.alone, args.seed)
            results: dict[tuple[str, str], list[dict[str, float]]] = {key: [] for key in SETTINGS}
            for _ in range(args.repetitions):
                for (engine, policy), options in SETTINGS.items():
                    found = [
                        decode(engines[engine], problems[first : first + running], options, task)
                        for first in range(0, len(problems), running)
                    ]
                    tokens = sum(f["tokens_per_forward"] * f["nfe"] for f in found)
                    seconds = sum(f["tokens_per_forward"] * f["nfe"] / f["tokens_per_second"] for f in found)
                    mean = {name: statistics.mean(f[name] for f in found) for name in found[0]}
                    results[engine, policy].append({**mean, "tokens_per_second": tokens / seconds})
            print(f"\n{task}, {running} at a time, {len(problems)} problems\n{header}")
            for (engine, policy), found in results.items():
                low, middle, high = percentiles([f["tokens_per_second"] for f in found])
                one = found[0]
                print(
                    f"{engine:<22} {policy:<19} {one['accuracy']:>7.1%} {one['nfe']:>7.2f} "
                    f"{one['tokens_per_forward']:>7.2f} {middle:>7.0f}   {low:.0f} - {high:.0f}",
                    flush=True,
                )
                if args.json:
                    speed = summary([f["tokens_per_second"] for f in found])
                    line = {"bench": "families", "task": task, "running": running, "engine": engine, "policy": policy}
                    line |= {"problems": len(problems), "repetitions": len(found)}
                    write_lines(args.json, [{**conditions, **line, **one, "tokens_per_second": speed}])
            pairs = zip(results["sdar-mini", "static 0.9"], results["sdar-mini, not fused", "static 0.9"], strict=True)
            gains = [fused["tokens_per_second"] / parted["tokens_per_second"] - 1 for fused, parted in pairs]
            print(f"fused commit, static 0.9: {statistics.median(gains):+.0%} tokens/s")


def compare_rows(args: argparse.Namespace, conditions: dict[str, Any]) -> None:
    """Seconds of a step whose requests have the rows of one block of 8, and of 16: what it costs to schedule two."""
    llm = start("sdar-mini", max(args.running), osdt={"run_ahead": False})  # every step of the engine is one forward
    print("\ntime of a step, one token per request and step, ms")
    for running in args.running:
        seconds: dict[int, list[float]] = {8: [], 16: []}
        for _ in range(args.repetitions + 1):
            for block_length, found in seconds.items():
                extra = {"osdt_policy": "fixed_steps", "osdt_block_length": block_length}
                params = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True, extra_args=extra)
                prompts = [{"prompt_token_ids": [7 + index % 50] * 32} for index in range(running)]
                begin = time.perf_counter()
                outputs = llm.generate(prompts, params, use_tqdm=False)
                num_steps = num_forwards(outputs[0].outputs[0])
                found.append((time.perf_counter() - begin) / num_steps)
        one, two = (statistics.median(seconds[rows][1:]) for rows in (8, 16))
        print(f"{running:>4} requests: {1e3 * one:.2f} with 8 rows each, {1e3 * two:.2f} with 16", flush=True)
        if args.json:
            line = {"bench": "rows", "running": running, "seconds_8": summary(seconds[8][1:])}
            write_lines(args.json, [{**conditions, **line, "seconds_16": summary(seconds[16][1:])}])


def compare_prefix_caching(args: argparse.Namespace, conditions: dict[str, Any]) -> None:
    """Time to the first block of prompts that share five worked examples."""
    longer = {"hf_overrides": {"max_position_embeddings": 2048}, "max_model_len": 2048}
    engines = {on: start("sdar-mini", 1, enable_prefix_caching=on, **longer) for on in (True, False)}
    params = SamplingParams(
        temperature=0.0, max_tokens=1, extra_args={f"osdt_{name}": value for name, value in STATIC.items()}
    )
    print("\ntime to the first block, five worked examples before the question, one request at a time")
    for task in TASKS:
        rng = random.Random(0)
        shots = "".join(f"{p.prompt} {p.sample_answer(rng)} \n " for p in generate(task, "train", 5, 3))
        questions = generate(task, "held_out", args.alone, args.seed)
        seconds: dict[bool, list[float]] = {True: [], False: []}
        num_prompt = num_cached = 0
        for repetition in range(args.repetitions + 1):
            for problem in questions:
                for on, llm in engines.items():
                    begin = time.perf_counter()
                    [output] = llm.generate([shots + problem.prompt], params, use_tqdm=False)
                    if repetition:  # the first round fills the caches, of prompts and of code
                        seconds[on].append(time.perf_counter() - begin)
                        num_prompt, num_cached = len(output.prompt_token_ids), max(num_cached, output.num_cached_tokens)
        for llm in engines.values():
            llm.reset_prefix_cache()
        with_cache, without = (statistics.median(seconds[on]) for on in (True, False))
        print(
            f"{task:<16} prompt {num_prompt} tokens, up to {num_cached} cached: {1e3 * with_cache:.1f} ms with prefix "
            f"caching, {1e3 * without:.1f} ms without, {without / with_cache:.2f}x",
            flush=True,
        )
        if args.json:
            line = {"bench": "prefix_caching", "task": task, "prompt_tokens": num_prompt, "cached_tokens": num_cached}
            line |= {"seconds": summary(seconds[True]), "seconds_without": summary(seconds[False])}
            write_lines(args.json, [{**conditions, **line}])


def main() -> None:
    """Parse arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=64, help="held-out problems a task")
    parser.add_argument("--alone", type=int, default=8, help="problems a task where requests come one at a time")
    parser.add_argument("--running", type=int, nargs="+", default=[1, 8, 64], help="requests at a time")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="which held-out problems")
    parser.add_argument(
        "--skip", nargs="*", default=[], choices=("policies", "rows", "prefix"), help="parts to leave out"
    )
    parser.add_argument("--json", help="append JSON lines to this file")
    args = parser.parse_args()
    conditions = environment(dtype="float32", threads=int(os.environ.get("OMP_NUM_THREADS", 0)) or None)
    if "policies" not in args.skip:
        compare_policies(args, conditions)
    if "rows" not in args.skip:
        compare_rows(args, conditions)
    if "prefix" not in args.skip:
        compare_prefix_caching(args, conditions)


if __name__ == "__main__":
    main()
