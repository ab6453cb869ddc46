"""LocalLeap: positions near a confident one pass at a lower threshold.

Source: LocalLeap (arXiv 2510.07081). Anchors are the masked positions with confidence >= the anchor threshold; masked
positions at most ``leap_radius`` positions from an anchor, in the same block, pass with confidence >= the relaxed one.
Without an anchor the most confident position is unmasked alone. Ours: with ``calibrated`` the anchor threshold is that
of OSDT, and the relaxed one a share of it; 0.83 is the share of the authors' two thresholds.
"""

from dataclasses import dataclass, replace

from csrc_triton.types import Rule
from vllm_osdt.calibration.thresholds import Thresholds
from vllm_osdt.declaration import count, number, option
from vllm_osdt.geometry import MAX_BLOCK_LENGTH, DecodeShape
from vllm_osdt.policies.base import Schedule, Step, constant, distances
from vllm_osdt.policies.osdt import CalibratedOptions, CalibratedPolicy, calibrated_schedule


@dataclass(frozen=True)
class LocalLeapOptions(CalibratedOptions):
    """Two thresholds and a radius; calibrated, a ratio of the two."""

    anchor_threshold: float = option(
        0.9,
        number(gt=0, le=1),
        "Of `local_leap`: confidence with which a position is an anchor.",
        excludes="calibrated",
    )
    relaxed_threshold: float = option(
        0.75,
        number(gt=0, le=1),
        "Of `local_leap`: confidence with which positions near an anchor pass.",
        excludes="calibrated",
    )
    relaxed_ratio: float = option(
        0.83,
        number(gt=0, le=1),
        "Of `local_leap` with `calibrated`: the anchor threshold is the profile's, and the relaxed one is this share "
        "of it.",
        needs="calibrated",
    )
    leap_radius: int = option(
        4, count(0, MAX_BLOCK_LENGTH), "Of `local_leap`: how far from an anchor is near.", unit="positions"
    )


class LocalLeap(CalibratedPolicy):
    """``anchor_threshold`` everywhere; near an anchor, ``relaxed_threshold``.

    Calibrated, the profile's threshold of each block and step, and ``relaxed_ratio`` of it.
    """

    name = "local_leap"
    Options = LocalLeapOptions
    with_profile = "`anchor_threshold`; near an anchor, `relaxed_ratio` of it is enough"
    adjusts = True

    def schedule(self, options: LocalLeapOptions, shape: DecodeShape, thresholds: Thresholds | None = None) -> Schedule:
        """See the class."""
        if options.calibrated:
            schedule = calibrated_schedule(options, shape, thresholds)
            return replace(schedule, constants=(0.0, options.leap_radius, options.relaxed_ratio))
        constants = (options.relaxed_threshold, options.leap_radius)
        return constant(shape, Rule.THRESHOLD, options.anchor_threshold, constants)

    def adjust(self, step: Step) -> None:
        """Lift the score of relaxed positions near an anchor to the anchor threshold."""
        import torch  # late: options are read without it

        score, threshold = step.score, step.parameter.unsqueeze(-1)  # [R, W], [R, 1]
        relaxed = torch.maximum(step.constants[:, :1], step.constants[:, 2:3] * threshold)  # one of them is 0
        is_near = distances(score.shape[1], score.device) <= step.constants[:, 1, None, None]  # [R, W, W]
        has_anchor = (is_near & (score >= threshold).unsqueeze(1)).any(dim=-1)
        torch.where(has_anchor & (score >= relaxed), torch.maximum(score, threshold), score, out=score)
