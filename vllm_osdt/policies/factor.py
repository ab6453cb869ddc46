"""Fast-dLLM's factor rule: the n most confident positions, n the largest with (n + 1)(1 - c_(n)) < f.

Source: Fast-dLLM (arXiv 2505.22618), section 3.3. The authors' code also commits the last candidate when it fails the
test; here the rule is exact.
"""

from vllm_osdt.calibration.calibrate import Thresholds
from vllm_osdt.config import DecodingOptions
from vllm_osdt.policies.base import Rule, Schedule, constant


def factor(options: DecodingOptions, thresholds: Thresholds | None = None) -> Schedule:
    """Schedule of ``options.factor`` everywhere."""
    return constant(options, Rule.FACTOR, options.factor)
