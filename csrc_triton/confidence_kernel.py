"""The Triton kernel of ``confidence``: one program walks one row of logits, once.

Called by ``csrc_triton.ops``, which has checked the arguments.
"""

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
import triton
import triton.language as tl

from csrc_triton import noise
from csrc_triton.types import ENTROPY_SCALE

TILE_V = 4096
SCALE = tl.constexpr(ENTROPY_SCALE)
UINT32_MASK = tl.constexpr(noise.UINT32_MASK)
KEY_INCREMENT = tl.constexpr(noise.KEY_INCREMENT)
UNIFORM_SHIFT = tl.constexpr(noise.UNIFORM_SHIFT)
UNIFORM_STEP = tl.constexpr(noise.UNIFORM_STEP)
Array = tl.tensor  # what the functions of noise are annotated with


def _for_triton(function: Callable[..., Any]) -> Any:
    """The function compiled by Triton, with the globals of this module: constants and compiled functions."""
    return triton.jit(FunctionType(function.__code__, globals()))


mix = _for_triton(noise.mix)
mix_key = _for_triton(noise.mix_key)
hash_ids = _for_triton(noise.hash_ids)


@triton.jit
def _confidence_kernel(
    logits_ptr,
    logits_stride,
    temperature_ptr,
    noise_key_ptr,
    token_ptr,
    confidence_ptr,
    vocabulary,
    excluded_token_id,  # -1: none
    by_entropy_ptr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    TILE_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * logits_stride
    temperature = 0.0
    if HAS_TEMPERATURE:
        temperature = tl.load(temperature_ptr + row)
        first, second = mix_key(tl.load(noise_key_ptr + row))
        first, second = first.to(tl.uint32), second.to(tl.uint32)

    largest = -float("inf")  # over all ids
    total = 0.0  # of exp(logit - largest) over all ids
    weighted = 0.0  # of (logit - largest) exp(logit - largest)
    best_score = -float("inf")  # over allowed ids
    best_id = 0
    num_nan = 0
    for start in range(0, vocabulary, TILE_V):
        ids = start + tl.arange(0, TILE_V)
        logit = tl.load(row_ptr + ids, mask=ids < vocabulary, other=-float("inf")).to(tl.float32)
        is_nan = logit != logit
        num_nan += tl.sum(is_nan.to(tl.int32))
        logit = tl.where(is_nan, -float("inf"), logit)

        tile_largest = tl.max(logit)
        new_largest = tl.maximum(largest, tile_largest)
        shift = tl.where(new_largest == -float("inf"), 0.0, new_largest)  # -inf - -inf would be NaN
        if HAS_ENTROPY:
            lower = tl.where(total > 0, largest - shift, 0.0)
            weighted = tl.exp(lower) * (weighted + lower * total)
            x = tl.maximum(logit - shift, -87.0)
            weighted += tl.sum(x * tl.exp(x))
        total = total * tl.exp(largest - shift) + tl.sum(tl.exp(logit - shift))
        largest = new_largest

        score = tl.where(ids == excluded_token_id, -float("inf"), logit)
        if HAS_TEMPERATURE:
            if temperature > 0:
                bits = hash_ids(first, second, ids.to(tl.uint32))
                u = ((bits >> UNIFORM_SHIFT).to(tl.float32) + 0.5) * UNIFORM_STEP  # exact, strictly between 0 and 1
                score += temperature * -tl.log(-tl.log(u))
        tile_best, tile_best_id = tl.max(score, axis=0, return_indices=True, return_indices_tie_break_left=True)
        better = tile_best > best_score  # strictly: the lowest id keeps a tie between tiles
        best_id = tl.where(better, start + tile_best_id, best_id)
        best_score = tl.where(better, tile_best, best_score)

    hopeless = (num_nan > 0) | (best_score == -float("inf"))
    best_id = tl.where(hopeless, tl.where(excluded_token_id == 0, 1, 0), best_id)
    chosen = best_score
    if HAS_TEMPERATURE:
        chosen = tl.load(row_ptr + best_id).to(tl.float32)  # without the noise
    chosen = tl.where(hopeless, 0.0, chosen)
    probability = tl.exp(chosen - tl.where(hopeless, 0.0, largest)) / tl.where(hopeless, 1.0, total)
    if HAS_ENTROPY:
        if tl.load(by_entropy_ptr + row) != 0:
            if total > 0:
                entropy = tl.log(total) - weighted / total
                probability = tl.minimum(1.0 - entropy / SCALE, 1.0)
    tl.store(token_ptr + row, best_id.to(tl.int64))
    tl.store(confidence_ptr + row, tl.where(hopeless, 0.0, probability))


def confidence(
    logits: torch.Tensor,
    excluded_token_id: int | None = None,
    temperature: torch.Tensor | None = None,
    noise_key: torch.Tensor | None = None,
    by_entropy: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``ops.confidence``; CPU tensors work only in Triton's interpreter."""
    num_rows, vocabulary = logits.shape
    token = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    probability = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    if num_rows:
        _confidence_kernel[(num_rows,)](
            logits,
            logits.stride(0),
            temperature,
            noise_key,
            token,
            probability,
            vocabulary,
            -1 if excluded_token_id is None else excluded_token_id,
            None if by_entropy is None else by_entropy.view(torch.uint8),
            HAS_TEMPERATURE=temperature is not None,
            HAS_ENTROPY=by_entropy is not None,
            TILE_V=min(TILE_V, triton.next_power_of_2(vocabulary)),
            num_warps=8,
        )
    return token, probability
