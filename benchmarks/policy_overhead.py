"""What a policy's step costs beside the model: equal steps, in turns with static_threshold's, and their operations.

All rules decode the same requests, and whatever a rule says, every step decides as many positions: the op that unmasks
is given that rule in its place. So all have the same forwards, and the difference is what a policy computes of them.

Three figures: the processor's time of whole steps, which shows all costs and all noise; that of steps without the
model's layers, which shows a tenth of a millisecond beside a step of a third of a second; and the tensor operations of
a step, which no noise touches.
"""

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from decoding import Bench
from problems import Problem
from torch.utils._python_dispatch import TorchDispatchMode

from csrc_triton import Rule, Rules, cpu, cpu_reading, implementations
from vllm_osdt.cli.tuning.candidates import calibrates
from vllm_osdt.engine.statistics import num_forwards
from vllm_osdt.policies import loops as policy_loops

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
LENGTH = 32  # tokens of a request, a block of llada-mini
# Compiled loops by module, each of which counts as one operation.
LOOPS: dict[ModuleType, tuple[str, ...]] = {
    cpu: ("confidence", "unmask", "grids", "best", "ranks", "choose", "quota", "take_rows", "put_rows"),
    cpu_reading: ("best_two", "count_steady", "compare_coarsely", "average"),
    policy_loops: ("prophet", "sched", "klass", "less", "ccd", "multi_block"),
}
# How a tensor becomes an array and the other way round, and ops that only say where a tensor's numbers lie.
CONVERSIONS = ("aten.detach", "aten.to.dtype_layout", "aten.resolve_conj", "aten.resolve_neg", "aten.lift_fresh")


def runner_of(bench: Bench) -> Any:
    """The model runner of an engine in this process."""
    return bench.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


@contextmanager
def equal_steps(bench: Bench, positions: int = 1) -> Iterator[None]:
    """Every step decides so many positions, the most confident ones by the scores that its policy leaves."""
    size = bench.llm.llm_engine.engine_core.engine_core.scheduler.max_num_running_reqs
    sampler = runner_of(bench).sampler
    unmask = sampler._unmask
    rules = Rules(
        torch.full((size,), int(Rule.TOP_K), dtype=torch.int8),
        torch.full((size,), float(positions)),
        torch.ones(size, dtype=torch.int32),
    )

    def equal(blocks: Any, proposals: Any, of_policy: Rules) -> Any:
        return unmask(blocks, proposals, Rules._make(part[: of_policy.rule.shape[0]] for part in rules))

    assert unmask is implementations(sampler.states.device)[1]
    sampler._unmask = equal
    try:
        yield
    finally:
        sampler._unmask = unmask


class Layers:
    """The processor's time that a model's layers take, in seconds, while it is entered."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.seconds = 0.0
        self._model, self._forward = model, model.forward

    def __enter__(self) -> "Layers":
        def forward(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            try:
                return self._forward(*args, **kwargs)
            finally:
                self.seconds += time.process_time() - start

        self._model.forward = forward
        return self

    def __exit__(self, *error: object) -> None:
        del self._model.forward


class Operations(TorchDispatchMode):
    """Counts tensor operations that are no views; a compiled loop is one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self._depth = 0  # of loops that run

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count, and do it."""
        if not (self._depth or func.is_view or str(func).startswith(CONVERSIONS)):
            self.found[str(func)] += 1
        return func(*args, **(kwargs or {}))

    def loop(self, name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        """A loop that is counted in place of what it calls."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.found[name] += 1
            self._depth += 1
            try:
                return run(*args, **kwargs)
            finally:
                self._depth -= 1

        return counted


def operations(bench: Bench, decode: Callable[[], Any]) -> int:
    """Tensor operations of all that ``decode`` runs, the model's included."""
    sampler, counting = runner_of(bench).sampler, Operations()
    with ExitStack() as stack:
        for of, names in (*LOOPS.items(), (sampler, ("_unmask", "_confidence"))):
            counted = {name: counting.loop(name, getattr(of, name)) for name in names}
            stack.enter_context(mock.patch.multiple(of, **counted))
        stack.enter_context(counting)
        decode()
    return sum(counting.found.values())


def settings_of(policies: list[str]) -> dict[str, dict[str, Any]]:
    """Request options by the name of a row, without the base."""
    found = {name: {"policy": name, **SETTINGS.get(name, {})} for name in policies if name != BASE}
    return found | {f"{BASE}, {name}": {"policy": BASE, **SETTINGS[BASE], **own} for name, own in BESIDE.items()}


