"""S2D2: a block-causal model drafts many positions at once, and verifies them itself from left to right.

Source: S2D2 (arXiv 2603.25702) and the authors' code (phymhan/S2D2). A denoising step proposes a token for every masked
position. Where a router says so, one more forward pass verifies the proposals of the first run of masked positions: it
gives each of them the model's distribution p behind all tokens before it, as with blocks of one position. Proposals are
taken from left to right with probability min(1, p / q), where q is the distribution that they were drawn from. The
first that is refused is replaced by a token drawn from (p - q)+, and ends the step. So verified tokens have the
distribution of decoding one token after the other. Where that takes fewer positions than ``steps`` ask for, and where
nothing is verified, the static threshold decides.

Routers: the length of the run; or a score E[K] - cost, where E[K] = a1 + a1 a2 + ... is the expected number of accepted
proposals, with a = exp(-H / log V) for an entropy H of V tokens, or 1 where the two likeliest are more than a margin
apart, else 0. The score passes a threshold, or, with hysteresis, switches verification on at one and off below another.
The authors' settings: SDAR blocks of 4, score 0, cost 1, or of 16, always; threshold 0.85. Fast-dLLM v2: hysteresis on
at 1 and off below -5, cost 1 for each confident position, or runs of at least 8; threshold 0.9.

The last router is a contextual bandit (``contextual_bandit_ucb`` of the code), whose numbers are the request's own. A
draft belongs to one of eight contexts: whether its run is in the longer half of lengths, whether half of the block or
sub-block is decided, and whether the mean of H / log V over the run is at least a half. As in the code, what a block
had before its first draft, such as the end of a prompt, does not count as decided; in a sub-block it does. The reward
of a draft is the number of positions that are decided, or half of it where two forwards verify it. Of two choices with
n rewards of mean m in the context of draft t, the one with the larger m + beta sqrt(log t / n) is made; of equal ones
verification; and one without rewards before any other.

Deviations: at temperature 0 a proposal is taken where it is the likeliest token of p, the limit of the rule; the
authors' code draws with the probabilities of temperature 1 there. Distributions leave the mask token out. Hysteresis
switches on at its threshold, as in the paper; the code wants more. The bandit has the code's default of two bins each.
Left out are keys and values of causal passes in place of those of whole blocks (the code's ``cache_ver`` and
``draft_ver``).
"""

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from csrc_triton.types import NO_CONFIDENCE
from vllm_osdt.calibration.thresholds import Thresholds
from vllm_osdt.declaration import count, number, option
from vllm_osdt.errors import InvalidOptionError
from vllm_osdt.geometry import MAX_BLOCK_LENGTH, Canvas, CanvasRequest, DecodeShape
from vllm_osdt.policies.base import CHOSEN, Policy, PositionLogits, Schedule, Step
from vllm_osdt.policies.static_threshold import StaticThreshold, StaticThresholdOptions

if TYPE_CHECKING:
    import torch

MIN_SPAN, MAX_SPAN, MARGIN, COST, COST_OF_POSITION, ON, OFF = range(7)  # constants
# Of the bandit, in their place: beta, positions that are drafted together, and whether these are a sub-block.
EXPLORATION, PART, IS_SUB_BLOCK = COST, COST_OF_POSITION, ON
TOKEN, CONFIDENCE = range(2)  # memory: what was drafted
DOUBT, AGREES = range(2)  # readings: -log a; whether a verified proposal is taken
IS_ON = 0  # carry: hysteresis
NUM_CONTEXTS = 8  # carry of the bandit: number of rewards by choice and context, 1 for verifications; then their sums
CONTEXT, OPEN_AT_FIRST = range(2)  # state of the bandit: of the last draft; masked positions of the block's first one
NO_MARGIN = -1.0  # constant MARGIN where entropies say how sure a proposal is
NO_BOUND = 1e9  # of scores
HOPELESS = 1e3  # doubt of a proposal that is not expected to be taken
BASE = StaticThreshold()  # what decides where nothing is verified
UNITS = 2.0**30  # doubts and expectations are whole numbers of them, so that no sum depends on its order
TAKES, REDRAWS = 0x243F6A8885A308D3, 0x13198A2E03707344  # keys of the two draws of a verification: digits of pi


