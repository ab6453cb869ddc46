"""The sample of a cross product."""

import itertools

import pytest
from selection import covering


@pytest.mark.parametrize("sizes", [(4,), (3, 2), (4, 3, 3, 2, 2), (5, 4, 2, 1)])
def test_any_two_values_occur_together(sizes):
    cases = list(itertools.product(*map(range, sizes)))
    chosen = covering(cases)
    assert set(chosen) <= set(cases) and len(set(chosen)) == len(chosen)
    for a, b in itertools.combinations(range(len(sizes)), 2):
        assert {(case[a], case[b]) for case in chosen} == set(itertools.product(range(sizes[a]), range(sizes[b])))
    assert {case[0] for case in chosen} == set(range(sizes[0]))


def test_a_sample_is_small():
    assert len(covering(itertools.product(range(4), range(3), range(3), range(4)))) <= 20
