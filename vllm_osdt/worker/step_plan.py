"""The denoising step of one batch: which rows run, which of them are read, and by which rule they are unmasked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from vllm.v1.worker.gpu.input_batch import InputBatch

from csrc_triton import Blocks, Rule, Rules
from csrc_triton.cpu import compiled
from csrc_triton.types import ENTROPY_SCALE
from vllm_osdt.geometry import MAX_BLOCK_LENGTH
from vllm_osdt.policies import MODIFIERS, POLICIES, Policy
from vllm_osdt.policies.base import MAX_BRANCHES, Branch, Cutter
from vllm_osdt.worker.grammar import GrammarRows
from vllm_osdt.worker.slots import ADJUSTING, CUTTERS, CanvasStates, HostTables

_NONE = np.empty(0, dtype=np.int64)
_NO_FLAGS = np.empty(0, dtype=bool)  # of one type, so that compiled functions see one
_NO_SPANS = np.empty((0, 2), dtype=np.int64)
NOWHERE = 2**30  # a place behind all minima of output
TOP_K = int(Rule.TOP_K)
NUM_FURTHER = MAX_BRANCHES - 1


class LogitRows(NamedTuple):
    """Some of a step's M logit rows, S of them; their requests want more than the best token.

    Attributes:
        slots_np: int64 ``[S]`` slot of each, on the host.
        rows_np: int64 ``[S]``, the same as ``rows``, likewise.
        rows: int64 ``[S]``, which of the M.
        slots: int32 ``[S]``, the same as ``slots_np``.
        place: int64 ``[S]``, position of the token that each predicts; ``NOWHERE`` where ``min_tokens`` is not asked.
        asks_share: bool ``[S]``, whose confidence is their share of what is left; None when no row's is.
        penalties: float64 ``[S, 5]``, presence, frequency and repetition penalty, end of prompt, end of canvas; None
            when no row has a penalty.
    """

    slots_np: np.ndarray
    rows_np: np.ndarray
    rows: torch.Tensor
    slots: torch.Tensor
    place: torch.Tensor
    asks_share: torch.Tensor | None = None
    penalties: torch.Tensor | None = None

    def part(self, start: int, stop: int) -> "LogitRows":
        """Rows ``start`` to ``stop`` of them."""
        return LogitRows._make(None if one is None else one[start:stop] for one in self)


class ReadRows(NamedTuple):
    """The logit rows that a policy reads, S of a step's M: those of its requests' masked positions.

    Attributes:
        rows: int64 ``[S]``, which of the M, ascending.
        request: int64 ``[S]``, whose each is: which of the policy's requests.
        offset: int64 ``[S]``, position in the active block.
        slots: int64 ``[S]``, of the request of each.
        step_index: int64 ``[S]``, denoising steps that the block has seen before this one.
        shaped: Those of them whose logits are changed; None without any.
        shaped_at: int64: which of the S those are.
        shaped_np: The same on the host.
        is_verified: bool ``[S]``, whether they are of a verification; None where none is.
    """

    rows: torch.Tensor
    request: torch.Tensor
    offset: torch.Tensor
    slots: torch.Tensor
    step_index: torch.Tensor
    shaped: LogitRows | None
    shaped_at: torch.Tensor
    shaped_np: np.ndarray
    is_verified: torch.Tensor | None = None


class PolicyRequests(NamedTuple):
    """Some of a step's requests, S of them, as ``policies.Step`` has them; ``rows`` and ``slots`` ascend or not alike.

    Attributes:
        rows: int64 ``[S]``, which of the batch's requests.
        slots: int64 ``[S]``.
        step_index: int64 ``[S]``.
        block_index: int64 ``[S]``.
        num_left: int64 ``[S]``.
        num_positions: int64 ``[S]``.
        first_slot: Where their slots are consecutive ones in ascending order, the first; else -1. Their rows of a table
            are then a part of it, which takes no copies.
    """

    rows: torch.Tensor
    slots: torch.Tensor
    step_index: torch.Tensor
    block_index: torch.Tensor
    num_left: torch.Tensor
    num_positions: torch.Tensor
    first_slot: int

    def take(self, table: torch.Tensor) -> torch.Tensor:
        """Their rows ``[S, ...]`` of a table by slot, the table's own or copies: :meth:`put` them back if changed."""
        if self.first_slot >= 0:
            return table.narrow(0, self.first_slot, self.slots.shape[0])
        return table.index_select(0, self.slots)

    def put(self, table: torch.Tensor, own: torch.Tensor) -> None:
        """Put back what :meth:`take` gave."""
        if self.first_slot < 0:
            table.index_copy_(0, self.slots, own)


class CutRows(NamedTuple):
    """The requests whose blocks are cut in a step, of one cutter."""

    cutter: Cutter
    requests: PolicyRequests


class AdjustedRows(NamedTuple):
    """The requests of a policy that adjusts its steps, see ``policies.Step``; S of them."""

    policy: Policy
    requests: PolicyRequests
    read: ReadRows | None  # where the policy reads logits
    span: torch.Tensor | None  # int64 [S, 2], see policies.base.Verification; None where nothing is verified


class ModifiedRequests(NamedTuple):
    """The logit rows of the requests that have a modifier, S of a step's M: those of their masked positions.

    Attributes:
        number: Place of the modifier in ``policies.MODIFIERS``.
        rows: int64 ``[S]``, which of the M.
        slots: int64 ``[S]``, of the request of each.
        offset: int64 ``[S]``, position in the active block.
        step_index: int64 ``[S]``, denoising steps that the block has seen before this one.
    """

    number: int
    rows: torch.Tensor
    slots: torch.Tensor
    offset: torch.Tensor
    step_index: torch.Tensor


class DraftRows(NamedTuple):
    """The requests whose drafts a step verifies and makes (``worker.drafting``), G of them, with up to K branches.

    Attributes:
        entries: int64 ``[G, K]``, which of the step's blocks each branch is, -1 for none; the first is the request.
        slots: int64 ``[G]``.
        sizes: int64 ``[G, at least 2 K]``, positions that a denoising step is expected to unmask, from this one on.
        is_subset: bool ``[G]``, a draft is right where the target has all of it; else where it is the target.
        slots_np: The same as ``slots`` on the host.
    """

    entries: torch.Tensor
    slots: torch.Tensor
    sizes: torch.Tensor
    is_subset: torch.Tensor
    slots_np: np.ndarray


