"""Prophet: everything is filled once the model is sure enough for the stage of decoding.

Source: Prophet (arXiv 2508.19982; pixeli99/Prophet). With g the mean gap between the two best logits and p = step /
total steps: all masked positions are filled when g >= 7.5 while p < 0.33, 5.0 while p < 0.67, and 2.5 behind that. The
authors' scripts take g over five tokens behind a phrase that they put into the answer, which tells of one task; here it
is taken over all masked positions. Step i of T, from 0, has p = i / T; with ``prophet_progress`` ``release`` it has
(i + 1) / T, as in the authors' code. See ``early_exit`` for what else is ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from vllm_osdt.declaration import number, option
from vllm_osdt.policies.base import Step
from vllm_osdt.policies.early_exit import EarlyExit, EarlyExitOptions, is_adaptive

if TYPE_CHECKING:
    import torch

FIRST, SECOND = 0.33, 0.67  # progress at which a stage ends
EARLY, MIDDLE, LATE, COUNTS_ITSELF = range(2, 6)  # constants


@dataclass(frozen=True)
class ProphetOptions(EarlyExitOptions):
    """The gap that each stage asks for."""

    prophet_early: float = option(
        7.5, number(ge=0), "Of `prophet`: mean gap of the two best logits that is enough while progress is below 0.33."
    )
    prophet_middle: float = option(5.0, number(ge=0), "Of `prophet`: the same from there to 0.67.")
    prophet_late: float = option(2.5, number(ge=0), "Of `prophet`: the same from there on.")
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

    def numbers(self, options: ProphetOptions) -> Sequence[float]:
        """See the base."""
        counts_itself = float(options.prophet_progress == "release")
        return options.prophet_early, options.prophet_middle, options.prophet_late, counts_itself

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
