"""Large shapes: speed against the floor, by number of requests, tokens per forward and arrivals; calls; memory."""

from collections.abc import Iterator
from typing import Any

from benchmarks.gpu import calls
from benchmarks.gpu.engines import runner_of, worker_of
from benchmarks.gpu.lines import gib, part, spread
from benchmarks.gpu.load import Clock, Load, measure
from benchmarks.gpu.machine import rates
from benchmarks.gpu.shapes import Weights, start_shape
from benchmarks.gpu.sizes import IS_STAND_IN, SIZES

MAX_WAITS_PER_STEP = 1  # for its output
PEAK_TOLERANCE_GIB = 0.1  # of the allocator's blocks


def check_shape(stage: str) -> None:
    """A large model with random weights in bfloat16."""
    import torch

    name = stage.split(":")[1]
    found_rates = rates()
    llm = start_shape(stage, name)
    runner = runner_of(llm)
    torch.cuda.reset_peak_memory_stats()
    with part(stage, "full batch", requests=max(SIZES.requests)) as found:
        found |= _first_full_batch(llm)
        assert not found["compiled"], "kernels that were not warmed up"
    weights = Weights.of(runner.model, llm.llm_engine.vllm_config.model_config.hf_config)
    clock = Clock().watch(llm)
    loads = _loads(runner.decode_query_len)
    num_first = len(SIZES.requests)
    for load in loads[:num_first]:
        _measure(stage, llm, load, clock, weights, found_rates)
    for is_replayed in (True, False):
        with part(stage, "calls", requests=SIZES.requests[1], graphs=is_replayed) as found:
            runner.replays_graphs = is_replayed
            found |= _calls(llm, f"{name}-{'graphs' if is_replayed else 'eager'}")
            if is_replayed:
                assert found["waits_per_step"] <= MAX_WAITS_PER_STEP
    _measure(stage, llm, loads[1], clock, weights, found_rates, "burst without graphs")
    runner.replays_graphs = True
    for load in loads[num_first:]:
        _measure(stage, llm, load, clock, weights, found_rates)
    with part(stage, "memory") as found:
        _check_memory(llm, found)


def check_compiled(stage: str) -> None:
    """Whether it pays to have vLLM compile a large model: bursts on both engines, in turns."""
    name = stage.split(":")[1]
    found_rates = rates()
    how = {"mode": 3} | ({"backend": "eager"} if IS_STAND_IN else {})  # CompilationMode.VLLM_COMPILE
    engines = {
        "plain": start_shape(stage, name, label="plain", memory_share=0.42),
        "compiled": start_shape(stage, name, label="compiled", memory_share=0.42, compilation_config=how),
    }
    clocks = {what: Clock().watch(llm) for what, llm in engines.items()}
    for load in _loads(runner_of(engines["plain"]).decode_query_len)[: len(SIZES.requests)]:
        for what, llm in engines.items():
            weights = Weights.of(runner_of(llm).model, llm.llm_engine.vllm_config.model_config.hf_config)
            _measure(stage, llm, load, clocks[what], weights, found_rates, what)


def _loads(block_length: int) -> list[Load]:
    """Bursts of the first number of tokens, then arrivals one after another, then the other numbers of tokens."""

    def with_tokens(tokens: int, is_staggered: bool) -> Iterator[Load]:
        for number in SIZES.requests:
            if not is_staggered or number > 1:
                yield Load(number, tokens, block_length, is_staggered)

    first, *others = _tokens_per_forward(block_length)
    loads = [*with_tokens(first, False), *with_tokens(first, True)]
    for tokens in others:
        loads += [*with_tokens(tokens, False), *with_tokens(tokens, True)]
    return loads


def _tokens_per_forward(block_length: int) -> list[int]:
    """Those of ``SIZES`` that a block has room for, or all of the block."""
    return [number for number in SIZES.tokens_per_forward if number <= block_length] or [block_length]


def _measure(
    stage: str, llm: Any, load: Load, clock: Clock, weights: Weights, found_rates: Any, what: str | None = None
) -> None:
    about = {
        "requests": load.requests,
        "tokens_per_forward": load.tokens_per_forward,
        "prompt_length": SIZES.prompt_length,
        "max_tokens": load.max_tokens,
        "block_length": load.block_length,
    }
    with part(stage, what or ("staggered" if load.is_staggered else "burst"), **about) as found:
        found |= measure(llm, load, clock, weights, found_rates)


def _first_full_batch(llm: Any) -> dict[str, Any]:
    """As many requests as may run, the first that the engine sees: what is compiled then was not warmed up."""
    step_ms: list[float] = []
    length = runner_of(llm).decode_query_len
    with calls.find_compilations() as compiled:
        load = Load(max(SIZES.requests), _tokens_per_forward(length)[0], length, max_tokens=length)
        load.run(llm, step_ms.append)
    return {"step_ms": spread(step_ms), "slowest_ms": round(max(step_ms), 1), "compiled": sorted(set(compiled))}


def _calls(llm: Any, name: str) -> dict[str, Any]:
    """What steps of some requests call and wait for."""
    load = Load(SIZES.requests[1], 1, runner_of(llm).decode_query_len)
    req_ids = load.submit(llm, load.requests)
    found = calls.profile_steps(llm, name)
    if not IS_STAND_IN:
        found["waits_by_line"] = calls.find_waits(llm)
    llm.llm_engine.abort_request(req_ids)
    llm.llm_engine.step()  # the worker hears of it with the next step
    return found


def _check_memory(llm: Any, found: dict[str, Any]) -> None:
    """What steps needed beside weights, pages and graphs, against what vLLM's profile left for it."""
    import torch

    worker = worker_of(llm)
    free, total = torch.cuda.mem_get_info()
    transient = gib(torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated())
    profiled = gib(getattr(worker, "peak_activation_memory", 0))
    found |= {
        "weights_gib": gib(runner_of(llm).model_memory_usage),
        "pages_gib": gib(getattr(worker, "available_kv_cache_memory_bytes", 0)),
        "planned_gib": gib(getattr(worker, "requested_memory", 0)),
        "used_gib": gib(total - free),
        "peak_of_steps_gib": transient,
        "profiled_gib": profiled,
    }
    assert transient <= profiled + PEAK_TOLERANCE_GIB, "steps need more than the profile left for them"