@dataclass(frozen=True)
class DenoiseBatch:
    """What the sampler needs of a step; R requests, W the longest block among them, M positions with logits.

    Blocks, rules and thresholds are those of the requests, and behind them of their further branches: Q of each, of
    which the first R are the requests'.

    Attributes:
        slots_np: ``[R]`` slots, on the host.
        is_active: bool ``[R]``, on the host: whether the request denoises in this step.
        step_np: int64 ``[R]``, on the host: denoising steps that the block has seen before this one.
        slots: The same as ``slots_np``, on the device.
        blocks: The active blocks; those that denoise nothing have the last row of ``CanvasStates.masked``.
        position: int64 ``[M]``, index into ``[R, W]`` of each logits row: of masked positions, and of those that may be
            edited.
        rules: By which each block is unmasked; policies that adjust the step overwrite parameters.
        temperature: float32 ``[M]``, or None when all are 0.
        noise_key: int64 ``[M]``, or None likewise.
        by_entropy: bool ``[M]``, rows whose confidence is one of their entropy, or None when there are none.
        edit_threshold: float32 ``[R]``, infinite where nothing is edited, or None when no request edits.
        draft_threshold: float32 ``[R]``, infinite where nothing is drafted, or None when no request has a draft.
        adjusted: The requests whose policy adjusts the step, by policy.
        has_cuts: Whether the blocks of some requests are, or will be, shorter than ``block_length``.
        cut: The requests whose blocks are cut in this step, by cutter.
        recorded_np: int64 ``[C]``, on the host: which of the batch's requests calibrate or have a grammar.
        recorded: The same on the device, None where none does.
        shaped: Rows whose logits are changed before a token is proposed; None without any.
        scored: Rows whose log probabilities are returned; None without any.
        num_scores: Log probabilities returned of each token, besides its own, of the request that asks for most; -1
            when none asks.
        grammar: What grammars allow, which comes after the model has run; None where no request has one.
        modified: The rows of each modifier that a request has.
        drafting: The requests whose drafts are verified and made; None without any.
        asking: int64 ``[A]`` slots of the requests that ask for them, None when none does.
    """

    slots_np: np.ndarray
    is_active: np.ndarray
    step_np: np.ndarray
    slots: torch.Tensor
    blocks: Blocks
    position: torch.Tensor
    rules: Rules
    temperature: torch.Tensor | None
    noise_key: torch.Tensor | None
    by_entropy: torch.Tensor | None
    edit_threshold: torch.Tensor | None
    draft_threshold: torch.Tensor | None
    adjusted: list[AdjustedRows]
    has_cuts: bool
    cut: list[CutRows]
    recorded_np: np.ndarray
    recorded: torch.Tensor | None
    shaped: LogitRows | None = None
    scored: LogitRows | None = None
    num_scores: int = -1
    asking: torch.Tensor | None = None
    grammar: GrammarRows | None = None
    modified: tuple[ModifiedRequests, ...] = ()
    drafting: DraftRows | None = None

    @property
    def needs_logits(self) -> bool:
        """Whether the step needs more of its logits than the best token and its confidence."""
        reads = bool(self.modified) or any(one.read is not None for one in self.adjusted)
        return (reads and self.position.shape[0] > 0) or self.shaped is not None or self.scored is not None


class BlockQueries(NamedTuple):
    """A step's rows cut into S pieces of requests: each sees all positions up to its own end, and nothing else.

    A row of a causal piece sees those up to its own.
    """

    query_start_loc: np.ndarray  # int32 [S + 1], first row of each piece
    seq_lens: np.ndarray  # int32 [S], position behind each
    request: np.ndarray  # int64 [S], whose it is
    causal: np.ndarray | None = None  # int32 [S], 1: it is causal; None: none is

    def arrays(self) -> dict[str, np.ndarray]:
        """For the device, by names of their own."""
        return {"block_" + name: array for name, array in self._asdict().items() if array is not None}


class Queries(NamedTuple):
    """The queries of attention in a step, S of them: requests, or pieces of blocks."""

    start_loc: torch.Tensor  # int32 [S + 1], first row of each
    seq_lens: torch.Tensor  # int32 [S], positions that each sees, from the first
    request: torch.Tensor | None  # int64 [S], whose it is, where it is a piece
    max_query_len: int
    max_seq_len: int | None  # None: any; attention plans its work by it
    start_loc_np: np.ndarray | None = None  # on the host, where it is no graph's
    seq_lens_np: np.ndarray | None = None
    causal: torch.Tensor | None = None  # int32 [S], 1: a row sees the positions up to its own; None: none is causal


@dataclass
class CanvasInputBatch(InputBatch):
    """vLLM's input batch with what a canvas needs.

    Attributes:
        denoise: The denoising step that it is for.
        logit_rows: int64 ``[M]``, rows to which the last layer narrows the hidden states; ``logits_indices`` then
            counts from 0.
        queries: What attention sees of it.
        graph: The graph that runs it, a ``StepDescriptor``.
        rows: What the scheduler asked for, on the host.
        pages: Arrays of ``worker.branch_pages``, where the step has further branches.
    """

    denoise: DenoiseBatch | None = None
    logit_rows: torch.Tensor | None = None
    queries: Queries | None = None
    graph: Any = None
    rows: "StepRows | None" = None
    pages: dict[str, torch.Tensor] | None = None


