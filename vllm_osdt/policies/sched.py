"""SchED: everything is filled once the model is sure enough, and how sure it has to be falls with the progress.

Source: SchED (arXiv 2512.02892; amr-mohamedd/SchED). With g the mean gap between the two best logits and p =
i / (T - 1) at step i of T, all masked positions are filled when g >= tau(p). That falls from ``sched_high`` to
``sched_low`` in a line, a cosine, or as low + (high - low) exp(-rate p). Defaults: the authors' code, but for
``sched_max_change``. The code fills only where no position's best token differs from the step before; the published
rule does not ask for that. It also counts ``sched_min_progress`` in committed positions, where this is p. See
``early_exit`` for what else is ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from vllm_osdt.declaration import count, number, option
from vllm_osdt.errors import InvalidOptionError
from vllm_osdt.geometry import MAX_BLOCK_LENGTH, DecodeShape
from vllm_osdt.policies.base import Step
from vllm_osdt.policies.early_exit import EarlyExit, EarlyExitOptions

if TYPE_CHECKING:
    import torch

LINEAR, COSINE = -1.0, -2.0  # in the place of the rate of the exponential


@dataclass(frozen=True)
class SchedOptions(EarlyExitOptions):
    """The threshold by progress, and what else an exit needs."""

    sched_high: float = option(
        7.5, number(ge=0), "Of `sched`: mean gap of the two best logits that is enough at the beginning."
    )
    sched_low: float = option(2.5, number(ge=0), "Of `sched`: the same at the end.")
    sched_form: str = option(
        "cosine", Literal["linear", "cosine", "exponential"], "Of `sched`: how the gap falls with the progress."
    )
    sched_rate: float = option(
        4.0,
        number(gt=0),
        "Of `sched`: k of the exponential, low + (high − low) · exp(−k · progress).",
        needs="sched_form=exponential",
    )
    sched_patience: int = option(
        0,
        count(0, MAX_BLOCK_LENGTH),
        "Of `sched`: so many steps of the block in a row, before the one that exits, have changed little enough "
        "(`sched_max_change`) and are behind `sched_min_progress`.",
        unit="denoising steps",
    )
    sched_min_progress: float = option(0.0, number(ge=0, le=1), "Of `sched`: no exit before this progress.")
    sched_max_change: float = option(
        1.0,
        number(ge=0, le=1),
        "Of `sched`: share of the masked positions whose best token may differ from that of the step before; 0 is the "
        "authors' code. All differ in a block's first step.",
    )


class Sched(EarlyExit):
    """State: steps in a row that changed little enough, and whether the block has seen a step. Memory: best tokens."""

    name = "sched"
    Options = SchedOptions
    memory_size = 1

    def check(self, options: SchedOptions) -> None:
        """The threshold must not rise."""
        if options.sched_low > options.sched_high:
            raise InvalidOptionError(
                f"sched_low is {options.sched_low:g}, above sched_high {options.sched_high:g}; lower it.",
                refusal="sched-bounds",
                parameter="sched_low",
                value=options.sched_low,
            )

    def numbers(self, options: SchedOptions, shape: DecodeShape) -> Sequence[float]:
        """See the base."""
        rate = {"linear": LINEAR, "cosine": COSINE, "exponential": options.sched_rate}[options.sched_form]
        gates = options.sched_patience, options.sched_min_progress, options.sched_max_change
        return options.sched_high, options.sched_low, rate, *gates

    def progress(self, step: Step, index: "torch.Tensor", last: "torch.Tensor") -> "torch.Tensor":
        """0 in the first step and 1 in the last; 1 in the only one."""
        return (index / last.clamp(min=1)).masked_fill(last <= 0, 1.0)

    def is_sure(self, step: Step, gap: "torch.Tensor", progress: "torch.Tensor") -> "torch.Tensor":
        """See the module."""
        import torch  # late: options are read without it

        high, low, rate, patience, min_progress, max_change = step.constants[:, 2:].unbind(dim=1)
        falling = torch.where(rate == COSINE, (1 + torch.cos(torch.pi * progress)) / 2, torch.exp(-rate * progress))
        falling = torch.where(rate == LINEAR, 1 - progress, falling)
        best, before = step.reading[:, :, 2], step.memory[:, :, 0]
        num_changed = ((best != before) & step.is_open).sum(dim=1)
        change = num_changed / step.is_open.sum(dim=1).clamp(min=1)
        change = change.masked_fill(step.state[:, 2] == 0, 1.0)
        step.memory[:, :, 0] = best
        step.state[:, 2] = 1.0
        is_calm = (progress >= min_progress) & (change <= max_change)
        step.state[:, 1] = (step.state[:, 1] + 1).masked_fill(~is_calm, 0.0)
        return is_calm & (step.state[:, 1] > patience) & (gap >= low + (high - low) * falling)

    def adjust_by_loop(self, step: Step) -> None:
        """See the base."""
        from vllm_osdt.policies.loops import sched  # late: options are read without torch

        sched(step)
