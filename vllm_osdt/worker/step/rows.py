"""Which rows of its requests a step computes."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from csrc_triton.cpu import compiled
from vllm_osdt.policies.base import Branch
from vllm_osdt.worker.slots import CanvasStates, HostTables

_NONE = np.empty(0, dtype=np.int64)
_NO_FLAGS = np.empty(0, dtype=bool)  # of one type, so that compiled functions see one
_NO_SPANS = np.empty((0, 2), dtype=np.int64)


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
        first = sub_block(host, slot, block_start, rows.num_active[req])
        if first < block_start or not host.masked[slot, first - block_start]:
            rows.start[req], rows.num_rows[req] = first, host.sub_block_length[slot]


@compiled()
def sub_block(host: HostTables, slot: int, block_start: int, num_active: int) -> int:
    """Position of the first sub-block that has a mask."""
    base = block_start + num_active - host.block_length[slot]
    first_masked = block_start
    for k in range(num_active):
        if host.masked[slot, k]:
            first_masked = block_start + k
            break
    return first_masked - (first_masked - base) % host.sub_block_length[slot]
