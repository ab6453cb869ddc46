"""Fast-dLLM's factor rule: the n most confident positions, n the largest with (n + 1)(1 - c_(n)) < f.

Source: Fast-dLLM (arXiv 2505.22618), section 3.3. The authors' code also commits the last candidate when it fails the
test; here the rule is exact.
"""

from dataclasses import dataclass

from csrc_triton.types import Rule
from vllm_osdt.calibration.thresholds import Thresholds
from vllm_osdt.declaration import number, option
from vllm_osdt.geometry import DecodeShape
from vllm_osdt.policies.base import Policy, Schedule, constant


@dataclass(frozen=True)
class FactorOptions:
    """The factor f."""

    factor: float = option(
        1.0,
        number(gt=0),
        "f of `factor`: the n most confident positions, n the largest with (n + 1)(1 − c₍ₙ₎) < f.",
    )


class Factor(Policy):
    """``options.factor`` everywhere."""

    name = "factor"
    Options = FactorOptions
    with_profile = "its factor bounds an uncertainty times a rank, and a calibrated threshold is of one position"

    def schedule(self, options: FactorOptions, shape: DecodeShape, thresholds: Thresholds | None = None) -> Schedule:
        """See the class."""
        return constant(shape, Rule.FACTOR, options.factor)
