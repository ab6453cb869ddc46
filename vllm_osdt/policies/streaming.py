"""Streaming-dLLM's dynamic threshold: it falls as the block fills.

Source: Streaming-dLLM (arXiv 2601.17917). With r the masked share of the block, the threshold of a step is
threshold x (1 - ``relaxation`` x (1 - r)), and equality passes; at least the most confident position. The paper has
0.9 and 0.6, and finds that more relaxation costs quality; the authors' code has 0.3 (xiaoshideta/Streaming-dLLM).

Deviations: in the authors' code r is the masked share of the block and of the window behind it, and 1 in a block's
first step. Here it is that of the block, or of the sub-block; positions of the prompt, of a template, and behind the
end of the context count as decided.
"""

from dataclasses import dataclass

from csrc_triton.types import Rule
from vllm_osdt.calibration.thresholds import Thresholds
from vllm_osdt.declaration import number, option
from vllm_osdt.geometry import DecodeShape
from vllm_osdt.policies.base import Policy, Schedule, Step, constant
from vllm_osdt.policies.static_threshold import ThresholdOptions, threshold_of


@dataclass(frozen=True)
class StreamingOptions(ThresholdOptions):
    """A threshold, and by how much it falls."""

    relaxation: float = option(
        0.6,
        number(ge=0, le=1),
        "Of `streaming`: share of `threshold` that is taken off it as the block fills.",
    )


class Streaming(Policy):
    """``options.threshold`` in a block of masks, down to ``1 - options.relaxation`` of it."""

    name = "streaming"
    Options = StreamingOptions
    adjusts = True

    def schedule(self, options: StreamingOptions, shape: DecodeShape, thresholds: Thresholds | None = None) -> Schedule:
        """See the class; ``adjust`` lowers the parameter."""
        constants = (options.relaxation, shape.sub_block_length or shape.block_length)
        return constant(shape, Rule.THRESHOLD, threshold_of(options, shape), constants)

    def adjust(self, step: Step) -> None:
        """Lower the threshold."""
        relaxation, length = step.constants[:, :2].unbind(dim=1)
        step.parameter.mul_(1.0 - relaxation * (1.0 - step.is_open.sum(dim=1) / length))
