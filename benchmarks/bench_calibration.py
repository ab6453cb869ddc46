"""What a calibration costs the steps of an engine.

Steps whose requests are all recorded, the step that ends a round, and the write of the profile.

Decodes the same problems of the bundled model llada-mini with the static threshold and calibrating, in alternation, and
reports the median step, the median last step and the time of one write of the profile, all in ms.

    python benchmarks/bench_calibration.py --running 32
"""

import argparse
import os
import statistics
import tempfile
import time
from itertools import chain
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

from common import environment
from vllm import LLM

import vllm_osdt
from vllm_osdt.mini import model_path
from vllm_osdt.mini.tasks import generate


def step_times(llm: LLM, prompts: list[str], options: dict[str, Any]) -> list[float]:
    """Times in ms of the steps that decode all prompts at once."""
    engine, params = llm.llm_engine, vllm_osdt.sampling_params(max_tokens=96, **options)
    for prompt in prompts:
        engine.add_request(f"{time.monotonic_ns()}", prompt, params)
    times = []
    while engine.has_unfinished_requests():
        start = time.perf_counter()
        engine.step()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def main() -> None:
    """Parse arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--running", type=int, default=32, help="requests at a time; all of them calibrate")
    parser.add_argument("--repetitions", type=int, default=8)
    args = parser.parse_args()
    osdt = {"profile_dir": tempfile.mkdtemp(), "drift": "off", "num_calibration_requests": args.running}
    osdt |= {"statistic": "q1", "run_ahead": False}  # takes any number of requests; every step is one forward
    llm = LLM(model_path("llada-mini"), dtype="float32", max_num_seqs=args.running, additional_config={"osdt": osdt})
    prompts = [problem.prompt for problem in generate("code", "held_out", args.running, 0)]
    static: dict[str, Any] = {"policy": "static_threshold"}
    step_times(llm, prompts, static)
    step_times(llm, prompts, {"task": "first"})
    runs: dict[str, list[list[float]]] = {"static": [], "calibrating": []}
    for index in range(args.repetitions):
        runs["static"].append(step_times(llm, prompts, static))
        runs["calibrating"].append(step_times(llm, prompts, {"task": f"task {index}"}))
    print(environment(dtype="float32", running=args.running))
    for name, times in runs.items():
        step, last = statistics.median(chain.from_iterable(times)), statistics.median(run[-1] for run in times)
        print(f"{name:<12} median step {step:.2f} ms, last step {last:.2f} ms")
    registry = llm.llm_engine.engine_core.engine_core.scheduler.calibrator.registry
    registry.flush()
    profile = next(iter(registry.profiles.values()))
    start = time.perf_counter()
    registry._store.save(profile)
    print(f"one write of the profile, beside the steps: {1e3 * (time.perf_counter() - start):.2f} ms")


if __name__ == "__main__":
    main()