@dataclass(frozen=True)
class S2D2Options(StaticThresholdOptions):
    """When drafts are verified."""

    verify_router: Literal["score", "hysteresis", "span", "bandit"] = option(
        "score",
        Literal["score", "hysteresis", "span", "bandit"],
        "Of `s2d2`: what says whether a draft is verified. `span`: its length alone; always, with `verify_min_span` 1. "
        "`bandit`: what has decided more positions per forward in drafts of this request like it.",
    )
    verify_min_span: int = option(
        1,
        count(1, MAX_BLOCK_LENGTH),
        "Of `s2d2`: drafts of fewer masked positions in a row are not verified.",
        unit="tokens",
    )
    verify_max_span: int = option(
        MAX_BLOCK_LENGTH,
        count(1, MAX_BLOCK_LENGTH),
        "Of `s2d2`: of longer ones the first positions are verified.",
        unit="tokens",
    )
    verify_estimator: Literal["entropy", "margin"] = option(
        "entropy",
        Literal["entropy", "margin"],
        "Of `s2d2`: from what it is estimated how likely a verification takes a proposal.",
    )
    verify_margin: float = option(
        0.05,
        number(ge=0, lt=1),
        "Of `s2d2`: distance of the two largest probabilities above which a proposal counts as taken.",
        needs="verify_estimator=margin",
    )
    verify_cost: float = option(
        1.0,
        number(ge=0),
        "Of `s2d2`: what a verification costs, in proposals that it has to take for it.",
        unit="tokens",
    )
    verify_cost_per: Literal["verification", "confident_position"] = option(
        "verification",
        Literal["verification", "confident_position"],
        "Of `s2d2`: `confident_position`: that is the cost of each position that `threshold` would unmask.",
    )
    verify_score: float = option(
        0.0,
        number(),
        "Of `s2d2`: expected proposals beyond the cost from which on a draft is verified.",
        unit="tokens",
        needs="verify_router=score",
    )
    verify_on: float = option(
        1.0,
        number(),
        "Of `s2d2`: the same where the draft before was not verified.",
        unit="tokens",
        needs="verify_router=hysteresis",
    )
    verify_off: float = option(
        -5.0,
        number(),
        "Of `s2d2`: the same where it was; less than `verify_on`.",
        unit="tokens",
        needs="verify_router=hysteresis",
    )
    verify_exploration: float = option(
        1.0,
        number(ge=0),
        "Of `s2d2`: how much what was chosen seldom is preferred, in positions per forward.",
        unit="tokens",
        needs="verify_router=bandit",
    )


