"""What travels between front end, engine core and workers: one typed message each way.

``RequestSpec`` goes from the front end to the engine core in a request's sampling parameters. ``CanvasStep`` goes from
the scheduler to every rank with vLLM's ``SchedulerOutput``, and so does a ``GrammarChain`` of each request with a
grammar, with ``GrammarOutput``; ``StepReport`` comes back from the first rank with its ``ModelRunnerOutput``. Each is
one attribute of vLLM's object (:data:`CANVAS_STEP`, :data:`GRAMMAR_CHAINS`, :data:`STEP_REPORT`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np

from vllm_osdt.geometry import Canvas
from vllm_osdt.options import DecodingOptions
from vllm_osdt.options.canvas import resolve_answer
from vllm_osdt.policies import Schedule
from vllm_osdt.policies.base import Branch

RESOLVED_KEY = "osdt_resolved"  # in SamplingParams.extra_args
CANVAS_STEP = "canvas_step"  # attribute of SchedulerOutput
STEP_REPORT = "step_report"  # attribute of ModelRunnerOutput
GRAMMAR_CHAINS = "grammar_chains"  # attribute of GrammarOutput: GrammarChain by request id
HOLE, OPEN_HOLE = -1, -2  # in RequestSpec.pinned
KEY = "osdt"  # of our statistics and response fields, among vLLM's
TRACE = "trace"  # in a response's field, see engine.trace
ERROR = "error"  # likewise: why the request could not go on


class Switch(NamedTuple):
    """How a request goes on behind the token that ends its thinking (``policies.tccf``).

    Attributes:
        think_end: That token.
        check_prompt: Token ids that take its place; empty where it stays.
        cache_salt: Of the pages from then on, whose keys and values depend on the new block length.
    """

    think_end: int
    check_prompt: list[int]
    cache_salt: str | None = None

    def written(self, tokens: Sequence[int]) -> tuple[list[int], int]:
        """The output in place of tokens that have the end of thinking among them, and how many of them are given."""
        place = tokens.index(self.think_end)
        own = tokens[: place + (not self.check_prompt)]
        return [*own, *self.check_prompt], len(self.check_prompt)


@dataclass(frozen=True)
class RequestSpec:
    """How a request is decoded, once it is admitted.

    Attributes:
        options: Every option, resolved: ``gen_length`` is set.
        canvas: Its positions.
        follows_choice: Whether neither the request nor the operator says how positions are chosen, so that the task's
            profile may.
        pinned: Token ids from the prompt's end on, ``HOLE`` where the model writes, ``OPEN_HOLE`` where an end token
            may end the hole; None where the model writes everywhere.
        draft: Token ids from the prompt's end on, each of which is taken once the model proposes it; None for none.
        switch: What happens when it has ended its thinking; None where nothing does, or where that has happened.
        barred: Policies that the profile may not choose, since the request's parameters do not go with them.
    """

    options: DecodingOptions
    canvas: Canvas
    follows_choice: bool = False
    pinned: list[int] | None = None
    draft: list[int] | None = None
    switch: Switch | None = None
    barred: tuple[str, ...] = ()

    def as_extra_args(self) -> dict[str, Any]:
        """Plain values for ``SamplingParams.extra_args``, since the parameters cross processes."""
        values = {
            "options": self.options.as_dict(),
            "canvas": list(self.canvas),
            "follows": self.follows_choice,
            "barred": list(self.barred),
            "pinned": self.pinned,
            "draft": self.draft,
            "switch": None if self.switch is None else list(self.switch),
        }
        return {RESOLVED_KEY: values}

    @classmethod
    def of(cls, sampling_params: Any) -> "RequestSpec | None":
        """The spec that sampling parameters hold; None where they have none, as vLLM's own warm-up requests."""
        found = (getattr(sampling_params, "extra_args", None) or {}).get(RESOLVED_KEY)
        if found is None:
            return None
        options, canvas = DecodingOptions(**found["options"]), Canvas(*found["canvas"])
        switch = None if found["switch"] is None else Switch(*found["switch"])
        return cls(options, canvas, found["follows"], found["pinned"], found["draft"], switch, tuple(found["barred"]))

    def answer(self, position: int) -> "RequestSpec":
        """How the request is decoded from ``position`` on, once it has ended its thinking."""
        options, canvas = resolve_answer(self.options, self.canvas, position)
        return RequestSpec(options, canvas)


def answer_start(template: Sequence[int]) -> int | None:
    """Where the last hole behind given text begins in the output; None where no text has a hole behind it.

    Args:
        template: See ``RequestSpec.pinned``.
    """
    begins = (place for place in range(1, len(template)) if template[place] < 0 <= template[place - 1])
    return max(begins, default=None)


class Decides(IntEnum):
    """What a step of a request decides."""

    NOTHING = 0
    """It writes keys and values only."""
    BLOCK = 1
    """Masked positions of the active block."""
    FIRST_POSITION = 2
    """The active block's first position, whose token the row before the block predicts (shifted logits)."""
    VERIFIED = 3
    """Drafted positions of the active block, each by what the model says from left to right."""


class Span(NamedTuple):
    """Some positions of an active block that follow each other.

    Attributes:
        first: Place of the first one in the block, from its first uncommitted position.
        length: How many.
    """

    first: int
    length: int


