"""CadLLM: threshold and block length follow the confidence of the request.

Source: CadLLM (arXiv 2512.07173). With m the mean confidence of the masked positions in a forward and c the mean of the
last two m, a block that is entered has clip(Bmin + floor((Bmax - Bmin) c), Bmin, Bmax) positions, the first one B0. The
paper's threshold goes from t0 to tmin with the share g of the canvas that is decided: t0 (1 - g) + tmin g. The authors'
code has another one, a ramp in each block: max(t0 - 0.45 i / S, tmin) in its step i, with S = (S0 + (Smax - S0)(1 - c))
B / B0. Here Bmax is ``block_length``, and m is over the active block. Not here: the paper's subset of the vocabulary,
whose size depends on a measure of repetition that its text does not define; a probability among fewer tokens is larger,
so that a lower threshold does the same.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from csrc_triton.types import Rule
from vllm_osdt.calibration.thresholds import Thresholds
from vllm_osdt.declaration import count, number, option
from vllm_osdt.errors import InvalidOptionError
from vllm_osdt.geometry import MAX_BLOCK_LENGTH, Canvas, CanvasRequest, DecodeShape
from vllm_osdt.policies.base import Policy, Schedule, Step, constant

if TYPE_CHECKING:
    import torch

RAMP_DEPTH = 0.45  # of the authors' code: how far a threshold falls in S steps
LAST, BEFORE_LAST, NUM_FORWARDS = range(3)  # of Step.carry: two mean confidences, and how many there have been
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


class CadLLM(Policy):
    """A falling threshold, and blocks that are longer where the model is surer."""

    name = "cad_llm"
    Options = CadLLMOptions
    with_profile = "it cuts blocks to many lengths, and calibrated thresholds are of blocks of one length"
    adjusts = True
    cuts_blocks = True

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
            float(options.cad_ramp == "block"),
            options.cad_min_block,
            first,
            shape.block_length,
            options.cad_steps,
            options.cad_max_steps,
        )
        return constant(shape, Rule.THRESHOLD, options.cad_threshold, constants)

    def cut(self, step: Step) -> "torch.Tensor":
        """See ``Cutter``."""
        return self._entered(step)[:, BLOCK_LENGTH].long()

    def adjust(self, step: Step) -> None:
        """The threshold of the step; the mean confidence is kept."""
        import torch  # late: options are read without it

        step.state.copy_(torch.where(step.state[:, :1] == 0, self._entered(step), step.state))
        high, low, by_block = step.constants[:, :3].unbind(dim=1)
        share = 1.0 - step.num_left / step.num_positions
        ramp = torch.maximum(high - RAMP_DEPTH * step.step_index / step.state[:, NUM_STEPS], low)
        step.parameter.copy_(torch.where(by_block > 0, ramp, high * (1.0 - share) + low * share))
        number = step.is_open.sum(dim=1)
        total = step.confidence.nan_to_num().masked_fill(~step.is_open, 0.0).double().sum(dim=1)
        mean = (total / number.clamp(min=1)).float()
        after = torch.stack([mean, step.carry[:, LAST], step.carry[:, NUM_FORWARDS] + 1, step.carry[:, 3]], dim=1)
        step.carry.copy_(torch.where(number.unsqueeze(1) > 0, after, step.carry))

    def _entered(self, step: Step) -> "torch.Tensor":
        """``Step.state`` of a block that is entered: its length, and the steps of its ramp; float32 ``[R, 4]``."""
        import torch

        shortest, first, longest, steps, most_steps = step.constants[:, 3:8].unbind(dim=1)
        last, before_last, number = step.carry[:, :3].unbind(dim=1)
        level = torch.where(number > 1, (last + before_last) / 2, last)
        length = (shortest + ((longest - shortest) * level).floor()).clamp(shortest, longest)
        length = torch.where(number > 0, length, first)
        num_steps = (steps + (most_steps - steps) * torch.where(number > 0, 1.0 - level, 0.0)) * length / first
        return torch.stack([length, num_steps.clamp(min=1.0), *step.state[:, 2:].unbind(dim=1)], dim=1)
