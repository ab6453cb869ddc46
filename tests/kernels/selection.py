"""Which cases run.

Interpreted Triton takes milliseconds for what a GPU does in microseconds, so by default it gets a sample: of a cross
product, cases that contain every pair of values of two axes; of random blocks and examples, fewer. ``TEST_ALL=1`` runs
everything.

Two at a time is how a kernel combines what it is asked for: a dtype ends at the load, the excluded id and the noise
meet in the score, and everything meets the vocabulary in its tiles. What selects another compiled kernel is one axis.
"""

import itertools
import os
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
TEST_ALL = os.environ.get("TEST_ALL") == "1"
IMPLEMENTATIONS = ["cpu", "triton"]

per_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def is_sampled(implementation: str) -> bool:
    return implementation == "triton" and not (HAS_GPU or TEST_ALL)


def number(implementation: str, all_of_them: int, sample: int) -> int:
    """Of blocks or examples."""
    return sample if is_sampled(implementation) else all_of_them


def per_implementation_and(**axes: Sequence[Any]) -> pytest.MarkDecorator:
    """Parametrizes a test by its implementation and the values of all axes."""
    rows = []
    for implementation in IMPLEMENTATIONS:
        cases = list(itertools.product(*axes.values()))
        rows += [(implementation, *case) for case in (covering(cases) if is_sampled(implementation) else cases)]
    return pytest.mark.parametrize(("implementation", *axes), rows)


def covering(cases: Iterable[tuple]) -> list[tuple]:
    """Some of the cases in which any two values occur together that do so in all of them; greedy, so it is small."""
    left = list(cases)
    missing = set().union(*map(_pairs, left))
    chosen = []
    while missing:
        best = max(left, key=lambda case: len(_pairs(case) & missing))
        missing -= _pairs(best)
        chosen.append(best)
    return chosen


def _pairs(case: tuple) -> set[tuple]:
    """Of axis and value; values by their representation, since tensors and NaN do not compare."""
    return set(itertools.combinations(((axis, repr(value)) for axis, value in enumerate(case)), min(2, len(case))))