class Assignment(NamedTuple):
    """What workers need of a request that starts or resumes.

    Attributes:
        schedule: Its rule and parameters.
        is_recorded: Whether its steps are recorded for a calibration.
        is_watched: Whether the guard wants its confidence at block entry.
        policy: Name of its policy, where the task's profile has chosen it; None for that of its options.
        has_grammar: Whether a grammar says which tokens it may have; its steps are reported as those of a calibration.
        has_drafts: Whether tokens are drafted for it, by its own draft or by n-grams.
        by_entropy: Whether its confidences are of entropies.
        reads_logits: Whether its policy reads its logits.
    """

    schedule: Schedule
    is_recorded: bool = False
    is_watched: bool = False
    policy: str | None = None
    has_grammar: bool = False
    has_drafts: bool = False
    by_entropy: bool = False
    reads_logits: bool = False


class BranchPages(NamedTuple):
    """The further branches of a request in a step, and the KV pages that they are computed in.

    Attributes:
        branches: In the order of their numbers, from 1; the request's own rows are branch 0.
        pages: Ids of pages that are no other request's: of the first branch for each page that its rows lie in, then of
            the second, and so on.
    """

    branches: tuple[Branch, ...]
    pages: list[int]


@dataclass
class CanvasStep:
    """What a step adds to vLLM's ``SchedulerOutput``.

    Attributes:
        assignments: Of the requests that start or resume, by id.
        first_position: Ids of the requests of which this step decides the first position alone
            (``Decides.FIRST_POSITION``); vLLM's draft counts tell the other two.
        drafts: Tokens that are drafted for the blocks that are entered, -1 for none: the position of the first, and
            token ids, by request.
        verified: The drafted positions that this step verifies, by request; it decides no others.
        branches: Further branches, by request.
        is_awaited: Whether a request that this step has no room for may have a place in the next one.
    """

    assignments: dict[str, Assignment] = field(default_factory=dict)
    first_position: frozenset[str] = frozenset()
    drafts: dict[str, tuple[int, list[int]]] = field(default_factory=dict)
    verified: dict[str, Span] = field(default_factory=dict)
    branches: dict[str, BranchPages] = field(default_factory=dict)
    is_awaited: bool = False


class GrammarChain(NamedTuple):
    """What a grammar allows from the first masked position of a block on, n positions in a row.

    The mask of each position holds behind the tokens of all before it: what is decided, then one token of the chain for
    each position. So a position may be unmasked once those before it have these tokens.

    Attributes:
        start: Place of the first masked position in its block.
        tokens: int, n of them: behind which token the next position's mask holds, ``ANY_TOKEN`` for any.
        masks: int, n of them: row of the step's bitmask, ``ONE_TOKEN`` where only the token of ``tokens`` is allowed,
            or ``NO_MASK`` where every token is.
    """

    start: int
    tokens: list[int]
    masks: list[int]


ANY_TOKEN = -1  # in GrammarChain.tokens
ONE_TOKEN, NO_MASK = -1, -2  # in GrammarChain.masks


class RecordedStep(NamedTuple):
    """One denoising step of C requests that calibrate or have a grammar, blocks of up to W positions; NumPy arrays.

    Attributes:
        req_ids: Their ids.
        block: int64 ``[C]``, index of the active block in the canvas.
        step: int64 ``[C]``, denoising steps that the block has seen before.
        confidence: float32 ``[C, W]``; read where ``before`` is set.
        proposal: int32 ``[C, W]``, the best token of each position; read likewise.
        before: bool ``[C, W]``, positions that were masked and had logits.
        after: bool ``[C, W]``, masked positions after the step.
        tokens: int32 ``[C, W]``, the block after the step.
        ahead: int32 ``[C, W]``: how many denoising steps behind ``step`` decided a position, where verified drafts
            stand for some; None for 0 everywhere.
        offset: int64 ``[C]``, place of the block's first position among the ``block_length`` positions that have its
            index, where blocks have many lengths; None for 0 everywhere.
    """

    req_ids: list[str]
    block: np.ndarray
    step: np.ndarray
    confidence: np.ndarray
    proposal: np.ndarray
    before: np.ndarray
    after: np.ndarray
    tokens: np.ndarray
    ahead: np.ndarray | None = None
    offset: np.ndarray | None = None


class HeldWeights(NamedTuple):
    """The weights that a rank holds.

    Attributes:
        num_updates: How often they have changed since the engine's start.
        checkpoint: Model and revision from whose files all of them were read anew; None where a caller gave them, and
            before the first update.
    """

    num_updates: int = 0
    checkpoint: tuple[str, str | None] | None = None


@dataclass
class StepReport:
    """What a step tells the engine core beside its tokens.

    Attributes:
        entries: Request id, index of the block, and mean confidence of its masked positions, of the watched requests
            that entered a block in this step.
        mean_confidence: Mean confidence of the step's masked positions, by id, of the requests whose cache mode asks.
        num_fallbacks: int64 ``[kinds]``, steps decided by a threshold of another cell, by ``Fallback``.
        recorded: The requests that calibrate or have a grammar, None without any.
        ran_ahead: How many steps behind this one were of use, by id, of the requests that the worker took further.
        weights: That the rank had by the end of the step.
        drafted: Positions that the step has drafted and the next one is to verify, by id.
        takes_branches: Whether the rank's attention can compute further branches; vLLM chooses it there.
    """

    entries: list[tuple[str, int, float]] = field(default_factory=list)
    mean_confidence: dict[str, float] = field(default_factory=dict)
    num_fallbacks: np.ndarray | None = None
    recorded: RecordedStep | None = None
    ran_ahead: dict[str, int] = field(default_factory=dict)
    weights: HeldWeights = field(default_factory=HeldWeights)
    drafted: dict[str, Span] = field(default_factory=dict)
    takes_branches: bool = True


def join_traces(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """The trace of two parts of an answer that follow each other (see ``engine.trace``)."""
    return {name: first[name] + second[name] for name in first}
