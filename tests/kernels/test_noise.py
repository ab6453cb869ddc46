"""The hash behind the noise, against integers without a width, and the distribution of the noise."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from csrc_triton import noise

KEYS = [0, 1, -1, 2**31, 2**32, -(2**63), 2**63 - 1, 123456789]


def finalizer(bits: int) -> int:
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ bits >> shift) * factor % 2**32
    return bits ^ bits >> 16


@pytest.mark.parametrize(("bits", "mixed"), [(0, 0), (1, 0x514E28B7), (0xFFFFFFFF, 0x81F16F39)])
def test_the_finalizer_is_that_of_murmurhash3(bits, mixed):
    """The hash of no bytes under a seed is the finalizer of the seed."""
    assert finalizer(bits) == mixed
    assert noise.mix(torch.tensor([bits])).tolist() == [mixed]
    assert noise.mix(np.array([bits], np.uint32)).tolist() == [mixed]


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**32 - 1))
def test_torch_and_numpy_hash_as_integers_without_a_width_do(key, token_id):
    unsigned, golden = key % 2**64, 0x9E3779B9
    first = finalizer((unsigned % 2**32 + golden) % 2**32)
    second = finalizer(((unsigned >> 32 ^ first) + golden) % 2**32)
    expected = finalizer(finalizer((token_id + first) % 2**32) ^ second)
    words = noise.mix_key(torch.tensor([key]))
    assert noise.hash_ids(*words, torch.tensor([token_id])).tolist() == [expected]
    narrow = (word.astype(np.uint32) for word in noise.mix_key(np.array([key])))
    bits = noise.hash_ids(*narrow, np.array([token_id], np.uint32))
    assert bits.dtype == np.uint32 and bits.tolist() == [expected]


def test_noise_of_numpy_is_that_of_torch_up_to_its_logarithms():
    ids = np.arange(5000)
    expected = noise.gumbel_noise(torch.tensor(KEYS), torch.from_numpy(ids)).numpy()
    first, second = (word.astype(np.uint32) for word in noise.mix_key(np.array(KEYS)))
    for row in range(len(KEYS)):
        got = noise.gumbel_noise_np(first[row : row + 1], second[row : row + 1], ids)
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, expected[row], rtol=2e-6, atol=2e-6)


def test_noise_is_finite_and_within_its_bounds():
    values = noise.gumbel_noise(torch.arange(100), torch.arange(10_000))
    assert -2.82 < values.min().item() and values.max().item() < 16.64 < noise.GUMBEL_MAX
    assert values.mean().item() == pytest.approx(0.5772, abs=0.01)  # Euler's constant
    assert values.var().item() == pytest.approx(math.pi**2 / 6, abs=0.02)
