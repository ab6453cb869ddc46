"""Streaming-dLLM's dynamic threshold: it falls as the block fills.

Source: Streaming-dLLM (arXiv 2601.17917). With r the masked share of the block, the threshold of a step is
threshold x (1 - ``relaxation`` x (1 - r)), and equality passes; at least the most confident position. The paper has
0.9 and 0.6, and finds that more relaxation costs quality; the authors' code has 0.3 (xiaoshideta/Streaming-dLLM).

In the authors' code r is the masked share of the block and of the window behind it, as far as masks take part in a
step: W positions behind the block, and the last one of the canvas. So it is 1 in a block's first step. That is
``ratio_window`` W; their default is 32.

Deviations: r is a share of the most masks that the block, or a sub-block of it, has had, with the window's. In the
authors' code for Dream with its dual cache, the masks of the window are none, though its positions count; that is not
here. Ours: with ``calibrated`` the threshold that falls is that of OSDT. The paper's pruning of the suffix is the
option ``suffix_window``, which goes with every policy.
"""

from dataclasses import dataclass, replace

from vllm_osdt.calibration.thresholds import Thresholds
from vllm_osdt.declaration import count, number, option
from vllm_osdt.geometry import DecodeShape
from vllm_osdt.policies.base import Schedule, Step
from vllm_osdt.policies.osdt import CalibratedOptions, CalibratedPolicy, calibrated_schedule
from vllm_osdt.policies.static_threshold import ThresholdOptions

MAX_WINDOW = 2**17  # positions
NO_WINDOW = -1.0  # in the place of its length, where there is none


@dataclass(frozen=True)
class StreamingOptions(ThresholdOptions, CalibratedOptions):
    """A threshold, and by how much it falls."""

    relaxation: float = option(
        0.6,
        number(ge=0, le=1),
        "Of `streaming`: share of `threshold` that is taken off it as the block fills.",
    )
    ratio_window: int | None = option(
        None,
        count(0, MAX_WINDOW) | None,
        "Of `streaming`: masks behind the block that count with its own in how full it is: so many, and the last one "
        "of the canvas, as in the authors' code, which has 32. The threshold then falls less. `null`: none.",
        unit="positions",
    )


class Streaming(CalibratedPolicy):
    """``options.threshold`` in a block of masks, down to ``1 - options.relaxation`` of it."""

    name = "streaming"
    Options = StreamingOptions
    with_profile = "`threshold`, which falls from there as the block fills"
    adjusts = True

    def schedule(self, options: StreamingOptions, shape: DecodeShape, thresholds: Thresholds | None = None) -> Schedule:
        """See the class; ``adjust`` lowers the parameter."""
        window = NO_WINDOW if options.ratio_window is None else options.ratio_window
        schedule = calibrated_schedule(options, shape, thresholds if options.calibrated else None)
        return replace(schedule, constants=(options.relaxation, window))

    def adjust(self, step: Step) -> None:
        """Lower the threshold; ``step.state`` has the most masks that were left."""
        import torch  # late: options are read without it

        relaxation, window = step.constants[:, :2].unbind(dim=1)
        left, most = step.is_open.sum(dim=1), step.state[:, 0]
        most.copy_(step.num_at_entry(most).maximum(left))
        behind = torch.minimum(window + 1.0, (step.num_left - left).to(window.dtype))
        step.parameter.mul_(1.0 - relaxation * (1.0 - (left + behind) / (most + behind).clamp(min=1)))
