"""``unmask`` on blocks that are rows of tables, the form in which an engine keeps them."""

from collections.abc import Callable

import torch

from csrc_triton.reference import NO_CONFIDENCE, UnmaskResult


def unmask_in_tables(
    unmask: Callable[..., UnmaskResult],
    cells: torch.Tensor,
    masked: torch.Tensor,
    slots: torch.Tensor,
    canvas_index: torch.Tensor,
    logit_cells: torch.Tensor,
    token: torch.Tensor,
    confidence: torch.Tensor,
    rule: torch.Tensor,
    parameter: torch.Tensor,
    end_token_ids: torch.Tensor,
    num_needed: torch.Tensor,
    quota: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, UnmaskResult]:
    """Gathers the blocks, takes ``unmask``'s decision and writes it back.

    Args:
        unmask: An implementation of ``ops.unmask`` without argument checks.
        cells: [num_cells] int32, written in place: the tokens of all canvases.
        masked: [num_slots, at least block_length] bool, written in place: True where undecided.
        slots: [num_blocks] int64, distinct: row of ``masked`` of each block.
        canvas_index: [num_blocks, block_length] int64, place of each position in ``cells``.
        logit_cells: [num_masked] int64, flat index into [num_blocks, block_length] of each masked position with logits;
            one without is less sure than any with.
        token: [num_masked] int64, what each proposes.
        confidence: [num_masked] fp32, how sure it is.
        rule, parameter, end_token_ids, num_needed, quota: See ``ops.unmask``.

    Returns:
        The blocks' tokens, [num_blocks, block_length] int32; the confidences at their places, [num_blocks,
        block_length] fp32, below 0 elsewhere; the counts of ``ops.unmask``.
    """
    proposal = torch.zeros(canvas_index.shape, dtype=token.dtype, device=cells.device)
    best = torch.full(canvas_index.shape, NO_CONFIDENCE, dtype=torch.float32, device=cells.device)
    proposal.view(-1)[logit_cells] = token
    best.view(-1)[logit_cells] = confidence
    block_length = canvas_index.shape[1]
    canvas, undecided = cells[canvas_index], masked[slots, :block_length]
    result = unmask(canvas, undecided, proposal, best, rule, parameter, end_token_ids, num_needed, quota)
    cells[canvas_index] = canvas
    masked[slots, :block_length] = undecided
    return canvas, best, result
