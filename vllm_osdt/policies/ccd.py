"""CCD: coherent contextual decoding, which ranks positions by what several steps say of them.

Source: CCD (arXiv 2512.02044), and the authors' code (tonyckc/CCD-DLM-code).

``paper``: each step notes its V most confident masked positions. A position's distribution is the mean of the last d
steps' that have noted it, this one included; its best token is proposed, and the positions just noted are ranked by its
entropy. CCD commits the first of them, as many as ``fixed_steps`` would take. CCD-DS (``ccd_dynamic``) commits all of
them that the d - 1 steps before have noted too, with the same best token, where these are at least as many; so does
the authors' code. Authors' values: V = 4; d = 2 for LLaDA, 3 for Dream. What we know of the paper is its abstract,
its project page and summaries: that its step counts agreeing positions is theirs, in which order it commits is not.

``release``: the authors' code averages nothing. Confidence is the negative entropy of this step. N are the n positions
that followed the committed ones in the step before, n = 1 in the first 4 steps, then one more each step, up to 5 times
the quota; 2 while at most a tenth of the block is masked. From the sixth step on, where one of the quota's positions is
in N: those of the n most confident that are in N and have kept their best token are committed, all of them, or the
quota's number without ``ccd_dynamic``. Where these are fewer than the quota, or none of the quota's is in N, and in the
first five steps, the quota's. Unlike the code, a position that is not masked is never noted, and the last step is none
of its own.

State is the block's; the authors denoise all of the answer together. A proposal that is a sample, not the best token of
its step, stays.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from csrc_triton.types import Rule
from vllm_osdt.calibration.thresholds import Thresholds
from vllm_osdt.declaration import Flag, count, option
from vllm_osdt.geometry import MAX_BLOCK_LENGTH, Canvas, CanvasRequest, DecodeShape
from vllm_osdt.policies.base import Policy, PositionLogits, Schedule, Step, best, constant
from vllm_osdt.policies.fixed_steps import StepsOptions, quota_numbers, quota_of, resolve_if_asked

if TYPE_CHECKING:
    import torch

IS_DYNAMIC, WINDOW, NUM_POSITIONS, QUOTA = range(4)  # constants; from the last on, the quota's
TOKEN, NOTED, TOKEN_EARLIER, NOTED_EARLIER = range(4)  # memory: of the step before, and of the one before that
CONFIDENCE, RANK, BEST_TOKEN = range(3)  # reading
NUM_NOTED, NUM_MASKED = range(2)  # state: n, and the most masked positions that a step has seen
WARM_UP, GROWTH_FROM, EXPANSION, LATE = 5, 4, 5, 0.1  # of the authors' code
NOWHERE = -2.0  # rank of a position that is not open


@dataclass(frozen=True)
class CCDOptions(StepsOptions):
    """Whose rule, how far back it looks, and whether its steps have a fixed size."""

    ccd_rule: str = option(
        "paper",
        Literal["paper", "release"],
        "Of `ccd`: the paper's distributions averaged over steps, or the rule of the authors' code, which averages "
        "none.",
    )
    ccd_dynamic: bool = option(
        True,
        Flag,
        "Of `ccd`: commit all positions on which steps agree (CCD-DS), where these are more than the step's number.",
    )
    ccd_window: int = option(
        2,
        count(2, 3),
        "Of `ccd` by the paper: how many steps are averaged, this one included; the authors' is 3 for Dream.",
        unit="denoising steps",
        needs="ccd_rule=paper",
    )
    ccd_positions: int = option(
        4,
        count(1, MAX_BLOCK_LENGTH),
        "Of `ccd` by the paper: how many positions each step notes.",
        unit="positions",
        needs="ccd_rule=paper",
    )


class CCD(Policy):
    """Positions on which the last steps agree, by the entropy of their averaged distributions; of two steps."""

    name = "ccd"
    Options = CCDOptions
    with_profile = "it has no threshold: what steps agree on is committed, the least entropies first"
    adjusts = True
    reads_logits = True
    reads_step_before = True
    memory_size = 4

    @property
    def variants(self) -> tuple[Policy, ...]:
        """For averages of three steps, and for the authors' code."""
        return LONGER, RELEASE

    def resolve(self, options: CCDOptions, asked: CanvasRequest, canvas: Canvas) -> dict[str, Any]:
        """Total steps of the canvas, where the request asks for steps."""
        return resolve_if_asked(options, asked, canvas)

    def schedule(self, options: CCDOptions, shape: DecodeShape, thresholds: Thresholds | None = None) -> Schedule:
        """See the class; ``adjust`` chooses."""
        is_release = options.ccd_rule == "release"
        own = (float(options.ccd_dynamic), options.ccd_window, options.ccd_positions)
        schedule = constant(shape, Rule.THRESHOLD, 1.0, (*own, *quota_numbers(options, shape)))
        return replace(schedule, variant=2 if is_release else int(options.ccd_window > 2))

    def read(self, rows: PositionLogits) -> None:
        """Average the distributions of the steps that have noted a position, and propose what is likeliest then."""
        from csrc_triton.reading import average  # late: options are read without torch

        before = () if rows.before is None else (rows.before, *rows.earlier)
        counts = [rows.memory[:, column] for column in (NOTED, NOTED_EARLIER)[: len(before)]]
        average(rows.logits, before, counts, rows.token, rows.confidence, rows.reading)

    def adjust(self, step: Step) -> None:
        """Choose by the paper, and note this step's positions."""
        if step.score.device.type == "cpu":
            from vllm_osdt.policies.loops import ccd  # late: options are read without torch

            ccd(step)
        else:
            self.adjust_by_tensors(step)

    def adjust_by_tensors(self, step: Step) -> None:
        """See :meth:`adjust`."""
        token, quota = step.reading[..., BEST_TOKEN], quota_of(step, QUOTA)
        stays = step.is_open & (step.memory[..., NOTED] > 0) & (step.memory[..., TOKEN] == token)
        chosen, noted = self._choice(step, quota, stays)
        step.memory[..., TOKEN_EARLIER], step.memory[..., NOTED_EARLIER] = step.memory[..., :TOKEN_EARLIER].unbind(-1)
        step.memory[..., TOKEN], step.memory[..., NOTED] = token, noted.to(token.dtype)
        step.choose(chosen, step.reading[..., RANK])

    def _choice(self, step: Step, quota: "torch.Tensor", stays: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
        """What is committed and what is noted, bool ``[R, W]`` each; ``stays``: noted before, with the same token."""
        return _by_paper(step, quota, stays)


class Longer(CCD):
    """The same with a step more."""

    num_steps_before = 2


class Release(CCD):
    """The authors' rule, which averages nothing."""

    reads_step_before = False

    def adjust(self, step: Step) -> None:
        """Choose by the code, and note this step's positions."""
        self.adjust_by_tensors(step)

    def _choice(self, step: Step, quota: "torch.Tensor", stays: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
        """As that of :class:`CCD`."""
        return _by_release(step, quota, stays)


LONGER, RELEASE = Longer(), Release()  # of ``CCD.variants``


def _by_paper(step: Step, quota: "torch.Tensor", stays: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
    """What is committed and what is noted, bool ``[R, W]`` each."""
    import torch  # late: options are read without it

    confidence = step.reading[..., CONFIDENCE].masked_fill(~step.is_open, NOWHERE)
    number = torch.maximum(step.constants[:, NUM_POSITIONS].long(), quota)
    noted = best(confidence, number) & step.is_open
    agrees_longer = (step.memory[..., NOTED_EARLIER] > 0) & (
        step.memory[..., TOKEN_EARLIER] == step.reading[..., BEST_TOKEN]
    )
    agrees = noted & stays & (agrees_longer | (step.constants[:, WINDOW] < 3).unsqueeze(1))
    first = best(step.reading[..., RANK].masked_fill(~noted, NOWHERE), quota)
    is_enough = (agrees.sum(dim=1) >= quota) & (step.constants[:, IS_DYNAMIC] > 0)
    return torch.where(is_enough.unsqueeze(1), agrees, first), noted


def _by_release(step: Step, quota: "torch.Tensor", stays: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
    """What is committed and what is noted, bool ``[R, W]`` each; ``step.state`` has n."""
    import torch  # late: options are read without it

    num_open = step.is_open.sum(dim=1).to(step.state.dtype)
    step.state[:, NUM_MASKED] = torch.maximum(step.state[:, NUM_MASKED], num_open)
    grown = torch.minimum(step.state[:, NUM_NOTED] + 1, (EXPANSION * quota).to(num_open.dtype))
    grown = torch.where(num_open <= LATE * step.state[:, NUM_MASKED], grown.clamp(max=2), grown)
    step.state[:, NUM_NOTED] = torch.where(step.step_index < GROWTH_FROM, 1.0, grown)
    number = step.state[:, NUM_NOTED].long()
    rank = step.reading[..., RANK].masked_fill(~step.is_open, NOWHERE)
    first = best(rank, quota) & step.is_open
    matches = best(rank, number) & stays
    meets = (first & (step.memory[..., NOTED] > 0)).any(dim=1) & (matches.sum(dim=1) >= quota)
    meets = (meets & (step.step_index >= WARM_UP)).unsqueeze(1)
    few = best(rank.masked_fill(~matches, NOWHERE), quota)
    matched = torch.where((step.constants[:, IS_DYNAMIC] > 0).unsqueeze(1), matches, few)
    left = step.is_open & ~torch.where(meets, matches, first)
    noted = best(rank.masked_fill(~left, NOWHERE), number) & left
    return torch.where(meets, matched, first), noted
