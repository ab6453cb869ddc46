"""Confirmation of drafted tokens: a masked position takes its drafted token where the model proposes the same one.

A few tensor operations on ``[num_blocks, block_length]``, for requests that have a draft; they run on any device.
Arguments are not checked.
"""

import torch

from csrc_triton.types import Blocks, Proposals, UnmaskResult


def confirm(
    blocks: Blocks, proposals: Proposals, drafts: torch.Tensor, draft_threshold: torch.Tensor, result: UnmaskResult
) -> tuple[torch.Tensor, UnmaskResult]:
    """Unmasks positions whose proposal is the drafted token; call it after ``unmask``, with the same blocks.

    Args:
        blocks: ``cells`` and ``masked`` are written in place.
        proposals: Of the step, with the model's own confidence.
        drafts: [num_cells] int32, the drafted token of every cell, -1 for none.
        draft_threshold: [num_blocks] fp32, the confidence that a confirmed proposal has at least; infinite where
            nothing is drafted.
        result: Of ``unmask``.

    Returns:
        [num_blocks, block_length] int32, the tokens of the blocks; the result with the confirmed positions.
    """
    num_blocks, block_length = blocks.canvas_index.shape
    token, confidence = proposals.to_grids(num_blocks, block_length)
    masked = blocks.masked[blocks.slots, :block_length]
    confirmed = masked & (token == drafts[blocks.canvas_index]) & (confidence >= draft_threshold.unsqueeze(-1))
    canvas = blocks.cells[blocks.canvas_index]
    canvas = torch.where(confirmed, token.to(canvas.dtype), canvas)
    blocks.cells[blocks.canvas_index] = canvas
    masked &= ~confirmed
    blocks.masked[blocks.slots, :block_length] = masked
    position = torch.arange(block_length, device=canvas.device)
    is_end = (canvas.unsqueeze(-1) == blocks.end_token_ids.unsqueeze(1)).any(dim=-1) & (canvas >= 0)
    first_end = torch.where(is_end, position, block_length).amin(dim=-1)
    first_masked = torch.where(masked, position, block_length).amin(dim=-1)
    is_open = (first_masked < blocks.num_output_positions) & (first_masked <= first_end)
    num_ready = torch.minimum(first_end + 1, blocks.num_output_positions).masked_fill(is_open, 0)
    num_confirmed = confirmed.sum(dim=-1, dtype=torch.int32)
    return canvas, UnmaskResult(
        result.num_unmasked + num_confirmed, result.num_masked - num_confirmed, num_ready.to(torch.int32)
    )
