"""Confirmation of drafted tokens, against the rule written out position by position."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from csrc_triton import Blocks, Proposals, UnmaskResult
from csrc_triton.draft import confirm

VOCABULARY = 4
LEVELS = [0.0, 0.25, 0.5, 1.0]


def by_hand(cells, masked, slots, index, proposals, drafts, threshold, ends, num_outputs):
    """Lists in, lists out: how many are confirmed and ready in each block; cells and masks are changed."""
    width, counts = len(index[0]), []
    for row, slot in enumerate(slots):
        num_confirmed = 0
        for k, cell in enumerate(index[row]):
            token, confidence = proposals.get(row * width + k, (None, 0.0))
            if masked[slot][k] and token == drafts[cell] and confidence >= threshold[row]:
                cells[cell], masked[slot][k] = token, False
                num_confirmed += 1
        ready = num_outputs[row]
        for k in range(num_outputs[row]):
            if masked[slot][k]:
                ready = 0
                break
            if cells[index[row][k]] == ends[row]:
                ready = k + 1
                break
        counts.append((num_confirmed, ready))
    return counts


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_every_block_takes_the_tokens_that_are_taken_by_hand(data):
    num_slots, width = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    slots = data.draw(st.permutations(range(num_slots)))[: data.draw(st.integers(1, num_slots))]
    tokens = st.integers(0, VOCABULARY - 1)
    num_cells = num_slots * width + 1
    cells = data.draw(st.lists(tokens, min_size=num_cells, max_size=num_cells))
    drafts = data.draw(st.lists(st.integers(-1, VOCABULARY - 1), min_size=num_cells, max_size=num_cells))
    masked = [data.draw(st.lists(st.booleans(), min_size=width, max_size=width)) for _ in range(num_slots)]
    index = [[slot * width + k for k in range(width)] for slot in slots]
    position = sorted(data.draw(st.sets(st.integers(0, len(slots) * width - 1))))
    proposals = {place: (data.draw(tokens), data.draw(st.sampled_from([*LEVELS, float("nan")]))) for place in position}
    threshold = [data.draw(st.sampled_from([*LEVELS, float("inf")])) for _ in slots]
    ends = [data.draw(st.integers(-1, VOCABULARY - 1)) for _ in slots]
    num_outputs = [data.draw(st.integers(0, width)) for _ in slots]
    blocks = Blocks(
        cells=torch.tensor(cells, dtype=torch.int32),
        masked=torch.tensor(masked),
        slots=torch.tensor(slots),
        canvas_index=torch.tensor(index),
        end_token_ids=torch.tensor(ends)[:, None],
        num_output_positions=torch.tensor(num_outputs, dtype=torch.int32),
    )
    given_proposals = Proposals(
        torch.tensor(position, dtype=torch.int64),
        torch.tensor([token for token, _ in proposals.values()], dtype=torch.int64),
        torch.tensor([confidence for _, confidence in proposals.values()], dtype=torch.float32),
    )
    before = UnmaskResult(*torch.tensor([[1] * len(slots), [9] * len(slots), [0] * len(slots)], dtype=torch.int32))
    canvas, result = confirm(
        blocks, given_proposals, torch.tensor(drafts, dtype=torch.int32), torch.tensor(threshold), before
    )
    counts = by_hand(cells, masked, slots, index, proposals, drafts, threshold, ends, num_outputs)
    assert (blocks.cells.tolist(), blocks.masked.tolist()) == (cells, masked)
    assert canvas.tolist() == [[cells[cell] for cell in row] for row in index]
    assert [one.dtype for one in result] == [torch.int32] * 3
    assert torch.stack(list(result)).T.tolist() == [[1 + n, 9 - n, ready] for n, ready in counts]
