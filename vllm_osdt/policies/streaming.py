"""Streaming-dLLM's dynamic threshold: it falls as the block fills.

Source: Streaming-dLLM (arXiv 2601.17917). With r the masked share of the block, the threshold of a step is
threshold x (1 - ``relaxation`` x (1 - r)), and equality passes; at least the most confident position. The paper has
0.9 and 0.6, and finds that more relaxation costs quality; the authors' code has 0.3 (xiaoshideta/Streaming-dLLM).

Deviations: in the authors' code r is the masked share of the block and of the window behind it, and 1 in a block's
first step. Here it is the share of the most masks that the block, or a sub-block of it, has had. Ours: with
``calibrated`` the threshold that falls is that of OSDT. The paper's pruning of the suffix is the option
``suffix_window``, which goes with every policy.
"""

from dataclasses import dataclass, replace

from vllm_osdt.calibration.thresholds import Thresholds
from vllm_osdt.declaration import number, option
from vllm_osdt.geometry import DecodeShape
from vllm_osdt.policies.base import Schedule, Step
from vllm_osdt.policies.osdt import CalibratedOptions, CalibratedPolicy, calibrated_schedule
from vllm_osdt.policies.static_threshold import ThresholdOptions


@dataclass(frozen=True)
class StreamingOptions(ThresholdOptions, CalibratedOptions):
    """A threshold, and by how much it falls."""

    relaxation: float = option(
        0.6,
        number(ge=0, le=1),
        "Of `streaming`: share of `threshold` that is taken off it as the block fills.",
    )


class Streaming(CalibratedPolicy):
    """``options.threshold`` in a block of masks, down to ``1 - options.relaxation`` of it."""

    name = "streaming"
    Options = StreamingOptions
    with_profile = "`threshold`, which falls from there as the block fills"
    adjusts = True

    def schedule(self, options: StreamingOptions, shape: DecodeShape, thresholds: Thresholds | None = None) -> Schedule:
        """See the class; ``adjust`` lowers the parameter."""
        schedule = calibrated_schedule(options, shape, thresholds if options.calibrated else None)
        return replace(schedule, constants=(options.relaxation,))

    def adjust(self, step: Step) -> None:
        """Lower the threshold; ``step.state`` has the most masks that were left."""
        import torch  # late: options are read without it

        left, most = step.is_open.sum(dim=1), step.state[:, 0]
        # A step before the block's first one here had its first position alone.
        most.copy_(torch.where(most > 0, most.maximum(left), left + (step.step_index > 0)))
        step.parameter.mul_(1.0 - step.constants[:, 0] * (1.0 - left / most.clamp(min=1)))
