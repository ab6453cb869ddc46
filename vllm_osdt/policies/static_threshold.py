"""Fast-dLLM's static threshold: every masked position whose confidence reaches one cutoff, at least the best one.

Sources: Fast-dLLM (arXiv 2505.22618), section 3.3; ``confidence >= threshold`` as in the authors' v1 code. With
``steps``, the dynamic rule of SDAR (arXiv 2510.06303, ``low_confidence_dynamic``) and LLaDA2: where fewer positions
pass than the fixed schedule would unmask, that many of the best ones are.
"""

from dataclasses import replace

from vllm_osdt.calibration.calibrate import Thresholds
from vllm_osdt.config import DecodingOptions
from vllm_osdt.policies.base import Rule, Schedule, constant
from vllm_osdt.policies.fixed_steps import positions_per_step


def static_threshold(
    options: DecodingOptions, thresholds: Thresholds | None = None, *, first_alone: bool = False
) -> Schedule:
    """Schedule of ``options.threshold`` everywhere, with the quota of ``options.steps`` if the policy is its own."""
    schedule = constant(options, Rule.THRESHOLD, options.threshold)
    if options.policy == "static_threshold" and options.steps is not None:
        schedule = replace(schedule, quota=positions_per_step(options, first_alone=first_alone))
    return schedule
