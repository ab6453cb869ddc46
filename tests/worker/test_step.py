"""How a step is laid out, and the random keys that make sampling independent of the batch."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_osdt.models.traits import Traits
from vllm_osdt.worker.slots import CanvasStates, _seed
from vllm_osdt.worker.step.layout import TOP_K, plan_step
from vllm_osdt.worker.step.plan import noise_keys, plan_denoise
from vllm_osdt.worker.step.queries import split_queries_at_canvas, split_queries_by_block
from vllm_osdt.worker.step.rows import StepRows, step_rows

MASK64 = (1 << 64) - 1


def by_hand(seed, position, step):
    """Two rounds of the splitmix64 finalizer in Python's integers."""
    key = seed & MASK64
    for word in (position, step):
        key = ((key ^ word) + 0x9E3779B97F4A7C15) & MASK64
        key = ((key ^ (key >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
        key = ((key ^ (key >> 27)) * 0x94D049BB133111EB) & MASK64
        key ^= key >> 31
    return key - (1 << 64) if key >> 63 else key


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(-(2**63), 2**63 - 1), st.integers(0, 200_000), st.integers(0, 127)),
        min_size=1,
        max_size=8,
    )
)
def test_keys_equal_a_calculation_by_hand_row_by_row(rows):
    seed, position, step = (np.array(column, dtype=np.int64) for column in zip(*rows, strict=True))
    assert noise_keys(seed, position, step).tolist() == [by_hand(*row) for row in rows]


def test_keys_of_neighboring_seeds_positions_and_steps_are_distinct():
    seeds = np.array([_seed("any", seed) for seed in range(16)], dtype=np.int64)
    index, position, step = (grid.ravel() for grid in np.meshgrid(np.arange(16), np.arange(64), np.arange(32)))
    keys = noise_keys(seeds[index], position, step)
    assert np.unique(keys).size == 16 * 64 * 32
    assert abs((keys > 0).mean() - 0.5) < 0.02


def test_a_request_key_comes_from_its_seed_else_from_its_id():
    assert _seed("a", 7) == _seed("b", 7) != _seed("a", 8)
    assert _seed("a", None) != _seed("b", None)


def take_step(states, slots, start, num_rows, num_drafts, decides_first=None):
    """Plan a step of requests of which none decides its block's first position alone, unless told."""
    decides_first = np.zeros(len(slots), dtype=bool) if decides_first is None else np.array(decides_first)
    return plan_step(states, step_rows(states, slots, start, num_rows, num_drafts, decides_first))


def states_of_two_requests():
    """Slot 2: prompt 5, two blocks of 4, in the third step. Slot 0: prompt 3, a block of 2 to be entered."""
    states = CanvasStates(4, 16, Traits(4, 99), torch.device("cpu"))
    for slot, (prompt, canvas, output, length) in {2: (5, 8, 7, 4), 0: (3, 2, 2, 2)}.items():
        states.host.canvas_start[slot] = prompt
        states.host.canvas_end[slot] = prompt + canvas
        states.host.max_output_end[slot] = prompt + output
        states.host.block_length[slot] = length
        states.host.parameters[slot] = np.arange(16) / 16
        states.host.rule[slot] = slot
        states.host.end_token_ids[slot, 1] = 40 + slot
    states.host.min_unmask[2, :4] = [4, 3, 2, 1]
    states.host.block_start[2], states.host.step[2] = 5, 1
    states.host.masked[2, :4] = [False, True, False, True]
    return states


