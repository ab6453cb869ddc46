"""Requests for a large shape, and what is measured while they are decoded."""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.gpu.engines import runner_of, watch_graphs
from benchmarks.gpu.lines import spread
from benchmarks.gpu.shapes import Weights
from benchmarks.gpu.sizes import SIZES

_seeds = itertools.count()


@dataclass(frozen=True)
class Load:
    """Requests with random prompts, as many tokens unmasked in every forward.

    Attributes:
        requests: At a time. In a burst all arrive at once; staggered, twice as many arrive, evenly over the steps that
            a request takes, so that after a while as many are under way.
        tokens_per_forward: Of each request.
        block_length: Of the model.
        is_staggered: Whether they arrive one after another.
        max_tokens: Of each request.
    """

    requests: int
    tokens_per_forward: int
    block_length: int
    is_staggered: bool = False
    max_tokens: int = SIZES.max_tokens

    @property
    def arrivals(self) -> list[int]:
        """The engine step before which each request arrives, ascending."""
        if not self.is_staggered:
            return [0] * self.requests
        num_steps = self.max_tokens // self.tokens_per_forward
        return [index * num_steps // self.requests for index in range(2 * self.requests)]

    def submit(self, llm: Any, number: int) -> list[str]:
        """Queue some of them, and return their ids; no prompt is asked for twice, so none is in the prefix cache."""
        import numpy as np
        from vllm import SamplingParams

        steps = self.block_length // self.tokens_per_forward
        params = SamplingParams(
            temperature=0.0,
            max_tokens=self.max_tokens,
            ignore_eos=True,
            detokenize=False,
            extra_args={"osdt_policy": "fixed_steps", "osdt_steps_per_block": steps},
        )
        seeds = [next(_seeds) for _ in range(number)]
        for seed in seeds:
            prompt = np.random.default_rng(seed).integers(10, 500, SIZES.prompt_length).tolist()
            llm.llm_engine.add_request(f"request-{seed}", {"prompt_token_ids": prompt}, params)
        return [f"request-{seed}" for seed in seeds]

    def run(self, llm: Any, on_step: Callable[[float], None] = lambda ms: None) -> float:
        """Decode all of them; ``on_step`` gets the milliseconds of each engine step. Returns the seconds."""
        arrivals, step = self.arrivals, 0
        begin = time.perf_counter()
        while arrivals or llm.llm_engine.has_unfinished_requests():
            arrived = sum(one <= step for one in arrivals)
            self.submit(llm, arrived)
            del arrivals[:arrived]
            start = time.perf_counter()
            llm.llm_engine.step()
            on_step((time.perf_counter() - start) * 1e3)
            step += 1
        return time.perf_counter() - begin


@dataclass
class Clock:
    """Times of what a runner does, between events on the device that are read when all is over.

    A forward is one replay of a graph, or the model's call with what follows it: logits, proposals, the decision.

    Attributes:
        spans: Events before and after each call, and whether a forward begins with it.
        sizes: Rows and logit rows of each planned forward.
    """

    spans: list[tuple[Any, Any, bool]] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)

    def watch(self, llm: Any) -> "Clock":
        """Time an engine's runner from now on."""
        runner = runner_of(llm)
        model, sampler, manager, plan = runner.model, runner.sampler, runner.cudagraph_manager, runner._plan
        model.forward = self._timed(model.forward, begins=True)
        model.compute_logits = self._timed(model.compute_logits)
        sampler.propose, sampler.decide = self._timed(sampler.propose), self._timed(sampler.decide)
        if manager is not None:
            manager.replay = self._timed(manager.replay, begins=True)

        def planned(*args: Any, **kwargs: Any) -> Any:
            result = plan(*args, **kwargs)
            self.sizes.append((result[0].positions.size, result[0].logit_rows.size))
            return result

        runner._plan = planned
        return self

    def _timed(self, function: Callable[..., Any], begins: bool = False) -> Callable[..., Any]:
        import torch

        def timed(*args: Any, **kwargs: Any) -> Any:
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            result = function(*args, **kwargs)
            after.record()
            self.spans.append((before, after, begins))
            return result

        return timed

    def take(self) -> dict[str, Any]:
        """Milliseconds on the device since the last call, and how many forwards; waits for the device."""
        import torch

        torch.cuda.synchronize()
        inside = sum(before.elapsed_time(after) for before, after, _ in self.spans)
        pairs = itertools.pairwise(self.spans)
        between = [last[1].elapsed_time(this[0]) for last, this in pairs if this[2]]
        number = sum(begins for *_, begins in self.spans)
        self.spans.clear()
        return {
            "num_forwards": number,
            "device_ms_per_forward": round(inside / max(1, number), 3),
            "between_forwards_ms": spread(between),
        }


def measure(llm: Any, load: Load, clock: Clock, weights: Weights, rates: tuple[float | None, float | None]) -> Any:
    """Decode a load: speed, the floor of its forwards and the share of it, and what passes between forwards.

    Args:
        llm: The engine.
        load: The requests.
        clock: Watches the engine.
        weights: Of the model.
        rates: Bytes and operations a second, of ``machine.rates``.
    """
    import torch

    clock.take()
    clock.sizes.clear()
    step_ms: list[float] = []
    num_requests = len(load.arrivals)
    with watch_graphs(llm) as launched:
        seconds = load.run(llm, step_ms.append)
    found = clock.take()
    num_forwards = max(1, found["num_forwards"])
    found |= {
        "tokens_per_s": round(num_requests * load.max_tokens / seconds, 1),
        "forwards_per_s": round(num_forwards / seconds, 1),
        "ms_per_forward": round(seconds * 1e3 / num_forwards, 3),
        "step_ms": spread(step_ms),
        "num_steps": len(step_ms),
        "num_replays": len(launched.rows),
        "ahead": dict(launched.ahead),
        "rows_per_forward": round(sum(rows for rows, _ in clock.sizes) / num_forwards, 1),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
    }
    bytes_per_s, operations_per_s = rates
    if bytes_per_s and operations_per_s:
        floor_s = sum(weights.floor_s(*size, bytes_per_s, operations_per_s) for size in clock.sizes)
        found["floor_ms_per_forward"] = round(floor_s * 1e3 / num_forwards, 3)
        found["times_the_floor"] = round(seconds / floor_s, 2)
    return found