class S2D2(Policy):
    """The static threshold, and verifications of what it would leave masked."""

    name = "s2d2"
    with_profile = "its threshold decides only where nothing is verified"
    Options = S2D2Options
    adjusts = True
    reads_logits = True
    reads_step_before = True
    verifies = True
    memory_size = 2

    @property
    def variants(self) -> tuple[Policy, ...]:
        """The bandit."""
        return (BANDIT,)

    def without_use(self, options: S2D2Options) -> frozenset[str]:
        """Estimates and costs, where the router looks at lengths or rewards; and a least length for the bandit."""
        estimates = ("verify_estimator", "verify_margin", "verify_cost", "verify_cost_per")
        unused = {"span": estimates, "bandit": (*estimates, "verify_min_span")}
        return frozenset(unused.get(options.verify_router, ()))

    def check(self, options: S2D2Options) -> None:
        """Refuse bounds that contradict each other."""
        if options.verify_off >= options.verify_on:
            raise InvalidOptionError(
                f"verify_off is {options.verify_off:g}; it must be less than verify_on {options.verify_on:g}: send a "
                "smaller one.",
                refusal="verify-bounds",
                parameter="verify_off",
                value=options.verify_off,
            )
        if options.verify_max_span < options.verify_min_span:
            raise InvalidOptionError(
                f"verify_max_span is {options.verify_max_span}; it must be at least verify_min_span "
                f"{options.verify_min_span}: send a larger one.",
                refusal="verify-bounds",
                parameter="verify_max_span",
                value=options.verify_max_span,
            )

    def resolve(self, options: S2D2Options, asked: CanvasRequest, canvas: Canvas) -> dict[str, Any]:
        """Total steps of the canvas, where the request asks for steps."""
        return BASE.resolve(options, asked, canvas)

    def schedule(self, options: S2D2Options, shape: DecodeShape, thresholds: Thresholds | None = None) -> Schedule:
        """That of the static threshold."""
        base = BASE.schedule(options, shape, thresholds)
        if options.verify_router == "bandit":
            part, is_sub_block = shape.sub_block_length or shape.block_length, shape.sub_block_length is not None
            own = (1, options.verify_max_span, NO_MARGIN, options.verify_exploration, part, is_sub_block)
            return replace(base, constants=own, variant=1)
        bounds = {
            "span": (-NO_BOUND, -NO_BOUND),
            "score": (options.verify_score, options.verify_score),
            "hysteresis": (options.verify_on, options.verify_off),
        }
        per_position = options.verify_cost_per == "confident_position"
        costs = (0.0, options.verify_cost) if per_position else (options.verify_cost, 0.0)
        margin = options.verify_margin if options.verify_estimator == "margin" else NO_MARGIN
        constants = (options.verify_min_span, options.verify_max_span, margin, *costs, *bounds[options.verify_router])
        return replace(base, constants=constants)

    def read(self, rows: PositionLogits) -> None:
        """Of a draft, how sure its proposals are; of a verification, which of them are taken, and what else is."""
        import torch  # late: options are read without it

        assert rows.is_verified is not None
        temperature = torch.zeros_like(rows.confidence) if rows.temperature is None else rows.temperature
        scale = torch.where(temperature > 0, temperature, 1.0).unsqueeze(1)
        log_share = (rows.logits / scale).log_softmax(dim=-1)
        share = log_share.exp()
        entropy = -(share * log_share).masked_fill(share == 0, 0.0).sum(dim=-1, dtype=torch.float64).float()
        best, second = share.topk(2, dim=-1).values.unbind(dim=1)
        margin = rows.constants[:, MARGIN]
        by_margin = torch.where(best - second > margin, 0.0, HOPELESS)
        rows.reading[:, DOUBT] = torch.where(margin == NO_MARGIN, entropy / math.log(share.shape[1]), by_margin)
        drafted = rows.memory[:, TOKEN].long()
        token, confidence = rows.token, rows.confidence
        if rows.before is not None and rows.noise_key is not None:
            is_sampled = temperature > 0
            sampled = _sample(share, (rows.before.gather() / scale).softmax(dim=-1), drafted, rows.noise_key)
            token = torch.where(is_sampled, sampled, token)
            of_sampled = rows.logits.gather(1, token.unsqueeze(1)).squeeze(1) - rows.logits.logsumexp(dim=-1)
            confidence = torch.where(is_sampled, of_sampled.exp(), confidence)
        rows.reading[:, AGREES] = (token == drafted).float()
        rows.token.copy_(torch.where(rows.is_verified, token, rows.token))
        rows.confidence.copy_(torch.where(rows.is_verified, confidence, rows.confidence))

    def adjust(self, step: Step) -> None:
        """Ask for a verification, decide by one, or leave the step to the threshold."""
        verification = step.verification
        assert verification is not None
        is_verified = verification.span[:, 1:] > 0
        self._route(step, is_verified)
        self._decide(step, is_verified)

    def _route(self, step: Step, is_verified: "torch.Tensor") -> None:
        """Say which drafts are to be verified, and keep them; ``is_verified``: bool ``[R, 1]``, what is none."""
        import torch

        verification, constants = step.verification, step.constants
        assert verification is not None
        width = step.score.shape[1]
        place = torch.arange(width, device=step.score.device)
        first = place.where(step.is_open, width).amin(dim=1, keepdim=True)
        is_behind = ((place >= first) & ~step.is_open).cumsum(dim=1) > 0
        is_run = step.is_open & ~is_behind
        doubt = (step.reading[..., DOUBT].double() * UNITS).long().masked_fill(~is_run, 0)
        length = is_run.sum(dim=1)
        drafts = ~is_verified.squeeze(1)
        passes = self._passes(step, is_run, doubt, length, drafts)
        asks = drafts & passes & (length >= constants[:, MIN_SPAN]) & (length > 0)
        span = torch.stack([first.squeeze(1), length.minimum(constants[:, MAX_SPAN].long())], dim=1)
        verification.asked.copy_(span.masked_fill(~asks.unsqueeze(1), 0))
        kept = torch.stack([step.token.float(), step.confidence], dim=2)
        step.memory.copy_(torch.where(drafts[:, None, None], kept, step.memory))

    def _passes(
        self,
        step: Step,
        is_run: "torch.Tensor",
        doubt: "torch.Tensor",
        length: "torch.Tensor",
        drafts: "torch.Tensor",
    ) -> "torch.Tensor":
        """Whether the router wants a draft verified, bool ``[R]``; what it keeps is written.

        Args:
            step: The step.
            is_run: bool ``[R, W]``, the first run of masked positions.
            doubt: int64 ``[R, W]``, that of the run's proposals, in units; 0 elsewhere.
            length: int64 ``[R]``, of the run.
            drafts: bool ``[R]``, requests whose step is none of verification.
        """
        import torch

        constants = step.constants
        doubt = doubt.cumsum(dim=1)
        expected = ((doubt.double() / -UNITS).exp() * UNITS).long().masked_fill(~is_run, 0).sum(dim=1).double() / UNITS
        num_confident = (step.is_open & (step.confidence >= step.parameter.unsqueeze(1))).sum(dim=1)
        score = expected - constants[:, COST] - constants[:, COST_OF_POSITION] * num_confident
        passes = score >= torch.where(step.carry[:, IS_ON] > 0, constants[:, OFF], constants[:, ON])
        step.carry[:, IS_ON] = torch.where(drafts, passes.float(), step.carry[:, IS_ON])
        return passes

    def _decide(self, step: Step, is_verified: "torch.Tensor") -> None:
        """Choose what a verification takes; where that is too little, the threshold adds to it from the draft."""
        import torch

        verification = step.verification
        assert verification is not None
        place = torch.arange(step.score.shape[1], device=step.score.device)
        first, length = verification.span[:, :1], verification.span[:, 1:]
        is_inside = (place >= first) & (place < first + length)
        refused = (is_inside & (step.reading[..., AGREES] == 0)).long()
        taken = is_inside & (refused.cumsum(dim=1) - refused == 0)  # the first that is refused is replaced
        is_enough = taken.sum(dim=1) >= verification.min_unmask
        score = step.memory[..., CONFIDENCE].masked_fill(taken, CHOSEN).masked_fill(~step.is_open, NO_CONFIDENCE)
        step.score.copy_(torch.where(is_verified, score, step.score))
        step.parameter.masked_fill_(is_verified.squeeze(1) & is_enough, CHOSEN)
        drafted = step.memory[..., TOKEN].to(step.token.dtype)
        step.token.copy_(torch.where(is_verified & step.is_open & ~taken, drafted, step.token))


