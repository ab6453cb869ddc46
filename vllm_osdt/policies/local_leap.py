"""LocalLeap: positions near a confident one pass at a lower threshold.

Source: LocalLeap (arXiv 2510.07081). Anchors are the masked positions with confidence >= the anchor threshold; masked
positions at most ``leap_radius`` positions from an anchor, in the same block, pass with confidence >= the relaxed one.
Without an anchor the most confident position is unmasked alone.
"""

from dataclasses import dataclass

from csrc_triton.types import Rule
from vllm_osdt.calibration.thresholds import Thresholds
from vllm_osdt.declaration import count, number, option
from vllm_osdt.geometry import MAX_BLOCK_LENGTH, DecodeShape
from vllm_osdt.policies.base import Policy, Schedule, Step, constant


@dataclass(frozen=True)
class LocalLeapOptions:
    """Two thresholds and a radius."""

    anchor_threshold: float = option(
        0.9, number(gt=0, le=1), "Of `local_leap`: confidence with which a position is an anchor."
    )
    relaxed_threshold: float = option(
        0.75, number(gt=0, le=1), "Of `local_leap`: confidence with which positions near an anchor pass."
    )
    leap_radius: int = option(
        4, count(0, MAX_BLOCK_LENGTH), "Of `local_leap`: how far from an anchor is near.", unit="positions"
    )


class LocalLeap(Policy):
    """``anchor_threshold`` everywhere; near an anchor, ``relaxed_threshold``."""

    name = "local_leap"
    Options = LocalLeapOptions
    adjusts = True

    def schedule(self, options: LocalLeapOptions, shape: DecodeShape, thresholds: Thresholds | None = None) -> Schedule:
        """See the class."""
        constants = (options.relaxed_threshold, options.leap_radius)
        return constant(shape, Rule.THRESHOLD, options.anchor_threshold, constants)

    def adjust(self, step: Step) -> None:
        """Lift the score of relaxed positions near an anchor to the anchor threshold."""
        import torch  # late: options are read without it

        score, threshold = step.score, step.parameter.unsqueeze(-1)  # [R, W], [R, 1]
        place = torch.arange(score.shape[1], device=score.device)
        is_near = (place - place.unsqueeze(-1)).abs() <= step.constants[:, 1, None, None]  # [R, W, W]
        has_anchor = (is_near & (score >= threshold).unsqueeze(1)).any(dim=-1)
        leaps = has_anchor & (score >= step.constants[:, :1]) & (score < threshold)
        score.copy_(torch.where(leaps, threshold, score))
