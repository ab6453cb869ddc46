"""What policies read off logits: compiled loops against their twins of tensor operations."""

import pytest
import torch

from csrc_triton import cpu_reading, reference_reading
from csrc_triton.types import KeptLogits

SIZES = [(0, 8), (1, 8), (5, 13), (40, 200), (7, 1023), (3, 5000)]
CLOSE = {"rtol": 1e-4, "atol": 3e-6, "equal_nan": True}  # sums in float32, in parts or whole


def rows(shape, seed, *, dtype=torch.float32):
    """Logits with tokens that are left out, every other number of a wider table."""
    generator = torch.Generator().manual_seed(seed)
    logits = 4.0 * torch.randn(shape[0], shape[1] + 9, generator=generator)
    logits = logits[:, : shape[1]].masked_fill(torch.rand(shape, generator=generator) < 0.2, -torch.inf)
    logits[:, 1] = torch.randn(shape[0], generator=generator)  # some of them is left
    later = logits + 0.3 * torch.randn(shape, generator=generator)
    table = torch.randn(2 * shape[0] + 3, shape[1] + 5, generator=generator)[:, : shape[1]]
    where = torch.randperm(table.shape[0], generator=generator)[: shape[0]]
    table[where] = logits.nan_to_num(neginf=-2.0)
    return later, KeptLogits(table.to(dtype), where)


def both(name, *args, written):
    """What the loop and its twin write, by argument."""
    found = []
    for module in (cpu_reading, reference_reading):
        own = [one.clone() if index in written else one for index, one in enumerate(args)]
        assert getattr(module, name)(*own) is None
        found.append([own[index] for index in written])
    return zip(*found, strict=True)


def assert_alike(found):
    for own, twin in found:
        torch.testing.assert_close(own, twin, **CLOSE)


@pytest.mark.parametrize("shape", SIZES)
def test_the_best_two_are_exact(shape):
    logits, _ = rows(shape, 1)
    logits[: shape[0] // 2, 2:] = -torch.inf  # one or two are left
    if shape[0] > 4:
        logits[3, 5] = torch.nan
        logits[4, :3] = 50.0  # equal ones
    [(own, twin)] = both("best_two", logits, torch.full((shape[0], 4), 7.0), written=[1])
    assert torch.equal(own, twin)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SIZES)
def test_steady_steps_are_counted_alike(shape, dtype):
    for seed in range(6):
        logits, before = rows(shape, seed, dtype=dtype)
        if shape[0] > 4:
            logits[0, 3], logits[1, 3], before.table[before.row[1], 3] = torch.nan, 0.0, torch.nan
        memory = torch.tensor([0.0, 3.0]).expand(shape[0], 2).contiguous()
        memory[:: 1 + seed % 2, 0] = 2.0
        bound = torch.full((shape[0],), 0.05 * (seed + 1))
        assert_alike(both("count_steady", logits, before, bound, memory, torch.zeros(shape[0], 4), written=[3, 4]))


def test_a_divergence_is_what_it_is():
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.4, 0.4, 0.2])
    exact = (p * (p / q).log()).sum().item()
    before = KeptLogits(q.log()[None] + 3.0, torch.zeros(1, dtype=torch.int64))
    for bound, number in ((exact * 0.999, 0.0), (exact * 1.001, 2.0)):
        memory, reading = torch.ones(1, 2), torch.zeros(1, 4)
        cpu_reading.count_steady(p.log()[None], before, torch.tensor([bound]), memory, reading)
        assert memory.tolist() == [[2.0, number]] and reading[0, 0] == number


@pytest.mark.parametrize("shape", SIZES)
def test_coarse_comparisons_are_alike(shape):
    memory = torch.zeros(shape[0], 18)
    for seed in (0, 1):
        logits, _ = rows(shape, 4)
        logits += 0.5 * seed * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        if shape[1] > 8 and seed:
            logits[:1, :9] = -torch.inf  # few are left
        found = list(both("compare_coarsely", logits, 8, memory, torch.zeros(shape[0], 4), written=[2, 3]))
        for own, twin in found:
            torch.testing.assert_close(own[:, :2], twin[:, :2], **CLOSE)
        torch.testing.assert_close(found[0][0][:, 10:], found[0][1][:, 10:], **CLOSE)
        memory = found[0][0]


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("shape", SIZES)
def test_averages_are_alike(shape, number):
    logits, first = rows(shape, 2)
    _, second = rows(shape, 3, dtype=torch.bfloat16)
    if shape[0] > 4:
        logits[0, 3] = torch.nan
        logits[1] = -torch.inf
    before, generator = (first, second)[:number], torch.Generator().manual_seed(shape[0])
    counts = [(torch.rand(shape[0], generator=generator) < 0.5).float() for _ in before]
    token = logits.argmax(dim=1)
    token[::3] = 1  # a sample
    confidence, reading = torch.zeros(shape[0]), torch.zeros(shape[0], 4)
    found = list(both("average", logits, before, counts, token, confidence, reading, written=[3, 4, 5]))
    known = torch.isfinite(found[2][1][:, 0])
    assert_alike((own[known], twin[known]) for own, twin in found)
    assert torch.equal(torch.isfinite(found[2][0][:, 0]), known)