def test_a_step_runs_the_scheduled_rows_and_reads_the_masked_ones():
    states = states_of_two_requests()
    slots, start = np.array([2, 0]), np.array([5, 0])
    num_rows, num_drafts = np.array([4, 5]), np.array([4, 2], dtype=np.int32)
    plan = take_step(states, slots, start, num_rows, num_drafts)
    assert states.host.step[slots].tolist() == [2, 0]
    assert states.host.masked[0].nonzero()[0].tolist() == [0, 1]
    assert plan.positions.tolist() == [5, 6, 7, 8, 0, 1, 2, 3, 4]
    assert plan.source.tolist() == [37, 38, 39, 40, 0, 1, 2, 3, 4]
    assert plan.query_start_loc.tolist() == [0, 4, 9]
    assert plan.seq_lens.tolist() == [13, 5]
    assert plan.logit_rows.tolist() == [1, 3, 7, 8]
    assert plan.cu_num_logits.tolist() == [0, 2, 4]
    assert plan.logit_slots.tolist() == [2, 2, 0, 0]  # per row of logits, as vLLM documents expanded_idx_mapping
    assert plan.position.tolist() == [1, 3, 4, 5]
    assert plan.canvas_index.tolist() == [[37, 38, 39, 40], [3, 4, 64, 64]]
    assert plan.rule.tolist() == [2, 0]
    assert plan.parameter.tolist() == [2 / 16, 0]
    assert plan.min_unmask.tolist() == [2, 0]
    assert plan.end_token_ids[:, :3].tolist() == [[-1, 42, -1], [-1, 40, -1]]
    assert plan.num_output_positions.tolist() == [4, 2]


def plan_of_two_requests(**wants):
    """Of a step of both, with entries of the first one's columns."""
    states = states_of_two_requests()
    for name, value in wants.items():
        getattr(states.host, name)[2] = value
    slots, none = np.array([2, 0]), np.array([False, False])
    rows = step_rows(states, slots, np.array([5, 0]), np.array([4, 5]), np.array([4, 2], dtype=np.int32), none)
    return states, rows, plan_step(states, rows)


def test_a_plain_step_is_planned_as_any_other_without_looking_for_wishes():
    states, rows, plan = plan_of_two_requests()
    assert plan.is_plain
    quick, full = (plan_denoise(states, rows, plan._replace(is_plain=plain)) for plain in (True, False))
    for name, one, other in zip(quick._fields, quick, full, strict=True):
        if name == "arrays":
            assert one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)
        else:
            assert np.array_equal(one, other) if isinstance(one, np.ndarray) else one == other, name


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("temperature", 0.5),
        ("is_shaped", True),
        ("modifies", 1),
        ("adjusts", 1),
        ("cuts", 1),
        ("by_entropy", True),
        ("max_drafts", 2),
        ("draft_threshold", 0.5),
        ("edit_threshold", 0.5),
        ("num_logprobs", 0),
        ("reads_logits", True),
        ("is_recorded", True),
    ],
)
def test_a_step_with_a_request_that_wants_more_is_not_plain(column, value):
    assert not plan_of_two_requests(**{column: value})[2].is_plain


def test_a_step_of_no_request_is_empty():
    states, none = states_of_two_requests(), np.empty(0, dtype=np.int64)
    no_drafts = np.empty(0, dtype=np.int32)
    plan = take_step(states, none, none, none, no_drafts)
    assert plan.positions.size == plan.logit_rows.size == plan.canvas_index.size == 0
    assert plan.query_start_loc.tolist() == [0]


def test_a_request_without_drafts_reads_no_logits_and_keeps_its_masks_and_its_step():
    states = states_of_two_requests()
    slots, start = np.array([2, 0]), np.array([1, 0])
    num_rows, num_drafts = np.array([4, 5]), np.array([0, 2], dtype=np.int32)
    before = states.host.masked[2].copy()
    plan = take_step(states, slots, start, num_rows, num_drafts)
    assert (states.host.step[2], states.host.block_start[2]) == (1, 5)
    assert np.array_equal(states.host.masked[2], before)
    assert plan.positions.tolist() == [1, 2, 3, 4, 0, 1, 2, 3, 4]
    assert plan.mask_rows.tolist() == [4, 0]  # the row behind those of the slots, which is never masked
    assert not states.masked[4].any()
    assert plan.logit_rows.tolist() == [7, 8] and plan.cu_num_logits.tolist() == [0, 0, 2]
    assert plan.num_output_positions.tolist() == [0, 2]
    assert plan.canvas_index[0].tolist() == [64] * plan.canvas_index.shape[1]
    assert states.host.num_fallbacks.sum() == 1  # of the other request