def noise_keys(seed: np.ndarray, position: np.ndarray, step: np.ndarray) -> np.ndarray:
    """One random key per position and denoising step, so that sampling depends on nothing else.

    Args:
        seed, position, step: int64 ``[M]``; step counts from the block's first.

    Returns:
        int64 ``[M]``: two rounds of the splitmix64 finalizer.
    """
    with np.errstate(over="ignore"):
        key = seed.astype(np.uint64)
        for word in (position, step):
            key = (key ^ word.astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
            key = (key ^ (key >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            key = (key ^ (key >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            key ^= key >> np.uint64(31)
    return key.view(np.int64)


class StepPlan(NamedTuple):
    """What one step computes, on the host; T rows, M masked positions, W the longest active block.

    R are its requests, and their further branches behind them.
    """

    positions: np.ndarray  # int64 [T]
    source: np.ndarray  # int64 [T], index of each row's token in CanvasStates.cells
    query_start_loc: np.ndarray  # int32 [R + 1], first row of each request
    seq_lens: np.ndarray  # int32 [R], positions whose keys and values are seen
    logit_rows: np.ndarray  # int64 [M], rows whose logits are read
    logit_slots: np.ndarray  # int32 [M], whose they are
    cu_num_logits: np.ndarray  # int32 [R + 1]
    position: np.ndarray  # int64 [M], where in [R, W] each of them is
    canvas_index: np.ndarray  # int64 [R, W], index in CanvasStates.cells; padding points to the last
    mask_rows: np.ndarray  # int64 [R], row of CanvasStates.masked, the last one for requests that denoise nothing
    rule: np.ndarray  # int8 [R]
    parameter: np.ndarray  # float32 [R]
    end_token_ids: np.ndarray  # int64 [R, E]
    num_output_positions: np.ndarray  # int32 [R]
    min_unmask: np.ndarray  # int32 [R]


class StepRows(NamedTuple):
    """What the scheduler asks of a step, on the host: R requests, and behind them their further branches, Q in all."""

    slots: np.ndarray  # int64 [Q]
    start: np.ndarray  # int64 [Q], position of the first row of each
    num_rows: np.ndarray  # int64 [Q]
    block_start: np.ndarray  # int64 [Q], position of the first uncommitted token
    num_active: np.ndarray  # int64 [Q], positions of the active block from there on; 0: nothing is denoised
    decides_first: np.ndarray  # bool [Q], only that first position is
    branch: np.ndarray = _NONE  # int64 [Q], number of the branch, 0 for requests; empty when there are only those
    is_causal: np.ndarray = _NO_FLAGS  # bool [Q], whether a row sees the positions up to its own alone; empty likewise
    request: np.ndarray = _NONE  # int64 [Q], which of the R it belongs to; empty likewise
    span: np.ndarray = _NO_SPANS  # int64 [Q, 2], positions that are verified (messages.Span), length 0: none; or [0, 2]

    @property
    def num_requests(self) -> int:
        """R."""
        return int((self.branch == 0).sum()) if self.branch.size else self.slots.size

    @property
    def is_verified(self) -> np.ndarray:
        """Requests and branches of which the step is a verification, bool ``[Q]``."""
        return self.span[:, 1] > 0 if self.span.size else np.zeros(self.slots.size, dtype=bool)


def step_rows(
    states: CanvasStates,
    slots: np.ndarray,
    start: np.ndarray,
    num_rows: np.ndarray,
    num_drafts: np.ndarray,
    decides_first: np.ndarray,
    branches: Sequence[Sequence[Branch]] = (),
    span: np.ndarray = _NO_SPANS,
) -> StepRows:
    """Bring the tables up to date for a step, and leave out rows that it can do without.

    A sub-block's cache and a cut block spare some. A verification needs those up to the last position of its span.

    Args:
        states: Tables.
        slots: int64 ``[R]`` scheduled slots.
        start: int64 ``[R]`` position of the first row of each.
        num_rows: int64 ``[R]`` rows of each.
        num_drafts: int32 ``[R]`` how many of them, from the last, begin at the active block; 0 without one.
        decides_first: bool ``[R]``, the step decides the active block's first position alone, by the row before it.
        branches: Further branches of each; empty when no request has any. Those of which the device has no tokens, or
            that would have no masks, are left out.
        span: See ``StepRows``, int64 ``[R, 2]`` or ``[0, 2]``.
    """
    host = states.host
    block_length = host.block_length[slots]
    block_start = start + num_rows - num_drafts
    # Without drafts the active block begins behind the step's rows.
    num_active = np.where(decides_first & (num_drafts == 0), block_length, np.minimum(block_length, num_drafts))
    states.begin_step(slots, block_start, num_active)
    rows = StepRows(slots, start, num_rows, block_start, num_active, decides_first, span=span)
    if span.size:
        rows = _rows_of_verifications(states, rows)
    if branches and states.has_branches:
        rows = _with_branches(host, rows, branches)
    if host.cuts[slots].any():
        rows = _without_rows_behind_blocks(host, rows)
    if host.sub_block_cache[slots].any():
        rows = rows._replace(start=rows.start.copy(), num_rows=rows.num_rows.copy())
        skip_cached_rows(host, rows)
    return rows


def _rows_of_verifications(states: CanvasStates, rows: StepRows) -> StepRows:
    """The rows of a step that verifies some of its requests' drafts; such a step is none of denoising.

    Where a causal row predicts the position behind it, they end before the last position of the span. Else each of its
    positions has a branch, which has its mask behind the tokens before it; the first one is the request's own.
    """
    is_verified, (first, length) = rows.is_verified, rows.span.T
    states.host.step[rows.slots[is_verified]] -= 1
    last = first if states.verifies_by_branches else first + length - 2
    num_rows = rows.block_start + last + 1 - rows.start
    is_causal = _NO_FLAGS if states.commits_causally else is_verified  # attention has a flag for them there
    return rows._replace(num_rows=np.where(is_verified, num_rows, rows.num_rows), is_causal=is_causal)


def _with_branches(host: HostTables, rows: StepRows, branches: Sequence[Sequence[Branch]]) -> StepRows:
    """The rows of a step, and behind them those of branches that are of use."""
    request, number, start, num_rows, is_causal = [], [], [], [], []
    for req, own in enumerate(branches):
        if rows.span.size and rows.span[req, 1]:
            usable = own
        else:
            usable = own[: _num_usable(host, rows.slots[req], rows.num_active[req])] if own else ()
        for index, branch in enumerate(usable, start=1):
            request.append(req)
            number.append(index)
            start.append(branch.start)
            num_rows.append(branch.num_rows)
            is_causal.append(branch.is_causal)
    if not request:
        return rows
    owner = np.array(request, dtype=np.int64)
    all_of = np.concatenate([np.arange(rows.slots.size), owner])
    none = np.zeros(rows.slots.size, dtype=np.int64)
    whole = StepRows(*(array[all_of] for array in rows[:6]))
    return whole._replace(
        start=np.concatenate([rows.start, start]),
        num_rows=np.concatenate([rows.num_rows, num_rows]),
        branch=np.concatenate([none, number]),
        is_causal=np.concatenate([rows.is_causal if rows.is_causal.size else none.astype(bool), is_causal]),
        request=all_of,
        span=rows.span[all_of] if rows.span.size else rows.span,
    )


def _num_usable(host: HostTables, slot: int, num_active: int) -> int:
    """Further branches of which the device has tokens and that have masks left, as many as are expected to be."""
    num_drafted, step = int(host.num_drafted[slot]), int(host.step[slot])
    if not num_drafted:
        return 0
    left = int(host.masked[slot, :num_active].sum())
    last = host.draft_sizes.shape[1] - 1
    for number in range(num_drafted):
        left -= int(host.draft_sizes[slot, min(step + number, last)])
        if left <= 0:
            return number
    return num_drafted


def _without_rows_behind_blocks(host: HostTables, rows: StepRows) -> StepRows:
    """The rows of a step without those behind blocks that have been cut, where the block alone is computed."""
    limit = np.where(host.cuts[rows.slots] > 0, host.block_limit[rows.slots], 0)
    num_active = np.where(limit > 0, np.minimum(rows.num_active, limit), rows.num_active)
    is_block_alone = host.is_dual[rows.slots] & (rows.start == rows.block_start) & (rows.num_active == rows.num_rows)
    return rows._replace(num_active=num_active, num_rows=np.where(is_block_alone, num_active, rows.num_rows))


@compiled()
def skip_cached_rows(host: HostTables, rows: StepRows) -> None:
    """Leave out the rows that a sub-block's cache spares.

    A step computes the active sub-block alone where that begins with a written token and the block has been computed
    whole since it was entered.
    """
    for req in range(rows.slots.size):
        slot = rows.slots[req]
        if not host.sub_block_cache[slot] or rows.num_active[req] == 0 or rows.decides_first[req]:
            continue
        block_start = rows.block_start[req]
        base = block_start + rows.num_active[req] - host.block_length[slot]
        if host.step[slot] <= (block_start == base):  # the step before gave a first token, from the block before
            continue
        first = _sub_block(host, slot, block_start, rows.num_active[req])
        if first < block_start or not host.masked[slot, first - block_start]:
            rows.start[req], rows.num_rows[req] = first, host.sub_block_length[slot]


@compiled()
def _sub_block(host: HostTables, slot: int, block_start: int, num_active: int) -> int:
    """Position of the first sub-block that has a mask."""
    base = block_start + num_active - host.block_length[slot]
    first_masked = block_start
    for k in range(num_active):
        if host.masked[slot, k]:
            first_masked = block_start + k
            break
    return first_masked - (first_masked - base) % host.sub_block_length[slot]


def plan_step(states: CanvasStates, rows: StepRows, width: int | None = None) -> StepPlan:
    """Lay out a step.

    Args:
        states: Tables.
        rows: What runs.
        width: W, no shorter than the longest active block; None: as long as it.
    """
    slots, num_rows = rows.slots, rows.num_rows
    num_reqs, num_tokens = slots.size, int(num_rows.sum())
    width = width or int(states.host.block_length[slots].max(initial=1))
    plan = StepPlan(
        positions=np.empty(num_tokens, np.int64),
        source=np.empty(num_tokens, np.int64),
        query_start_loc=np.empty(num_reqs + 1, np.int32),
        seq_lens=np.empty(num_reqs, np.int32),
        logit_rows=np.empty(num_reqs * width, np.int64),
        logit_slots=np.empty(num_reqs * width, np.int32),
        cu_num_logits=np.empty(num_reqs + 1, np.int32),
        position=np.empty(num_reqs * width, np.int64),
        canvas_index=np.empty((num_reqs, width), np.int64),
        mask_rows=np.empty(num_reqs, np.int64),
        rule=np.empty(num_reqs, np.int8),
        parameter=np.empty(num_reqs, np.float32),
        end_token_ids=states.host.end_token_ids[slots],
        num_output_positions=np.empty(num_reqs, np.int32),
        min_unmask=np.empty(num_reqs, np.int32),
    )
    # A position that is decided alone is predicted from the row before it (see the plans of the engine core).
    shifts = states.logits_shift, max(states.logits_shift, int(states.commits_causally))
    num_logits = _fill(states.host, rows, shifts, states.mask_cell, plan)
    return plan._replace(
        logit_rows=plan.logit_rows[:num_logits],
        logit_slots=plan.logit_slots[:num_logits],
        position=plan.position[:num_logits],
    )


@compiled()
def _fill(host: HostTables, rows: StepRows, shifts: tuple[int, int], mask_cell: int, plan: StepPlan) -> int:
    """Write a plan, count its fallbacks and return the number of logit rows.

    ``shifts``: how far before a position the logits are that predict it; likewise where it is decided alone, or
    verified.
    ``mask_cell``: a cell with a mask token.
    """
    # Of verifications: the last row of each branch, and the second branch of each request.
    last_row, second = rows.num_rows.cumsum() - 1, np.zeros(rows.slots.size, np.int64)
    if rows.span.shape[0]:
        for entry in range(rows.branch.size):
            if rows.branch[entry] == 1:
                second[rows.request[entry]] = entry
    row_length, num_slots = host.parameters.shape[1], host.block_length.size
    padding_cell = host.parameters.size
    row = num_logits = 0
    plan.query_start_loc[0] = plan.cu_num_logits[0] = 0
    for req in range(rows.slots.size):
        slot, start, num_rows = rows.slots[req], rows.start[req], rows.num_rows[req]
        block_start, num_active, decides_first = rows.block_start[req], rows.num_active[req], rows.decides_first[req]
        first_cell = slot * row_length
        branch = rows.branch[req] if rows.branch.size else 0
        of_branch = slot * NUM_FURTHER + branch - 1  # among the further branches of all slots
        block_cell = first_cell + block_start
        is_verified = rows.span.shape[0] > 0 and rows.span[req, 1] > 0
        if branch > 0 and not is_verified:
            block_cell = padding_cell + 1 + of_branch * MAX_BLOCK_LENGTH
        edits = np.isfinite(host.edit_threshold[slot])
        first_read, last_read = 0, 1 if decides_first else num_active
        logits_shift = shifts[1] if decides_first or is_verified else shifts[0]
        if host.sub_block_length[slot] > 0 and num_active > 0 and not decides_first:
            first_read = _sub_block(host, slot, block_start, num_active) - block_start
            last_read = first_read + host.sub_block_length[slot]
        for k in range(num_rows):
            plan.positions[row + k] = start + k
            is_inside = block_start <= start + k < block_start + num_active
            plan.source[row + k] = block_cell + start + k - block_start if is_inside else first_cell + start + k
        if is_verified and logits_shift == 0:  # the position that the branch verifies
            plan.source[row + num_rows - 1] = mask_cell
        for k in range(plan.canvas_index.shape[1]):
            is_inside = k < num_active and not (is_verified and branch > 0)  # what it says is the request's
            plan.canvas_index[req, k] = block_cell + k if is_inside else padding_cell
            place = block_start - start + k - logits_shift
            is_inside = is_inside and (branch == 0 or 0 <= place < num_rows)  # a branch may end before its block
            if is_inside and first_read <= k < last_read and (host.masked[slot, k] or edits):
                logit_row = row + place
                if is_verified:  # what is read of positions outside of the span means nothing
                    number = k - rows.span[req, 0] if logits_shift == 0 else 0
                    is_further = 0 < number < rows.span[req, 1]
                    logit_row = last_row[second[req] + number - 1] if is_further else min(logit_row, last_row[req])
                plan.logit_rows[num_logits] = logit_row
                plan.logit_slots[num_logits] = slot
                plan.position[num_logits] = req * plan.canvas_index.shape[1] + k
                num_logits += 1
        row += num_rows
        plan.query_start_loc[req + 1] = row
        plan.cu_num_logits[req + 1] = num_logits
        host.canvas_end[slot] = max(host.canvas_end[slot], start + num_rows)
        plan.seq_lens[req] = host.canvas_end[slot]
        step = step_in_block = 0
        if num_active > 0:
            offset = block_start - host.canvas_start[slot]
            step_in_block = min(host.step[slot] + branch, host.block_length[slot] - 1)
            step = offset - offset % host.block_length[slot] + step_in_block
            if branch == 0:
                host.num_fallbacks[host.fallback[slot, step]] += 1
        # Where only a first position is decided and the request gives it, nothing is, before the next step.
        is_idle = decides_first and num_active > 0 and not host.masked[slot, 0] and host.masked[slot, :num_active].any()
        mask_row = slot if branch == 0 else num_slots + 1 + of_branch
        is_idle = is_idle or (is_verified and branch > 0)
        plan.mask_rows[req] = mask_row if num_active > 0 and not is_idle else num_slots
        plan.rule[req] = TOP_K if decides_first else host.rule[slot]
        plan.parameter[req] = 1.0 if decides_first else host.parameters[slot, step]
        plan.min_unmask[req] = 0 if decides_first else host.min_unmask[slot, step_in_block]
        plan.num_output_positions[req] = min(max(host.max_output_end[slot] - block_start, 0), num_active)
        if is_idle:
            plan.num_output_positions[req] = 0
    return num_logits


def split_queries_by_block(states: CanvasStates, rows: StepRows) -> BlockQueries:
    """The queries of a block-causal model: a step's rows are whole blocks, or a part of one, or a causal branch's."""
    block_length = states.host.block_length[rows.slots]
    block_length = np.where(block_length > 0, block_length, rows.num_rows)  # vLLM's warm-up requests have no canvas
    num_blocks = -(-rows.num_rows // block_length)
    request = np.repeat(np.arange(rows.slots.size), num_blocks)
    index = np.arange(request.size) - (num_blocks.cumsum() - num_blocks)[request]  # of a block in its request
    length = np.minimum(block_length, rows.num_rows)[request]
    query_start_loc = np.zeros(request.size + 1, dtype=np.int32)
    length.cumsum(out=query_start_loc[1:])
    block = rows.start[request] // block_length[request] + index
    pieces = BlockQueries(query_start_loc, ((block + 1) * block_length[request]).astype(np.int32), request)
    return _with_single_rows(pieces, rows)


def split_queries_of_branches(rows: StepRows, seq_lens: np.ndarray) -> BlockQueries:
    """The queries where every position sees the whole canvas: requests, branches, and the rows of causal ones.

    Args:
        rows: Of the step.
        seq_lens: int32 ``[Q]``, positions that each sees.
    """
    query_start_loc = np.zeros(rows.slots.size + 1, dtype=np.int32)
    rows.num_rows.cumsum(out=query_start_loc[1:])
    return _with_single_rows(BlockQueries(query_start_loc, seq_lens, np.arange(rows.slots.size)), rows)


def _with_single_rows(pieces: BlockQueries, rows: StepRows) -> BlockQueries:
    """The pieces of a step with those of causal branches cut into their rows, which any backend takes.

    The keys and values of all rows are written before any is read.
    """
    if not rows.is_causal.any():
        return pieces
    length = np.diff(pieces.query_start_loc)
    is_cut = rows.is_causal[pieces.request]
    piece = np.repeat(np.arange(length.size), np.where(is_cut, length, 1))
    position = np.concatenate([start + np.arange(n) for start, n in zip(rows.start, rows.num_rows, strict=True)])
    first = np.zeros(piece.size + 1, dtype=np.int32)
    np.where(is_cut[piece], 1, length[piece]).cumsum(out=first[1:])
    seq_lens = np.where(is_cut[piece], position[first[:-1]] + 1, pieces.seq_lens[piece]).astype(np.int32)
    causal = None if pieces.causal is None else np.where(is_cut[piece], 0, pieces.causal[piece]).astype(np.int32)
    return BlockQueries(first, seq_lens, pieces.request[piece], causal)


def split_queries_at_canvas(rows: StepRows) -> BlockQueries:
    """The queries of a model that commits causally: a step's decided rows, which are causal, and its active block.

    The rows of a verification are causal likewise.
    """
    num_causal = np.minimum(rows.block_start - rows.start, rows.num_rows)
    if rows.span.size:
        num_causal = np.where(rows.is_verified, rows.num_rows, num_causal)
    length = np.stack([num_causal, rows.num_rows - num_causal], axis=1).ravel()
    piece = np.flatnonzero(length)
    query_start_loc = np.zeros(piece.size + 1, dtype=np.int32)
    length[piece].cumsum(out=query_start_loc[1:])
    end = np.stack([rows.start + num_causal, rows.start + rows.num_rows], axis=1).ravel()[piece]
    pieces = BlockQueries(query_start_loc, end.astype(np.int32), piece // 2, 1 - (piece % 2).astype(np.int32))
    return _with_single_rows(pieces, rows)


class DenoisePlan(NamedTuple):
    """What the sampler needs of a step, on the host: :class:`DenoiseBatch` before it is sent to the device."""

    slots: np.ndarray  # int64 [R]
    is_active: np.ndarray  # bool [R]
    step: np.ndarray  # int64 [R], denoising steps that the block has seen before
    policies: list[Policy]  # that adjust the step
    first_slots: list[int]  # of their requests, see PolicyRequests
    cutters: list[Cutter]  # that cut blocks in this step
    has_cuts: bool  # whether some request has a cutter
    recorded: np.ndarray  # int64 [C], requests that calibrate or have a grammar
    arrays: dict[str, np.ndarray]  # for the device
    shaped_slots: np.ndarray  # int64 [S], of the rows whose logits are changed
    scored_slots: np.ndarray  # int64 [S], of the rows whose log probabilities are returned
    num_scores: int  # log probabilities of each token, -1: none
    read_slots: dict[int, np.ndarray]  # of rows that a policy reads and whose logits are changed, by policy
    modifiers: list[int]  # places in MODIFIERS of those that requests have
    drafting: np.ndarray  # int64 [G], slots of the requests whose drafts are verified and made

    @property
    def needs_logits(self) -> bool:
        """As ``DenoiseBatch.needs_logits``."""
        reads = bool(self.modifiers) or any(f"read_{number}" in self.arrays for number in range(len(self.policies)))
        return (reads and self.arrays["position"].size > 0) or bool(self.shaped_slots.size or self.scored_slots.size)


def plan_denoise(states: CanvasStates, rows: StepRows, plan: StepPlan) -> DenoisePlan:
    """What the sampler needs of a planned step.

    Args:
        states: Tables.
        rows: What runs. A step that decides first positions alone is adjusted by no policy.
        plan: The step.
    """
    host, num_requests = states.host, rows.num_requests
    # Of requests, and of these and their further branches.
    slots, decides_first, all_slots = rows.slots[:num_requests], rows.decides_first[:num_requests], rows.slots
    is_active, step = plan.mask_rows[:num_requests] < host.block_length.size, host.step[slots]
    all_steps = host.step[all_slots] + rows.branch if rows.branch.size else step
    arrays = {
        "slots": slots,
        "mask_rows": plan.mask_rows,
        "canvas_index": plan.canvas_index,
        "end_token_ids": plan.end_token_ids,
        "num_output_positions": plan.num_output_positions,
        "rule": plan.rule,
        "parameter": plan.parameter,
        "min_unmask": plan.min_unmask,
        "position": plan.position,
    }
    temperature = host.temperature[slots]
    is_shaped, num_scores = host.is_shaped[slots], host.num_logprobs[slots]
    is_scored = num_scores >= 0
    takes_part = is_active & ~decides_first
    policies, first_slots, of_policies = _adjusting(states, slots, step, takes_part)
    for number, policy in enumerate(policies if rows.span.size else ()):
        if policy.verifies:
            of_policies[f"adjusted_span_{number}"] = rows.span[of_policies[f"adjusted_{number}"][0]]
    cuts = host.cuts[slots]
    cutters: list[Cutter] = []
    if cuts.any():
        is_due = takes_part & (cuts > 0) & (host.block_limit[slots] == 0)
        for number in np.unique(cuts[is_due]).tolist():
            of_policies[f"cut_{len(cutters)}"] = _of_policy(states, slots, step, is_due & (cuts == number))
            cutters.append(CUTTERS[number - 1])
    shaped_slots = scored_slots = _NONE
    read_slots: dict[int, np.ndarray] = {}
    modifies = host.modifies[slots] * is_active
    modifiers = [number for number in range(len(MODIFIERS)) if (modifies >> number & 1).any()]
    reads = host.reads_logits[slots] & is_active & ~decides_first
    if is_scored.any():
        arrays["asking"] = slots[is_scored]
    if temperature.any() or is_shaped.any() or is_scored.any() or reads.any() or modifiers:
        row_req, row_pos = np.divmod(plan.position, plan.canvas_index.shape[1])
        row_slots = all_slots[row_req]
        places = host.block_start[row_slots] + row_pos
        if temperature.any():
            arrays["temperature"] = host.temperature[row_slots]
            arrays["noise_key"] = noise_keys(host.seed[row_slots], places, all_steps[row_req])
        has_logits = np.ones(row_req.size, dtype=bool)
        if rows.span.size:
            first, length = rows.span[row_req].T
            has_logits = (length == 0) | ((row_pos >= first) & (row_pos < first + length))
        may_end = host.may_end[row_slots, places]
        places = np.where(may_end, NOWHERE, places)
        shaped_rows = np.flatnonzero(host.is_shaped[row_slots] & has_logits)
        shaped_slots = _some_rows(host, arrays, "shaped", shaped_rows, row_slots, places)
        scored_rows = np.flatnonzero((host.num_logprobs[row_slots] >= 0) & has_logits)
        scored_slots = _some_rows(host, arrays, "scored", scored_rows, row_slots, places)
        for number in modifiers:
            is_modified = (row_req < num_requests) & (modifies[np.minimum(row_req, num_requests - 1)] >> number & 1 > 0)
            which = np.flatnonzero(is_modified & host.masked[row_slots, row_pos])
            of_rows = (which, row_slots[which], row_pos[which], step[row_req[which]])
            arrays[f"modified_{number}"] = np.stack(of_rows)
        for number in range(len(policies)):
            of_policy = of_policies[f"adjusted_{number}"][0]
            if reads[of_policy].any():
                request_of = np.full(all_slots.size, -1)
                request_of[of_policy] = np.where(reads[of_policy], np.arange(of_policy.size), -1)
                which = np.flatnonzero((request_of[row_req] >= 0) & host.masked[row_slots, row_pos] & has_logits)
                owner = row_req[which]
                arrays[f"read_{number}"] = np.stack(
                    (which, request_of[owner], row_pos[which], row_slots[which], step[owner])
                )
                if rows.span.size and policies[number].verifies:
                    arrays[f"read_{number}_verified"] = rows.is_verified[owner]
                arrays[f"read_{number}_at"] = np.flatnonzero(is_shaped[owner])
                which = which[arrays[f"read_{number}_at"]]
                read_slots[number] = _some_rows(host, arrays, f"read_{number}_shaped", which, row_slots, places)
    asks_entropy = host.by_entropy[all_slots]
    if asks_entropy.any():
        arrays["by_entropy"] = asks_entropy[plan.position // plan.canvas_index.shape[1]]
    edit_threshold = host.edit_threshold[all_slots]
    if np.isfinite(edit_threshold).any():
        arrays["edit_threshold"] = edit_threshold
    draft_threshold = host.draft_threshold[all_slots]
    if np.isfinite(draft_threshold).any():
        # Where confidence is 1 - H / 32, a distribution of entropy H counts as one of confidence exp(-H).
        with np.errstate(divide="ignore"):
            by_entropy = np.maximum(1 + np.log(draft_threshold) / np.float32(ENTROPY_SCALE), 0)
        arrays["draft_threshold"] = np.where(asks_entropy, by_entropy, draft_threshold)
    recorded = _NONE
    if states.observed:
        recorded = np.flatnonzero(host.is_recorded[slots] & is_active)
        if recorded.size:
            arrays["recorded"] = recorded
    drafting = _NONE
    if host.max_drafts[slots].any():
        drafting, of_drafts = _drafting(host, rows, takes_part)
        arrays |= of_drafts
    return DenoisePlan(
        slots,
        is_active,
        step,
        policies,
        first_slots,
        cutters,
        bool(cuts.any()),
        recorded,
        arrays | of_policies,
        shaped_slots,
        scored_slots,
        int(num_scores.max(initial=-1)),
        read_slots,
        modifiers,
        drafting,
    )


def _drafting(host: HostTables, rows: StepRows, takes_part: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The slots of the requests whose drafts a step verifies and makes, and the arrays of :class:`DraftRows`."""
    requests = np.flatnonzero(takes_part & (host.max_drafts[rows.slots[: takes_part.size]] > 0))
    slots = rows.slots[requests]
    if not slots.size:
        return _NONE, {}
    number, most = int(rows.branch.max(initial=0)) + 1, int(host.max_drafts[slots].max())
    entries = np.full((requests.size, number), -1, dtype=np.int64)
    entries[:, 0] = requests
    if rows.branch.size:
        place = np.full(takes_part.size, -1)
        place[requests] = np.arange(requests.size)
        further = np.flatnonzero((rows.branch > 0) & (place[rows.request] >= 0))
        entries[place[rows.request[further]], rows.branch[further]] = further
    step = host.step[slots, None] + np.arange(number + most)
    sizes = np.take_along_axis(host.draft_sizes[slots], np.minimum(step, host.draft_sizes.shape[1] - 1), axis=1)
    # A draft needs a mask, so that not all of these are of use, or computed.
    host.num_drafted[slots] = host.max_drafts[slots] - 1
    return slots, {
        "drafting_entries": entries,
        "drafting_slots": slots,
        "drafting_sizes": sizes.astype(np.int64),
        "drafting_subset": host.takes_subsets[slots],
    }


def _some_rows(
    host: HostTables, arrays: dict[str, np.ndarray], name: str, rows: np.ndarray, slots: np.ndarray, places: np.ndarray
) -> np.ndarray:
    """Add the arrays of ``LogitRows`` for some of the M logit rows; returns their slots.

    Args:
        host: Tables.
        arrays: For the device, added to.
        name: Which rows they are.
        rows: int64 ``[S]``.
        slots, places: int64 ``[M]``.
    """
    chosen = slots[rows]
    if rows.size:
        arrays[f"{name}_rows"], arrays[f"{name}_place"] = rows, places[rows]
        arrays[f"{name}_slots"] = chosen.astype(np.int32)
        if host.filters_confidence[chosen].any():
            arrays[f"{name}_asks_share"] = host.filters_confidence[chosen]
        if host.penalizes[chosen].any():
            ends = np.stack([host.prompt_end[chosen], host.canvas_end[chosen]], axis=1)
            arrays[f"{name}_penalties"] = np.concatenate([host.penalties[chosen], ends], axis=1, dtype=np.float64)
    return chosen


def _adjusting(
    states: CanvasStates, slots: np.ndarray, step: np.ndarray, takes_part: np.ndarray
) -> tuple[list[Policy], list[int], dict[str, np.ndarray]]:
    """The policies that adjust a step, and of each the first slot and :func:`_of_policy`."""
    policy_of = states.host.adjusts[slots]
    policies: list[Policy] = []
    first_slots: list[int] = []
    arrays: dict[str, np.ndarray] = {}
    for number in sorted(set(policy_of.tolist()) - {0}):
        own = _of_policy(states, slots, step, takes_part & (policy_of == number))
        if own.shape[1]:
            arrays[f"adjusted_{len(policies)}"] = own
            first_slots.append(first_of_consecutive(own[1].tolist()))
            policies.append(POLICIES[ADJUSTING[number - 1]])
    return policies, first_slots, arrays


def first_of_consecutive(slots: list[int]) -> int:
    """The first of consecutive slots in ascending order; -1 where they are not."""
    first = slots[0]
    return first if slots == list(range(first, first + len(slots))) else -1


def _of_policy(states: CanvasStates, slots: np.ndarray, step: np.ndarray, is_own: np.ndarray) -> np.ndarray:
    """Some of a step's requests, int64 ``[6, S]`` in the order of :class:`PolicyRequests`; one array is sent at once.

    Args:
        states: Tables.
        slots, step: int64 ``[R]``.
        is_own: bool ``[R]``, which are meant.
    """
    host = states.host
    found = np.empty((6, slots.size), dtype=np.int64)
    number = _describe(
        found,
        slots,
        step,
        is_own,
        states.is_block_causal,
        host.block_start,
        host.canvas_start,
        host.block_length,
        host.first_end,
        host.last_end,
        host.prompt_end,
        host.cuts,
        host.block_limit,
        host.masked,
        host.pinned,
    )
    return found if number == slots.size else found[:, :number].copy()


@compiled()
def _describe(
    found: np.ndarray,
    slots: np.ndarray,
    steps: np.ndarray,
    is_own: np.ndarray,
    is_block_causal: bool,
    block_start: np.ndarray,
    canvas_start: np.ndarray,
    block_length: np.ndarray,
    all_first_end: np.ndarray,
    last_end: np.ndarray,
    prompt_end: np.ndarray,
    cuts: np.ndarray,
    block_limit: np.ndarray,
    masked: np.ndarray,
    pinned: np.ndarray,
) -> int:
    """Fill the first columns of :func:`_of_policy`, and say how many.

    Undecided and all positions are those of canvases as far as they are there (``Canvas.end_at``). The tables come one
    by one, since a call takes long to unpack a tuple of all of them.
    """
    number = 0
    for req in range(slots.size):
        if not is_own[req]:
            continue
        slot = slots[req]
        start, length, first_end = block_start[slot], block_length[slot], all_first_end[slot]
        grown = max(start + 1 - first_end, 0)
        end = min(first_end + (grown + length - 1) // length * length, last_end[slot])
        # A block-causal model's first block may begin in the prompt: it ends on the grid.
        offset = start - canvas_start[slot]
        behind = start + length - (offset % length if is_block_causal else 0)
        if cuts[slot] and block_limit[slot]:
            behind = start + block_limit[slot]
        left = 0
        for k in range(masked.shape[1]):
            left += masked[slot, k]
        for position in range(behind, end):
            left += not pinned[slot, position]
        found[0, number], found[1, number], found[2, number] = req, slot, steps[req]
        found[3, number], found[4, number] = offset // length, left
        found[5, number] = end - max(prompt_end[slot], canvas_start[slot])
        number += 1
    return number


def idle_plan() -> DenoisePlan:
    """Of a step that denoises nothing."""
    none: list[Any] = []
    nobody = np.empty(0, dtype=bool)
    return DenoisePlan(_NONE, nobody, _NONE, none, none, none, False, _NONE, {}, _NONE, _NONE, -1, {}, none, _NONE)


def denoise_batch(states: CanvasStates, plan: DenoisePlan, sent: Mapping[str, torch.Tensor]) -> DenoiseBatch:
    """A planned step on the device.

    Args:
        states: Tables.
        plan: The step.
        sent: ``plan.arrays`` on the device, perhaps among others; a graph's, with padding.
    """
    return DenoiseBatch(
        slots_np=plan.slots,
        is_active=plan.is_active,
        step_np=plan.step,
        slots=sent["slots"],
        blocks=Blocks(
            cells=states.cells,
            masked=states.masked,
            slots=sent["mask_rows"],
            canvas_index=sent["canvas_index"],
            end_token_ids=sent["end_token_ids"],
            num_output_positions=sent["num_output_positions"],
        ),
        position=sent["position"],
        rules=Rules(rule=sent["rule"], parameter=sent["parameter"], min_unmask=sent["min_unmask"]),
        temperature=sent.get("temperature"),
        noise_key=sent.get("noise_key"),
        by_entropy=sent.get("by_entropy"),
        edit_threshold=sent.get("edit_threshold"),
        draft_threshold=sent.get("draft_threshold"),
        adjusted=[_adjusted_rows(policy, number, plan, sent) for number, policy in enumerate(plan.policies)],
        has_cuts=plan.has_cuts,
        cut=[CutRows(cutter, _policy_requests(sent[f"cut_{number}"])) for number, cutter in enumerate(plan.cutters)],
        recorded_np=plan.recorded,
        recorded=sent.get("recorded"),
        shaped=_logit_rows("shaped", plan.shaped_slots, plan.arrays, sent),
        scored=_logit_rows("scored", plan.scored_slots, plan.arrays, sent),
        num_scores=plan.num_scores,
        asking=sent.get("asking"),
        modified=tuple(_modified(number, sent[f"modified_{number}"]) for number in plan.modifiers),
        drafting=_draft_rows(plan, sent),
    )


def _draft_rows(plan: DenoisePlan, sent: Mapping[str, torch.Tensor]) -> DraftRows | None:
    """The requests whose drafts are verified and made, on the device; None without any."""
    if not plan.drafting.size:
        return None
    entries, slots, sizes, subset = (sent[f"drafting_{name}"] for name in ("entries", "slots", "sizes", "subset"))
    return DraftRows(entries, slots, sizes, subset, plan.drafting)


def _adjusted_rows(policy: Policy, number: int, plan: DenoisePlan, sent: Mapping[str, torch.Tensor]) -> AdjustedRows:
    read = None
    if f"read_{number}" in sent:
        rows, request, offset, slots, step_index = sent[f"read_{number}"].unbind()
        shaped = _logit_rows(f"read_{number}_shaped", plan.read_slots[number], plan.arrays, sent)
        at = sent[f"read_{number}_at"], plan.arrays[f"read_{number}_at"]
        read = ReadRows(rows, request, offset, slots, step_index, shaped, *at, sent.get(f"read_{number}_verified"))
    requests = _policy_requests(sent[f"adjusted_{number}"], plan.first_slots[number])
    return AdjustedRows(policy, requests, read, sent.get(f"adjusted_span_{number}"))


def _modified(number: int, found: torch.Tensor) -> ModifiedRequests:
    """The rows of a modifier."""
    rows, slots, offset, step_index = found.unbind()
    return ModifiedRequests(number, rows, slots, offset, step_index)


def _policy_requests(found: torch.Tensor, first_slot: int = -1) -> PolicyRequests:
    """:func:`_of_policy` on the device."""
    rows, slots, step_index, block_index, num_left, num_positions = found.unbind()
    return PolicyRequests(rows, slots, step_index, block_index, num_left, num_positions, first_slot)


def _logit_rows(
    name: str, slots: np.ndarray, arrays: Mapping[str, np.ndarray], sent: Mapping[str, torch.Tensor]
) -> LogitRows | None:
    if not slots.size:
        return None
    return LogitRows(
        slots,
        arrays[f"{name}_rows"],
        sent[f"{name}_rows"],
        sent[f"{name}_slots"],
        sent[f"{name}_place"],
        sent.get(f"{name}_asks_share"),
        sent.get(f"{name}_penalties"),
    )
