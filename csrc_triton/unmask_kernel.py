"""The Triton kernel of ``unmask``: one program decides one block.

Called by ``csrc_triton.ops``, which has checked the arguments.
"""

import torch
import triton
import triton.language as tl

from csrc_triton.types import NO_CONFIDENCE, UNCERTAINTY_UNITS, Blocks, Proposals, Rule, Rules, UnmaskResult

THRESHOLD = tl.constexpr(int(Rule.THRESHOLD))
TOP_K = tl.constexpr(int(Rule.TOP_K))
FACTOR = tl.constexpr(int(Rule.FACTOR))
JOINT_BOUND = tl.constexpr(int(Rule.JOINT_BOUND))
UNITS = tl.constexpr(float(UNCERTAINTY_UNITS))
WITHOUT_LOGITS = tl.constexpr(NO_CONFIDENCE)


# Numbers that change from step to step must not compile the kernel anew.
@triton.jit(do_not_specialize=["num_proposals", "num_probes", "block_length", "canvas_index_stride"])
def _unmask_kernel(
    cells_ptr,
    masked_ptr,
    masked_stride,
    slots_ptr,
    canvas_index_ptr,
    canvas_index_stride,
    end_token_ids_ptr,
    end_token_ids_stride,
    num_output_positions_ptr,
    position_ptr,
    token_ptr,
    confidence_ptr,
    num_proposals,
    num_probes,  # bits of num_proposals
    rule_ptr,
    parameter_ptr,
    min_unmask_ptr,
    canvas_ptr,
    grid_ptr,
    counts_ptr,
    block_length,
    NUM_ENDS: tl.constexpr,
    PADDED_LENGTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    position = tl.arange(0, PADDED_LENGTH)
    valid = position < block_length
    masked_row = masked_ptr + tl.load(slots_ptr + row) * masked_stride + position
    masked = tl.load(masked_row, mask=valid, other=0) != 0
    rule = tl.load(rule_ptr + row)
    parameter = tl.load(parameter_ptr + row)

    # proposals ascend by position: each position looks its own up, by bisection
    flat = row * block_length + position
    before = tl.zeros_like(flat)  # number of proposals at lower positions
    for n in range(num_probes):
        probe = before + (1 << (num_probes - 1 - n))
        in_range = probe <= num_proposals
        lower = tl.load(position_ptr + probe - 1, mask=in_range, other=0) < flat
        before = tl.where(in_range & lower, probe, before)
    has_logits = valid & (before < num_proposals)
    has_logits &= tl.load(position_ptr + before, mask=has_logits, other=-1) == flat
    token = tl.load(token_ptr + before, mask=has_logits, other=0)
    confidence = tl.load(confidence_ptr + before, mask=has_logits, other=WITHOUT_LOGITS)
    tl.store(grid_ptr + flat, confidence, mask=valid)
    score = tl.where(masked & (confidence == confidence), confidence, -1.0)

    # a key of every position, all different: the more confident first, of equals the earlier one, and masked ones first
    bits = (score + 0.0).to(tl.int32, bitcast=True)  # -0.0 is 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # as integers, in the order of the floats
    key = (tl.where(masked, ordered, -0x7FFFFFFF - 1).to(tl.int64) << 32) + (PADDED_LENGTH - 1 - position)
    best = tl.sort(key, descending=True)
    rank = position + 1  # of a sorted key
    ordered = (best >> 32).to(tl.int32)
    score = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    is_candidate = rank <= tl.sum(masked.to(tl.int32))
    score = tl.where(is_candidate, score, WITHOUT_LOGITS)

    factor_passes = (rank + 1).to(tl.float32) * (1.0 - score) < parameter
    top_k_passes = rank.to(tl.float32) <= parameter
    # uncertainties are whole numbers of units: their sum does not depend on its order
    uncertainty = ((1.0 - score) * UNITS).to(tl.int64)
    total = tl.cumsum(uncertainty, axis=0)
    total += tl.where(rule == JOINT_BOUND, uncertainty, 0)
    bound_passes = total < tl.ceil(parameter * UNITS).to(tl.int64)
    passing = tl.where(rule == FACTOR, factor_passes, bound_passes)
    passing = tl.where(rule == TOP_K, top_k_passes, passing)
    passing = tl.where(rule == THRESHOLD, score >= parameter, passing)
    passing = (passing | (rank <= tl.load(min_unmask_ptr + row))) & (score > WITHOUT_LOGITS)
    num_accepted = tl.max(tl.where(passing, rank, 1))
    last_accepted = tl.sum(tl.where(rank == num_accepted, best, 0))
    accepted = masked & (key >= last_accepted)
    still_masked = masked & (key < last_accepted)

    # padding of many blocks may share a cell, which nothing writes: it is never masked
    cell = cells_ptr + tl.load(canvas_index_ptr + row * canvas_index_stride + position, mask=valid, other=0)
    canvas = tl.load(cell, mask=valid, other=0)
    canvas = tl.where(accepted, token.to(tl.int32), canvas)
    tl.store(cell, canvas, mask=accepted)
    tl.store(canvas_ptr + flat, canvas, mask=valid)
    tl.store(masked_row, tl.zeros((PADDED_LENGTH,), tl.uint8), mask=accepted)

    # emission ends at the first end token or undecided position, or with the last output position
    num_output_positions = tl.load(num_output_positions_ptr + row)
    is_end = position < 0
    for n in tl.static_range(NUM_ENDS):
        is_end |= canvas == tl.load(end_token_ids_ptr + row * end_token_ids_stride + n)
    is_end &= (canvas >= 0) & valid
    first_masked = tl.min(tl.where(still_masked, position, PADDED_LENGTH))
    first_end = tl.min(tl.where(is_end, position, PADDED_LENGTH))
    blocked = (first_masked < num_output_positions) & (first_masked <= first_end)
    num_ready = tl.where(blocked, 0, tl.minimum(first_end + 1, num_output_positions))

    num_blocks = tl.num_programs(0)
    tl.store(counts_ptr + row, tl.sum(accepted.to(tl.int32)))
    tl.store(counts_ptr + num_blocks + row, tl.sum(still_masked.to(tl.int32)))
    tl.store(counts_ptr + 2 * num_blocks + row, num_ready)


def unmask(blocks: Blocks, proposals: Proposals, rules: Rules) -> tuple[torch.Tensor, torch.Tensor, UnmaskResult]:
    """See ``ops.unmask``; CPU tensors work only in Triton's interpreter."""
    num_blocks, block_length = blocks.canvas_index.shape
    num_proposals, device = proposals.position.shape[0], blocks.cells.device
    canvas = torch.empty(blocks.canvas_index.shape, dtype=torch.int32, device=device)
    confidence = torch.empty(blocks.canvas_index.shape, dtype=torch.float32, device=device)
    counts = torch.empty(3, num_blocks, dtype=torch.int32, device=device)
    if num_blocks:
        _unmask_kernel[(num_blocks,)](
            blocks.cells,
            blocks.masked.view(torch.uint8),
            blocks.masked.stride(0),
            blocks.slots,
            blocks.canvas_index,
            blocks.canvas_index.stride(0),
            blocks.end_token_ids,
            blocks.end_token_ids.stride(0),
            blocks.num_output_positions,
            *proposals,
            num_proposals,
            num_proposals.bit_length(),
            *rules,
            canvas,
            confidence,
            counts,
            block_length,
            NUM_ENDS=blocks.end_token_ids.shape[1],
            PADDED_LENGTH=triton.next_power_of_2(block_length),
        )
    return canvas, confidence, UnmaskResult(*counts)
