"""The entropy-bounded rule: the most certain positions, as long as their entropies together stay below a bound.

Source: SDAR's ``entropy_bounded`` (JetAstra/SDAR), whose code sums over positions instead of the vocabulary and so
gives every position the same entropy: here it is that of the position's distribution. EB-Sampler (arXiv 2505.24857),
where the idea comes from, leaves the largest of the entropies out of the sum.
"""

from csrc_triton.types import ENTROPY_SCALE
from vllm_osdt.calibration.calibrate import Thresholds
from vllm_osdt.config import DecodingOptions
from vllm_osdt.policies.base import Rule, Schedule, constant


def entropy_bound(options: DecodingOptions, thresholds: Thresholds | None = None) -> Schedule:
    """Schedule of ``options.entropy`` everywhere. A position's confidence is 1 - H / 32 under this policy, so that the
    n most certain with H_(1) + ... + H_(n) < entropy are those whose doubts stay below entropy / 32."""
    return constant(options, Rule.ENTROPY_BOUND, options.entropy / ENTROPY_SCALE)
