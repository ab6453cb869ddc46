"""Runs a few small steps before the first request, so that it waits neither for Triton nor for Numba.

vLLM's own warm-up sends ordinary requests with grammars and log probabilities, which a canvas has no use for.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from vllm import SamplingParams
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
from vllm.v1.request import Request

from csrc_triton import Blocks, Proposals, Rules
from vllm_osdt.geometry import MAX_BLOCK_LENGTH, DecodeShape, canvas_of
from vllm_osdt.messages import CANVAS_STEP, Assignment, CanvasStep, RequestSpec
from vllm_osdt.options import DecodingOptions
from vllm_osdt.options.operator import default_decoding_options
from vllm_osdt.policies import POLICIES

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

    from vllm_osdt.worker.slots import CanvasStates

# Of requests whose logits are changed, in every way that has compiled code.
_SHAPED: dict[str, Any] = {
    "logprobs": 1,
    "top_p": 0.9,
    "top_k": 2,
    "min_p": 0.01,
    "logit_bias": {0: 1.0},
    "presence_penalty": 0.1,
    "repetition_penalty": 1.1,
}
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
    defaults = default_decoding_options(vllm_config)
    no_steps: dict[str, Any] = {"steps": None, "steps_per_block": None}
    defaults = replace(defaults, task=None, policy="static_threshold", **no_steps)
    defaults = replace(defaults, edit_threshold=None, adablock=False, gen_length=defaults.block_length)
    steps = [(number, temperature, defaults, by_entropy) for number, temperature, by_entropy in _STEPS]
    if vllm_config.model_config.hf_config.traits.can_edit:
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
    kinds = [
        (number, replace(options, policy="entropy_bound") if by_entropy else options, {"temperature": temperature})
        for number, temperature, options, by_entropy in steps
    ]
    kinds.append((2, defaults, {"temperature": 1.0, **_SHAPED}))
    for index, (number, options, sampling) in enumerate(kinds):
        req_ids = [f"_warm_up_{index}_{i}" for i in range(min(number, room))]
        if req_ids:
            output = _first_step(kv_cache_config, options, req_ids, sampling)
            execute_model(output)
            sample_tokens(None)
            end = SchedulerOutput.make_empty()
            end.finished_req_ids = set(output.num_scheduled_tokens)
            execute_model(end)


def warm_up_lengths(states: "CanvasStates", unmask: Callable[[Blocks, Proposals, Rules], Any]) -> None:
    """Decide an idle block of every length for which the kernel is compiled apart: requests choose theirs.

    Args:
        states: Tables, of which nothing changes.
        unmask: The kernel of the tables' device.
    """
    device, num_ends = states.device, states.host.end_token_ids.shape[1]

    def zeros(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.zeros(shape or (1,), dtype=dtype, device=device)

    length = 1
    while length <= MAX_BLOCK_LENGTH:
        blocks = Blocks(
            cells=states.cells,
            masked=states.masked,
            slots=zeros(torch.int64) + states.idle_row,
            canvas_index=zeros(torch.int64, 1, length) + states.padding_cell,
            end_token_ids=zeros(torch.int64, 1, num_ends) - 1,
            num_output_positions=zeros(torch.int32),
        )
        proposals = Proposals(zeros(torch.int64) + length, zeros(torch.int64), zeros(torch.float32))
        unmask(blocks, proposals, Rules(zeros(torch.int8), zeros(torch.float32), zeros(torch.int32)))
        length *= 2


def _num_rows(options: DecodingOptions) -> int:
    """Of a request with a prompt of one token; on a grid it is part of the first block, or is it."""
    if options.is_on_grid:
        return max(2, options.block_length)
    return options.block_length + 1


def _num_pages(kv_cache_config: "KVCacheConfig", options: DecodingOptions) -> list[int]:
    sizes = [group.kv_cache_spec.block_size for group in kv_cache_config.kv_cache_groups]
    return [-(-_num_rows(options) // size) for size in sizes]


def _first_step(
    kv_cache_config: "KVCacheConfig", options: DecodingOptions, req_ids: list[str], sampling: dict[str, Any]
) -> SchedulerOutput:
    """The step with which the scheduler would begin these requests."""
    num_rows, pages = _num_rows(options), _num_pages(kv_cache_config, options)
    canvas = canvas_of(1, options.block_length, num_rows - 1, options.block_length, is_on_grid=options.is_on_grid)
    extra_args = RequestSpec(options, canvas).as_extra_args()
    params = SamplingParams(**sampling, max_tokens=num_rows - 1, extra_args=extra_args)
    shape = DecodeShape(canvas.num_blocks, canvas.block_length, options.sub_block_length)
    policy = POLICIES[options.policy]
    assignment = Assignment(
        policy.schedule(options, shape),
        is_recorded=True,
        is_watched=True,
        by_entropy=policy.looks_at_entropy(options),
        reads_logits=policy.needs_logits(options),
    )
    step = CanvasStep({req_id: assignment for req_id in req_ids})
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
    setattr(output, CANVAS_STEP, step)
    return output
