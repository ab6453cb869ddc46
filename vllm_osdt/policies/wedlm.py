"""WeDLM's rule: entropies with a penalty on the distance from the first mask.

Source: WeDLM (arXiv 2512.22737), distance-adjusted entropy; ``wedlm/engine/sampler.py`` of the authors' code
(Tencent/WeDLM). A step unmasks every masked position with H + ``distance_penalty`` x d < ``adjusted_entropy``, where d
is its distance from the first masked position in the block, at least the one with the least sum. The authors' bound is
0.4 and their penalty 0.02, in a window of 16 positions that slides; here it is the block, which does not.
"""

from dataclasses import dataclass

from csrc_triton.types import ENTROPY_SCALE, Rule
from vllm_osdt.calibration.thresholds import Thresholds
from vllm_osdt.declaration import number, option
from vllm_osdt.geometry import DecodeShape
from vllm_osdt.policies.base import Policy, Schedule, Step, constant, places


@dataclass(frozen=True)
class WeDLMOptions:
    """A bound and a penalty."""

    adjusted_entropy: float = option(
        0.4,
        number(gt=0, lt=ENTROPY_SCALE),
        "Of `wedlm`: positions pass whose entropy and penalty together stay below this.",
        unit="nats",
    )
    distance_penalty: float = option(
        0.02,
        number(ge=0, le=ENTROPY_SCALE),
        "Of `wedlm`: what each position of distance from the first mask adds to an entropy; more goes rather from left "
        "to right.",
        unit="nats per position",
    )


class WeDLM(Policy):
    """``options.adjusted_entropy`` everywhere."""

    name = "wedlm"
    Options = WeDLMOptions
    with_profile = "it looks at entropies, and calibrated thresholds are confidences"
    ranks_by_entropy = True
    adjusts = True

    def schedule(self, options: WeDLMOptions, shape: DecodeShape, thresholds: Thresholds | None = None) -> Schedule:
        """See the class; ``adjust`` decides alone."""
        constants = (options.adjusted_entropy, options.distance_penalty)
        return constant(shape, Rule.THRESHOLD, 1.0 - options.adjusted_entropy / ENTROPY_SCALE, constants)

    def adjust(self, step: Step) -> None:
        """Choose; a confidence is 1 - H / 32."""
        place = places(step.score.shape[1], step.score.device)
        first = place.where(step.is_open, place.shape[0]).amin(dim=1, keepdim=True)
        bound, penalty = step.constants[:, :1], step.constants[:, 1:2]
        adjusted = (1.0 - step.confidence) * ENTROPY_SCALE + penalty * (place - first).clamp(min=0)
        step.choose(adjusted < bound, 1.0 / (1.0 + adjusted))
