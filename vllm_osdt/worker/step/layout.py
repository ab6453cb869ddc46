"""Where the rows of a step lie, which of their logits are read, and by which rule each block is unmasked."""

from typing import NamedTuple

import numpy as np

from csrc_triton import Rule
from csrc_triton.cpu import compiled
from vllm_osdt.geometry import MAX_BLOCK_LENGTH
from vllm_osdt.policies.base import MAX_BRANCHES
from vllm_osdt.worker.slots import CanvasStates, HostTables
from vllm_osdt.worker.step.rows import StepRows, sub_block

TOP_K = int(Rule.TOP_K)
NUM_FURTHER = MAX_BRANCHES - 1


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
    is_plain: bool  # no request wants more than the best tokens of its masked positions, unmasked by rule and parameter


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
        is_plain=False,
    )
    return _filled(states, rows, plan)


def plan_again(states: CanvasStates, rows: StepRows, plan: StepPlan) -> StepPlan:
    """Lay out the next step of the same rows in the arrays of a plan, which is that of no step then.

    Tensors that share an array keep sharing it. The logit rows and positions are other parts of theirs.

    Args:
        states, rows: See :func:`plan_step`.
        plan: Of the step before.
    """
    assert plan.logit_rows.base is not None and plan.logit_slots.base is not None and plan.position.base is not None
    whole = plan._replace(
        logit_rows=plan.logit_rows.base, logit_slots=plan.logit_slots.base, position=plan.position.base
    )
    return _filled(states, rows, whole)


def _filled(states: CanvasStates, rows: StepRows, plan: StepPlan) -> StepPlan:
    """A plan whose arrays have room for all of its logit rows, written and cut to those that are read."""
    # A position that is decided alone is predicted from the row before it (see the plans of the engine core).
    shifts = states.logits_shift, max(states.logits_shift, int(states.commits_causally))
    num_logits, is_plain = _fill(states.host, rows, shifts, states.mask_cell, plan)
    return plan._replace(
        logit_rows=plan.logit_rows[:num_logits],
        logit_slots=plan.logit_slots[:num_logits],
        position=plan.position[:num_logits],
        is_plain=is_plain,
    )


@compiled()
def _fill(
    host: HostTables, rows: StepRows, shifts: tuple[int, int], mask_cell: int, plan: StepPlan
) -> tuple[int, bool]:
    """Write a plan, count its fallbacks and return the number of logit rows, and whether the step is plain.

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
    is_plain = rows.span.shape[0] == 0
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
        is_plain = is_plain and not (edits or _wants_more(host, slot))
        first_read, last_read = 0, 1 if decides_first else num_active
        logits_shift = shifts[1] if decides_first or is_verified else shifts[0]
        if host.sub_block_length[slot] > 0 and num_active > 0 and not decides_first:
            first_read = sub_block(host, slot, block_start, num_active) - block_start
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
        if decides_first and num_active > 0:
            host.num_alone[slot] = host.masked[slot, 0]
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
    return num_logits, is_plain


@compiled()
def _wants_more(host: HostTables, slot: int) -> bool:
    """Whether a request that does not edit wants more than a plain step has."""
    wants_other_tokens = host.temperature[slot] != 0 or host.is_shaped[slot] or host.modifies[slot] != 0
    wants_other_rule = host.adjusts[slot] != 0 or host.cuts[slot] != 0 or host.by_entropy[slot]
    has_drafts = host.max_drafts[slot] != 0 or np.isfinite(host.draft_threshold[slot])
    reports = host.num_logprobs[slot] >= 0 or host.reads_logits[slot] or host.is_recorded[slot]
    return wants_other_tokens or wants_other_rule or has_drafts or reports
