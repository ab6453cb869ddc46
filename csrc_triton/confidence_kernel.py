"""The Triton kernel of ``confidence``: each program walks one chunk of one row of logits, once.

A step reads as few as one row; one program for each would leave most of a GPU without work. A vocabulary that fits a
chunk takes one launch, a larger one a second, which combines the chunks of each row.

Called by ``csrc_triton.ops``, which has checked the arguments.
"""

import torch
import triton
import triton.language as tl

from csrc_triton.partials_kernel import combine_partials, finish, margin_between, store_partial, summarize
from csrc_triton.types import WITHOUT_MARGIN, Partial

CHUNK_V = 4096  # ids; a constant, so that a row's sums do not depend on the number of rows


@triton.jit
def _confidence_kernel(
    logits_ptr,
    logits_stride,
    temperature_ptr,
    noise_key_ptr,
    token_ptr,  # written if a row is one chunk, else None
    confidence_ptr,
    margin_ptr,  # likewise, if it is asked for
    partials_ptr,  # else written
    vocabulary,
    excluded_token_id,  # -1: none
    by_entropy_ptr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_MARGIN: tl.constexpr,
    IS_ONE_CHUNK: tl.constexpr,
    CHUNK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    in_rows = row >= 0  # all of them
    chunk = tl.program_id(1)
    ids = chunk * CHUNK_V + tl.arange(0, CHUNK_V)
    logit = tl.load(
        logits_ptr + row[:, None] * logits_stride + ids[None, :], mask=(ids < vocabulary)[None, :], other=-float("inf")
    ).to(tl.float32)
    largest, total, weighted, best_score, best_logit, best_id, first_logit, second_logit = summarize(
        logit,
        ids,
        excluded_token_id,
        temperature_ptr,
        noise_key_ptr,
        by_entropy_ptr,
        row,
        in_rows,
        HAS_TEMPERATURE,
        HAS_ENTROPY,
        HAS_MARGIN,
    )
    if IS_ONE_CHUNK:
        by_entropy = tl.zeros_like(best_id)
        if HAS_ENTROPY:
            by_entropy = tl.load(by_entropy_ptr + row).to(tl.int32)
        token, probability = finish(
            largest, total, weighted, best_score, best_logit, best_id, excluded_token_id, by_entropy, HAS_ENTROPY
        )
        tl.store(token_ptr + row, token.to(tl.int64))
        tl.store(confidence_ptr + row, probability)
        if HAS_MARGIN:
            tl.store(margin_ptr + row, margin_between(first_logit, second_logit, total))
    else:
        store_partial(
            partials_ptr,
            chunk.to(tl.int64),
            row,
            tl.num_programs(0),
            in_rows,
            largest,
            total,
            weighted,
            best_score,
            best_logit,
            best_id,
            first_logit,
            second_logit,
            HAS_MARGIN,
        )


def confidence(
    logits: torch.Tensor,
    excluded_token_id: int | None = None,
    temperature: torch.Tensor | None = None,
    noise_key: torch.Tensor | None = None,
    by_entropy: torch.Tensor | None = None,
    margin: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``ops.confidence``; CPU tensors work only in Triton's interpreter."""
    num_rows, vocabulary = logits.shape
    num_chunks = triton.cdiv(vocabulary, CHUNK_V)
    token = probability = partials = None
    if num_chunks == 1:
        token = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
        probability = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    else:
        num_fields = WITHOUT_MARGIN if margin is None else len(Partial)
        partials = torch.empty(num_chunks, num_fields, num_rows, dtype=torch.float32, device=logits.device)
    if num_rows:
        _confidence_kernel[(num_rows, num_chunks)](
            logits,
            logits.stride(0),
            temperature,
            noise_key,
            token,
            probability,
            margin,
            partials,
            vocabulary,
            -1 if excluded_token_id is None else excluded_token_id,
            None if by_entropy is None else by_entropy.view(torch.uint8),
            HAS_TEMPERATURE=temperature is not None,
            HAS_ENTROPY=by_entropy is not None,
            HAS_MARGIN=margin is not None,
            IS_ONE_CHUNK=num_chunks == 1,
            CHUNK_V=min(CHUNK_V, triton.next_power_of_2(vocabulary)),
            num_warps=8,
            enable_fp_fusion=False,
        )
    if token is not None and probability is not None:
        return token, probability
    assert partials is not None
    return combine_partials(partials, excluded_token_id, by_entropy, margin)
