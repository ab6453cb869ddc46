"""Prophet: everything is filled once the model is sure enough for the stage of decoding.

Source: Prophet (arXiv 2508.19982; pixeli99/Prophet). With g the mean gap between the two best logits and p = step /
total steps: all masked positions are filled when g >= 7.5 while p < 0.33, 5.0 while p < 0.67, and 2.5 behind that. Step
i of T, from 0, has p = i / T; with ``prophet_progress`` ``release`` it has (i + 1) / T, as in the authors' code.

By default g is taken over all masked positions. The authors' scripts put a phrase such as "The answer is" into the
answer, and take g over five positions behind it. That is ``prophet_region`` beside a template. Ours: only masked
positions of the active block have a gap, and behind the region the rest is filled. See ``early_exit`` for what else is
ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from vllm_osdt.declaration import count, number, option
from vllm_osdt.geometry import MAX_BLOCK_LENGTH, DecodeShape
from vllm_osdt.policies.base import Step, places
from vllm_osdt.policies.early_exit import EarlyExit, EarlyExitOptions, is_adaptive

if TYPE_CHECKING:
    import torch

FIRST, SECOND = 0.33, 0.67  # progress at which a stage ends
EARLY, MIDDLE, LATE, COUNTS_ITSELF, REGION_START, REGION_LENGTH = range(2, 8)  # constants
KNOWN = 1  # column of Step.state: behind the last column that has been open; before it what is not open is decided


@dataclass(frozen=True)
class ProphetOptions(EarlyExitOptions):
    """The gap that each stage asks for."""

    prophet_early: float = option(
        7.5, number(ge=0), "Of `prophet`: mean gap of the two best logits that is enough while progress is below 0.33."
    )
    prophet_middle: float = option(5.0, number(ge=0), "Of `prophet`: the same from there to 0.67.")
    prophet_late: float = option(2.5, number(ge=0), "Of `prophet`: the same from there on.")
    prophet_region: int | None = option(
        None,
        count(1, MAX_BLOCK_LENGTH) | None,
        "Of `prophet`: the gap is that of so many positions behind the last given text with a hole behind it "
        "(`osdt_infill`), as far as they are masked. The authors' scripts have 5. Blocks before them have no early "
        "exit, and once they are decided the rest is filled. `null`, and without such text: all masked positions.",
        unit="positions",
    )
    prophet_progress: str = option(
        "done",
        Literal["done", "release"],
        "Of `prophet`: what progress is in step i of T, from 0. `done`: the share of the steps that are done, i / T. "
        "`release`, as in the authors' code: the step counts itself, (i + 1) / T. Beside `commit_threshold` and "
        "`calibrated` progress is the committed share, and this says nothing.",
    )


class Prophet(EarlyExit):
    """Three gaps for three stages."""

    name = "prophet"
    Options = ProphetOptions

    def numbers(self, options: ProphetOptions, shape: DecodeShape) -> Sequence[float]:
        """See the base; the region has length 0 where all masked positions count."""
        counts_itself = float(options.prophet_progress == "release")
        gaps = options.prophet_early, options.prophet_middle, options.prophet_late
        start, length = shape.answer_start, options.prophet_region
        region = (0, 0) if start is None or length is None else (start, length)
        return *gaps, counts_itself, *region

    def watched(self, step: Step) -> "tuple[torch.Tensor, torch.Tensor]":
        """Those of the region; nothing is asked for once all of it is decided."""
        length, column = step.constants[:, REGION_LENGTH].long(), places(step.score.shape[1], step.score.device)
        first = step.constants[:, REGION_START].long() - step.output_index  # column of the region's first position
        behind = column - first.unsqueeze(1)
        is_inside = ((behind >= 0) & (behind < length.unsqueeze(1))) | (length == 0).unsqueeze(1)
        counts, known = step.is_open & is_inside, step.state[:, KNOWN]
        known.copy_(known.maximum(((column + 1) * step.is_open).amax(dim=1).to(known.dtype)))
        return counts, (length > 0) & (first + length <= known) & ~counts.any(dim=1)

    def without_use(self, options: ProphetOptions) -> frozenset[str]:
        """How steps are counted, where their number is unknown."""
        return frozenset(["prophet_progress"] if is_adaptive(options) else [])

    def progress(self, step: Step, index: "torch.Tensor", last: "torch.Tensor") -> "torch.Tensor":
        """The share of the steps that are done, with or without this one."""
        return (index + step.constants[:, COUNTS_ITSELF]) / (last + 1).clamp(min=1)

    def is_sure(self, step: Step, gap: "torch.Tensor", progress: "torch.Tensor") -> "torch.Tensor":
        """See the module."""
        import torch  # late: options are read without it

        early, middle, late = (step.constants[:, column] for column in (EARLY, MIDDLE, LATE))
        return gap >= torch.where(progress < FIRST, early, torch.where(progress < SECOND, middle, late))

    def adjust_by_loop(self, step: Step) -> None:
        """See the base."""
        from vllm_osdt.policies.loops import prophet  # late: options are read without torch

        prophet(step)
