"""``python -m vllm_osdt.demo``.

A bundled model on its tasks, decoded one token per step, with Fast-dLLM's static threshold and with One-Shot
Dynamic Thresholding, and a picture of what OSDT calibrated.
"""

import argparse
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm import LLM

POLICIES: dict[str, dict[str, Any]] = {
    "one token per step": {"osdt_policy": "fixed_steps"},
    "static 0.9": {"osdt_policy": "static_threshold", "osdt_threshold": 0.9},
    "OSDT": {"osdt_policy": "osdt"},
}
PICTURE = Path("demo/osdt_signature.png")
CALIBRATION_SEED = 1000  # of the problems that calibrate


@dataclass(frozen=True)
class Row:
    """What one policy did on one task."""

    task: str
    policy: str
    accuracy: float
    nfe: float
    tokens_per_forward: float
    tokens_per_second: float


def run_policy(llm: "LLM", task: str, policy: str, problems: list[Any], gen_length: int, cache: str | None) -> Row:
    """Decode every problem of a task with one policy."""
    from vllm import SamplingParams

    from vllm_osdt.engine.statistics import num_forwards
    from vllm_osdt.mini.tasks import check

    options = {**POLICIES[policy], "osdt_task": task, **({"osdt_cache_mode": cache} if cache else {})}
    params = SamplingParams(temperature=0.0, max_tokens=gen_length, extra_args=options)
    start = time.perf_counter()
    outputs = llm.generate([problem.prompt for problem in problems], params, use_tqdm=False)
    seconds = time.perf_counter() - start
    completions = [output.outputs[0] for output in outputs]
    num_tokens = sum(len(completion.token_ids) for completion in completions)
    nfe = sum(map(num_forwards, completions))
    right = sum(check(problem, completion.text) for problem, completion in zip(problems, completions, strict=True))
    return Row(
        task,
        policy,
        accuracy=right / len(problems),
        nfe=nfe / len(problems),
        tokens_per_forward=num_tokens / nfe,
        tokens_per_second=num_tokens / seconds,
    )


def main() -> None:
    """Parse arguments, run, print the table, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llada-mini", help="name of a bundled model")
    parser.add_argument("--problems", type=int, default=64, help="problems per task")
    parser.add_argument("--seed", type=int, default=0, help="which held-out problems")
    parser.add_argument(
        "--cache",
        choices=("none", "prefix", "dual"),
        help="KV cache mode of a model that has several (default: dual)",
    )
    parser.add_argument("--picture", type=Path, default=PICTURE)
    args = parser.parse_args()

    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM

    from vllm_osdt import profiles
    from vllm_osdt.calibration.plot import draw_signatures
    from vllm_osdt.mini import gen_length_of, model_path, tasks_of
    from vllm_osdt.mini.tasks import generate
    from vllm_osdt.options import DecodingOptions

    start = time.perf_counter()
    llm = LLM(
        model=model_path(args.model),
        max_num_seqs=args.problems,
        dtype="float32",
        max_num_batched_tokens=16384,
        additional_config={"osdt": {"profile_dir": ""}},  # every run calibrates
    )
    print(f"engine started in {time.perf_counter() - start:.1f} s; {args.problems} held-out problems per task")
    header = f"{'task':<16} {'policy':<20} {'accuracy':>9} {'NFE':>7} {'tokens/forward':>15} {'tokens/s':>9}"
    print(f"{header}\n{'-' * len(header)}")
    gen_length = gen_length_of(args.model)
    for task in tasks_of(args.model):
        problems = generate(task, "held_out", args.problems, args.seed)
        # The requests that calibrate are others, and are not in the figures.
        calibrating = generate(
            task, "held_out", DecodingOptions().num_calibration_requests, CALIBRATION_SEED + args.seed
        )
        run_policy(llm, task, "OSDT", calibrating, gen_length, args.cache)
        for policy in POLICIES:
            row = run_policy(llm, task, policy, problems, gen_length, args.cache)
            print(
                f"{row.task:<16} {row.policy:<20} {row.accuracy:>9.1%} {row.nfe:>7.1f} {row.tokens_per_forward:>15.2f} "
                f"{row.tokens_per_second:>9.0f}",
                flush=True,
            )
    draw_signatures(profiles(llm), args.picture)
    print(f"confidence signatures and thresholds: {args.picture}")


if __name__ == "__main__":
    main()