def measure(
    bench: Bench, problems: list[Problem], policies: list[str], num_requests: int, num_pairs: int, num_steps: int
) -> dict:
    """The processor's time of each rule's steps over those of static_threshold just before and after.

    Args:
        bench: The engine.
        problems: Of which the first ``num_requests`` are decoded, all at once.
        policies: Which; modifiers are measured too.
        num_requests: At once.
        num_pairs: How often each rule is measured.
        num_steps: Of a request, a divisor of ``LENGTH``.

    Returns:
        ``ms_per_step`` of static_threshold's steps. By name, each with the median and its 95 % interval: ``ratios`` of
        whole steps, and ``extra_ms``, by which a step is longer beside the model's layers. ``operations`` of a step by
        name, static_threshold's too, and ``left_out`` by name: why it is.
    """
    settings = settings_of(policies)
    for own in settings.values():
        if calibrates(own):
            bench.decode(problems, **own)
    requests = problems[:num_requests]
    model = runner_of(bench).model

    def decode(own: dict[str, Any]) -> int:
        completions = bench.generate(requests, [own] * num_requests, max_tokens=LENGTH, ignore_eos=True)
        return sum(map(num_forwards, completions))

    def unlike(own: dict[str, Any], forwards: int) -> str | None:
        try:
            found = decode(own)
        except ValueError as error:  # the model does not take it
            return str(error)
        return None if found == forwards else f"it takes {found} forwards, not {forwards}"

    def timed(own: dict[str, Any]) -> tuple[float, float]:
        """Seconds of a request, and those of them beside the layers."""
        with Layers(model) as layers:
            start = time.process_time()
            decode(own)
            seconds = time.process_time() - start
        return seconds, seconds - layers.seconds

    base = {"policy": BASE, **SETTINGS[BASE]}
    with equal_steps(bench, LENGTH // num_steps):
        forwards = decode(base)  # warm, as the others
        left_out = {name: why for name, own in settings.items() if (why := unlike(own, forwards))}
        settings = {name: own for name, own in settings.items() if name not in left_out}
        ratios: dict[str, list[float]] = {name: [] for name in settings}
        extras: dict[str, list[float]] = {name: [] for name in settings}
        before = timed(base)
        of_base = [before[0]]
        for _ in range(num_pairs):
            for name, own in settings.items():
                found, after = timed(own), timed(base)
                ratios[name].append(2 * found[0] / (before[0] + after[0]))
                extras[name].append(1e3 * (found[1] - (before[1] + after[1]) / 2) * num_requests / forwards)
                of_base.append(after[0])
                before = after
        counted = {BASE: base, **settings}
        per_step = {
            name: operations(bench, lambda own=own: decode(own)) * num_requests / forwards
            for name, own in counted.items()
        }
    return {
        "ms_per_step": 1e3 * statistics.median(of_base) * num_requests / forwards,
        "steps": num_steps,
        "left_out": left_out,
        "ratios": summaries(ratios),
        "extra_ms": summaries(extras),
        "operations": {name: round(number, 1) for name, number in per_step.items()},
    }


def summaries(found: dict[str, list[float]]) -> dict[str, tuple[float, float, float]]:
    """The median of each, and its 95 % interval."""
    return {name: (statistics.median(values), *interval(values)) for name, values in found.items()}


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
    """The figures in words: ratios of whole steps, extra time over a step's, and extra operations."""
    step, number = found["ms_per_step"], found["operations"][BASE]
    lines = [
        f"{num_requests} requests at once; a step of {BASE} takes {step:.2f} ms and {number:.0f} operations",
        f"{'':<32}{'whole steps':>33}{'beside the layers':>33}{'operations':>12}",
    ]
    for name, ratio in found["ratios"].items():
        whole, beside = [one - 1 for one in ratio], [one / step for one in found["extra_ms"][name]]
        columns = [f"{middle:>+8.1%}  ({low:+.1%} to {high:+.1%})" for middle, low, high in (whole, beside)]
        more = found["operations"][name] - number
        lines.append(f"{name:<32}{columns[0]:>33}{columns[1]:>33}{more:>+12.0f}")
    lines += [f"left out: {name}: {why}" for name, why in found["left_out"].items()]
    return "\n".join(lines)