def test_a_block_that_begins_inside_the_prompt_is_as_long_as_its_drafts():
    states = CanvasStates(2, 32, Traits(8, 99, is_block_causal=True), torch.device("cpu"))
    states.host.canvas_start[1], states.host.canvas_end[1], states.host.max_output_end[1] = 8, 24, 20
    states.host.block_length[1] = 8
    states.host.parameters[1] = np.arange(32)
    slots, start, num_rows, num_drafts = np.array([1]), np.array([0]), np.array([16]), np.array([5], dtype=np.int32)
    for number in range(9):
        plan = take_step(states, slots, start, num_rows, num_drafts)
        assert plan.logit_rows.tolist() == [11, 12, 13, 14, 15]
        assert plan.canvas_index.tolist() == [[43, 44, 45, 46, 47, 64, 64, 64]]
        assert plan.num_output_positions.tolist() == [5]
        assert plan.parameter.tolist() == [min(number, 7)]  # of the first block; its last step holds for later ones
    plan = take_step(states, slots, np.array([8]), num_rows, np.array([8], dtype=np.int32))
    assert (plan.logit_rows.tolist(), plan.parameter.tolist()) == (list(range(8, 16)), [8.0])
    assert plan.num_output_positions.tolist() == [4]


def test_queries_are_cut_at_block_boundaries():
    states = CanvasStates(4, 64, Traits(8, 99, is_block_causal=True), torch.device("cpu"))
    states.host.block_length[:] = [4, 8, 0, 16]
    slots, start, num_rows = np.array([1, 0, 2, 3]), np.array([16, 0, 0, 32]), np.array([16, 4, 3, 16])
    nothing = np.zeros(4, dtype=np.int64)
    queries = split_queries_by_block(states, StepRows(slots, start, num_rows, nothing, nothing, nothing > 0))
    assert queries.query_start_loc.tolist() == [0, 8, 16, 20, 23, 39]
    assert queries.seq_lens.tolist() == [24, 32, 4, 3, 48]  # the third is a warm-up request of vLLM, without blocks
    assert queries.request.tolist() == [0, 0, 1, 2, 3]
    none = np.empty(0, dtype=np.int64)
    empty = split_queries_by_block(states, StepRows(none, none, none, none, none, none > 0))
    assert empty.query_start_loc.tolist() == [0] and empty.request.size == 0


def test_decided_rows_are_a_causal_query_and_the_active_block_is_another():
    slots, start, num_rows = np.array([1, 0, 2]), np.array([16, 3, 0]), np.array([16, 4, 11])
    block_start = start + num_rows - np.array([0, 4, 8])  # no canvas yet; a block alone; both
    nothing = np.zeros(3, dtype=np.int64)
    queries = split_queries_at_canvas(StepRows(slots, start, num_rows, block_start, nothing, nothing > 0))
    assert queries.query_start_loc.tolist() == [0, 16, 20, 23, 31]
    assert queries.seq_lens.tolist() == [32, 7, 3, 11]
    assert queries.request.tolist() == [0, 1, 2, 2]
    assert queries.causal is not None and queries.causal.tolist() == [1, 0, 1, 0]
    assert set(queries.arrays()) == {f"block_{name}" for name in ("query_start_loc", "seq_lens", "request", "causal")}
    none = np.empty(0, dtype=np.int64)
    empty = split_queries_at_canvas(StepRows(none, none, none, none, none, none > 0))
    assert empty.query_start_loc.tolist() == [0] and empty.request.size == 0


