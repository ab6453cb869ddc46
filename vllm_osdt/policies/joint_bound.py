"""Fast-dLLM++: as many of the most confident positions as a bound on their joint probability allows.

Source: Fast-dLLM++ (arXiv 2606.02955). With c_(1) >= c_(2) >= ... the joint probability of the first n proposals is at
least L = c_(1) + ... + c_(n) - (n - 1), and that of any other choice at most U = 1 - c_(n); n is the largest with
L - U > delta. Equal confidences give the factor rule with f = 1 - delta.
"""

from dataclasses import dataclass

from csrc_triton.types import Rule
from vllm_osdt.calibration.thresholds import Thresholds
from vllm_osdt.declaration import number, option
from vllm_osdt.geometry import DecodeShape
from vllm_osdt.policies.base import Policy, Schedule, constant


@dataclass(frozen=True)
class JointBoundOptions:
    """The bound's distance delta."""

    delta: float = option(
        0.25,
        number(ge=0, lt=1),
        "δ of `joint_bound`: the n most confident positions, n the largest with Σ(1 − c₍ⱼ₎) + (1 − c₍ₙ₎) < 1 − δ.",
    )


class JointBound(Policy):
    """``options.delta`` everywhere: L - U > delta is a sum of uncertainties 1 - c below 1 - delta."""

    name = "joint_bound"
    Options = JointBoundOptions
    with_profile = "its bound is on a sum of uncertainties, and a calibrated threshold is of one position"

    def schedule(
        self, options: JointBoundOptions, shape: DecodeShape, thresholds: Thresholds | None = None
    ) -> Schedule:
        """See the class."""
        return constant(shape, Rule.JOINT_BOUND, 1.0 - options.delta)
