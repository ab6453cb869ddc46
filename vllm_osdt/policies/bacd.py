"""BACD, bounded adaptive confidence decoding: the threshold follows the confidence of what the block has committed.

Source: TDAR (arXiv 2602.09555), bounded adaptive confidence decoding. A block's first step has the threshold
clamp(max c, low, high), with the maximum over the masked positions; later ones clamp(mean c, low, high), with the mean
over the positions that the block has committed so far. The authors' code keys that history by batch slot, which is
wrong when requests move; here it belongs to the request. Ours: with ``calibrated`` the upper bound is the threshold of
OSDT, and the lower one no higher than that. (As the lower bound it would change nothing where commits are sure, whose
mean is above the upper bound.)
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from csrc_triton.types import Rule
from vllm_osdt.calibration.thresholds import Thresholds
from vllm_osdt.declaration import number, option
from vllm_osdt.errors import InvalidOptionError
from vllm_osdt.geometry import DecodeShape
from vllm_osdt.policies.base import Schedule, Step, constant
from vllm_osdt.policies.osdt import CalibratedOptions, CalibratedPolicy, calibrated_schedule

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class BACDOptions(CalibratedOptions):
    """The bounds of the threshold."""

    min_threshold: float = option(0.6, number(gt=0, le=1), "Of `bacd`: lower bound of the threshold.")
    max_threshold: float = option(
        0.9, number(gt=0, le=1), "Of `bacd`: upper bound of the threshold.", excludes="calibrated"
    )


class BACD(CalibratedPolicy):
    """A threshold between two bounds, from the mean confidence of the block's commits."""

    name = "bacd"
    Options = BACDOptions
    with_profile = "`max_threshold`; after unsure commits its threshold falls below that, to `min_threshold` at most"
    adjusts = True

    def check(self, options: BACDOptions) -> None:
        """The bounds must leave room."""
        if options.min_threshold > options.max_threshold and not options.calibrated:
            raise InvalidOptionError(
                f"min_threshold is {options.min_threshold:g}, above max_threshold {options.max_threshold:g}; lower it.",
                refusal="bacd-bounds",
                parameter="min_threshold",
                value=options.min_threshold,
            )

    def schedule(self, options: BACDOptions, shape: DecodeShape, thresholds: Thresholds | None = None) -> Schedule:
        """See the class; ``adjust`` replaces the parameter."""
        schedule = (
            calibrated_schedule(options, shape, thresholds)
            if options.calibrated
            else constant(shape, Rule.THRESHOLD, options.max_threshold)
        )
        return replace(schedule, constants=(options.min_threshold,))

    def adjust(self, step: Step) -> None:
        """The threshold of a step; ``step.state`` has the sum and the number of committed confidences."""
        import torch  # late: options are read without it

        total, number_committed = step.state[:, 0], step.state[:, 1]
        mean = total / number_committed.clamp(min=1)
        threshold = torch.where(number_committed > 0, mean, step.score.amax(dim=-1))
        high = step.parameter
        torch.clamp(threshold, step.constants[:, 0].minimum(high), high, out=high)

    def observe(self, step: Step, unmasked: "torch.Tensor") -> None:
        """Count the confidences of what the step committed."""
        is_counted = unmasked & (step.score >= 0)  # a position without logits has none
        confidence = step.score.double() * is_counted  # so that padding changes no sum
        step.state[:, 0] += confidence.sum(dim=-1).float()
        step.state[:, 1] += is_counted.sum(dim=-1)
