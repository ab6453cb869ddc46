"""How a step is laid out, and the random keys that make sampling independent of the batch."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_osdt.worker.denoise_batch import cut_into_blocks, noise_keys, plan_step
from vllm_osdt.worker.request_states import CanvasStates, _seed

MASK64 = (1 << 64) - 1


def by_hand(seed, position, step):
    """Two rounds of the splitmix64 finaliser in Python's integers."""
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


def test_keys_of_neighbouring_seeds_positions_and_steps_are_distinct():
    seeds = np.array([_seed("any", seed) for seed in range(16)], dtype=np.int64)
    index, position, step = (grid.ravel() for grid in np.meshgrid(np.arange(16), np.arange(64), np.arange(32)))
    keys = noise_keys(seeds[index], position, step)
    assert np.unique(keys).size == 16 * 64 * 32
    assert abs((keys > 0).mean() - 0.5) < 0.02


def test_a_request_key_comes_from_its_seed_else_from_its_id():
    assert _seed("a", 7) == _seed("b", 7) != _seed("a", 8)
    assert _seed("a", None) != _seed("b", None)


def states_of_two_requests():
    """Slot 2: prompt 5, two blocks of 4, in the third step. Slot 0: prompt 3, a block of 2 to be entered."""
    states = CanvasStates(4, 16, 99, torch.device("cpu"))
    for slot, (prompt, canvas, output, length) in {2: (5, 8, 7, 4), 0: (3, 2, 2, 2)}.items():
        states.host.origin[slot] = prompt
        states.host.canvas_end[slot] = prompt + canvas
        states.host.output_end[slot] = prompt + output
        states.host.block_length[slot] = length
        states.host.parameters[slot] = np.arange(16) / 16
        states.host.rule[slot] = slot
        states.host.eos_token_id[slot] = 40 + slot
    states.host.block_start[2], states.host.step[2] = 5, 1
    states.host.masked[2, :4] = [False, True, False, True]
    return states


def test_a_step_runs_the_scheduled_rows_and_reads_the_masked_ones():
    states = states_of_two_requests()
    slots, start = np.array([2, 0]), np.array([5, 0])
    num_rows, num_drafts = np.array([4, 5]), np.array([4, 2], dtype=np.int32)
    states.begin_step(slots, start + num_rows - num_drafts, num_drafts)
    assert states.host.step[slots].tolist() == [2, 0]
    assert states.host.masked[0].nonzero()[0].tolist() == [0, 1]
    plan = plan_step(states, slots, start, num_rows, num_drafts)
    assert plan.positions.tolist() == [5, 6, 7, 8, 0, 1, 2, 3, 4]
    assert plan.source.tolist() == [37, 38, 39, 40, 0, 1, 2, 3, 4]
    assert plan.query_start_loc.tolist() == [0, 4, 9]
    assert plan.seq_lens.tolist() == [13, 5]
    assert plan.logit_rows.tolist() == [1, 3, 7, 8]
    assert plan.cu_num_logits.tolist() == [0, 2, 4]
    assert plan.cells.tolist() == [1, 3, 4, 5]
    assert plan.canvas_index.tolist() == [[37, 38, 39, 40], [3, 4, 64, 64]]
    assert plan.rule.tolist() == [2, 0]
    assert plan.parameter.tolist() == [2 / 16, 0]
    assert plan.eos_token_id.tolist() == [42, 40]
    assert plan.num_needed.tolist() == [4, 2]


def test_a_step_of_no_request_is_empty():
    states, none = states_of_two_requests(), np.empty(0, dtype=np.int64)
    no_drafts = np.empty(0, dtype=np.int32)
    states.begin_step(none, none, no_drafts)
    plan = plan_step(states, none, none, none, no_drafts)
    assert plan.positions.size == plan.logit_rows.size == plan.canvas_index.size == 0
    assert plan.query_start_loc.tolist() == [0]


def test_a_request_without_drafts_reads_no_logits_and_keeps_its_masks_and_its_step():
    states = states_of_two_requests()
    slots, start = np.array([2, 0]), np.array([1, 0])
    num_rows, num_drafts = np.array([4, 5]), np.array([0, 2], dtype=np.int32)
    before = states.host.masked[2].copy()
    states.begin_step(slots, start + num_rows - num_drafts, num_drafts)
    plan = plan_step(states, slots, start, num_rows, num_drafts)
    assert (states.host.step[2], states.host.block_start[2]) == (1, 5)
    assert np.array_equal(states.host.masked[2], before)
    assert plan.positions.tolist() == [1, 2, 3, 4, 0, 1, 2, 3, 4]
    assert plan.mask_rows.tolist() == [4, 0]  # the row behind those of the slots, which is never masked
    assert not states.masked[4].any()
    assert plan.logit_rows.tolist() == [7, 8] and plan.cu_num_logits.tolist() == [0, 0, 2]
    assert plan.num_needed.tolist() == [0, 2]
    assert plan.canvas_index[0].tolist() == [64] * plan.canvas_index.shape[1]
    assert states.host.num_fallbacks[2].sum() == 0


def test_a_block_that_begins_inside_the_prompt_is_as_long_as_its_drafts():
    states = CanvasStates(2, 32, 99, torch.device("cpu"), is_block_causal=True)
    states.host.origin[1], states.host.canvas_end[1], states.host.output_end[1] = 8, 24, 20
    states.host.block_length[1] = 8
    states.host.parameters[1] = np.arange(32)
    slots, start, num_rows, num_drafts = np.array([1]), np.array([0]), np.array([16]), np.array([5], dtype=np.int32)
    for number in range(9):
        states.begin_step(slots, np.array([11]), num_drafts)
        plan = plan_step(states, slots, start, num_rows, num_drafts)
        assert plan.logit_rows.tolist() == [11, 12, 13, 14, 15]
        assert plan.canvas_index.tolist() == [[43, 44, 45, 46, 47, 64, 64, 64]]
        assert plan.num_needed.tolist() == [5]
        assert plan.parameter.tolist() == [min(number, 7)]  # of the first block; its last step holds for later ones
    states.begin_step(slots, np.array([16]), np.array([8], dtype=np.int32))
    plan = plan_step(states, slots, np.array([8]), num_rows, np.array([8], dtype=np.int32))
    assert (plan.logit_rows.tolist(), plan.parameter.tolist()) == (list(range(8, 16)), [8.0])
    assert plan.num_needed.tolist() == [4]


def test_queries_are_cut_at_block_boundaries():
    states = CanvasStates(4, 64, 99, torch.device("cpu"), is_block_causal=True)
    states.host.block_length[:] = [4, 8, 0, 16]
    slots, start, num_rows = np.array([1, 0, 2, 3]), np.array([16, 0, 0, 32]), np.array([16, 4, 3, 16])
    queries = cut_into_blocks(states, slots, start, num_rows)
    assert queries.query_start_loc.tolist() == [0, 8, 16, 20, 23, 39]
    assert queries.seq_lens.tolist() == [24, 32, 4, 3, 48]  # the third is a warm-up request of vLLM, without blocks
    assert queries.request.tolist() == [0, 0, 1, 2, 3]
    none = np.empty(0, dtype=np.int64)
    empty = cut_into_blocks(states, none, none, none)
    assert empty.query_start_loc.tolist() == [0] and empty.request.size == 0
