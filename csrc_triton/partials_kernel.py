"""What the Triton kernels of ``confidence`` and ``lm_head_confidence`` share: partials of a row, and their combination.

A row of logits is cut into chunks of ids. One program finds the partial of a chunk (see ``types.Partial``), another
combines those of a row. Chunks have a fixed size and a row's are combined in one order, so a row's result depends
neither on the number of rows nor on what the others contain.

All are launched with ``enable_fp_fusion=False``. The variant with temperatures gives a greedy row the bits that the
variant without gives it, and the compiler may fuse a product with a sum in one and not in the other.

Results and partials are allocated at each call. In a captured CUDA graph these allocations belong to the graph's own
memory pool: a replay allocates nothing, so the ops take no buffers.
"""

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
import triton
import triton.language as tl

from csrc_triton import noise
from csrc_triton.types import ENTROPY_SCALE, WITHOUT_MARGIN, Partial

MAX_CHUNKS_OF_A_WARP = 64  # of a row; more are combined by four warps
SCALE = tl.constexpr(ENTROPY_SCALE)
SMALLEST_DIFFERENCE = tl.constexpr(-87.0)  # of a logit and the largest: x exp(x) is below 2e-36 there
UINT32_MASK = tl.constexpr(noise.UINT32_MASK)
KEY_INCREMENT = tl.constexpr(noise.KEY_INCREMENT)
UNIFORM_SHIFT = tl.constexpr(noise.UNIFORM_SHIFT)
UNIFORM_STEP = tl.constexpr(noise.UNIFORM_STEP)
NO_ID = tl.constexpr(1 << 24)  # above every id, and fp32 holds it
NUM_FIELDS, NUM_FIELDS_WITHOUT_MARGIN = tl.constexpr(len(Partial)), tl.constexpr(WITHOUT_MARGIN)
LARGEST = tl.constexpr(int(Partial.LARGEST))
TOTAL = tl.constexpr(int(Partial.TOTAL))
WEIGHTED = tl.constexpr(int(Partial.WEIGHTED))
BEST_SCORE = tl.constexpr(int(Partial.BEST_SCORE))
BEST_LOGIT = tl.constexpr(int(Partial.BEST_LOGIT))
BEST_ID = tl.constexpr(int(Partial.BEST_ID))
FIRST_LOGIT = tl.constexpr(int(Partial.FIRST_LOGIT))
SECOND_LOGIT = tl.constexpr(int(Partial.SECOND_LOGIT))
Array = tl.tensor  # what the functions of noise are annotated with


def _for_triton(function: Callable[..., Any]) -> Any:
    """The function compiled by Triton, with the globals of this module: constants and compiled functions."""
    return triton.jit(FunctionType(function.__code__, globals()))


mix = _for_triton(noise.mix)
mix_key = _for_triton(noise.mix_key)
hash_ids = _for_triton(noise.hash_ids)


