"""What one engine step costs beside the model: scheduling, input preparation, sampling and output.

Runs the engine in this process on any LLaDA checkpoint and reports, for each number of running requests, the median
time of ``LLMEngine.step()`` and of the model in it (forward and logits); the difference is the overhead.

    python benchmarks/bench_step_overhead.py --model CHECKPOINT --running 1 8 32
"""

import argparse
import os
import time

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import numpy as np
import torch
from common import environment, percentiles, write_lines
from vllm import LLM, SamplingParams


class Clock:
    """Adds up the wall-clock seconds of the calls it wraps."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def wrap(self, function):
        """Return ``function``, timed."""

        def timed(*args, **kwargs):
            start = time.perf_counter()
            result = function(*args, **kwargs)
            self.seconds += time.perf_counter() - start
            return result

        return timed


def measure(llm: LLM, clock: Clock, running: int, args: argparse.Namespace) -> dict[str, list[float]]:
    """Step ``running`` equal requests to their end; times in ms of the steps in which all of them ran."""
    engine = llm.llm_engine
    rng = np.random.default_rng(0)
    vocabulary = llm.model_config.get_vocab_size()
    params = SamplingParams(
        temperature=0,
        max_tokens=args.gen_length,
        ignore_eos=True,
        detokenize=False,
        extra_args={"osdt_policy": "fixed_steps", "osdt_cache_mode": args.cache},
    )
    for index in range(running):
        prompt = {"prompt_token_ids": rng.integers(2, vocabulary - 2, args.prompt_length).tolist()}
        engine.add_request(f"{running}-{index}-{time.monotonic_ns()}", prompt, params)
    steps, models = [], []
    while engine.has_unfinished_requests():
        clock.seconds, start = 0.0, time.perf_counter()
        outputs = engine.step()
        if not any(output.finished for output in outputs):
            steps.append((time.perf_counter() - start) * 1e3)
            models.append(clock.seconds * 1e3)
    return {"step_ms": steps[1:], "model_ms": models[1:]}  # the first step admits and allocates


def main() -> None:
    """Parse arguments, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="LLaDA checkpoint folder; default: the bundled llada-mini")
    parser.add_argument("--running", type=int, nargs="+", default=[1, 8, 32], help="numbers of running requests")
    parser.add_argument("--prompt-length", type=int, default=32)
    parser.add_argument("--gen-length", type=int, default=64)
    parser.add_argument("--cache", default="dual", choices=("none", "prefix", "dual"))
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--json", default=None, help="append JSON lines to this file")
    args = parser.parse_args()
    if args.model is None:
        from vllm_osdt.mini import model_path

        args.model = model_path("llada-mini")

    llm = LLM(
        model=args.model, skip_tokenizer_init=True, dtype="float32", max_num_seqs=max(args.running), max_model_len=256
    )
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    clock = Clock()
    runner.model.forward = clock.wrap(runner.model.forward)
    runner.model.compute_logits = clock.wrap(runner.model.compute_logits)
    record = environment(dtype="float32", threads=torch.get_num_threads())
    print(record)
    print(f"{'running':>8} {'step ms':>10} {'model ms':>10} {'overhead ms':>12} {'p20':>8} {'p80':>8}")
    lines = []
    for running in args.running:
        measure(llm, clock, running, args)
        samples = [measure(llm, clock, running, args) for _ in range(args.repetitions)]
        step = np.concatenate([sample["step_ms"] for sample in samples])
        model = np.concatenate([sample["model_ms"] for sample in samples])
        p20, median, p80 = percentiles(step - model)
        print(
            f"{running:>8} {np.median(step):>10.2f} {np.median(model):>10.2f} {median:>12.2f} {p20:>8.2f} {p80:>8.2f}"
        )
        lines.append(
            {
                **record,
                "bench": "step_overhead",
                "model": os.path.basename(args.model.rstrip("/")),
                "running": running,
                "cache": args.cache,
                "step_ms": float(np.median(step)),
                "model_ms": float(np.median(model)),
                "overhead_ms": median,
                "overhead_p20_ms": p20,
                "overhead_p80_ms": p80,
                "steps": int(step.size),
            }
        )
    if args.json:
        write_lines(args.json, lines)


if __name__ == "__main__":
    main()
