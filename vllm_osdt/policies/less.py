"""LESS: positions that are sure, keep their best token, and whose distribution has stopped moving.

Source: LESS (arXiv 2606.16908), mutual-stability sampling, and the authors' code (amr-mohamedd/LESS-Is-More), whose
defaults these are: masked positions with confidence >= the threshold, the same best token as in each of the last
``persistence`` steps, and a Jensen-Shannon divergence from the step before of at most ``js_threshold``; where there are
none, the most confident ones, as many as ``fixed_steps`` would take. The divergence is that of coarse distributions:
the 8 likeliest tokens of each step by themselves, and the rest as one.

Ours: with ``calibrated`` the threshold of confidences is that of OSDT.

Deviation: with a temperature the authors' code adds noise to what it compares. Here distributions and best tokens are
those without noise, and the committed token is the sample.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from csrc_triton.types import Rule
from vllm_osdt.calibration.thresholds import Thresholds
from vllm_osdt.declaration import count, number, option
from vllm_osdt.geometry import MAX_BLOCK_LENGTH, Canvas, CanvasRequest, DecodeShape
from vllm_osdt.policies.base import PositionLogits, Schedule, Step, best, constant
from vllm_osdt.policies.fixed_steps import StepsOptions, quota_numbers, quota_of, resolve_if_asked
from vllm_osdt.policies.osdt import CalibratedOptions, CalibratedPolicy, calibrated_schedule

if TYPE_CHECKING:
    import torch

TOP = 8  # tokens of the coarse distributions, as in the authors' code
DIVERGENCE, PERSISTENCE, QUOTA = range(3)  # constants; from the last on, the quota's
TOKEN, RUN = range(2)  # memory: the best token, and in how many steps in a row it was; behind them tokens and shares
FIRST_TOKEN, FIRST_SHARE = 2, 2 + TOP


@dataclass(frozen=True)
class LESSOptions(StepsOptions, CalibratedOptions):
    """Three thresholds."""

    less_confidence: float = option(
        0.75,
        number(ge=0, le=1),
        "Of `less`: confidence with which a stable position passes.",
        excludes="calibrated",
    )
    js_threshold: float = option(
        0.04,
        number(ge=0),
        "Of `less`: the largest Jensen-Shannon divergence of two steps' distributions with which a position is stable; "
        "those of the 8 likeliest tokens. No divergence exceeds ln 2.",
        unit="nats",
    )
    persistence: int = option(
        2,
        count(1, MAX_BLOCK_LENGTH),
        "Of `less`: in how many steps before this one the best token of a position must have been the same.",
        unit="denoising steps",
    )


class LESS(CalibratedPolicy):
    """A confidence, a best token that stays, and a small divergence; else the most confident positions."""

    name = "less"
    Options = LESSOptions
    with_profile = "`less_confidence`; where nothing is stable, `steps` may unmask positions below it"
    adjusts = True
    reads_logits = True
    memory_size = 2 + 2 * TOP

    def resolve(self, options: LESSOptions, asked: CanvasRequest, canvas: Canvas) -> dict[str, Any]:
        """Total steps of the canvas, where the request asks for steps."""
        return resolve_if_asked(options, asked, canvas)

    def schedule(self, options: LESSOptions, shape: DecodeShape, thresholds: Thresholds | None = None) -> Schedule:
        """See the class; ``adjust`` chooses."""
        schedule = (
            calibrated_schedule(options, shape, thresholds)
            if options.calibrated
            else constant(shape, Rule.THRESHOLD, options.less_confidence)
        )
        constants = (options.js_threshold, options.persistence, *quota_numbers(options, shape))
        return replace(schedule, constants=constants)

    def read(self, rows: PositionLogits) -> None:
        """Compare best tokens and coarse distributions with the step before, and keep this step's."""
        import torch  # late: options are read without it

        memory, size = rows.memory, min(TOP, rows.logits.shape[1])
        share, token = rows.logits.softmax(dim=-1).topk(size, dim=-1)
        winner = rows.logits.argmax(dim=-1).float()  # exact: a float32 holds integers up to 2^24
        stays = (memory[:, RUN] > 0) & (memory[:, TOKEN] == winner)
        before = memory[:, FIRST_TOKEN:][:, :size], memory[:, FIRST_SHARE:][:, :size]
        divergence = coarse_divergence((token.float(), share), before)
        rows.reading[:, 0] = torch.where(memory[:, RUN] > 0, divergence, 1.0)
        memory[:, RUN] = torch.where(stays, memory[:, RUN] + 1, 1.0)
        rows.reading[:, 1] = memory[:, RUN]
        memory[:, TOKEN] = winner
        memory[:, FIRST_TOKEN:][:, :size], memory[:, FIRST_SHARE:][:, :size] = token.float(), share

    def adjust(self, step: Step) -> None:
        """Choose what is sure and stable, else the quota."""
        import torch  # late: options are read without it

        constants, (divergence, run, *_) = step.constants, step.reading.unbind(dim=-1)
        passes = step.is_open & (step.confidence >= step.parameter.unsqueeze(1))
        passes &= (divergence <= constants[:, DIVERGENCE, None]) & (run > constants[:, PERSISTENCE, None])
        first = best(step.confidence, quota_of(step, QUOTA))
        step.choose(torch.where(passes.any(dim=1, keepdim=True), passes, first))


def coarse_divergence(
    now: "tuple[torch.Tensor, torch.Tensor]", before: "tuple[torch.Tensor, torch.Tensor]"
) -> "torch.Tensor":
    """Jensen-Shannon divergence of distributions of which a few tokens are known, float32 ``[S]``, in nats.

    A token that only one of them knows is 0 in the other, whose share of it is in its rest.

    Args:
        now, before: Token ids and shares, float32 ``[S, K]``.
    """
    (token, p), (token_before, q) = now, before
    is_same = token.unsqueeze(2) == token_before.unsqueeze(1)  # [S, K, K]
    q_of_p = (is_same * q.unsqueeze(1)).sum(dim=2)
    q_alone = q.masked_fill(is_same.any(dim=1), 0.0)
    rest, rest_before = ((1.0 - one.sum(dim=1, keepdim=True)).clamp(min=0.0) for one in (p, q))
    total = _half_divergence(p, q_of_p) + _half_divergence(q_of_p, p)
    total += _half_divergence(rest, rest_before) + _half_divergence(rest_before, rest)
    return total + _half_divergence(q_alone, q_alone * 0.0)


def _half_divergence(p: "torch.Tensor", q: "torch.Tensor") -> "torch.Tensor":
    """Half of KL(p || (p + q) / 2) by row; 0 where p is."""
    import torch  # late: options are read without it

    return 0.5 * (torch.special.xlogy(p, p) - torch.special.xlogy(p, 0.5 * (p + q))).sum(dim=1)
