"""What the benchmarks of policies share: an engine, outcomes of one setting, and how two of them are compared."""

import argparse
import math
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

import numpy as np
from problems import Problem

from vllm_osdt.calibration.profile import Setting
from vllm_osdt.calibration.thresholds import Thresholds
from vllm_osdt.engine.statistics import num_forwards
from vllm_osdt.options import DecodingOptions

SIGNIFICANCE = 0.05


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments that every benchmark of policies has."""
    parser.add_argument("--cache", choices=("none", "prefix", "dual", "block"), help="default: the model's")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--max-num-batched-tokens", type=int, default=16384)
    parser.add_argument("--json", type=Path, help="append JSON lines to this file")


@dataclass
class Outcome:
    """One configuration on one task.

    Attributes:
        task, name: What was decoded, and how in words.
        options: The request options.
        right: Problem by problem, as are ``nfe`` and ``num_tokens``.
        seconds: Wall clock of all of them together.
        constant: The threshold, where OSDT's table has only one.
        calibration: Which calibrating request, -1 for none.
    """

    task: str
    name: str
    options: dict[str, Any]
    right: list[bool]
    nfe: list[int]
    num_tokens: list[int]
    seconds: float
    constant: float | None = None
    calibration: int = -1
    notes: dict[str, float] = field(default_factory=dict)

    @property
    def accuracy(self) -> float:
        """Share of the problems answered right, in [0, 1]."""
        return float(np.mean(self.right))

    @property
    def mean_nfe(self) -> float:
        """Forward passes per problem."""
        return float(np.mean(self.nfe))

    @property
    def tokens_per_forward(self) -> float:
        """Output tokens per forward pass of a request."""
        return sum(self.num_tokens) / sum(self.nfe)

    @property
    def tokens_per_second(self) -> float:
        """Output tokens of all requests together per second of the run."""
        return sum(self.num_tokens) / self.seconds

    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the accuracy."""
        return wilson(sum(self.right), len(self.right))


def wilson(num_right: int, num_asked: int) -> tuple[float, float]:
    """95 % Wilson interval of a share."""
    z = 1.959964
    share, weight = num_right / num_asked, z * z / num_asked
    middle = (share + weight / 2) / (1 + weight)
    half = z * math.sqrt(share * (1 - share) / num_asked + weight / (4 * num_asked)) / (1 + weight)
    return middle - half, middle + half


def mcnemar(left: list[bool], right: list[bool]) -> float:
    """Two-sided exact p-value that two configurations answer the same problems equally well."""
    lost = sum(a and not b for a, b in zip(left, right, strict=True))
    won = sum(b and not a for a, b in zip(left, right, strict=True))
    n = lost + won
    tail = sum(math.comb(n, k) for k in range(min(lost, won) + 1)) / 2**n
    return min(1.0, 2 * tail)


def is_measurably_worse(outcome: Outcome, reference: Outcome) -> bool:
    """Whether it answers fewer problems, beyond chance."""
    return outcome.accuracy < reference.accuracy and mcnemar(outcome.right, reference.right) < SIGNIFICANCE


def pareto(outcomes: list[Outcome]) -> list[Outcome]:
    """Those that no other beats in forwards and accuracy, by rising forwards."""
    front: list[Outcome] = []
    for outcome in sorted(outcomes, key=lambda outcome: (outcome.mean_nfe, -outcome.accuracy)):
        if not front or outcome.accuracy > front[-1].accuracy:
            front.append(outcome)
    return front


class Bench:
    """An engine and the outcomes it has given; each of its steps is one forward, so that steps and rows can be counted.

    Args:
        args: Of :func:`add_engine_arguments`.
        model: Folder of the checkpoint.
        gen_length: Tokens of an answer, at most.
        operator: The operator's options.
    """

    def __init__(self, args: argparse.Namespace, model: str, gen_length: int, **operator: Any) -> None:
        from vllm import LLM

        self.args = args
        self.gen_length = gen_length
        self.llm = LLM(
            model=model,
            dtype=args.dtype,
            skip_tokenizer_init=not (Path(model) / "tokenizer_config.json").exists(),
            max_num_seqs=args.concurrency,
            max_num_batched_tokens=args.max_num_batched_tokens,
            additional_config={"osdt": {"profile_dir": "", "drift": "off", "run_ahead": False, **operator}},
        )

    def decode(self, problems: list[Problem], **options: Any) -> tuple[list[bool], list[int], list[int], float]:
        """Right or not, forwards and tokens of every problem, and the seconds they took together."""
        start = time.perf_counter()
        completions = self.generate(problems, [options] * len(problems))
        seconds = time.perf_counter() - start
        return (
            [problem.is_right(completion.text) for problem, completion in zip(problems, completions, strict=True)],
            [num_forwards(completion) for completion in completions],
            [len(completion.token_ids) for completion in completions],
            seconds,
        )

    def generate(self, problems: list[Problem], options: list[dict[str, Any]], **changes: Any) -> list[Any]:
        """The completion of every problem, each with options of its own; ``changes`` are sampling parameters."""
        from vllm import SamplingParams

        args = self.args
        cache = {} if args.cache is None else {"cache_mode": args.cache}
        params = [
            SamplingParams(
                **{"temperature": 0.0, "max_tokens": self.gen_length, **changes},
                extra_args={"osdt_" + name: value for name, value in {**cache, **own}.items()},
            )
            for own in options
        ]
        outputs = self.llm.generate([problem.prompt for problem in problems], params, use_tqdm=False)
        return [output.outputs[0] for output in outputs]

    def run(self, problems_of: str, problems: list[Problem], name: str, **options: Any) -> Outcome:
        """One configuration on one task."""
        return Outcome(problems_of, name, options, *self.decode(problems, **options))

    def profile(self, task: str) -> dict[str, Any] | None:
        """A task's profile, None while it has none."""
        from vllm_osdt import profiles

        found = [profile for profile in profiles(self.llm) if profile["task"] == task]
        return found[0] if found else None

    def calibrate(self, requests: list[Problem], full: DecodingOptions, options: dict[str, Any]) -> None:
        """Have a task's first requests make its profile, where it has none."""
        if self.profile(options["task"]) is None:
            self.decode(requests[: full.num_calibration_requests], **options)

    def thresholds(self, full: DecodingOptions, options: dict[str, Any], problem: Problem) -> Thresholds:
        """T by block and step; the engine computes it for the first request that asks."""
        setting = str(Setting(full.granularity, full.statistic, full.record, full.risk))
        profile = self.profile(options["task"])
        assert profile is not None
        if setting not in profile["thresholds"]:
            self.decode([problem], **options)
            profile = self.profile(options["task"])
            assert profile is not None
        values = np.array(profile["thresholds"][setting], dtype=np.float32)  # None becomes NaN
        return Thresholds(values, np.zeros(values.shape, dtype=np.int8))
