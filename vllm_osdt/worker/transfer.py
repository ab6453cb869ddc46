"""What a step sends to the device: all of its arrays in one copy.

A copy of its own for each of some twenty small arrays costs the host more than all the planning of a step.
"""

from collections.abc import Hashable, Mapping
from typing import TypeVar

import numpy as np
import torch

ALIGNMENT = 16  # bytes; every array begins at a multiple
Key = TypeVar("Key", bound=Hashable)


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A tensor of one array on the device, without a copy where that is the host, without waiting elsewhere."""
    return send({0: array}, device)[0]


def send(arrays: Mapping[Key, np.ndarray], device: torch.device) -> dict[Key, torch.Tensor]:
    """Tensors of the arrays on the device.

    Where the device is the host, they share the arrays' memory. Elsewhere the arrays are put into one pinned buffer,
    which is copied without waiting; the tensors are parts of the copy.

    Args:
        arrays: Contiguous or not, of any dtype that torch has, by name.
        device: Where they are needed.
    """
    if device.type == "cpu":
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
    offsets: dict[Key, int] = {}
    size = 0
    for name, array in arrays.items():
        offsets[name] = size
        size += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
    staged = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    for name, array in arrays.items():
        _part(staged, offsets[name], array).copy_(torch.from_numpy(array))
    copied = staged.to(device, non_blocking=True)
    return {name: _part(copied, offsets[name], array) for name, array in arrays.items()}


def _part(buffer: torch.Tensor, offset: int, like: np.ndarray) -> torch.Tensor:
    """The part of a buffer of bytes that holds an array."""
    return buffer[offset : offset + like.nbytes].view(torch.from_numpy(like).dtype).view(like.shape)
