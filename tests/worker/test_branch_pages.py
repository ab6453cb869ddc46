"""Pages of further branches: which are replaced in the tables, which are copied, and what a copy moves."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vllm_osdt.messages import BranchPages
from vllm_osdt.models.traits import Traits
from vllm_osdt.policies.base import Branch
from vllm_osdt.worker.branch_pages import branch_tables, copy_pages, make_room_in_tables, plan_pages
from vllm_osdt.worker.slots import CanvasStates
from vllm_osdt.worker.step.layout import plan_step
from vllm_osdt.worker.step.queries import split_queries_by_block, split_queries_of_branches
from vllm_osdt.worker.step.rows import step_rows

PAGE = 4


def states_of(block_length, *, is_block_causal=False):
    """Slot 1: prompt 6, a canvas of 8, in the second step of the block at 6. Slot 0: likewise, without drafts."""
    traits = Traits(block_length, 99, is_block_causal=is_block_causal)
    states = CanvasStates(3, 32, traits, torch.device("cpu"))
    for slot in (0, 1):
        host = states.host
        host.canvas_start[slot], host.canvas_end[slot], host.max_output_end[slot] = 6, 14, 14
        host.first_end[slot] = host.last_end[slot] = 14
        host.block_length[slot], host.block_start[slot], host.step[slot] = block_length, 6, 0
        host.masked[slot, :block_length] = True
        states.token_ids[slot, :14] = torch.arange(14) + 100 * (slot + 1)
    states.host.max_drafts[1], states.host.num_drafted[1] = 4, 3
    return states


def step_with_branches(states, branches, start=6, num_rows=4):
    slots, ones = np.array([0, 1]), np.ones(2, dtype=np.int64)
    decides_first = np.zeros(2, dtype=bool)
    return step_rows(
        states,
        slots,
        start * ones,
        num_rows * ones,
        (start + num_rows - 6) * ones.astype(np.int32),
        decides_first,
        [(), branches],
    )


def test_rows_of_a_branch_are_its_own_tokens_at_the_blocks_positions():
    states = states_of(4)
    states.branch_ids[1, 0, :4] = torch.tensor([11, 12, 13, 14])
    states.branch_ids[1, 1, :4] = torch.tensor([21, 22, 23, 24])
    branch = Branch(6, 6)  # as with `prefix`, whose rows go to the end of the canvas
    rows = step_with_branches(states, [branch, branch], num_rows=6)
    assert rows.num_requests == 2 and rows.branch.tolist() == [0, 0, 1, 2] and rows.request.tolist() == [0, 1, 1, 1]
    plan = plan_step(states, rows)
    read = states.cells[torch.from_numpy(plan.source)].view(4, 6)
    assert read[1].tolist() == [206, 207, 208, 209, 210, 211]
    assert read[2].tolist() == [11, 12, 13, 14, 210, 211] and read[3].tolist() == [21, 22, 23, 24, 210, 211]
    assert plan.positions.reshape(4, 6).tolist() == [list(range(6, 12))] * 4
    assert states.cells[torch.from_numpy(plan.canvas_index)][2:, :4].tolist() == [[11, 12, 13, 14], [21, 22, 23, 24]]
    assert plan.mask_rows.tolist() == [0, 1, 3 + 1 + 32, 3 + 1 + 33]
    assert plan.logit_rows.reshape(4, 4).tolist() == [[r * 6 + k for k in range(4)] for r in range(4)]
    queries = split_queries_of_branches(rows, plan.seq_lens)
    assert queries.seq_lens.tolist() == [14] * 4 and queries.query_start_loc.tolist() == [0, 6, 12, 18, 24]


def test_branches_without_tokens_or_masks_are_left_out():
    states = states_of(4)
    branches = [Branch(6, 4)] * 3
    states.host.draft_sizes[1, :4] = [9, 1, 2, 1]  # the next steps should unmask one, and then two of four
    assert step_with_branches(states, branches).branch.tolist() == [0, 0, 1, 2]
    states = states_of(4)
    states.host.num_drafted[1] = 1
    assert step_with_branches(states, branches).branch.tolist() == [0, 0, 1]
    states = states_of(4)
    states.host.block_start[1] = -1  # the block is entered: there are no drafts of it
    assert step_with_branches(states, branches).branch.size == 0
    states = states_of(4)
    states.has_branches = False
    assert step_with_branches(states, branches).branch.size == 0


def test_rows_of_a_causal_branch_are_queries_of_one_row_and_end_where_it_does():
    states = states_of(4, is_block_causal=True)
    states.host.block_start[:2], states.host.canvas_start[:2] = 8, 8
    slots, ones = np.array([0, 1]), np.ones(2, dtype=np.int64)
    branches = [Branch(8, 4, is_causal=True), Branch(8, 2, is_causal=True), Branch(8, 4)]
    states.host.masked[1, :4] = [False, True, False, True]
    states.host.draft_sizes[1] = 0  # as many as there are
    rows = step_rows(states, slots, 8 * ones, 4 * ones, 4 * ones.astype(np.int32), ones < 0, [(), branches])
    plan, queries = plan_step(states, rows), split_queries_by_block(states, rows)
    assert queries.request.tolist() == [0, 1, 2, 2, 2, 2, 3, 3, 4]
    assert np.diff(queries.query_start_loc).tolist() == [4, 4, 1, 1, 1, 1, 1, 1, 4]
    assert queries.seq_lens.tolist() == [12, 12, 9, 10, 11, 12, 9, 10, 12]
    assert np.diff(plan.cu_num_logits).tolist() == [4, 2, 2, 1, 2]  # position 3 has no row in the shorter one
    assert plan.logit_rows.tolist() == [0, 1, 2, 3, 5, 7, 9, 11, 13, 15, 17]


def test_pages_that_a_branch_writes_are_its_own_and_what_is_around_its_rows_is_copied():
    states = states_of(4)
    rows = step_with_branches(states, [Branch(6, 4), Branch(6, 4)])
    plan = plan_step(states, rows)
    pages = BranchPages((Branch(6, 4), Branch(6, 4)), [20, 21, 22, 23])
    arrays = plan_pages(rows, plan.seq_lens, [None, pages], PAGE)
    # Rows 6 to 9 lie in pages 1 and 2, and both have others around them.
    assert list(zip(arrays["own_row"], arrays["own_column"], arrays["own_page"], strict=True)) == [
        (2, 1, 20),
        (2, 2, 21),
        (3, 1, 22),
        (3, 2, 23),
    ]
    assert arrays["copy_page"].tolist() == [20, 21, 22, 23]
    tables = SimpleNamespace(
        block_tables=[SimpleNamespace(gpu=torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [0] * 4], dtype=torch.int32))],
        block_sizes=[PAGE],
        slot_mappings=torch.full((1, 32), 7),
    )
    sent = {name: torch.from_numpy(array) for name, array in arrays.items()}
    table, slots, copied = branch_tables(tables, sent, torch.from_numpy(plan.positions))
    assert table.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8], [5, 20, 21, 8], [5, 22, 23, 8]]
    assert copied.tolist() == [6, 7, 6, 7]
    own = [(2, 3), (6, 7), (20, 21), (22, 23)]
    assert slots.view(4, 4).tolist() == [[a * PAGE + 2, a * PAGE + 3, b * PAGE, b * PAGE + 1] for a, b in own]
    assert (tables.slot_mappings[0, 16:] == -1).all()
    # A graph has rows and entries behind those of the step, and reads the tables in vLLM's own memory of a step.
    tables.input_block_tables, made = [torch.zeros(3, 4, dtype=torch.int32)], []
    tables.init_block_table_layout_tensors = lambda: made.append(len(tables.input_block_tables[0]))
    make_room_in_tables(tables, 3)
    make_room_in_tables(tables, 6)
    assert made == [6]
    padded = torch.cat([torch.from_numpy(plan.positions), torch.full((5,), 99)])
    of_graph = branch_tables(tables, sent, padded, 6)
    assert of_graph[0].data_ptr() == tables.input_block_tables[0].data_ptr() and of_graph[0].shape[0] == 6
    assert torch.equal(of_graph[0][:4], table) and torch.equal(of_graph[2], copied)
    assert (
        of_graph[1].shape == (1, 21) and torch.equal(of_graph[1][:, :16], slots) and (of_graph[1][:, 16:] == -1).all()
    )


@pytest.mark.parametrize(
    ("start", "num_rows", "seen", "copied"),
    [(4, 8, 14, []), (4, 6, 14, [2]), (4, 6, 10, []), (5, 7, 14, [1]), (5, 2, 7, [1]), (0, 3, 3, [])],
)
def test_a_page_is_copied_only_where_attention_reads_around_the_rows(start, num_rows, seen, copied):
    states = states_of(4)
    rows = step_with_branches(states, [Branch(6, 4)])
    whole = rows._replace(start=np.full(3, start), num_rows=np.full(3, num_rows))
    first, last = start // PAGE, (start + num_rows - 1) // PAGE
    pages = BranchPages((Branch(start, num_rows),), list(range(30, 31 + last - first)))
    arrays = plan_pages(whole, np.full(3, seen, dtype=np.int32), [None, pages], PAGE)
    assert arrays["own_column"].tolist() == list(range(first, last + 1))
    assert arrays["copy_column"].tolist() == copied


@pytest.mark.parametrize("shape", [(6, 2, 3), (12, 5)])
def test_a_copy_moves_whole_pages_of_every_layer_once(shape):
    caches = [torch.arange(int(np.prod(shape))).reshape(shape).float() + 1000 * layer for layer in range(2)]
    before = [cache.clone().unflatten(0, (6, -1)) for cache in caches]
    copy_pages([caches[0], caches[1], caches[0]], 6, torch.tensor([1, 1, 4]), torch.tensor([0, 5, 2]))
    for cache, old in zip(caches, before, strict=True):
        new = cache.unflatten(0, (6, -1))
        assert torch.equal(new[[0, 5, 2]], old[[1, 1, 4]]) and torch.equal(new[[1, 3, 4]], old[[1, 3, 4]])
    copy_pages(caches, 6, torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))
