"""What a decoding policy is: its options, and a rule with a parameter for every (block, denoising step) of a request.

A request's schedule is a small table that is made once, when the request is first planned. Each step then is one lookup
for the whole batch and one call of :func:`csrc_triton.unmask`. A policy whose parameters depend on what the steps see
also has :meth:`Policy.adjust`, which runs on the batch's requests of that policy before each decision, and
:meth:`Policy.observe`, which runs after it. One that wants more of the logits than the best token and its probability
has :meth:`Policy.read`, which runs before both.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import numpy as np

from csrc_triton.types import CHOSEN as CHOSEN
from csrc_triton.types import KeptLogits, Rule
from vllm_osdt.calibration.thresholds import Thresholds
from vllm_osdt.geometry import MAX_BLOCK_LENGTH, Canvas, CanvasRequest, DecodeShape

if TYPE_CHECKING:
    import torch

MAX_CONSTANTS = 8  # numbers that a policy is given with each request
MAX_STATE = 4  # numbers that a policy may keep for each request's active block
MAX_CARRY = 32  # numbers that it may keep for each request
MAX_READINGS = 4  # numbers that a policy may read off the logits of each position
MAX_BRANCHES = 33  # states of a block that one step computes, the block itself among them


class Branch(NamedTuple):
    """A further state of a request's active block, computed in the same step beside the block itself.

    Its rows see what is cached before and behind them, and each other. They see nothing of the block itself or of other
    branches.

    Attributes:
        start: Position of its first row.
        num_rows: Rows, at consecutive positions.
        is_causal: Whether a row sees the positions up to its own alone.
    """

    start: int
    num_rows: int
    is_causal: bool = False


class BlockStep(NamedTuple):
    """A step that computes a request's active block, not the first one of the block, as the engine core plans it.

    Attributes:
        start: Position of the first row.
        num_rows: Rows, at consecutive positions.
        block_start: First position of the block that is neither prompt nor committed.
        block_end: Position behind the block.
        num_before: Steps that the block has had since it was entered, at least 1.
    """

    start: int
    num_rows: int
    block_start: int
    block_end: int
    num_before: int


class Drafts(NamedTuple):
    """How the states that a step's proposals lead to are drafted and verified (``freedave``).

    Attributes:
        number: Branches of a step at most, the block itself among them.
        sizes: int32 ``[block_length]``: positions that a denoising step is expected to unmask, by step in the block.
        is_subset: A draft is right where the target has all of it; else where it is the target.
    """

    number: int
    sizes: np.ndarray
    is_subset: bool = False


@dataclass(frozen=True)
class Schedule:
    """The decisions of one request ahead of time.

    Attributes:
        rule: How ``parameters`` are read.
        parameters: float32 ``[num_blocks, block_length]``: confidence threshold (equality passes), number of positions,
            factor, or limit on the sum of uncertainties, by block and denoising step in the block. A block never needs
            more steps than positions, since every step unmasks at least one.
        min_unmask: int32 ``[block_length]``, by step in the block: so many positions are unmasked whatever the rule
            says; None for the one that every rule promises.
        fallback: int8, shape of ``parameters``, where a calibrated threshold comes from
            (``calibration.thresholds.Fallback``); None where nothing was calibrated.
        constants: At most 8 numbers that ``Policy.adjust`` reads.
        drafts: Of a policy that verifies drafts; None for no branches of that kind.
        variant: Who adjusts the steps: 0 for the policy itself, else a place in ``Policy.variants``, from 1.
    """

    rule: Rule
    parameters: np.ndarray
    min_unmask: np.ndarray | None = None
    fallback: np.ndarray | None = None
    constants: Sequence[float] = ()
    drafts: Drafts | None = None
    variant: int = 0


class PositionLogits(NamedTuple):
    """Logits of masked positions, of the batch's requests of one policy; S of them, perhaps not all at once.

    A row knows nothing of the others, so that it is the same in every batch.

    Attributes:
        logits: float32 ``[S, vocabulary]``, without temperature, as sampling parameters left them: -inf of what is left
            out and of the mask token.
        before: Those of the block's step before, as the model wrote them; anything where the position had no logits in
            that step, which ``memory`` can tell. None unless the policy's ``reads_step_before``.
        token: int64 ``[S]``, the proposal. May be overwritten.
        confidence: float32 ``[S]``, of the proposal. May be overwritten.
        constants: float32 ``[S, 8]``, from the request's schedule.
        memory: float32 ``[S, memory_size]``, zero when the block is entered. May be overwritten, and is kept until the
            next block.
        reading: float32 ``[S, 4]``, zero; what is written there comes to ``Step.reading``.
        step_index: int64 ``[S]``, denoising steps that the block has seen before this one.
        earlier: Like ``before``, of the steps before that one, the latest first; ``num_steps_before`` - 1 of them.
        carry: float32 ``[S, 32]``, ``Step.carry`` of the row's request before the step.
        temperature: float32 ``[S]``; None where every row's is 0.
        noise_key: int64 ``[S]``, a random key of the position and the step; None likewise.
        is_verified: bool ``[S]``, of a policy with ``verifies``: the logits are those of a verification. ``before`` has
            then the draft's, as sampling parameters left them, -inf of the mask token, where ``temperature`` is not
            None. None for others.
    """

    logits: "torch.Tensor"
    before: "KeptLogits | None"
    token: "torch.Tensor"
    confidence: "torch.Tensor"
    constants: "torch.Tensor"
    memory: "torch.Tensor"
    reading: "torch.Tensor"
    step_index: "torch.Tensor"
    earlier: "tuple[KeptLogits, ...]" = ()
    carry: "torch.Tensor | None" = None
    temperature: "torch.Tensor | None" = None
    noise_key: "torch.Tensor | None" = None
    is_verified: "torch.Tensor | None" = None


class Verification(NamedTuple):
    """What a policy with ``verifies`` is told of a step, and says of the next one; R requests.

    A span is the place of its first position in the active block, and its length; length 0: none.

    Attributes:
        span: int64 ``[R, 2]``, positions of which this step has the logits of a verification. The other masked
            positions then have none, and their proposals mean nothing.
        asked: int64 ``[R, 2]``, zero. Where a span is written, this step decides nothing: its proposals
            (``Step.token``) are put in their positions, still masked, and the next step verifies those of the span, or
            its first ones where that is too much for a step.
        min_unmask: int32 ``[R]``, of the schedule: so many positions the step unmasks at least.
    """

    span: "torch.Tensor"
    asked: "torch.Tensor"
    min_unmask: "torch.Tensor"


class Step(NamedTuple):
    """One denoising step of the batch's requests of one policy; R requests, W the longest block.

    Attributes:
        score: float32 ``[R, W]``, confidence of each masked position that has logits, -1 for NaN, -2 elsewhere. May be
            overwritten: the rule reads it.
        parameter: float32 ``[R]``, of the rule. May be overwritten.
        constants: float32 ``[R, 8]``, from the request's schedule.
        state: float32 ``[R, 4]``, zero when a block is entered. May be overwritten, and is kept until the next block.
        step_index: int64 ``[R]``, denoising steps that the block has seen before this one.
        confidence: float32 ``[R, W]``, the same as ``score``, as it was.
        token: int64 ``[R, W]``, the proposals; 0 without logits. A policy with ``verifies`` may overwrite it.
        is_open: bool ``[R, W]``, masked positions that have logits.
        memory: float32 ``[R, W, memory_size]``, zero when a block is entered. May be overwritten, and is kept until the
            next block.
        reading: float32 ``[R, W, 4]``, what :meth:`Policy.read` wrote; 0 elsewhere.
        carry: float32 ``[R, 32]``, zero when the request starts. May be overwritten, and is kept; a preempted request
            resumes with what it was when its block was entered.
        block_index: int64 ``[R]``, of the active block, from 0.
        num_left: int64 ``[R]``, undecided positions of the canvas, as far as it is there, before the step.
        num_positions: int64 ``[R]``, positions of the canvas, as far as it is there.
        end_token_ids: int64 ``[R, E]``, tokens that end the output, -1 for none. One that ends thinking is none.
        num_alone: int64 ``[R]``, positions of the block that a step before the policy's first one decided: with shifted
            logits 1, the first one, where the request does not give it; else 0.
        output_index: int64 ``[R]``, of the first column: its place in the request's output.
        tensors: What :meth:`Policy.tensors` has read for the engine, by name.
        verification: Of a policy with ``verifies``; None for others.
    """

    score: "torch.Tensor"
    parameter: "torch.Tensor"
    constants: "torch.Tensor"
    state: "torch.Tensor"
    step_index: "torch.Tensor"
    confidence: "torch.Tensor"
    token: "torch.Tensor"
    is_open: "torch.Tensor"
    memory: "torch.Tensor"
    reading: "torch.Tensor"
    carry: "torch.Tensor"
    block_index: "torch.Tensor"
    num_left: "torch.Tensor"
    num_positions: "torch.Tensor"
    end_token_ids: "torch.Tensor"
    num_alone: "torch.Tensor"
    output_index: "torch.Tensor"
    tensors: "Mapping[str, torch.Tensor]" = MappingProxyType({})
    verification: "Verification | None" = None

    def num_at_entry(self, known: "torch.Tensor") -> "torch.Tensor":
        """Masks with which the block, or its first sub-block, began, float32 ``[R]``.

        Args:
            known: float32 ``[R]``, what an earlier step of the block found; 0 in the first one that the policy adjusts.
        """
        return known.where(known > 0, (self.is_open.sum(dim=1) + self.num_alone).to(known.dtype))

    def choose(self, chosen: "torch.Tensor", rank: "torch.Tensor | None" = None) -> None:
        """Have exactly these positions unmasked, whatever the schedule's threshold; at least the first by rank.

        The schedule's rule must be ``Rule.THRESHOLD``.

        Args:
            chosen: bool ``[R, W]``; what is not open does not count.
            rank: float32 ``[R, W]``, at most 1, by which one position is unmasked where none is chosen; less than -1
                and NaN count as -1. None for the confidence.
        """
        from csrc_triton.adjusting import choose  # late: options are read without torch

        choose(self.score, self.parameter, self.confidence if rank is None else rank, chosen, self.is_open)


def best(score: "torch.Tensor", number: "torch.Tensor") -> "torch.Tensor":
    """The positions with the highest scores, the first ones among equals.

    Args:
        score: float32 ``[R, W]``; NaN counts as -1, as in ``csrc_triton.unmask``.
        number: ``[R]``, how many; whole numbers of any dtype.

    Returns:
        bool ``[R, W]``.
    """
    from csrc_triton import adjusting  # late: options are read without torch

    return adjusting.best(score, number)


def ranks(score: "torch.Tensor") -> "torch.Tensor":
    """How many positions come before each one, int64 ``[R, W]``; in the order of :func:`best`."""
    from csrc_triton import adjusting  # late: options are read without torch

    return adjusting.ranks(score)


@lru_cache(maxsize=MAX_BLOCK_LENGTH)
def places(width: int, device: "torch.device") -> "torch.Tensor":
    """int64 ``[W]``, 0 and up; not to be written. Made once for a width."""
    import torch  # late: options are read without it

    return torch.arange(width, device=device)


@lru_cache(maxsize=MAX_BLOCK_LENGTH)
def distances(width: int, device: "torch.device") -> "torch.Tensor":
    """int64 ``[W, W]``, of each position from each other; not to be written. Made once for a width."""
    place = places(width, device)
    return (place - place.unsqueeze(-1)).abs()


class Cutter(Protocol):
    """Says how long a block is when it is entered, where every position sees the whole canvas."""

    def cut(self, step: Step) -> "torch.Tensor":
        """The positions of the blocks that are entered.

        Args:
            step: Their first step that has logits of all masked positions, before anything of it is decided;
                ``constants`` are the cutter's. Nothing of it may be overwritten.

        Returns:
            int64 ``[R]``; less than 1 counts as 1, and more than ``block_length`` as that.
        """
        ...


class Policy(ABC):
    """Turns a request's options into its schedule. One instance serves all requests, so it holds no state of theirs.

    Attributes:
        name: What a user calls it.
        Options: A frozen dataclass of the options that it reads (``vllm_osdt.declaration.option``).
        with_profile: What a task's calibrated threshold is to it, for users: which of its numbers the option
            ``calibrated`` replaces; where it has no such option, why not.
        ranks_by_entropy: Whether confidence is 1 - H / 32, with H the entropy of the position in nats, in place of the
            probability of the proposal. Token editing, which compares probabilities, is then refused. Where it depends
            on options: :meth:`looks_at_entropy`.
        adjusts: Whether :meth:`adjust` and :meth:`observe` run.
        reads_logits: Whether :meth:`read` runs too. Where it depends on options: :meth:`needs_logits`.
        reads_step_before: Whether it gets the logits of the step before. The worker keeps them, or hidden states where
            the operator's ``kept_logits_gib`` has no room for logits; each step then multiplies with the output weight
            once more.
        num_steps_before: How many steps before; each takes room and that multiplication.
        memory_size: Numbers that it keeps of each position of the active block.
        verifies: Whether a step may be followed by a verification: a forward pass that gives of drafted positions the
            logits that the model has from left to right, each behind the drafted tokens before it
            (``Step.verification``). Such a policy reads logits. Refused where every position sees the whole canvas.
        needs_whole_blocks: Whether its schedule is one of blocks as long as ``block_length``. Refused for models with
            sub-blocks, and where blocks are cut.
        cuts_blocks: Whether it is a :class:`Cutter` too: blocks of its requests are as long as it says, at most
            ``block_length``. Refused for block-causal models, whose blocks lie on a grid.
        has_branches: Whether :meth:`branches` is asked. Options that a second state of the block would break are
            refused (``vllm_osdt.options``).
    """

    name: ClassVar[str]
    Options: ClassVar[type]
    with_profile: ClassVar[str] = "it has no way to take a profile's threshold in the place of one of its own"
    ranks_by_entropy: ClassVar[bool] = False
    adjusts: ClassVar[bool] = False
    reads_logits: ClassVar[bool] = False
    reads_step_before: ClassVar[bool] = False
    num_steps_before: ClassVar[int] = 1
    memory_size: ClassVar[int] = 0
    verifies: ClassVar[bool] = False
    needs_whole_blocks: ClassVar[bool] = False
    cuts_blocks: ClassVar[bool] = False
    has_branches: ClassVar[bool] = False

    def branches(self, options: Any, step: BlockStep) -> Sequence[Branch]:
        """Further branches of a step, for a policy with ``has_branches``.

        Args:
            options: Resolved options, of which it reads its own.
            step: The step; the result may depend on nothing else.
        """
        return ()

    def needs_branches(self, options: Any) -> bool:
        """Whether the tokens depend on how many branches are computed.

        If so, a step has all that fit an engine, and waits for room and pages. Else it has those that are to be had
        for nothing, the first ones.
        """
        return False

    def calibrates(self, options: Any) -> bool:
        """Whether requests of a task share a calibration profile, whose thresholds :meth:`schedule` is given.

        Where there is no profile, a request that would have one is decoded with the static threshold instead.
        """
        return False

    def check(self, options: Any) -> None:
        """Refuse options that contradict each other.

        Raises:
            InvalidOptionError: They do.
        """

    def check_operator(self, options: Any, operator: Any) -> None:
        """Refuse what the operator has not provided for; every policy is asked when an engine starts.

        Args:
            options: Of a request of this policy; when an engine starts, those of a request that sets none, which may
                be another policy's.
            operator: The ``ServerOptions``.

        Raises:
            OSDTError: The operator's options do not fit, or do not let requests use the policy.
        """

    def tensors(self, operator: Any) -> "Mapping[str, torch.Tensor]":
        """What ``Step.tensors`` has, read from files that the operator names when a worker starts.

        Args:
            operator: The ``ServerOptions``, which :meth:`check_operator` has seen.
        """
        return {}

    def resolve(self, options: Any, asked: CanvasRequest, canvas: Canvas) -> dict[str, Any]:
        """Options of its own that follow from the canvas, by name.

        Raises:
            InvalidOptionError: An option does not fit the canvas.
        """
        return {}

    def without_use(self, options: Any) -> frozenset[str]:
        """Names of its own options that mean nothing beside the others; a request that sets one is refused."""
        return frozenset()

    def looks_at_entropy(self, options: Any) -> bool:
        """Whether a request's confidences are of entropies, as ``ranks_by_entropy`` says."""
        return self.ranks_by_entropy

    def needs_logits(self, options: Any) -> bool:
        """Whether a request's logits are read; never without ``reads_logits``."""
        return self.reads_logits

    @abstractmethod
    def schedule(self, options: Any, shape: DecodeShape, thresholds: Thresholds | None = None) -> Schedule:
        """The schedule of a request.

        Args:
            options: Resolved options, of which it reads its own.
            shape: The request's blocks and how its model decides.
            thresholds: Calibrated T, where a profile applies; else None.
        """

    def read(self, rows: PositionLogits) -> None:
        """Read logits: write to ``rows.reading`` and ``rows.memory``, or change proposals and confidences."""

    def adjust(self, step: Step) -> None:
        """Change scores and parameters of a step before the rule decides."""

    def cut(self, step: Step) -> "torch.Tensor":
        """See :class:`Cutter`; for a policy with ``cuts_blocks``."""
        raise NotImplementedError

    @property
    def variants(self) -> "tuple[Policy, ...]":
        """Policies that adjust the steps of some of its requests in its place (``Schedule.variant``).

        They have its name and its attributes, but perhaps need fewer or more steps before. Requests of one take no
        operations of another.
        """
        return ()

    @property
    def observes(self) -> bool:
        """Whether it has :meth:`observe`."""
        return type(self).observe is not Policy.observe

    def observe(self, step: Step, unmasked: "torch.Tensor") -> None:
        """Keep in ``step.state`` what the next step needs.

        Args:
            step: As :meth:`adjust` left it.
            unmasked: bool ``[R, W]``, positions that the step decided.
        """


def constant(shape: DecodeShape, rule: Rule, parameter: float, constants: Sequence[float] = ()) -> Schedule:
    """The same parameter at every block and step."""
    table = np.full((shape.num_blocks, shape.block_length), parameter, dtype=np.float32)
    return Schedule(rule, table, constants=constants)
