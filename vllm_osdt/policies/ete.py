"""Explore-Then-Exploit: where little passes the threshold, a position of high uncertainty is decided as well.

Source: ETE (arXiv 2511.21103), abstract and introduction; no code is public. A token of confidence c carries about
-log c bits, so that a decoder which unmasks near-certain tokens alone is slow by design: to decide an uncertain one
makes others certain in the next step. The paper unmasks every position above a threshold, also in later blocks, which
here is a matter of ``block_length``. What it leaves open is ours: a step explores when fewer positions than
``explore_below`` pass; of the others it then decides the one that stands ``explore_rank`` of the way from the surest to
the least sure. With ``calibrated`` the threshold is that of OSDT.
"""

from dataclasses import dataclass, replace
from typing import Any

from vllm_osdt.calibration.thresholds import Thresholds
from vllm_osdt.declaration import count, number, option
from vllm_osdt.geometry import MAX_BLOCK_LENGTH, DecodeShape
from vllm_osdt.policies.base import Schedule, Step, ranks
from vllm_osdt.policies.osdt import CalibratedOptions, CalibratedPolicy, calibrated_schedule
from vllm_osdt.policies.static_threshold import ThresholdOptions


@dataclass(frozen=True)
class ETEOptions(ThresholdOptions, CalibratedOptions):
    """When a step explores, and where."""

    explore_below: int = option(
        2,
        count(1, MAX_BLOCK_LENGTH),
        "Of `ete`: a step in which fewer positions pass the threshold decides one more.",
        unit="positions",
    )
    explore_rank: float = option(
        0.0,
        number(ge=0, le=1),
        "Of `ete`: which one, of those that do not pass: 0 for the surest, 1 for the least sure.",
    )


class ETE(CalibratedPolicy):
    """A static threshold, and one position more where it lets few pass."""

    name = "ete"
    Options = ETEOptions
    with_profile = "`threshold`; an explored position passes below it"
    adjusts = True

    def schedule(self, options: Any, shape: DecodeShape, thresholds: Thresholds | None = None) -> Schedule:
        """See the class."""
        schedule = calibrated_schedule(options, shape, thresholds if options.calibrated else None)
        return replace(schedule, constants=(options.explore_below, options.explore_rank))

    def adjust(self, step: Step) -> None:
        """Choose what passes, the surest position where nothing does, and the explored one."""
        import torch  # late: options are read without it

        order = ranks(step.confidence)
        num_passing = (step.confidence >= step.parameter.unsqueeze(1)).sum(
            dim=1, keepdim=True
        )  # the first ones by rank
        below, rank = step.constants[:, :2].split(1, dim=1)
        first = num_passing.clamp(min=1)
        rest = (step.is_open.sum(dim=1, keepdim=True) - first - 1).clamp(min=0)
        explored = first + torch.floor(rest * rank + 0.5)
        step.choose((order < first) | ((order == explored) & (num_passing < below)))
