"""LESS: positions that are sure, keep their best token, and whose distribution has stopped moving.

Source: LESS (arXiv 2606.16908), mutual-stability sampling, and the authors' code (amr-mohamedd/LESS-Is-More), whose
defaults these are: masked positions with confidence >= the threshold, the same best token as in each of the last
``persistence`` steps, and a Jensen-Shannon divergence from the step before of at most ``js_threshold``; where there are
none, the most confident ones, as many as ``fixed_steps`` would take. The divergence is that of coarse distributions:
the 8 likeliest tokens of each step by themselves, and the rest as one.

Ours: with ``calibrated`` the threshold of confidences is that of OSDT.

Deviation: with a temperature the authors' code adds noise to what it compares. Here distributions and best tokens are
those without noise, and the committed token is the sample.
"""

from dataclasses import dataclass, replace
from typing import Any

from csrc_triton.types import Rule
from vllm_osdt.calibration.thresholds import Thresholds
from vllm_osdt.declaration import count, number, option
from vllm_osdt.geometry import MAX_BLOCK_LENGTH, Canvas, CanvasRequest, DecodeShape
from vllm_osdt.policies.base import PositionLogits, Schedule, Step, best, constant
from vllm_osdt.policies.fixed_steps import StepsOptions, quota_numbers, quota_of, resolve_if_asked
from vllm_osdt.policies.osdt import CalibratedOptions, CalibratedPolicy, calibrated_schedule

TOP = 8  # tokens of the coarse distributions, as in the authors' code
DIVERGENCE, PERSISTENCE, QUOTA = range(3)  # constants; from the last on, the quota's


@dataclass(frozen=True)
class LESSOptions(StepsOptions, CalibratedOptions):
    """Three thresholds."""

    less_confidence: float = option(
        0.75,
        number(ge=0, le=1),
        "Of `less`: confidence with which a stable position passes.",
        excludes="calibrated",
    )
    js_threshold: float = option(
        0.04,
        number(ge=0),
        "Of `less`: the largest Jensen-Shannon divergence of two steps' distributions with which a position is stable; "
        "those of the 8 likeliest tokens. No divergence exceeds ln 2.",
        unit="nats",
    )
    persistence: int = option(
        2,
        count(1, MAX_BLOCK_LENGTH),
        "Of `less`: in how many steps before this one the best token of a position must have been the same.",
        unit="denoising steps",
    )


class LESS(CalibratedPolicy):
    """A confidence, a best token that stays, and a small divergence; else the most confident positions."""

    name = "less"
    Options = LESSOptions
    with_profile = "`less_confidence`; where nothing is stable, `steps` may unmask positions below it"
    adjusts = True
    reads_logits = True
    memory_size = 2 + 2 * TOP  # see csrc_triton.reading.compare_coarsely

    def resolve(self, options: LESSOptions, asked: CanvasRequest, canvas: Canvas) -> dict[str, Any]:
        """Total steps of the canvas, where the request asks for steps."""
        return resolve_if_asked(options, asked, canvas)

    def schedule(self, options: LESSOptions, shape: DecodeShape, thresholds: Thresholds | None = None) -> Schedule:
        """See the class; ``adjust`` chooses."""
        schedule = (
            calibrated_schedule(options, shape, thresholds)
            if options.calibrated
            else constant(shape, Rule.THRESHOLD, options.less_confidence)
        )
        constants = (options.js_threshold, options.persistence, *quota_numbers(options, shape))
        return replace(schedule, constants=constants)

    def read(self, rows: PositionLogits) -> None:
        """Compare best tokens and coarse distributions with the step before, and keep this step's."""
        from csrc_triton.reading import compare_coarsely  # late: options are read without torch

        compare_coarsely(rows.logits, min(TOP, rows.logits.shape[1]), rows.memory, rows.reading)

    def adjust(self, step: Step) -> None:
        """Choose what is sure and stable, else the quota."""
        if step.score.device.type == "cpu":
            from vllm_osdt.policies.loops import less  # late: options are read without torch

            less(step)
        else:
            self.adjust_by_tensors(step)

    def adjust_by_tensors(self, step: Step) -> None:
        """See :meth:`adjust`."""
        import torch  # late: options are read without it

        constants, (divergence, run, *_) = step.constants, step.reading.unbind(dim=-1)
        passes = step.is_open & (step.confidence >= step.parameter.unsqueeze(1))
        passes &= (divergence <= constants[:, DIVERGENCE, None]) & (run > constants[:, PERSISTENCE, None])
        first = best(step.confidence, quota_of(step, QUOTA))
        step.choose(torch.where(passes.any(dim=1, keepdim=True), passes, first))
