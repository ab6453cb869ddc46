"""Token editing of LLaDA2.1 (arXiv 2602.08676, "T2T") on blocks that are rows of tables.

A few tensor operations on ``[num_blocks, block_length]``, for requests that ask for it; they run on any device.
"""

import torch

from csrc_triton.reference import NO_CONFIDENCE

MAX_POST_STEPS = 16  # denoising steps of a block without masks, as in the authors' code


def edit_in_tables(
    cells: torch.Tensor,
    masked: torch.Tensor,
    num_post_steps: torch.Tensor,
    slots: torch.Tensor,
    canvas_index: torch.Tensor,
    logit_cells: torch.Tensor,
    token: torch.Tensor,
    confidence: torch.Tensor,
    edit_threshold: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Replaces written tokens where the model is now surer than the threshold of another one; call it before unmasking.

    Args:
        cells, masked, slots, canvas_index, logit_cells, token, confidence: As of ``tables.unmask_in_tables``; the
            positions with logits are those of the whole block where a request edits.
        num_post_steps: [num_slots] int32, written in place: steps that the block has seen without a mask.
        edit_threshold: [num_blocks] fp32, confidence above which another token replaces the one that is there;
            infinite where nothing is edited.

    Returns:
        [num_blocks] bool, which blocks are not finished, whatever is unmasked in this step: one that edits is when a
        step without masks edits nothing, or after MAX_POST_STEPS of those. [num_logits] bool, which positions with
        logits are masked.
    """
    proposal = torch.zeros(canvas_index.shape, dtype=cells.dtype, device=cells.device)
    best = torch.full(canvas_index.shape, NO_CONFIDENCE, dtype=torch.float32, device=cells.device)
    proposal.view(-1)[logit_cells] = token.to(cells.dtype)
    best.view(-1)[logit_cells] = confidence
    canvas, undecided = cells[canvas_index], masked[slots, : canvas_index.shape[1]]
    edited = ~undecided & (best > edit_threshold.unsqueeze(-1)) & (proposal != canvas)
    cells[canvas_index] = torch.where(edited, proposal, canvas)
    is_full = ~undecided.any(dim=-1)
    post_steps = num_post_steps[slots] + is_full
    num_post_steps[slots] = post_steps.to(num_post_steps.dtype)
    goes_on = edited.any(dim=-1) & (post_steps < MAX_POST_STEPS)
    return edit_threshold.isfinite() & (~is_full | goes_on), undecided.reshape(-1)[logit_cells]
