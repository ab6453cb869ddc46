"""Runs a few small steps before the first request, so that it waits neither for Triton nor for Numba.

vLLM's own warm-up sends ordinary requests with grammars and log probabilities, which a canvas has no use for.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vllm import SamplingParams
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
from vllm.v1.request import Request

from vllm_osdt.config import BLOCK_CACHE, RESOLVED_KEY, DecodingOptions
from vllm_osdt.engine_config import server_defaults

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

# What the compiled code is specialized for: number of requests, temperature, and whether entropies are asked for.
_STEPS = ((1, 0.0, False), (2, 0.0, False), (2, 1.0, False), (2, 0.0, True), (2, 1.0, True))


def warm_up(
    vllm_config: "VllmConfig",
    kv_cache_config: "KVCacheConfig",
    execute_model: Callable[[SchedulerOutput], Any],
    sample_tokens: Callable[[None], Any],
) -> None:
    """Decode blocks of the served length by every kind of step; leaves nothing behind but what was compiled.

    Args:
        vllm_config: The engine's configuration.
        kv_cache_config: Its KV pages, of which the first few are written.
        execute_model, sample_tokens: The worker's.
    """
    defaults = replace(server_defaults(vllm_config), task=None, policy="static_threshold", steps=None)
    defaults = replace(defaults, steps_per_block=None, edit_threshold=None, gen_length=defaults.block_length)
    steps = [(number, temperature, defaults, by_entropy) for number, temperature, by_entropy in _STEPS]
    if getattr(vllm_config.model_config.hf_config, "can_edit", False):
        steps.append((2, 0.0, replace(defaults, edit_threshold=0.5), False))
    if defaults.sub_block_length is not None:
        steps.append((2, 0.0, replace(defaults, sub_block_cache=True), False))
    if _num_rows(defaults) > vllm_config.model_config.max_model_len:
        return
    room = min(
        vllm_config.scheduler_config.max_num_seqs,
        vllm_config.scheduler_config.max_num_batched_tokens // _num_rows(defaults),
        (kv_cache_config.num_blocks - 1) // max(1, sum(_num_pages(kv_cache_config, defaults))),
    )
    for index, (number, temperature, options, by_entropy) in enumerate(steps):
        if by_entropy:
            options = replace(options, policy="entropy_bound")
        req_ids = [f"_warm_up_{index}_{i}" for i in range(min(number, room))]
        if req_ids:
            output = _first_step(kv_cache_config, options, req_ids, temperature)
            execute_model(output)
            sample_tokens(None)
            end = SchedulerOutput.make_empty()
            end.finished_req_ids = set(output.num_scheduled_tokens)
            execute_model(end)


def _num_rows(options: DecodingOptions) -> int:
    """Of a request with a prompt of one token; a block-causal one is part of the first block, or is it."""
    if options.cache == BLOCK_CACHE:
        return max(2, options.block_length)
    return options.block_length + 1


def _num_pages(kv_cache_config: "KVCacheConfig", options: DecodingOptions) -> list[int]:
    sizes = [group.kv_cache_spec.block_size for group in kv_cache_config.kv_cache_groups]
    return [-(-_num_rows(options) // size) for size in sizes]


def _first_step(
    kv_cache_config: "KVCacheConfig", options: DecodingOptions, req_ids: list[str], temperature: float
) -> SchedulerOutput:
    """The step with which the scheduler would begin these requests."""
    num_rows, pages = _num_rows(options), _num_pages(kv_cache_config, options)
    params = SamplingParams(
        temperature=temperature,
        max_tokens=num_rows - 1,
        extra_args={RESOLVED_KEY: options.as_dict()},
    )
    output, next_page = SchedulerOutput.make_empty(), 1  # page 0 is vLLM's null page
    for req_id in req_ids:
        block_ids = []
        for number in pages:
            block_ids.append(list(range(next_page, next_page + number)))
            next_page += number
        request = Request(req_id, [0], params, None)
        output.scheduled_new_reqs.append(NewRequestData.from_request(request, tuple(block_ids), [0]))
        output.num_scheduled_tokens[req_id] = num_rows
        output.scheduled_spec_decode_tokens[req_id] = [-1] * (num_rows - 1)
    output.total_num_scheduled_tokens = num_rows * len(req_ids)
    return output
