"""Dimple's confident decoding: a threshold, and a schedule of steps where nothing passes it.

Source: Dimple (arXiv 2505.16990), confident decoding; the ``dim`` pipeline of the authors' code (yu-rp/Dimple). The S
steps of a block of N masked positions have the times t_j = 1 - j (1 - 0.001) / S. A step unmasks every position that
passes the threshold. Where none does, with n masks left, it takes the first time t_j that leaves fewer than n of the N
masked, j >= i + 1 in step i, and unmasks the best floor(n - t_j N) positions; at j = S all. The S-th step unmasks all.
The best positions are those with the largest probability, the largest margin between the two largest probabilities, or
the least entropy (``fallback_rank``).

The authors' sample command has the threshold 0.95. Their structure priors, tokens of the answer that are given
beforehand, are a template here: the option ``infill`` of a request.

Deviations:
- The authors have no blocks. Here a block has a schedule of its own, as with ``fixed_steps``; a canvas of one block is
  their case.
- The threshold is one of the probability, as in the paper. In the authors' code it is compared with what ranks: a
  margin, or a negative entropy, which never reaches it. That is ``threshold_on_rank``.
- Margin and entropy are those of the tokens that may be proposed, so without the mask token.
- Equality passes the threshold, as the option says.
- With ``calibrated`` the threshold is that of OSDT, one of the probability.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from csrc_triton.types import ENTROPY_SCALE
from vllm_osdt.calibration.thresholds import Thresholds
from vllm_osdt.declaration import Flag, option
from vllm_osdt.errors import InvalidOptionError
from vllm_osdt.geometry import Canvas, CanvasRequest, DecodeShape
from vllm_osdt.policies.base import PositionLogits, Schedule, Step, best
from vllm_osdt.policies.fixed_steps import StepsOptions, resolve_steps
from vllm_osdt.policies.osdt import CalibratedOptions, CalibratedPolicy, calibrated_schedule
from vllm_osdt.policies.static_threshold import ThresholdOptions

if TYPE_CHECKING:
    import torch

RANKS = ("probability", "margin", "entropy")
PROBABILITY, MARGIN = RANKS.index("probability"), RANKS.index("margin")
EPS_PARTS = 1000  # the schedule ends at the time 1 / EPS_PARTS


@dataclass(frozen=True)
class DimpleOptions(ThresholdOptions, StepsOptions, CalibratedOptions):
    """A threshold, the steps of the schedule, and what ranks positions that do not pass."""

    fallback_rank: str = option(
        "probability",
        Literal[RANKS],
        "Of `dimple`: what ranks positions in a step in which none passes `threshold`. `margin`, between the two "
        "largest probabilities, and `entropy` read the logits.",
    )
    threshold_on_rank: bool = option(
        False,
        Flag,
        "Of `dimple`: what ranks positions must pass `threshold`, in place of the probability, as in the authors' "
        "code: the margin; or the negative entropy, which never does, so that the schedule alone unmasks.",
    )


class Dimple(CalibratedPolicy):
    """``options.threshold``, and ``options.steps`` as the most steps."""

    name = "dimple"
    Options = DimpleOptions
    with_profile = "`threshold`; where nothing passes, the schedule unmasks positions below it"
    adjusts = True
    reads_logits = True
    needs_whole_blocks = True

    def without_use(self, options: DimpleOptions) -> frozenset[str]:
        """Probabilities pass the threshold either way, where they rank."""
        return frozenset(["threshold_on_rank"] if options.fallback_rank == "probability" else [])

    def check(self, options: Any) -> None:
        """What ranks has no calibrated threshold."""
        if options.policy == self.name and options.calibrated and options.threshold_on_rank:
            raise InvalidOptionError(
                "calibrated and threshold_on_rank are true, but a profile's thresholds are confidences, not margins "
                "or entropies: send threshold_on_rank = false, or leave calibrated out.",
                refusal="calibrated-entropy",
                parameter="calibrated",
                value=True,
            )

    def needs_logits(self, options: DimpleOptions) -> bool:
        """Margins and entropies are read off them."""
        return options.fallback_rank != "probability"

    def resolve(self, options: DimpleOptions, asked: CanvasRequest, canvas: Canvas) -> dict[str, Any]:
        """Total steps of the canvas, one token per step where the request does not say."""
        return {"steps": resolve_steps(options, asked, canvas)}

    def schedule(self, options: DimpleOptions, shape: DecodeShape, thresholds: Thresholds | None = None) -> Schedule:
        """See the class; ``adjust`` decides alone."""
        assert options.steps is not None
        steps_per_block = options.steps // shape.num_blocks
        ranked_by = RANKS.index(options.fallback_rank)
        passes_by = ranked_by if options.threshold_on_rank else PROBABILITY
        constants = (steps_per_block, ranked_by, passes_by)
        schedule = calibrated_schedule(options, shape, thresholds if options.calibrated else None)
        return replace(schedule, constants=constants)

    def read(self, rows: PositionLogits) -> None:
        """The rank of a position."""
        import torch  # late: options are read without it

        probability = rows.logits.softmax(dim=-1)
        first, second = probability.topk(2, dim=-1).values.unbind(dim=-1)
        entropy = torch.special.entr(probability).sum(dim=-1, dtype=torch.float64).float()
        rank = torch.where(rows.constants[:, 1] == MARGIN, first - second, 1.0 - entropy / ENTROPY_SCALE)
        rows.reading[:, 0] = rank

    def adjust(self, step: Step) -> None:
        """Choose; ``step.state`` has the masks with which the block began."""
        import torch

        num_steps, ranked_by, passes_by = step.constants[:, :3].unbind(dim=1)
        left = step.is_open.sum(dim=1)
        total = step.state[:, 0]
        total.copy_(step.num_at_entry(total))
        number = _number(left, total.long().clamp(min=1), num_steps.long(), step.step_index)
        rank = torch.where((ranked_by == PROBABILITY).unsqueeze(-1), step.confidence, step.reading[..., 0])
        rank = rank.masked_fill(~step.is_open, -2.0)
        passing = torch.where((passes_by == MARGIN).unsqueeze(-1), rank, step.confidence)
        can_pass = (passes_by <= MARGIN).unsqueeze(-1)  # a negative entropy never does
        passes = (passing >= step.parameter.unsqueeze(-1)) & step.is_open & can_pass
        is_last = (step.step_index + 1 >= num_steps).unsqueeze(-1)
        chosen = torch.where(passes.any(dim=1, keepdim=True), passes, best(rank, number))
        step.choose(chosen | is_last, rank)


def _number(
    left: "torch.Tensor", total: "torch.Tensor", num_steps: "torch.Tensor", step_index: "torch.Tensor"
) -> "torch.Tensor":
    """Positions that the schedule unmasks; in whole numbers, so that no rounding moves a floor.

    Args:
        left: int64 ``[R]``, masks left.
        total: int64 ``[R]``, masks at first.
        num_steps: int64 ``[R]``, of the block.
        step_index: int64 ``[R]``.

    Returns:
        int64 ``[R]``.
    """
    import torch

    share = (EPS_PARTS - 1) * total  # t_j = 1 - j share / (EPS_PARTS num_steps total)
    first = -((-EPS_PARTS * num_steps * (total - left + 1)) // share)  # that leaves one position fewer
    first = first.maximum(step_index + 1)
    number = left - total + first * share // (EPS_PARTS * num_steps)
    return torch.where(first >= num_steps, left, number)
