"""What policies that adjust a step share: the step's grids, the most confident positions, and a choice of positions.

On the CPU each is one compiled loop, since a small tensor operation there costs more than what it computes, most of all
right after a model has run. Elsewhere they are tensor operations. Both give the same bits. Arguments are not checked.
"""

from typing import NamedTuple

import torch

from csrc_triton import cpu
from csrc_triton.types import CHOSEN, NO_CONFIDENCE, Proposals


class Grids(NamedTuple):
    """A step's proposals by position, [num_blocks, block_length] each, all tensors of their own."""

    token: torch.Tensor
    """int64, 0 without logits."""
    confidence: torch.Tensor
    """fp32, of masked positions that have logits, -1 for NaN; ``NO_CONFIDENCE`` elsewhere."""
    score: torch.Tensor
    """The same."""
    is_open: torch.Tensor
    """bool, masked positions that have logits."""
    masked: torch.Tensor
    """bool, masked positions."""


def grids(proposals: Proposals, masked: torch.Tensor, slots: torch.Tensor, block_length: int) -> Grids:
    """The grids of a step.

    Args:
        proposals: Of the step; positions that are not masked may be among them.
        masked: [num_slots, at least block_length] bool.
        slots: [num_blocks] int64, the row of ``masked`` of each block.
        block_length: Of the longest block.
    """
    if masked.device.type == "cpu":
        return Grids(*cpu.grids(proposals, masked, slots, block_length))
    token, found = proposals.to_grids(slots.shape[0], block_length)
    own = masked.index_select(0, slots)[:, :block_length]
    confidence = torch.where(own, found.nan_to_num_(nan=-1.0), NO_CONFIDENCE)
    return Grids(token, confidence, confidence.clone(), confidence != NO_CONFIDENCE, own)


def best(score: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    """The positions with the highest scores, the first ones among equals.

    Args:
        score: [num_blocks, block_length] fp32, any strides; NaN counts as -1, as in ``unmask``.
        number: [num_blocks], how many; whole numbers of any dtype.

    Returns:
        [num_blocks, block_length] bool.
    """
    if score.device.type == "cpu":
        return cpu.best(score, number)
    order = score.nan_to_num(nan=-1.0).argsort(dim=1, descending=True, stable=True)
    is_first = torch.arange(score.shape[1], device=score.device) < number.unsqueeze(1)
    return torch.empty_like(is_first).scatter_(1, order, is_first)


def ranks(score: torch.Tensor) -> torch.Tensor:
    """How many positions come before each one, int64 [num_blocks, block_length]; arguments as of :func:`best`."""
    if score.device.type == "cpu":
        return cpu.ranks(score)
    order = score.nan_to_num(nan=-1.0).argsort(dim=1, descending=True, stable=True)
    place = torch.arange(score.shape[1], device=score.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, place)


def choose(
    score: torch.Tensor, parameter: torch.Tensor, rank: torch.Tensor, chosen: torch.Tensor, is_open: torch.Tensor
) -> None:
    """Have ``Rule.THRESHOLD`` unmask the chosen positions that are open, the first by rank where there are none.

    Args:
        score: [num_blocks, block_length] fp32, written: ``CHOSEN`` of what is chosen, else the rank, clamped to
            [-1, 1]; ``NO_CONFIDENCE`` where it is not open.
        parameter: [num_blocks] fp32, written: ``CHOSEN``.
        rank: [num_blocks, block_length] fp32, any strides.
        chosen: [num_blocks, block_length] bool, any strides.
        is_open: [num_blocks, block_length] bool.
    """
    if score.device.type == "cpu":
        cpu.choose(score, parameter, rank, chosen, is_open)
        return
    torch.clamp(rank, -1.0, 1.0, out=score)
    score.masked_fill_(chosen, CHOSEN).masked_fill_(~is_open, NO_CONFIDENCE)
    parameter.fill_(CHOSEN)
