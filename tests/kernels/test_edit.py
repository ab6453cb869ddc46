"""Token editing, against the rule written out position by position."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from csrc_triton import Blocks, Proposals
from csrc_triton.edit import MAX_POST_STEPS, edit

VOCABULARY = 4


def by_hand(cells, masked, post_steps, slots, index, position, token, confidence, threshold):
    """Lists in, lists out; the arguments of ``edit``."""
    width = len(index[0])
    read = {cell: (t, c) for cell, t, c in zip(position, token, confidence, strict=True)}
    is_open = []
    for row, slot in enumerate(slots):
        has_mask = any(masked[slot][:width])
        edits = 0
        for k in range(width):
            if masked[slot][k] or row * width + k not in read:
                continue
            t, c = read[row * width + k]
            if c > threshold[row] and t != cells[index[row][k]]:
                cells[index[row][k]] = t
                edits += 1
        post_steps[slot] += not has_mask
        goes_on = has_mask or (edits > 0 and post_steps[slot] < MAX_POST_STEPS)
        is_open.append(threshold[row] < float("inf") and goes_on)
    return is_open


def blocks_of(cells, masked, slots, index) -> Blocks:
    return Blocks(
        cells=torch.tensor(cells, dtype=torch.int32),
        masked=torch.tensor(masked),
        slots=torch.tensor(slots),
        canvas_index=torch.tensor(index),
        end_token_ids=torch.full((len(slots), 1), -1),
        num_output_positions=torch.zeros(len(slots), dtype=torch.int32),
    )


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_every_block_is_edited_as_by_hand(data):
    num_slots, width = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    slots = data.draw(st.permutations(range(num_slots)))[: data.draw(st.integers(1, num_slots))]
    tokens = st.integers(0, VOCABULARY - 1)
    cells = data.draw(st.lists(tokens, min_size=num_slots * width + 1, max_size=num_slots * width + 1))
    masked = [data.draw(st.lists(st.booleans(), min_size=width, max_size=width)) for _ in range(num_slots)]
    post_steps = data.draw(st.lists(st.integers(0, MAX_POST_STEPS), min_size=num_slots, max_size=num_slots))
    index = [[slot * width + k for k in range(width)] for slot in slots]
    position = sorted(data.draw(st.sets(st.integers(0, len(slots) * width - 1))))
    token = [data.draw(tokens) for _ in position]
    confidence = [data.draw(st.sampled_from([0.0, 0.25, 0.5, 1.0])) for _ in position]
    threshold = [data.draw(st.sampled_from([0.0, 0.25, 0.5, float("inf")])) for _ in slots]
    blocks = blocks_of(cells, masked, slots, index)
    post_steps_tensor = torch.tensor(post_steps, dtype=torch.int32)
    proposals = Proposals(
        torch.tensor(position, dtype=torch.int64),
        torch.tensor(token, dtype=torch.int64),
        torch.tensor(confidence, dtype=torch.float32),
    )
    is_open, is_masked = edit(blocks, proposals, post_steps_tensor, torch.tensor(threshold, dtype=torch.float32))
    expected_masked = [masked[slots[cell // width]][cell % width] for cell in position]
    expected = by_hand(cells, masked, post_steps, slots, index, position, token, confidence, threshold)
    assert is_open.tolist() == expected
    assert is_masked.tolist() == expected_masked
    assert (blocks.cells.tolist(), post_steps_tensor.tolist()) == (cells, post_steps)


@pytest.mark.parametrize(("num_post_steps", "is_open"), [(0, True), (14, True), (15, False)])
def test_a_block_that_never_settles_is_finished_after_some_steps(num_post_steps, is_open):
    blocks = blocks_of([1, 0], [[False]], [0], [[0]])
    post_steps = torch.tensor([num_post_steps], dtype=torch.int32)
    proposals = Proposals(torch.tensor([0]), torch.tensor([2]), torch.tensor([0.9]))
    got, _ = edit(blocks, proposals, post_steps, torch.tensor([0.5]))
    assert got.tolist() == [is_open]
    assert blocks.cells.tolist() == [2, 0] and post_steps.tolist() == [num_post_steps + 1]
