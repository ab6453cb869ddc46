"""CadLLM: threshold and block length follow the confidence of the request.

Source: CadLLM (arXiv 2512.07173). With m the mean confidence of the masked positions in a forward and c the mean of the
last two m, a block that is entered has clip(Bmin + floor((Bmax - Bmin) c), Bmin, Bmax) positions, the first one B0. The
paper's threshold goes from t0 to tmin with the share g of the canvas that is decided: t0 (1 - g) + tmin g. The authors'
code has another one, a ramp in each block: max(t0 - 0.45 i / S, tmin) in its step i, with S = (S0 + (Smax - S0)(1 - c))
B / B0. Here Bmax is ``block_length``, and m is over the active block.

With ``cad_vocabulary`` a confidence is the proposal's share of the V most likely tokens, and 0 where it is none of
them. The paper has V, and its text does not define the repetition in it; the authors' code does
(``calculate_adaptive_vocab_size`` and ``detect_repetition`` of juchengshen/CadLLM): V is 800 where g < 0.2, 70 where
g < 0.7, else 90; times 1.5, 1.2, 1 or 0.8 where the mean of the last five m is below 0.3, below 0.6, at most 0.8, or
above; times 1.3 where the last m is more than 0.1 below the one two before it; times 3 where the last four of at least
eight decided tokens are the same; from 35 to 1000, rounded down. The code's measure is 1 in that last case and at most
0.5 for tokens that repeat in pairs, threes or fours, and changes V above 0.5 only. Tokens count in the order in which
steps decide them, those of a step from left to right. Deviations: g is the share that is decided, where the code
guesses it from the steps; the mask token is none of the V; a token that a block's first step decides alone (Dream) is
not counted.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from csrc_triton.types import Rule
from vllm_osdt.calibration.thresholds import Thresholds
from vllm_osdt.declaration import Flag, count, number, option
from vllm_osdt.errors import InvalidOptionError
from vllm_osdt.geometry import MAX_BLOCK_LENGTH, Canvas, CanvasRequest, DecodeShape
from vllm_osdt.policies.base import Policy, PositionLogits, Schedule, Step, constant, places

if TYPE_CHECKING:
    import torch

RAMP_DEPTH = 0.45  # of the authors' code: how far a threshold falls in S steps
# Likewise: V by progress, its factors by confidence, and its bounds.
EARLY, MIDDLE, LATE = (0.2, 800.0), (0.7, 70.0), 90.0
UNSURE, HALF_SURE, SURE = (0.3, 1.5), (0.6, 1.2), (0.8, 0.8)
FALLING, REPEATING = (-0.1, 1.3), (4, 3.0)
MIN_COMMITTED, MIN_VOCABULARY, MAX_VOCABULARY = 8, 35, 1000
# Of Step.carry: mean confidences of the last forwards, the latest first; how many there have been; the share of the
# canvas that is decided; the token that was decided last, how often in a row, and how many have been.
NUM_MEANS = 5
NUM_FORWARDS, SHARE, TOKEN, RUN, NUM_COMMITTED = range(NUM_MEANS, NUM_MEANS + 5)
BLOCK_LENGTH, NUM_STEPS = range(2)  # of Step.state: of the active block


@dataclass(frozen=True)
class CadLLMOptions:
    """Bounds of the threshold and of the block length."""

    cad_threshold: float = option(0.85, number(gt=0, le=1), "Of `cad_llm`: threshold t0 at the beginning.")
    cad_min_threshold: float = option(0.4, number(gt=0, le=1), "Of `cad_llm`: threshold tmin at the end.")
    cad_ramp: str = option(
        "canvas",
        Literal["canvas", "block"],
        "Of `cad_llm`: the threshold falls over the `canvas`, as in the paper, or in each `block`, as in the authors' "
        "code.",
    )
    cad_min_block: int = option(
        4, count(1, MAX_BLOCK_LENGTH), "Of `cad_llm`: the shortest block; the longest is `block_length`.", unit="tokens"
    )
    cad_first_block: int = option(
        24,
        count(1, MAX_BLOCK_LENGTH),
        "Of `cad_llm`: length B0 of the first block; `block_length` where that is shorter.",
        unit="tokens",
    )
    cad_steps: int = option(
        24,
        count(),
        "Of `cad_llm` with a ramp in each block: S0, its steps when the model is sure.",
        unit="steps",
        needs="cad_ramp=block",
    )
    cad_max_steps: int = option(
        90,
        count(),
        "Of `cad_llm` with a ramp in each block: Smax, its steps when the model is unsure.",
        unit="steps",
        needs="cad_ramp=block",
    )
    cad_vocabulary: bool = option(
        False,
        Flag,
        "Of `cad_llm`: a confidence is the proposal's share of the V most likely tokens, 35 to 1000 of them, as in the "
        "paper. It is larger than the probability among all tokens, so that more of them pass.",
    )


class CadLLM(Policy):
    """A threshold that falls over the canvas, and blocks that are longer where the model is surer."""

    name = "cad_llm"
    Options = CadLLMOptions
    with_profile = "its threshold is a ramp between two bounds, and the lengths of its blocks follow what passes it"
    adjusts = True
    reads_logits = True
    cuts_blocks = True
    falls_in_blocks = False

    @property
    def variants(self) -> tuple[Policy, ...]:
        """A ramp in each block, the share of the most likely tokens, and both."""
        return VARIANTS

    def check(self, options: Any) -> None:
        """The thresholds and the steps must be in order."""
        if options.cad_max_steps < options.cad_steps:
            raise InvalidOptionError(
                f"cad_max_steps is {options.cad_max_steps}, below cad_steps {options.cad_steps}; raise it.",
                refusal="cad-steps",
                parameter="cad_max_steps",
                value=options.cad_max_steps,
            )
        if options.cad_min_threshold > options.cad_threshold:
            raise InvalidOptionError(
                f"cad_min_threshold is {options.cad_min_threshold:g}, above cad_threshold {options.cad_threshold:g}; "
                "lower it.",
                refusal="cad-thresholds",
                parameter="cad_min_threshold",
                value=options.cad_min_threshold,
            )

    def needs_logits(self, options: Any) -> bool:
        """For the share of the most likely tokens."""
        return options.cad_vocabulary

    def resolve(self, options: Any, asked: CanvasRequest, canvas: Canvas) -> dict[str, Any]:
        """The first block is no longer than the longest.

        Raises:
            InvalidOptionError: The shortest block is longer than the first or the longest one.
        """
        first = min(options.cad_first_block, canvas.block_length)
        if options.cad_min_block > first:
            raise InvalidOptionError(
                f"cad_min_block is {options.cad_min_block}, but the first block has {first} positions and the longest "
                f"(block_length) {canvas.block_length}; lower it.",
                refusal="cad-lengths",
                parameter="cad_min_block",
                value=options.cad_min_block,
            )
        return {"cad_first_block": first}

    def schedule(self, options: Any, shape: DecodeShape, thresholds: Thresholds | None = None) -> Schedule:
        """See the class; ``adjust`` replaces the parameter."""
        first = min(options.cad_first_block, shape.block_length)
        constants = (
            options.cad_threshold,
            options.cad_min_threshold,
            options.cad_min_block,
            first,
            shape.block_length,
            options.cad_steps,
            options.cad_max_steps,
        )
        variant = (options.cad_ramp == "block") + 2 * options.cad_vocabulary
        return replace(constant(shape, Rule.THRESHOLD, options.cad_threshold, constants), variant=variant)

    def cut(self, step: Step) -> "torch.Tensor":
        """See ``Cutter``."""
        return self._entered(step)[:, BLOCK_LENGTH].long()

    def adjust(self, step: Step) -> None:
        """The threshold of the step; the mean confidence is kept."""
        import torch  # late: options are read without it

        high, low = step.constants[:, :2].unbind(dim=1)
        if self.falls_in_blocks:
            step.state.copy_(torch.where(step.state[:, :1] == 0, self._entered(step), step.state))
            threshold = torch.maximum(high - RAMP_DEPTH * step.step_index / step.state[:, NUM_STEPS], low)
        else:
            share = 1.0 - step.num_left / step.num_positions
            threshold = high * (1.0 - share) + low * share
        step.parameter.copy_(threshold)
        number, known = step.is_open.sum(dim=1), step.carry[:, : NUM_FORWARDS + 1]
        total = step.confidence.clamp(min=0.0).sum(dim=1, dtype=torch.float64)
        mean = (total / number.clamp(min=1)).to(known.dtype)
        after = torch.cat([mean.unsqueeze(1), known[:, : NUM_MEANS - 1], known[:, NUM_FORWARDS:] + 1], dim=1)
        known.copy_(torch.where(number.unsqueeze(1) > 0, after, known))

    def _entered(self, step: Step) -> "torch.Tensor":
        """``Step.state`` of a block that is entered: its length, and the steps of its ramp; float32 ``[R, 4]``."""
        import torch

        shortest, first, longest, steps, most_steps = step.constants[:, 2:7].unbind(dim=1)
        (last, before_last), number = step.carry[:, :2].unbind(dim=1), step.carry[:, NUM_FORWARDS]
        level = torch.where(number > 1, (last + before_last) / 2, last)
        length = (shortest + ((longest - shortest) * level).floor()).clamp(shortest, longest)
        length = torch.where(number > 0, length, first)
        num_steps = (steps + (most_steps - steps) * torch.where(number > 0, 1.0 - level, 0.0)) * length / first
        return torch.stack([length, num_steps.clamp(min=1.0), *step.state[:, 2:].unbind(dim=1)], dim=1)


class InBlocks(CadLLM):
    """The same with a threshold that falls in each block."""

    falls_in_blocks = True


class Vocabulary(CadLLM):
    """The same with the proposal's share of the V most likely tokens for a confidence."""

    def read(self, rows: PositionLogits) -> None:
        """Put the proposal's share of the V most likely tokens in place of its probability."""
        import torch

        assert rows.carry is not None
        number = vocabulary_of(rows.carry)
        top = rows.logits.topk(min(MAX_VOCABULARY, rows.logits.shape[1]), dim=1).values
        number = number.clamp(max=top.shape[1])
        is_left = torch.arange(top.shape[1], device=top.device) < number.unsqueeze(1)
        total = top.double().masked_fill(~is_left, -torch.inf).logsumexp(dim=1)
        own = rows.logits.gather(1, rows.token.unsqueeze(1))
        is_among = own >= top.gather(1, number.unsqueeze(1) - 1)
        share = (own.squeeze(1).double() - total).exp().clamp(max=1.0)
        rows.confidence.copy_(torch.where(is_among.squeeze(1), share, 0.0))

    def observe(self, step: Step, unmasked: "torch.Tensor") -> None:
        """Keep how much is decided, and how often the last token was decided in a row."""
        import torch

        number = unmasked.sum(dim=1)
        step.carry[:, SHARE] = 1.0 - (step.num_left - number) / step.num_positions
        step.carry[:, NUM_COMMITTED] += number
        place = places(unmasked.shape[1], unmasked.device).expand_as(unmasked)
        last = place.masked_fill(~unmasked, -1).amax(dim=1)
        token = step.token.gather(1, last.clamp(min=0).unsqueeze(1))
        last_other = place.masked_fill(~unmasked | (step.token == token), -1).amax(dim=1)
        run = (unmasked & (place > last_other.unsqueeze(1))).sum(dim=1)
        name = token.squeeze(1).to(step.carry.dtype)  # exact below 2^24
        goes_on = (last_other < 0) & (step.carry[:, TOKEN] == name) | (number == 0)
        step.carry[:, RUN] = run + torch.where(goes_on, step.carry[:, RUN], 0.0)
        step.carry[:, TOKEN] = torch.where(number > 0, name, step.carry[:, TOKEN])


