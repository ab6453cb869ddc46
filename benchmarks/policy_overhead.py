"""What a policy's step costs beside the model: the processor's time of equal steps, in turns with static_threshold's.

All rules decode the same requests, and whatever a rule says, every step decides one position: the op that unmasks is
given that rule in its place. So all have the same forwards, and the difference is what a policy computes of them.
"""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from decoding import Bench
from problems import Problem

from csrc_triton import Rule, Rules, implementations
from vllm_osdt.cli.tuning.candidates import calibrates
from vllm_osdt.engine.statistics import num_forwards

BASE = "static_threshold"
# What keeps a policy's blocks as long as the others', or makes it do all its work.
SETTINGS: dict[str, dict[str, Any]] = {
    BASE: {"threshold": 0.9},
    "osdt": {"task": "overhead"},
    "cad_llm": {"cad_min_block": 32, "cad_first_block": 32},
}
# What stands beside a policy, here beside static_threshold; a threshold of 1 leaves blocks as they are.
BESIDE: dict[str, dict[str, Any]] = {
    "credit": {"credit": True},
    "adablock": {"adablock": True, "adablock_threshold": 1.0, "adablock_delimiters": [1]},
}
STEPS = 32  # of a request, a block of llada-mini


@contextmanager
def one_position_a_step(bench: Bench) -> Iterator[None]:
    """Every step decides the most confident position alone, by the scores that its policy leaves."""
    core = bench.llm.llm_engine.engine_core.engine_core
    sampler = core.model_executor.driver_worker.worker.model_runner.sampler
    unmask, size = sampler._unmask, core.scheduler.max_num_running_reqs
    rules = Rules(
        torch.full((size,), int(Rule.TOP_K), dtype=torch.int8),
        torch.ones(size),
        torch.ones(size, dtype=torch.int32),
    )

    def one(blocks: Any, proposals: Any, of_policy: Rules) -> Any:
        return unmask(blocks, proposals, Rules._make(part[: of_policy.rule.shape[0]] for part in rules))

    assert unmask is implementations(sampler.states.device)[1]
    sampler._unmask = one
    try:
        yield
    finally:
        sampler._unmask = unmask


def settings_of(policies: list[str]) -> dict[str, dict[str, Any]]:
    """Request options by the name of a row, without the base."""
    found = {name: {"policy": name, **SETTINGS.get(name, {})} for name in policies if name != BASE}
    return found | {f"{BASE}, {name}": {"policy": BASE, **SETTINGS[BASE], **own} for name, own in BESIDE.items()}


def measure(bench: Bench, problems: list[Problem], policies: list[str], num_requests: int, num_pairs: int) -> dict:
    """The processor's time of each rule's steps over those of static_threshold just before and after.

    Args:
        bench: The engine.
        problems: Of which the first ``num_requests`` are decoded, all at once.
        policies: Which; modifiers are measured too.
        num_requests: At once.
        num_pairs: How often each rule is measured.

    Returns:
        ``ms_per_step`` of static_threshold's steps, ``ratios`` by name, median and its 95 % interval, and ``left_out``
        by name: why it is.
    """
    settings = settings_of(policies)
    for own in settings.values():
        if calibrates(own):
            bench.decode(problems, **own)
    requests = problems[:num_requests]

    def decode(own: dict[str, Any]) -> int:
        completions = bench.generate(requests, [own] * num_requests, max_tokens=STEPS, ignore_eos=True)
        return sum(map(num_forwards, completions))

    def unlike(own: dict[str, Any], forwards: int) -> str | None:
        try:
            found = decode(own)
        except ValueError as error:  # the model does not take it
            return str(error)
        return None if found == forwards else f"it takes {found} forwards, not {forwards}"

    def timed(own: dict[str, Any]) -> float:
        start = time.process_time()
        decode(own)
        return time.process_time() - start

    base = {"policy": BASE, **SETTINGS[BASE]}
    with one_position_a_step(bench):
        forwards = decode(base)  # warm, as the others
        left_out = {name: why for name, own in settings.items() if (why := unlike(own, forwards))}
        settings = {name: own for name, own in settings.items() if name not in left_out}
        ratios: dict[str, list[float]] = {name: [] for name in settings}
        before = timed(base)
        of_base = [before]
        for _ in range(num_pairs):
            for name, own in settings.items():
                seconds, after = timed(own), timed(base)
                ratios[name].append(2 * seconds / (before + after))
                of_base.append(after)
                before = after
    return {
        "ms_per_step": 1e3 * statistics.median(of_base) * num_requests / forwards,
        "left_out": left_out,
        "ratios": {name: (statistics.median(found), *interval(found)) for name, found in ratios.items()},
    }


def interval(values: list[float]) -> tuple[float, float]:
    """95 % interval of a median, or wider: two of the values, by the binomial distribution of how many are below it."""
    ordered, n = sorted(values), len(values)
    below, chance, place = 0.5**n, 0.5**n, 0
    while place < (n - 1) // 2 and below + chance * (n - place) / (place + 1) <= 0.025:
        chance *= (n - place) / (place + 1)
        below += chance
        place += 1
    return ordered[place], ordered[n - 1 - place]


def table(found: dict, num_requests: int) -> str:
    """The ratios in words."""
    lines = [f"{num_requests} requests at once; a step of {BASE} takes {found['ms_per_step']:.2f} ms"]
    lines += [
        f"{name:<32}{ratio - 1:>+8.1%}  ({low - 1:+.1%} to {high - 1:+.1%})"
        for name, (ratio, low, high) in found["ratios"].items()
    ]
    lines += [f"left out: {name}: {why}" for name, why in found["left_out"].items()]
    return "\n".join(lines)
