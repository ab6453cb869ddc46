"""Fast-dLLM++: as many of the most confident positions as a bound on their joint probability allows.

Source: Fast-dLLM++ (arXiv 2606.02955). With c_(1) >= c_(2) >= ... the joint probability of the first n proposals is at
least L = c_(1) + ... + c_(n) - (n - 1), and that of any other choice at most U = 1 - c_(n); n is the largest with
L - U > delta. Equal confidences give the factor rule with f = 1 - delta.
"""

from vllm_osdt.calibration.calibrate import Thresholds
from vllm_osdt.config import DecodingOptions
from vllm_osdt.policies.base import Rule, Schedule, constant


def joint_bound(options: DecodingOptions, thresholds: Thresholds | None = None) -> Schedule:
    """Schedule of ``options.delta`` everywhere: L - U > delta is a sum of doubts 1 - c below 1 - delta."""
    return constant(options, Rule.JOINT_BOUND, 1.0 - options.delta)
