"""Fast-dLLM's static threshold: every masked position whose confidence reaches one cutoff, at least the best one.

Sources: Fast-dLLM (arXiv 2505.22618), section 3.3; ``confidence >= threshold`` as in the authors' v1 code. With
``steps``, the dynamic rule of SDAR (arXiv 2510.06303, ``low_confidence_dynamic``) and LLaDA2: where fewer positions
pass than the fixed schedule would unmask, that many of the best ones are.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from csrc_triton.types import Rule
from vllm_osdt.calibration.thresholds import Thresholds
from vllm_osdt.declaration import number, option
from vllm_osdt.geometry import Canvas, CanvasRequest, DecodeShape
from vllm_osdt.policies.base import Policy, Schedule, constant
from vllm_osdt.policies.fixed_steps import StepsOptions, positions_per_step, resolve_if_asked


@dataclass(frozen=True)
class ThresholdOptions:
    """The static threshold, which a calibration uses too."""

    threshold: float = option(
        0.9,
        number(gt=0, le=1),
        "Confidence of the static threshold, also that of a calibration, and of policies that have one beside other "
        "bounds. Equality passes, but not in SDAR, LLaDA2 and Fast-dLLM v2.",
    )


@dataclass(frozen=True)
class StaticThresholdOptions(ThresholdOptions, StepsOptions):
    """A threshold, and the fewest positions of a step."""


def threshold_of(options: ThresholdOptions, shape: DecodeShape) -> float:
    """The threshold, in float32; where equality must not pass, the next larger one."""
    threshold = np.float32(options.threshold)
    if shape.is_strict:
        threshold = np.nextafter(threshold, np.float32(np.inf))
    return float(threshold)


def static_schedule(options: ThresholdOptions, shape: DecodeShape) -> Schedule:
    """The schedule of the threshold alone."""
    return constant(shape, Rule.THRESHOLD, threshold_of(options, shape))


class StaticThreshold(Policy):
    """``options.threshold`` everywhere, and ``options.steps`` as the fewest positions of each step."""

    name = "static_threshold"
    Options = StaticThresholdOptions
    with_profile = "with a profile's thresholds it is `osdt`"

    def resolve(self, options: StaticThresholdOptions, asked: CanvasRequest, canvas: Canvas) -> dict[str, Any]:
        """Total steps of the canvas, where the request asks for steps."""
        return resolve_if_asked(options, asked, canvas)

    def schedule(
        self, options: StaticThresholdOptions, shape: DecodeShape, thresholds: Thresholds | None = None
    ) -> Schedule:
        """See the class."""
        schedule = static_schedule(options, shape)
        if options.steps is None:
            return schedule
        return replace(schedule, min_unmask=positions_per_step(options.steps, shape))
