"""Kernel tests: Triton's interpreter stands in for a GPU, and every output starts as garbage."""

import os
from collections.abc import Iterator

import pytest
import torch

# Triton reads this when it is imported and when a kernel is decorated, so it must be set before either.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

GARBAGE = 77  # neither a count nor an id any test expects


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors here are small; more threads would wait for each other on a busy machine."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(autouse=True)
def garbage_in_new_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """An element an implementation forgets to write shows up as NaN or as 77."""
    empty = torch.empty

    def poisoned(*size, **options) -> torch.Tensor:
        tensor = empty(*size, **options)
        return tensor.fill_(torch.nan if tensor.is_floating_point() else GARBAGE)

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture(autouse=True)
def corrected_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products and roundings of bf16 as a GPU has them, and calls in less time."""
    if torch.cuda.is_available():
        return
    from tests import interpreter

    for owner, name, method in interpreter.CORRECTIONS:
        monkeypatch.setattr(owner, name, method)
