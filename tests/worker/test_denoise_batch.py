"""The random keys that make sampling independent of the batch."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_osdt.worker.denoise_batch import noise_keys
from vllm_osdt.worker.request_states import _seed

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
