"""LLaDA's low-confidence schedule: a fixed number of denoising steps per block, the most confident positions first.

Source: LLaDA (arXiv 2502.09992), appendix B.4; ``get_num_transfer_tokens`` of the authors' code.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from csrc_triton.types import Rule
from vllm_osdt.calibration.thresholds import Thresholds
from vllm_osdt.declaration import count, option
from vllm_osdt.errors import InvalidOptionError
from vllm_osdt.geometry import MAX_BLOCK_LENGTH, Canvas, CanvasRequest, DecodeShape
from vllm_osdt.policies.base import Policy, Schedule, Step

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class StepsOptions:
    """How many denoising steps there are."""

    steps: int | None = option(
        None,
        count() | None,
        "Total denoising steps of `fixed_steps`, a multiple of the number of blocks. With `static_threshold`, a step "
        "unmasks at least as many positions as `fixed_steps` would: the dynamic rule of SDAR and LLaDA2. With `klass`, "
        "`less` and `ccd`, a step unmasks so many where none is stable. With `dimple`, blocks take at most so many. "
        "`prophet` and `sched` take them up to an early exit.",
        unit="denoising steps",
        default_text="one token per step",
        excludes="steps_per_block",
        follows_policy=False,
    )
    steps_per_block: int | None = option(
        None,
        count(1, MAX_BLOCK_LENGTH) | None,
        "Denoising steps of each block, whatever their number (SDAR's `denoising_steps`). Send it instead of `steps`.",
        unit="denoising steps",
        excludes="steps",
        follows_policy=False,
    )


class FixedSteps(Policy):
    """block_length // s positions a step, one more in the first block_length mod s of the s steps.

    Where a block's first step decides its first position alone, the other s - 1 share the rest likewise; a block of one
    step then takes two. Sub-blocks have equal parts of the s steps and are shared out one by one.
    """

    name = "fixed_steps"
    Options = StepsOptions
    with_profile = "it has no threshold"

    def resolve(self, options: StepsOptions, asked: CanvasRequest, canvas: Canvas) -> dict[str, Any]:
        """Total steps of the canvas, one token per step where the request does not say."""
        return {"steps": resolve_steps(options, asked, canvas)}

    def schedule(self, options: StepsOptions, shape: DecodeShape, thresholds: Thresholds | None = None) -> Schedule:
        """See the class."""
        assert options.steps is not None
        shares = positions_per_step(options.steps, shape)
        return Schedule(Rule.TOP_K, np.tile(shares.astype(np.float32), (shape.num_blocks, 1)))


def quota_numbers(options: StepsOptions, shape: DecodeShape) -> Sequence[float]:
    """The 4 constants of which :func:`quota_of` makes how many positions ``fixed_steps`` would take in each step."""
    if options.steps is None:
        return 1, 0, 0, 0
    row, num_alone = positions_per_step(options.steps, shape), int(shape.decides_first_alone)
    shared = row[num_alone : np.count_nonzero(row)]
    share = int(shared.min(initial=shape.block_length))
    return share, int((shared > share).sum()), num_alone, num_alone + shared.size


def quota_of(step: Step, column: int) -> "torch.Tensor":
    """Positions that ``fixed_steps`` would take, int64 ``[R]``, at least 1; without steps it is 1.

    Args:
        step: Of a model without sub-blocks.
        column: The first of ``step.constants`` that :func:`quota_numbers` made.
    """
    from csrc_triton.adjusting import quota  # late: options are read without torch

    return quota(step.constants[:, column : column + 4], step.step_index)


def resolve_if_asked(options: StepsOptions, asked: CanvasRequest, canvas: Canvas) -> dict[str, Any]:
    """Total steps of the canvas, where the request asks for steps; what ``Policy.resolve`` returns."""
    if options.steps is None and options.steps_per_block is None:
        return {}
    return {"steps": resolve_steps(options, asked, canvas)}


def positions_per_step(steps: int, shape: DecodeShape) -> np.ndarray:
    """The positions that each step of one block unmasks, int32 ``[block_length]``, 0 behind the last step.

    Args:
        steps: Of all blocks together.
        shape: The request's blocks.
    """
    sub_block = shape.sub_block_length or shape.block_length
    num_parts = shape.block_length // sub_block
    steps_per_part = steps // shape.num_blocks // num_parts
    first = _shares(sub_block, steps_per_part, int(shape.decides_first_alone))
    shares = [*first, *_shares(sub_block, steps_per_part, 0) * (num_parts - 1)]
    row = np.zeros(shape.block_length, dtype=np.int32)
    row[: len(shares)] = shares[: row.size]
    return row


def _shares(num_positions: int, num_steps: int, num_alone: int) -> list[int]:
    """Positions of each step; with ``num_alone`` the first step is of one position."""
    num_shared = num_positions - num_alone
    shared_steps = max(num_steps - num_alone, int(num_shared > 0))
    share, remainder = divmod(num_shared, max(shared_steps, 1))
    return [1] * num_alone + [share + (step < remainder) for step in range(shared_steps)]


def resolve_steps(options: StepsOptions, asked: CanvasRequest, canvas: Canvas) -> int:
    """Total denoising steps of a canvas.

    A user counts blocks of new tokens; a prompt's incomplete last block may make one more.

    Raises:
        InvalidOptionError: The steps cannot be shared out to the blocks.
    """
    block, num_blocks = canvas.block_length, canvas.num_blocks
    name = "steps" if options.steps_per_block is None else "steps_per_block"
    steps = getattr(options, name)
    if steps is None:
        return num_blocks * block
    num_asked = num_blocks
    if name == "steps_per_block":
        num_asked = 1
    elif asked.is_block_causal and asked.max_tokens is not None:
        num_asked = math.ceil(asked.max_tokens / block)
    sub_block = asked.sub_block_length or block
    parts = num_asked * (block // sub_block)
    if steps % parts or not parts <= steps <= num_asked * block:
        blocks = f"{num_asked} block{'s' * (num_asked > 1)} of {block}"
        if parts > num_asked:
            blocks += f", each {parts // num_asked} sub-blocks of {sub_block},"
        raise InvalidOptionError(
            f"{name} is {steps}; with {blocks} it must be a multiple of {parts} from {parts} to {num_asked * block}.",
            refusal="steps-share",
            parameter=name,
            value=steps,
        )
    return steps // num_asked * num_blocks
