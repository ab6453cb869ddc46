"""The entropy-bounded rule: the most certain positions, as long as their entropies together stay below a bound.

Source: SDAR's ``entropy_bounded`` (JetAstra/SDAR), whose code sums over positions instead of the vocabulary and so
gives every position the same entropy: here it is that of the position's distribution. EB-Sampler (arXiv 2505.24857),
where the idea comes from, leaves the largest of the entropies out of the sum.
"""

from dataclasses import dataclass

from csrc_triton.types import ENTROPY_SCALE, Rule
from vllm_osdt.calibration.thresholds import Thresholds
from vllm_osdt.declaration import number, option
from vllm_osdt.geometry import DecodeShape
from vllm_osdt.policies.base import Policy, Schedule, constant


@dataclass(frozen=True)
class EntropyBoundOptions:
    """The bound."""

    entropy: float = option(
        0.35,
        number(gt=0),
        "Bound of `entropy_bound`: the n most certain positions, n the largest with H₍₁₎ + … + H₍ₙ₎ < `entropy`.",
        unit="nats",
    )


class EntropyBound(Policy):
    """``options.entropy`` everywhere.

    A position's confidence is 1 - H / 32 under this policy, so that the n most certain with H_(1) + ... + H_(n) <
    entropy are those whose uncertainties stay below entropy / 32.
    """

    name = "entropy_bound"
    Options = EntropyBoundOptions
    with_profile = "it looks at entropies, and calibrated thresholds are confidences"
    ranks_by_entropy = True

    def schedule(
        self, options: EntropyBoundOptions, shape: DecodeShape, thresholds: Thresholds | None = None
    ) -> Schedule:
        """See the class."""
        return constant(shape, Rule.ENTROPY_BOUND, options.entropy / ENTROPY_SCALE)
