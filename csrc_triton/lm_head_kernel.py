"""The Triton kernel of ``lm_head_partials``: hidden rows times output weight, logits never written.

Each program multiplies a tile of rows with one chunk of the vocabulary and keeps of the logits what ``Partial`` lists:
an online softmax whose tiles are the chunks, finished by ``combine_partials``. Programs of the same chunk are next to
each other, so memory is read once for the weight, and again from the cache for the other rows.

Called by ``csrc_triton.ops``, which has checked the arguments.
"""

import torch
import triton
import triton.language as tl

from csrc_triton.partials_kernel import combine_partials, store_partial, summarize
from csrc_triton.types import WITHOUT_MARGIN, Partial

# Rows, ids (the chunk), hidden size, warps and stages of a program, by element size. They do not follow the number of
# rows, so that a row's products are summed in one order whatever the batch.
TILES = {2: (128, 256, 64, 8, 3), 4: (32, 64, 32, 4, 3)}


# Numbers that change from step to step must not compile the kernel anew.
@triton.jit(do_not_specialize=["num_rows"])
def _lm_head_kernel(
    hidden_ptr,
    hidden_stride,
    weight_ptr,
    weight_stride,
    temperature_ptr,
    noise_key_ptr,
    by_entropy_ptr,
    partials_ptr,
    num_rows,
    hidden_size,
    num_weight_rows,
    first_id,
    vocabulary,
    excluded_token_id,  # -1: none
    HAS_TEMPERATURE: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_MARGIN: tl.constexpr,
    TILE_M: tl.constexpr,
    CHUNK_V: tl.constexpr,
    TILE_H: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * TILE_M + tl.arange(0, TILE_M)
    in_rows = row < num_rows
    chunk = tl.program_id(1).to(tl.int64)
    weight_row = chunk * CHUNK_V + tl.arange(0, CHUNK_V)
    in_weight = weight_row < num_weight_rows

    product = tl.zeros((TILE_M, CHUNK_V), tl.float32)
    for start in range(0, hidden_size, TILE_H):
        k = start + tl.arange(0, TILE_H)
        hidden = tl.load(
            hidden_ptr + row[:, None] * hidden_stride + k[None, :],
            mask=in_rows[:, None] & (k < hidden_size)[None, :],
            other=0.0,
        )
        weight = tl.load(
            weight_ptr + weight_row[:, None] * weight_stride + k[None, :],
            mask=in_weight[:, None] & (k < hidden_size)[None, :],
            other=0.0,
        )
        product = tl.dot(hidden, tl.trans(weight), product, input_precision="ieee")
    logit = product.to(hidden_ptr.dtype.element_ty).to(tl.float32)  # as a logit that was written

    ids = (first_id + weight_row).to(tl.int32)
    counts = in_weight & (ids < vocabulary)
    logit = tl.where(counts[None, :], logit, -float("inf"))
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
    store_partial(
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
        HAS_MARGIN,
    )


def lm_head_partials(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    first_id: int = 0,
    vocabulary: int | None = None,
    excluded_token_id: int | None = None,
    temperature: torch.Tensor | None = None,
    noise_key: torch.Tensor | None = None,
    by_entropy: torch.Tensor | None = None,
    with_margin: bool = False,
) -> torch.Tensor:
    """See ``ops.lm_head_partials``; CPU tensors work only in Triton's interpreter."""
    (num_rows, hidden_size), num_weight_rows = hidden.shape, weight.shape[0]
    tile_m, chunk_v, tile_h, num_warps, num_stages = TILES[hidden.element_size()]
    num_chunks = triton.cdiv(num_weight_rows, chunk_v)
    num_fields = len(Partial) if with_margin else WITHOUT_MARGIN
    partials = torch.empty(num_chunks, num_fields, num_rows, dtype=torch.float32, device=hidden.device)
    if num_rows:
        _lm_head_kernel[(triton.cdiv(num_rows, tile_m), num_chunks)](
            hidden,
            hidden.stride(0),
            weight,
            weight.stride(0),
            temperature,
            noise_key,
            None if by_entropy is None else by_entropy.view(torch.uint8),
            partials,
            num_rows,
            hidden_size,
            num_weight_rows,
            first_id,
            first_id + num_weight_rows if vocabulary is None else vocabulary,
            -1 if excluded_token_id is None else excluded_token_id,
            HAS_TEMPERATURE=temperature is not None,
            HAS_ENTROPY=by_entropy is not None,
            HAS_MARGIN=with_margin,
            TILE_M=tile_m,
            CHUNK_V=chunk_v,
            TILE_H=tile_h,
            num_warps=num_warps,
            num_stages=num_stages,
            enable_fp_fusion=False,
        )
    return partials


def lm_head_confidence(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    excluded_token_id: int | None = None,
    temperature: torch.Tensor | None = None,
    noise_key: torch.Tensor | None = None,
    by_entropy: torch.Tensor | None = None,
    margin: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``ops.lm_head_confidence``; CPU tensors work only in Triton's interpreter."""
    options = (excluded_token_id, temperature, noise_key, by_entropy, margin is not None)
    partials = lm_head_partials(hidden, weight, 0, None, *options)
    return combine_partials(partials, excluded_token_id, by_entropy, margin)
