"""dInfer's hierarchical decoding: the best position of every run of masks, beside those above a threshold.

Source: dInfer (inclusionAI/dInfer), ``get_transfer_index_hierarchy_fast_v2``. A run is a stretch of masked positions
with none decided in between; positions far from each other depend less on each other. A step unmasks the most confident
position of every run, where its confidence is above ``run_threshold``, and all positions that pass the threshold; at
least the most confident one. The authors' tests have 0.4 and 0.9. Equality passes the threshold, as the option says;
theirs is strict. Ours: with ``calibrated`` the threshold of all positions is that of OSDT.
"""

from dataclasses import dataclass, replace

from vllm_osdt.calibration.thresholds import Thresholds
from vllm_osdt.declaration import number, option
from vllm_osdt.geometry import DecodeShape
from vllm_osdt.policies.base import Schedule, Step, places
from vllm_osdt.policies.osdt import CalibratedOptions, CalibratedPolicy, calibrated_schedule
from vllm_osdt.policies.static_threshold import ThresholdOptions


@dataclass(frozen=True)
class HierarchicalOptions(ThresholdOptions, CalibratedOptions):
    """Two thresholds."""

    run_threshold: float = option(
        0.4,
        number(ge=0, lt=1),
        "Of `hierarchical`: confidence above which the best position of a run of masks passes. Above `threshold` it "
        "changes nothing.",
    )


class Hierarchical(CalibratedPolicy):
    """``options.threshold`` for all positions, ``options.run_threshold`` for the best one of each run."""

    name = "hierarchical"
    Options = HierarchicalOptions
    with_profile = "`threshold`; the best position of a run passes at `run_threshold` as before"
    adjusts = True

    def schedule(
        self, options: HierarchicalOptions, shape: DecodeShape, thresholds: Thresholds | None = None
    ) -> Schedule:
        """See the class."""
        schedule = calibrated_schedule(options, shape, thresholds if options.calibrated else None)
        return replace(schedule, constants=(options.run_threshold,))

    def adjust(self, step: Step) -> None:
        """Lift the score of a run's best position to the threshold, where it is above that of runs."""
        import torch  # late: options are read without it

        is_open, width = step.is_open, step.score.shape[1]
        score = step.score
        place = places(width, score.device).expand_as(score)
        run = (~is_open).cumsum(dim=1)  # [R, W], the same throughout a run
        largest = score.new_full((score.shape[0], width + 1), -2.0).scatter_reduce(1, run, score, "amax")
        is_largest = is_open & (score == largest.gather(1, run))
        first = place.new_full(largest.shape, width).scatter_reduce(1, run, place.where(is_largest, width), "amin")
        threshold, run_threshold = step.parameter.unsqueeze(1), step.constants[:, :1]
        is_best = (place == first.gather(1, run)) & is_open & (score > run_threshold) & (score < threshold)
        torch.where(is_best, threshold, score, out=score)