@triton.jit
def summarize(
    logit,  # [rows, ids] fp32
    ids,  # [ids] int32, ascending by one
    excluded_token_id,
    temperature_ptr,  # these three point at the first row
    noise_key_ptr,
    by_entropy_ptr,
    row,  # [rows], offsets from there
    in_rows,  # [rows]
    HAS_TEMPERATURE: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_MARGIN: tl.constexpr,
):
    """The partial of each row, [rows] each; an id that does not count has the logit -inf.

    What few rows need is a branch at run time. A NaN is not looked for: it ends up in ``total``.
    """
    largest = tl.max(logit, axis=1)
    shift = tl.where(largest == -float("inf"), 0.0, largest)  # -inf - -inf would be NaN
    total = tl.sum(tl.exp(logit - shift[:, None]), axis=1)
    weighted = tl.zeros_like(total)
    if HAS_ENTROPY:
        by_entropy = tl.load(by_entropy_ptr + row, mask=in_rows, other=0)
        if tl.max(by_entropy.to(tl.int32), axis=0) != 0:
            x = tl.maximum(logit - shift[:, None], SMALLEST_DIFFERENCE)
            weighted = tl.sum(x * tl.exp(x), axis=1)

    best_score = largest
    best_logit = largest
    best_id = tl.min(tl.where(logit == largest[:, None], ids[None, :], NO_ID), axis=1)
    if tl.max((best_id == excluded_token_id).to(tl.int32), axis=0) != 0:
        allowed = tl.where((ids == excluded_token_id)[None, :], -float("inf"), logit)
        best_score = tl.max(allowed, axis=1)
        best_logit = best_score
        best_id = tl.min(tl.where(allowed == best_score[:, None], ids[None, :], NO_ID), axis=1)
    first_logit = best_score
    second_logit = best_score
    if HAS_MARGIN:
        is_other = (ids[None, :] != best_id[:, None]) & (ids != excluded_token_id)[None, :]
        second_logit = tl.max(tl.where(is_other, logit, -float("inf")), axis=1)
    if HAS_TEMPERATURE:
        temperature = tl.load(temperature_ptr + row, mask=in_rows, other=0.0)
        if tl.max(temperature, axis=0) > 0:
            first, second = mix_key(tl.load(noise_key_ptr + row, mask=in_rows, other=0))
            bits = hash_ids(first.to(tl.uint32)[:, None], second.to(tl.uint32)[:, None], ids.to(tl.uint32)[None, :])
            u = ((bits >> UNIFORM_SHIFT).to(tl.float32) + 0.5) * UNIFORM_STEP  # exact, strictly between 0 and 1
            allowed = tl.where((ids == excluded_token_id)[None, :], -float("inf"), logit)
            score = allowed + temperature[:, None] * -tl.log(-tl.log(u))  # a row at 0 keeps its logits bit for bit
            best_score = tl.max(score, axis=1)
            best_id = tl.min(tl.where(score == best_score[:, None], ids[None, :], NO_ID), axis=1)
            best_logit = tl.max(tl.where(ids[None, :] == best_id[:, None], logit, -float("inf")), axis=1)
    return largest, total, weighted, best_score, best_logit, best_id, first_logit, second_logit


@triton.jit
def margin_between(first_logit, second_logit, total):
    """See ``margin`` of ``ops.confidence``; NaN of ``total`` says that the row contains one."""
    has_two = (total == total) & (second_logit > -float("inf"))
    return tl.where(has_two, first_logit - tl.where(has_two, second_logit, 0.0), float("inf"))


@triton.jit
def finish(
    largest, total, weighted, best_score, best_logit, best_id, excluded_token_id, by_entropy, HAS_ENTROPY: tl.constexpr
):
    """Token and confidence of whole rows, of any shape; NaN of ``total`` says that the row contains one."""
    hopeless = (total != total) | (best_score == -float("inf"))
    total = tl.where(hopeless, 1.0, total)
    probability = tl.exp(tl.where(hopeless, 0.0, best_logit) - tl.where(hopeless, 0.0, largest)) / total
    if HAS_ENTROPY:
        entropy = tl.log(total) - weighted / total
        probability = tl.where(by_entropy != 0, tl.minimum(1.0 - entropy / SCALE, 1.0), probability)
    token = tl.where(hopeless, tl.where(excluded_token_id == 0, 1, 0), best_id)
    return token, tl.where(hopeless, 0.0, probability)


@triton.jit
def store_partial(
    partials_ptr,
    chunk,
    row,
    num_rows,
    in_rows,
    largest,
    total,
    weighted,
    best_score,
    best_logit,
    best_id,
    first_logit,
    second_logit,
    HAS_MARGIN: tl.constexpr,
):
    """Writes what ``summarize`` has found; ``chunk`` is int64, ``row`` [rows] int64."""
    ptr = partials_ptr + chunk * (NUM_FIELDS if HAS_MARGIN else NUM_FIELDS_WITHOUT_MARGIN) * num_rows + row
    tl.store(ptr + LARGEST * num_rows, largest, mask=in_rows)
    tl.store(ptr + TOTAL * num_rows, total, mask=in_rows)
    tl.store(ptr + WEIGHTED * num_rows, weighted, mask=in_rows)
    tl.store(ptr + BEST_SCORE * num_rows, best_score, mask=in_rows)
    tl.store(ptr + BEST_LOGIT * num_rows, best_logit, mask=in_rows)
    tl.store(ptr + BEST_ID * num_rows, best_id.to(tl.float32), mask=in_rows)
    if HAS_MARGIN:
        tl.store(ptr + FIRST_LOGIT * num_rows, first_logit, mask=in_rows)
        tl.store(ptr + SECOND_LOGIT * num_rows, second_logit, mask=in_rows)


