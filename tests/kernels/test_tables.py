"""``unmask`` on blocks that are rows of tables."""

import functools

import pytest
import torch
from test_unmask import random_state

from csrc_triton import cpu, implementations, reference, tables


def reference_unmask(canvas, masked, proposal, confidence, rule, parameter, end_token_ids, num_needed, quota):
    last = {"end_token_ids": end_token_ids, "num_needed": num_needed, "quota": quota}
    return reference.unmask(canvas, masked, proposal, confidence, rule, parameter, **last)


@pytest.mark.parametrize(("num_blocks", "block_length"), [(0, 4), (1, 1), (7, 32), (12, 5)])
def test_cpu_equals_gathering_the_blocks_and_writing_them_back(num_blocks, block_length):
    state = random_state(num_blocks, block_length, seed=num_blocks)
    generator = torch.Generator().manual_seed(block_length)
    num_slots, stride = num_blocks + 3, block_length + 9
    slots = torch.randperm(num_slots, generator=generator)[:num_blocks]
    canvas_index = slots[:, None] * stride + 4 + torch.arange(block_length)
    logit_cells = state["masked"].flatten().nonzero().flatten()
    results = []
    for run in (cpu.unmask_in_tables, functools.partial(tables.unmask_in_tables, reference_unmask)):
        cells = torch.arange(num_slots * stride + 1, dtype=torch.int32)
        masked = torch.zeros(num_slots, block_length + 2, dtype=torch.bool)
        masked[slots, :block_length] = state["masked"]
        chosen = (state[name].flatten()[logit_cells] for name in ("proposal", "confidence"))
        rules = (state[name] for name in ("rule", "parameter", "end_token_ids", "num_needed", "quota"))
        canvas, best, counts = run(cells, masked, slots, canvas_index, logit_cells, *chosen, *rules)
        results.append((cells, masked, canvas, best.flatten()[logit_cells].nan_to_num(-5), *counts))
    for own, expected in zip(*results, strict=True):
        assert own.dtype == expected.dtype
        assert torch.equal(own, expected)


def test_a_cpu_tensor_gets_the_cpu_path():
    assert implementations(torch.device("cpu")).unmask_in_tables is cpu.unmask_in_tables
