"""The bound of a port of Nemotron-Labs-Diffusion: a threshold, and below it a bound that rises with the rank.

Source: mlx-vlm 0.7.10, ``nemotron_labs_diffusion``, sampler ``optimized``. With c_(0) >= c_(1) >= ... a step unmasks
the positions k with c_(k) >= threshold, or with c_(k) >= ``bound_min`` and c_(k) >= 1 - ``bound_factor`` / (k + 2); at
least the first. Both tests fail for all that follow once they fail, so those are the first positions by rank. The
``product`` form, the port's sampler ``cumulative_error``, unmasks the first k with c_(0) c_(1) ... c_(k) >= threshold.
The port has the threshold 0.9, the minimum 0.45 and the factor 2. Its bound of a rank is that of Fast-dLLM's factor
rule, where equality passes here. Ours: with ``calibrated`` the threshold is that of OSDT. A product of
confidences is at most the least of them, so that the ``product`` form unmasks no more than OSDT does.

The port's limits on a step's positions and on a block's steps are not here.
"""

from dataclasses import dataclass, replace
from typing import Literal

from vllm_osdt.calibration.thresholds import Thresholds
from vllm_osdt.declaration import defaults, number, option
from vllm_osdt.errors import InvalidOptionError
from vllm_osdt.geometry import DecodeShape
from vllm_osdt.policies.base import Schedule, Step, best, places
from vllm_osdt.policies.osdt import CalibratedOptions, CalibratedPolicy, calibrated_schedule
from vllm_osdt.policies.static_threshold import ThresholdOptions


@dataclass(frozen=True)
class NemotronBoundOptions(ThresholdOptions, CalibratedOptions):
    """A threshold, and what passes below it."""

    bound_form: str = option(
        "rank",
        Literal["rank", "product"],
        "Of `nemotron_bound`: `rank`, a bound that rises with the rank, or `product`, the most confident positions "
        "whose confidences multiply to `threshold` or more.",
    )
    bound_min: float = option(
        0.45,
        number(ge=0, le=1),
        "Of `nemotron_bound`: least confidence of a position that passes the bound of its rank.",
    )
    bound_factor: float = option(
        2.0,
        number(gt=0),
        "f of `nemotron_bound`: the position of rank k, from 0, passes with confidence 1 − f / (k + 2).",
    )


class NemotronBound(CalibratedPolicy):
    """``options.threshold``, or the bound of a rank."""

    name = "nemotron_bound"
    Options = NemotronBoundOptions
    with_profile = "`threshold`, of a confidence or of a product; a rank's bound passes positions below it"
    adjusts = True

    def check(self, options: NemotronBoundOptions) -> None:
        """A product has no bound of a rank."""
        for name in ("bound_min", "bound_factor"):
            value = getattr(options, name)
            if options.bound_form == "product" and value != defaults(NemotronBoundOptions)[name]:
                raise InvalidOptionError(
                    f"{name} is {value:g}, but bound_form 'product' has no bound of a rank: send {name} = "
                    f"{defaults(NemotronBoundOptions)[name]:g}, or bound_form 'rank'.",
                    refusal="nemotron-product",
                    parameter=name,
                    value=value,
                )

    def schedule(
        self, options: NemotronBoundOptions, shape: DecodeShape, thresholds: Thresholds | None = None
    ) -> Schedule:
        """See the class; ``adjust`` chooses."""
        constants = (options.bound_min, options.bound_factor, float(options.bound_form == "product"))
        schedule = calibrated_schedule(options, shape, thresholds if options.calibrated else None)
        return replace(schedule, constants=constants)

    def adjust(self, step: Step) -> None:
        """Choose the positions that pass, which are the first ones by rank."""
        import torch  # late: options are read without it

        threshold = step.parameter.unsqueeze(1)  # [R, 1]
        least, factor, is_product = step.constants[:, :3].unsqueeze(1).unbind(dim=2)
        ranked = step.score.sort(dim=1, descending=True).values
        rank = places(ranked.shape[1], ranked.device)
        by_rank = (ranked >= threshold) | (ranked >= torch.maximum(least, 1.0 - factor / (rank + 2)))
        by_product = ranked.clamp(min=0.0).cumprod(dim=1) >= threshold
        passes = torch.where(is_product > 0, by_product, by_rank) & (ranked >= 0)
        step.choose(best(step.score, passes.sum(dim=1)))