@triton.jit
def _combine_kernel(
    partials_ptr,
    token_ptr,
    confidence_ptr,
    margin_ptr,
    num_chunks,
    excluded_token_id,  # -1: none
    by_entropy_ptr,
    HAS_ENTROPY: tl.constexpr,
    HAS_MARGIN: tl.constexpr,
    NUM_FIELDS_OF_CHUNK: tl.constexpr,
    PADDED_CHUNKS: tl.constexpr,
):
    row, num_rows = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    chunk = tl.arange(0, PADDED_CHUNKS)
    valid = chunk < num_chunks
    ptr = partials_ptr + chunk.to(tl.int64) * NUM_FIELDS_OF_CHUNK * num_rows + row

    chunk_largest = tl.load(ptr + LARGEST * num_rows, mask=valid, other=-float("inf"))
    largest = tl.max(chunk_largest, axis=0)
    lower = chunk_largest - tl.where(largest == -float("inf"), 0.0, largest)
    chunk_total = tl.load(ptr + TOTAL * num_rows, mask=valid, other=0.0)
    total = tl.sum(chunk_total * tl.exp(lower), axis=0)
    weighted, by_entropy = 0.0, 0
    if HAS_ENTROPY:
        by_entropy = tl.load(by_entropy_ptr + row).to(tl.int32)
        chunk_weighted = tl.load(ptr + WEIGHTED * num_rows, mask=valid, other=0.0)
        lower = tl.maximum(lower, SMALLEST_DIFFERENCE)  # 0 * -inf would be NaN
        weighted = tl.sum(tl.exp(lower) * (chunk_weighted + lower * chunk_total), axis=0)

    score = tl.load(ptr + BEST_SCORE * num_rows, mask=valid, other=-float("inf"))
    best_score = tl.max(score, axis=0)
    ids = tl.load(ptr + BEST_ID * num_rows, mask=valid, other=0.0).to(tl.int32)
    best_id = tl.min(tl.where(valid & (score == best_score), ids, NO_ID), axis=0)
    logit = tl.load(ptr + BEST_LOGIT * num_rows, mask=valid, other=-float("inf"))
    best_logit = tl.max(tl.where((score == best_score) & (ids == best_id), logit, -float("inf")), axis=0)

    token, probability = finish(
        largest, total, weighted, best_score, best_logit, best_id, excluded_token_id, by_entropy, HAS_ENTROPY
    )
    tl.store(token_ptr + row, token.to(tl.int64))
    tl.store(confidence_ptr + row, probability)
    if HAS_MARGIN:
        first = tl.load(ptr + FIRST_LOGIT * num_rows, mask=valid, other=-float("inf"))
        second = tl.load(ptr + SECOND_LOGIT * num_rows, mask=valid, other=-float("inf"))
        first_logit = tl.max(first, axis=0)
        winner = tl.min(tl.where(valid & (first == first_logit), chunk, PADDED_CHUNKS), axis=0)
        second_logit = tl.max(tl.where(chunk == winner, second, first), axis=0)
        tl.store(margin_ptr + row, margin_between(first_logit, second_logit, total))


def combine_partials(
    partials: torch.Tensor,
    excluded_token_id: int | None = None,
    by_entropy: torch.Tensor | None = None,
    margin: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``ops.combine_partials``; CPU tensors work only in Triton's interpreter."""
    num_chunks, num_fields, num_rows = partials.shape
    token = torch.empty(num_rows, dtype=torch.int64, device=partials.device)
    probability = torch.empty(num_rows, dtype=torch.float32, device=partials.device)
    if num_rows:
        _combine_kernel[(num_rows,)](
            partials,
            token,
            probability,
            margin,
            num_chunks,
            -1 if excluded_token_id is None else excluded_token_id,
            None if by_entropy is None else by_entropy.view(torch.uint8),
            HAS_ENTROPY=by_entropy is not None,
            HAS_MARGIN=margin is not None,
            NUM_FIELDS_OF_CHUNK=num_fields,
            PADDED_CHUNKS=triton.next_power_of_2(num_chunks),
            num_warps=1 if num_chunks <= MAX_CHUNKS_OF_A_WARP else 4,
            enable_fp_fusion=False,
        )
    return token, probability