class InBlocksVocabulary(Vocabulary):
    """Both."""

    falls_in_blocks = True


VARIANTS = InBlocks(), Vocabulary(), InBlocksVocabulary()  # of ``CadLLM.variants``


def vocabulary_of(carry: "torch.Tensor") -> "torch.Tensor":
    """V of requests, see the module.

    Args:
        carry: float32 ``[S, 32]``.

    Returns:
        int64 ``[S]``, 35 to 1000.
    """
    import torch

    # All in float64, as the code has it: a factor in float32 would round V down to another number.
    means, number, share = carry[:, :NUM_MEANS].double(), carry[:, NUM_FORWARDS].double(), carry[:, SHARE].double()
    one = torch.ones_like(share)
    base = torch.where(share < EARLY[0], EARLY[1], torch.where(share < MIDDLE[0], MIDDLE[1], LATE * one))
    mean = means.sum(dim=1) / number.clamp(1, NUM_MEANS)  # what there has not been is 0
    factor = torch.where(mean > SURE[0], SURE[1], one)
    factor = torch.where(mean < HALF_SURE[0], HALF_SURE[1], factor)
    factor = torch.where(mean < UNSURE[0], UNSURE[1], factor)
    falls = (number > 2) & (means[:, 0] - means[:, 2] < FALLING[0])
    factor = factor * torch.where(falls, FALLING[1], one)
    repeats = (carry[:, RUN] >= REPEATING[0]) & (carry[:, NUM_COMMITTED] >= MIN_COMMITTED)
    wanted = base * torch.where(number > 0, factor, one) * torch.where(repeats, REPEATING[1], one)
    return wanted.clamp(MIN_VOCABULARY, MAX_VOCABULARY).long()
