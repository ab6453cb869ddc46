"""Token editing of LLaDA2.1 (arXiv 2602.08676, "T2T").

A few tensor operations on ``[num_blocks, block_length]``, for requests that ask for it; they run on any device.
Arguments are not checked.
"""

import torch

from csrc_triton.types import Blocks, Proposals

MAX_POST_STEPS = 16  # denoising steps of a block without masks, as in the authors' code


def edit(
    blocks: Blocks, proposals: Proposals, num_post_steps: torch.Tensor, edit_threshold: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Replaces written tokens where the model is now surer than the threshold of another one; call it before unmasking.

    Args:
        blocks: ``cells`` is written in place.
        proposals: Those of the whole block where a request edits.
        num_post_steps: [num_slots] int32, written in place: steps that the block has seen without a mask.
        edit_threshold: [num_blocks] fp32, confidence above which another token replaces the one that is there;
            infinite where nothing is edited.

    Returns:
        [num_blocks] bool, which blocks are not finished, whatever is unmasked in this step: one that edits is when a
        step without masks edits nothing, or after MAX_POST_STEPS of those. [M] bool, which proposals are of masked
        positions.
    """
    num_blocks, block_length = blocks.canvas_index.shape
    token, confidence = proposals.to_grids(num_blocks, block_length)
    canvas, masked = blocks.cells[blocks.canvas_index], blocks.masked[blocks.slots, :block_length]
    edited = ~masked & (confidence > edit_threshold.unsqueeze(-1)) & (token != canvas)
    blocks.cells[blocks.canvas_index] = torch.where(edited, token.to(canvas.dtype), canvas)
    is_full = ~masked.any(dim=-1)
    post_steps = num_post_steps[blocks.slots] + is_full
    num_post_steps[blocks.slots] = post_steps.to(num_post_steps.dtype)
    goes_on = edited.any(dim=-1) & (post_steps < MAX_POST_STEPS)
    return edit_threshold.isfinite() & (~is_full | goes_on), proposals.of_grid(masked)