class Bandit(S2D2):
    """The same with a bandit for a router."""

    def _passes(
        self,
        step: Step,
        is_run: "torch.Tensor",
        doubt: "torch.Tensor",
        length: "torch.Tensor",
        drafts: "torch.Tensor",
    ) -> "torch.Tensor":
        """As that of :class:`S2D2`."""
        import torch

        part, num_open = step.constants[:, PART].long(), step.is_open.sum(dim=1)
        at_first = step.state[:, OPEN_AT_FIRST]
        at_first.copy_(torch.where(at_first == 0, num_open.float(), at_first))
        num_decided = torch.where(step.constants[:, IS_SUB_BLOCK] > 0, part, at_first.long()) - num_open
        is_long = (2 * (length - 1) >= part - 1) & (part > 1)
        is_late = 2 * num_decided >= part
        is_unsure = 2 * doubt.sum(dim=1) >= length * int(UNITS)
        context = 4 * is_long.long() + 2 * is_late.long() + is_unsure.long()
        step.state[:, CONTEXT] = torch.where(drafts, context.float(), step.state[:, CONTEXT])
        numbers, sums = step.carry.double().view(-1, 2, 2, NUM_CONTEXTS).unbind(dim=1)  # [R, choices, contexts]
        own = context[:, None, None].expand(-1, 2, 1)
        number, total = numbers.gather(2, own).squeeze(2), sums.gather(2, own).squeeze(2)
        log_t = ((numbers.sum(dim=(1, 2)) + 1.0).log() * UNITS).floor().unsqueeze(1) / UNITS
        value = total / number + step.constants[:, EXPLORATION].double().unsqueeze(1) * (log_t / number).sqrt()
        value = torch.where(number > 0, value, torch.inf)
        return value[:, 1] >= value[:, 0]

    def observe(self, step: Step, unmasked: "torch.Tensor") -> None:
        """Reward what was chosen; a draft that awaits its verification has decided nothing."""
        assert step.verification is not None
        number = unmasked.sum(dim=1, keepdim=True)
        is_verified = step.verification.span[:, 1:] > 0
        place = NUM_CONTEXTS * is_verified.long() + step.state[:, CONTEXT].long().unsqueeze(1)
        reward = number.float() / (1.0 + is_verified.float())  # a verification takes another forward
        numbers, sums = step.carry.split(2 * NUM_CONTEXTS, dim=1)
        numbers.scatter_add_(1, place, (number > 0).float())
        sums.scatter_add_(1, place, reward)


BANDIT = Bandit()  # of ``S2D2.variants``


def _sample(p: "torch.Tensor", q: "torch.Tensor", drafted: "torch.Tensor", noise_key: "torch.Tensor") -> "torch.Tensor":
    """Tokens of distributions p where ones of q were drafted: these with probability min(1, p / q), else of (p - q)+.

    Args:
        p, q: float32 ``[S, vocabulary]``.
        drafted: int64 ``[S]``.
        noise_key: int64 ``[S]``; the draft was drawn with it.

    Returns:
        int64 ``[S]``.
    """
    import torch

    from csrc_triton.noise import gumbel_noise, uniform_noise

    at = drafted.unsqueeze(1)
    number = torch.zeros(1, dtype=torch.int64, device=p.device)
    takes = uniform_noise(noise_key ^ TAKES, number) * q.gather(1, at) < p.gather(1, at)
    left = (p - q).clamp(min=0.0)
    left = torch.where((left > 0).any(dim=1, keepdim=True), left, p)
    ids = torch.arange(p.shape[1], device=p.device)
    other = (left.log() + gumbel_noise(noise_key ^ REDRAWS, ids)).argmax(dim=1)
    return torch.where(takes.squeeze(1), drafted, other)
