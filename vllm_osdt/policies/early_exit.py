"""What ``prophet`` and ``sched`` share: an ordinary schedule, until the model is so sure that all the rest is filled.

Sure is a matter of the mean gap between a position's best and second best logit, over the masked positions, and of the
progress. In the papers the masked positions are those of the whole answer, whose decoding then ends. Here they are
those of the active block, or sub-block, since a step reads no others; where the block is the whole canvas that is the
published rule. A position of which sampling parameters leave one token does not count.

The ordinary schedule is that of ``fixed_steps``. Ours: a threshold beside it, whose commits are adaptive, so that the
number of steps is unknown; progress is then the committed share of the positions, as the authors of SchED suggest.
With a temperature the rest is filled with the sampled proposals, not with the most likely tokens.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from csrc_triton.types import Rule
from vllm_osdt.calibration.thresholds import Thresholds
from vllm_osdt.declaration import number, option
from vllm_osdt.geometry import MAX_BLOCK_LENGTH, Canvas, CanvasRequest, DecodeShape
from vllm_osdt.policies.base import PositionLogits, Schedule, Step, constant
from vllm_osdt.policies.fixed_steps import StepsOptions, positions_per_step, resolve_steps
from vllm_osdt.policies.osdt import CalibratedOptions, CalibratedPolicy, calibrated_schedule

if TYPE_CHECKING:
    import torch

ADAPTIVE = -1.0  # in the place of the last step's index, where that is unknown
EVERY = -1.0  # a threshold that every confidence reaches


@dataclass(frozen=True)
class EarlyExitOptions(StepsOptions, CalibratedOptions):
    """What an exit fills, and which positions pass before it."""

    exit_scope: str = option(
        "block",
        Literal["block", "answer"],
        "Of `prophet` and `sched`: what an early exit fills. `block`: the active block; progress counts in it. "
        "`answer`: that, and every later block in its first step; progress counts in the whole canvas.",
    )
    commit_threshold: float | None = option(
        None,
        number(gt=0, le=1) | None,
        "Of `prophet` and `sched`: before an exit, positions of this confidence are unmasked too, and `steps` are "
        "optional, as with `static_threshold`. `null`: those of `fixed_steps` alone.",
        excludes="calibrated",
    )


def is_adaptive(options: Any) -> bool:
    """Whether positions pass a threshold before an exit, so that the number of steps is unknown."""
    return options.calibrated or options.commit_threshold is not None


class EarlyExit(CalibratedPolicy):
    """Fills all positions of a step once the mean gap of its logits is large enough; subclasses say when that is.

    Constants: the index of the last denoising step, or ``ADAPTIVE``; steps of a block, 0 where each block counts by
    itself; up to 6 of the subclass. State: masked positions when the block was entered. Carry: 1 behind an exit that is
    for the whole answer.
    """

    with_profile = "`commit_threshold`; an exit fills what is below it"
    adjusts = True
    reads_logits = True

    @abstractmethod
    def numbers(self, options: Any, shape: DecodeShape) -> Sequence[float]:
        """At most 6 numbers that :meth:`is_sure` finds in ``step.constants`` from the third on."""

    @abstractmethod
    def is_sure(self, step: Step, gap: "torch.Tensor", progress: "torch.Tensor") -> "torch.Tensor":
        """Whether a step fills everything, bool ``[R]``.

        Args:
            step: Of which ``state[:, 1:]``, memory and constants are the subclass's.
            gap: float32 ``[R]``, mean difference of the two best logits over the positions that count; -inf without
                any, inf where none is asked for.
            progress: float32 ``[R]`` in [0, 1], see :meth:`progress`.
        """

    @abstractmethod
    def progress(self, step: Step, index: "torch.Tensor", last: "torch.Tensor") -> "torch.Tensor":
        """Progress where the number of steps is known, float32 ``[R]``.

        Args:
            step: Of which ``constants`` are the subclass's.
            index: float32 ``[R]``, of the step, from 0.
            last: float32 ``[R]``, of the last one.
        """

    def watched(self, step: Step) -> "tuple[torch.Tensor, torch.Tensor]":
        """The positions whose gaps count, bool ``[R, W]``; and bool ``[R]``, whether no gap is asked for any more."""
        return step.is_open, step.is_open.new_zeros(step.is_open.shape[0])

    def resolve(self, options: EarlyExitOptions, asked: CanvasRequest, canvas: Canvas) -> dict[str, Any]:
        """Total steps of the canvas; beside a threshold only where the request asks for steps."""
        if is_adaptive(options) and options.steps is None and options.steps_per_block is None:
            return {}
        return {"steps": resolve_steps(options, asked, canvas)}

    def schedule(self, options: EarlyExitOptions, shape: DecodeShape, thresholds: Thresholds | None = None) -> Schedule:
        """See the module."""
        shares = None if options.steps is None else positions_per_step(options.steps, shape)
        of_answer = options.exit_scope == "answer"
        if is_adaptive(options):
            constants = (ADAPTIVE, float(of_answer), *self.numbers(options, shape))
            schedule = (
                calibrated_schedule(options, shape, thresholds)
                if options.commit_threshold is None
                else constant(shape, Rule.THRESHOLD, options.commit_threshold)
            )
            return replace(schedule, min_unmask=shares, constants=constants)
        assert options.steps is not None and shares is not None
        per_block = options.steps // shape.num_blocks
        last = (options.steps if of_answer else per_block) - 1
        constants = (float(last), float(per_block * of_answer), *self.numbers(options, shape))
        table = np.tile(shares.astype(np.float32), (shape.num_blocks, 1))
        return Schedule(Rule.TOP_K, table, constants=constants)

    def read(self, rows: PositionLogits) -> None:
        """The gap between the two best logits, whether there are two, and which token is the best."""
        from csrc_triton.reading import best_two  # late: options are read without torch

        best_two(rows.logits, rows.reading)

    @abstractmethod
    def adjust_by_loop(self, step: Step) -> None:
        """As :meth:`adjust_by_tensors`, on the CPU, where a small tensor operation takes longer than all of it."""

    def adjust(self, step: Step) -> None:
        """Have everything pass where the model is sure."""
        if step.score.device.type == "cpu":
            self.adjust_by_loop(step)
        else:
            self.adjust_by_tensors(step)

    def adjust_by_tensors(self, step: Step) -> None:
        """See :meth:`adjust`."""
        import torch  # late: options are read without it

        last, per_block = step.constants[:, 0], step.constants[:, 1]
        num_open = step.is_open.sum(dim=1)
        step.state[:, 0] = step.num_at_entry(step.state[:, 0])
        counts, is_past = self.watched(step)
        number = (step.reading[:, :, 1] * counts).sum(dim=1)
        # In float64 the sum does not depend on how it is taken, and so not on the longest block of the batch.
        gap = ((step.reading[:, :, 0] * counts).double().sum(dim=1) / number.clamp(min=1)).float()
        gap = gap.masked_fill(number == 0, -torch.inf).masked_fill(is_past, torch.inf)
        left = torch.where(per_block > 0, step.num_left / step.num_positions, num_open / step.state[:, 0].clamp(min=1))
        known = self.progress(step, step.block_index * per_block + step.step_index, last)
        progress = torch.where(last == ADAPTIVE, 1.0 - left, known).clamp(0.0, 1.0)
        exits = self.is_sure(step, gap, progress)
        fills = exits | (step.carry[:, 0] > 0)
        step.carry[:, 0] = (fills & (per_block > 0)).to(step.carry.dtype)
        everything = torch.where(last == ADAPTIVE, EVERY, float(MAX_BLOCK_LENGTH))
        step.parameter.copy_(torch.where(fills, everything, step.parameter))
