"""What policies that adjust a step share: compiled loops against their twins of tensor operations, bit for bit."""

import pytest
import torch

from csrc_triton import Proposals, cpu, reference

SHAPES = [(1, 1), (1, 32), (3, 7), (8, 32), (5, 128), (0, 4)]


def values(shape, seed):
    """Confidences with ties, NaN and positions without one."""
    generator = torch.Generator().manual_seed(seed)
    found = (torch.rand(shape, generator=generator) * 6).round() / 6
    kind = torch.rand(shape, generator=generator)
    return found.masked_fill(kind < 0.1, torch.nan).masked_fill(kind > 0.9, -2.0)


def same(left, right):
    return torch.equal(left, right) or torch.allclose(left, right, rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_best_positions_and_ranks_are_those_of_a_stable_sort(shape):
    for seed in range(8):
        score = values(shape, seed)
        number = torch.randint(-1, shape[1] + 3, shape[:1], generator=torch.Generator().manual_seed(seed))
        assert torch.equal(cpu.best(score, number), reference.best(score, number))
        assert torch.equal(cpu.best(score, number.float()), reference.best(score, number))
        assert torch.equal(cpu.ranks(score), reference.ranks(score))
        assert torch.equal(reference.ranks(score) < number.unsqueeze(1), reference.best(score, number))


def test_strides_of_scores_do_not_matter():
    several = torch.stack([values((4, 16), 1), values((4, 16), 2)], dim=-1)
    score, number = several[..., 1], torch.tensor([0, 3, 16, 1])
    assert torch.equal(cpu.best(score, number), reference.best(score.contiguous(), number))
    assert torch.equal(cpu.ranks(score), reference.ranks(score.contiguous()))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_choice_is_written_alike(shape):
    for seed in range(4):
        rank = torch.stack([values(shape, seed) * 1.5, values(shape, seed)], dim=-1)[..., 0]
        is_open, chosen = values(shape, seed + 10) > 0.2, values(shape, seed + 20) > 0.6
        written = [(torch.full(shape, torch.nan), torch.full(shape[:1], torch.nan)) for _ in range(2)]
        for own, (score, parameter) in zip((cpu, reference), written, strict=True):
            own.choose(score, parameter, rank, chosen, is_open)
        assert same(written[0][0], written[1][0]) and torch.equal(written[0][1], written[1][1])


@pytest.mark.parametrize("shape", SHAPES)
def test_grids_have_the_proposals_of_masked_positions(shape):
    num_blocks, length = shape
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        masked = torch.rand(num_blocks + 2, length + 3, generator=generator) < 0.6
        slots = torch.randperm(num_blocks + 2, generator=generator)[:num_blocks]
        position = torch.rand(num_blocks * length, generator=generator).lt(0.7).nonzero().squeeze(1)
        position = torch.cat([position, torch.full((2,), num_blocks * length)])  # padding
        confidence = values(position.shape, seed)
        token = torch.randint(0, 99, position.shape, generator=generator)
        proposals = Proposals(position, token, confidence)
        found, wanted = (own.grids(proposals, masked, slots, length) for own in (cpu, reference))
        assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
        assert torch.equal(found.is_open, found.confidence != -2.0) and not found.confidence.isnan().any()
        assert len({one.data_ptr() for one in found if one.numel()}) == (5 if num_blocks else 0)


def test_quotas_are_alike():
    generator = torch.Generator().manual_seed(0)
    numbers = (torch.rand(50, 8, generator=generator) * 5).floor()[:, 3:7]
    numbers[:, 3] += numbers[:, 2]
    index = torch.randint(0, 12, (50,), generator=generator)
    assert torch.equal(cpu.quota(numbers, index), reference.quota(numbers, index))


@pytest.mark.parametrize("size", [0, 3])
def test_rows_are_taken_and_put_by_slot_and_offset(size):
    generator = torch.Generator().manual_seed(0)
    numbers, memory = torch.rand(4, 7, generator=generator), torch.rand(4, 5, 6, generator=generator)[:, :, :size]
    slot, offset = torch.tensor([3, 0, 3]), torch.tensor([4, 0, 2])
    for own, twin in zip(*(one.take_rows(numbers, memory, slot, offset) for one in (cpu, reference)), strict=True):
        assert torch.equal(own, twin)
    tables = [memory.clone() for _ in range(2)]
    for one, table in zip((cpu, reference), tables, strict=True):
        one.put_rows(table, slot, offset, torch.arange(3.0 * size).view(3, size))
    assert torch.equal(*tables) and (size == 0 or not torch.equal(tables[0], memory))
