"""The Triton kernel of ``unmask``: one program decides one block.

Called by ``csrc_triton.ops``, which has checked the arguments.
"""

import torch
import triton
import triton.language as tl

from csrc_triton.reference import DOUBT_UNITS, NO_CONFIDENCE, Rule, UnmaskResult

THRESHOLD = tl.constexpr(int(Rule.THRESHOLD))
TOP_K = tl.constexpr(int(Rule.TOP_K))
FACTOR = tl.constexpr(int(Rule.FACTOR))
JOINT_BOUND = tl.constexpr(int(Rule.JOINT_BOUND))
UNITS = tl.constexpr(float(DOUBT_UNITS))
WITHOUT_LOGITS = tl.constexpr(NO_CONFIDENCE)


@triton.jit
def _unmask_kernel(
    canvas_ptr,
    canvas_stride,
    masked_ptr,
    masked_stride,
    proposal_ptr,
    proposal_stride,
    confidence_ptr,
    confidence_stride,
    rule_ptr,
    parameter_ptr,
    end_token_ids_ptr,
    end_token_ids_stride,
    num_needed_ptr,
    quota_ptr,
    num_unmasked_ptr,
    num_masked_ptr,
    num_ready_ptr,
    block_length,
    NUM_ENDS: tl.constexpr,
    PADDED_LENGTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    position = tl.arange(0, PADDED_LENGTH)
    valid = position < block_length
    masked_row = masked_ptr + row * masked_stride + position
    masked = tl.load(masked_row, mask=valid, other=0) != 0
    score = tl.load(confidence_ptr + row * confidence_stride + position, mask=masked, other=-1.0)
    score = tl.where(score != score, -1.0, score)
    rule = tl.load(rule_ptr + row)
    parameter = tl.load(parameter_ptr + row)

    # rank 1 is the most confident masked position; [position, other]
    others = tl.broadcast_to(score[None, :], (PADDED_LENGTH, PADDED_LENGTH))
    earlier = position[None, :] < position[:, None]
    ahead = masked[None, :] & ((others > score[:, None]) | ((others == score[:, None]) & earlier))
    rank = tl.sum(ahead.to(tl.int32), axis=1) + 1

    factor_passes = (rank + 1).to(tl.float32) * (1.0 - score) < parameter
    top_k_passes = rank.to(tl.float32) <= parameter
    # doubts are whole numbers of units: their sum does not depend on its order
    doubt = ((1.0 - score) * UNITS).to(tl.int64)
    ahead_or_self = ahead | (masked[None, :] & (position[None, :] == position[:, None]))
    doubts = tl.sum(tl.where(ahead_or_self, tl.broadcast_to(doubt[None, :], (PADDED_LENGTH, PADDED_LENGTH)), 0), axis=1)
    doubts += tl.where(rule == JOINT_BOUND, doubt, 0)
    bound_passes = doubts < tl.ceil(parameter * UNITS).to(tl.int64)
    passing = tl.where(rule == FACTOR, factor_passes, bound_passes)
    passing = tl.where(rule == TOP_K, top_k_passes, passing)
    passing = tl.where(rule == THRESHOLD, score >= parameter, passing)
    passing = (passing | (rank <= tl.load(quota_ptr + row))) & (score > WITHOUT_LOGITS)
    num_accepted = tl.max(tl.where(masked & passing, rank, 1))
    accepted = masked & (rank <= num_accepted)
    still_masked = masked & (rank > num_accepted)

    canvas_row = canvas_ptr + row * canvas_stride + position
    canvas = tl.load(canvas_row, mask=valid, other=0).to(tl.int64)
    proposal = tl.load(proposal_ptr + row * proposal_stride + position, mask=accepted, other=0).to(tl.int64)
    canvas = tl.where(accepted, proposal, canvas)
    tl.store(canvas_row, canvas.to(canvas_ptr.dtype.element_ty), mask=accepted)
    tl.store(masked_row, tl.zeros((PADDED_LENGTH,), tl.uint8), mask=accepted)

    # emission ends at the first end token or undecided position, or with the last needed one
    num_needed = tl.load(num_needed_ptr + row)
    is_end = position < 0
    for n in tl.static_range(NUM_ENDS):
        is_end |= canvas == tl.load(end_token_ids_ptr + row * end_token_ids_stride + n)
    is_end &= (canvas >= 0) & valid
    first_masked = tl.min(tl.where(still_masked, position, PADDED_LENGTH))
    first_end = tl.min(tl.where(is_end, position, PADDED_LENGTH))
    blocked = (first_masked < num_needed) & (first_masked <= first_end)
    num_ready = tl.where(blocked, 0, tl.minimum(first_end + 1, num_needed))

    tl.store(num_unmasked_ptr + row, tl.sum(accepted.to(tl.int32)))
    tl.store(num_masked_ptr + row, tl.sum(still_masked.to(tl.int32)))
    tl.store(num_ready_ptr + row, num_ready)


def unmask(
    canvas: torch.Tensor,
    masked: torch.Tensor,
    proposal: torch.Tensor,
    confidence: torch.Tensor,
    rule: torch.Tensor,
    parameter: torch.Tensor,
    end_token_ids: torch.Tensor,
    num_needed: torch.Tensor,
    quota: torch.Tensor,
) -> UnmaskResult:
    """See ``ops.unmask``; CPU tensors work only in Triton's interpreter."""
    num_blocks, block_length = canvas.shape
    num_unmasked, num_masked, num_ready = (
        torch.empty(num_blocks, dtype=torch.int32, device=canvas.device) for _ in range(3)
    )
    if num_blocks:
        _unmask_kernel[(num_blocks,)](
            canvas,
            canvas.stride(0),
            masked.view(torch.uint8),
            masked.stride(0),
            proposal,
            proposal.stride(0),
            confidence,
            confidence.stride(0),
            rule,
            parameter,
            end_token_ids,
            end_token_ids.stride(0),
            num_needed,
            quota,
            num_unmasked,
            num_masked,
            num_ready,
            block_length,
            NUM_ENDS=end_token_ids.shape[1],
            PADDED_LENGTH=triton.next_power_of_2(block_length),
        )
    return UnmaskResult(num_unmasked, num_masked, num_ready)
