"""What policies that adjust a step share: the step's grids, the most confident positions, and a choice of positions.

On the CPU each is one compiled loop, since a small tensor operation there costs more than what it computes, most of all
right after a model has run. Elsewhere they are tensor operations, the loops' twins in ``reference``. Arguments are not
checked.
"""

import torch

from csrc_triton import cpu, reference
from csrc_triton.types import Grids, Proposals


def grids(proposals: Proposals, masked: torch.Tensor, slots: torch.Tensor, block_length: int) -> Grids:
    """The grids of a step.

    Args:
        proposals: Of the step; positions that are not masked may be among them.
        masked: [num_slots, at least block_length] bool.
        slots: [num_blocks] int64, the row of ``masked`` of each block.
        block_length: Of the longest block.
    """
    found = cpu.grids if masked.device.type == "cpu" else reference.grids
    return found(proposals, masked, slots, block_length)


def best(score: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    """The positions with the highest scores, the first ones among equals.

    Args:
        score: [num_blocks, block_length] fp32, any strides; NaN counts as -1, as in ``unmask``.
        number: [num_blocks], how many; whole numbers of any dtype.

    Returns:
        [num_blocks, block_length] bool.
    """
    return cpu.best(score, number) if score.device.type == "cpu" else reference.best(score, number)


def ranks(score: torch.Tensor) -> torch.Tensor:
    """How many positions come before each one, int64 [num_blocks, block_length]; arguments as of :func:`best`."""
    return cpu.ranks(score) if score.device.type == "cpu" else reference.ranks(score)


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
    write = cpu.choose if score.device.type == "cpu" else reference.choose
    write(score, parameter, rank, chosen, is_open)


def quota(numbers: torch.Tensor, step_index: torch.Tensor) -> torch.Tensor:
    """How many positions a step decides, int64 [num_blocks]: 1 in the first steps and behind the last.

    Args:
        numbers: [num_blocks, 4] fp32, any strides, whole: positions of each other step; how many of those, the first
            ones, have one more; how many steps are the first ones; and the last, how many steps there are with them.
        step_index: [num_blocks] int64.
    """
    found = cpu.quota if numbers.device.type == "cpu" else reference.quota
    return found(numbers, step_index)


def take_rows(
    numbers: torch.Tensor, memory: torch.Tensor, slot: torch.Tensor, offset: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is kept of some positions and of their requests.

    Args:
        numbers: [num_slots, N] fp32.
        memory: [num_slots, at least block_length, K] fp32, any strides.
        slot, offset: [S] int64.

    Returns:
        [S, N] and [S, K] fp32, copies.
    """
    take = cpu.take_rows if slot.device.type == "cpu" else reference.take_rows
    return take(numbers, memory, slot, offset)


def put_rows(table: torch.Tensor, index: torch.Tensor, offset: torch.Tensor, own: torch.Tensor) -> None:
    """Write numbers of positions: ``table[index, offset] = own``.

    Args:
        table: [any, at least block_length, K] fp32, any strides, written.
        index, offset: [S] int64.
        own: [S, K] fp32.
    """
    put = cpu.put_rows if index.device.type == "cpu" else reference.put_rows
    put(table, index, offset, own)