def test_a_first_token_is_read_before_its_block_and_the_others_in_it():
    states = CanvasStates(1, 32, Traits(8, 99, is_block_causal=True, commits_causally=True), torch.device("cpu"))
    states.host.canvas_start[0], states.host.max_output_end[0], states.host.block_length[0] = 5, 21, 8
    slots, none, block = np.array([0]), np.array([0], dtype=np.int32), np.array([8], dtype=np.int32)
    plan = take_step(states, slots, np.array([0]), np.array([5]), none, [True])
    assert (plan.logit_rows.tolist(), plan.position.tolist(), plan.rule.tolist()) == ([4], [0], [TOP_K])
    states.host.masked[0, 0] = False
    plan = take_step(states, slots, np.array([5]), np.array([8]), block)
    assert (plan.positions.tolist(), plan.logit_rows.tolist()) == (list(range(5, 13)), list(range(1, 8)))


def states_with_sub_blocks(cached):
    states = CanvasStates(2, 32, Traits(8, 99, is_block_causal=True, logits_shift=1), torch.device("cpu"))
    host = states.host
    host.canvas_start[0], host.canvas_end[0], host.max_output_end[0], host.block_length[0] = 8, 24, 24, 8
    host.sub_block_length[0], host.sub_block_cache[0] = 4, cached
    host.parameters[0] = 8
    return states


def test_sub_blocks_are_read_from_left_to_right_and_computed_alone_where_they_can():
    states = states_with_sub_blocks(cached=True)
    slots, none, block = np.array([0]), np.array([0], dtype=np.int32), np.array([8], dtype=np.int32)
    # The forward of the block before gives the first token, whatever the policy.
    plan = take_step(states, slots, np.array([0]), np.array([8]), none, [True])
    assert (plan.logit_rows.tolist(), plan.position.tolist()) == ([7], [0])
    assert (plan.positions.tolist(), plan.rule.tolist(), plan.parameter.tolist()) == (list(range(8)), [TOP_K], [1.0])
    states.host.masked[0, 0] = False
    # The first step in the block computes it whole; position i is read at i - 1.
    plan = take_step(states, slots, np.array([8]), np.array([8]), block)
    assert (plan.logit_rows.tolist(), plan.position.tolist()) == ([0, 1, 2], [1, 2, 3])
    states.host.masked[0, 2] = False
    # Its sub-block begins with a written token: now that alone.
    plan = take_step(states, slots, np.array([8]), np.array([8]), block)
    assert plan.positions.tolist() == [8, 9, 10, 11]
    assert (plan.logit_rows.tolist(), plan.position.tolist()) == ([0, 2], [1, 3])
    states.host.masked[0, :4] = False
    # The second sub-block begins with a mask: the whole block, until that is written.
    for _ in range(2):
        plan = take_step(states, slots, np.array([8]), np.array([8]), block)
        assert plan.positions.tolist() == list(range(8, 16))
        assert (plan.logit_rows.tolist(), plan.position.tolist()) == ([3, 4, 5, 6], [4, 5, 6, 7])
    states.host.masked[0, [4, 6]] = False
    rows = step_rows(states, slots, np.array([8]), np.array([8]), block, np.array([False]))
    assert (rows.start.tolist(), rows.num_rows.tolist()) == ([12], [4])
    plan = plan_step(states, rows)
    assert (plan.logit_rows.tolist(), plan.position.tolist()) == ([0, 2], [5, 7])
    queries = split_queries_by_block(states, rows)
    assert (queries.query_start_loc.tolist(), queries.seq_lens.tolist()) == ([0, 4], [16])


def test_a_request_that_edits_reads_its_whole_block():
    states = CanvasStates(1, 32, Traits(8, 99, is_block_causal=True), torch.device("cpu"))
    states.host.block_length[0], states.host.edit_threshold[0] = 8, 0.5
    slots, drafts = np.array([0]), np.array([5], dtype=np.int32)
    take_step(states, slots, np.array([0]), np.array([8]), drafts)
    states.host.masked[0] = False
    plan = take_step(states, slots, np.array([0]), np.array([8]), drafts)
    assert plan.logit_rows.tolist() == [3, 4, 5, 6, 7]
