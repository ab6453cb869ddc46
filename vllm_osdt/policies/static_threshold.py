"""Fast-dLLM's static threshold: every masked position whose confidence reaches one cutoff, at least the best one.

Source: Fast-dLLM (arXiv 2505.22618), section 3.3; ``confidence >= threshold`` as in the authors' v1 code.
"""

from vllm_osdt.calibration.calibrate import Thresholds
from vllm_osdt.config import DecodingOptions
from vllm_osdt.policies.base import Rule, Schedule, constant


def static_threshold(options: DecodingOptions, thresholds: Thresholds | None = None) -> Schedule:
    """Schedule of ``options.threshold`` everywhere."""
    return constant(options, Rule.THRESHOLD, options.threshold)
