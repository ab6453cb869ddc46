"""dParallel's rule: every position whose entropy is at most a threshold, at least the one with the least.

Source: dParallel (arXiv 2509.26488); ``get_transfer_index_entropy`` of the authors' code (czg1225/dParallel). Their
threshold is 0.5 for LLaDA (0.45 on MBPP) and 0.45 for Dream, with weights that were distilled for it. d3LLM (arXiv
2601.07568) has the same rule.
"""

from dataclasses import dataclass

from csrc_triton.types import ENTROPY_SCALE, Rule
from vllm_osdt.calibration.thresholds import Thresholds
from vllm_osdt.declaration import number, option
from vllm_osdt.geometry import DecodeShape
from vllm_osdt.policies.base import Policy, Schedule, constant


@dataclass(frozen=True)
class EntropyThresholdOptions:
    """The threshold."""

    max_entropy: float = option(
        0.5,
        number(gt=0, lt=ENTROPY_SCALE),
        "Of `entropy_threshold` and `multi_block`: positions with at most this entropy pass.",
        unit="nats",
    )


class EntropyThreshold(Policy):
    """``options.max_entropy`` everywhere: H <= max_entropy is a confidence 1 - H / 32 >= 1 - max_entropy / 32."""

    name = "entropy_threshold"
    Options = EntropyThresholdOptions
    with_profile = "it looks at entropies, and calibrated thresholds are confidences"
    ranks_by_entropy = True

    def schedule(
        self, options: EntropyThresholdOptions, shape: DecodeShape, thresholds: Thresholds | None = None
    ) -> Schedule:
        """See the class."""
        return constant(shape, Rule.THRESHOLD, 1.0 - options.max_entropy / ENTROPY_SCALE)
