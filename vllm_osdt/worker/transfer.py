"""What a step sends to the device: all of its arrays in one copy.

A copy of its own for each of some twenty small arrays costs the host more than all the planning of a step.
"""

from collections.abc import Hashable, Mapping
from typing import TypeVar

import numpy as np
import torch

ALIGNMENT = 16  # bytes; every array begins at a multiple
Key = TypeVar("Key", bound=Hashable)


def align(num_bytes: int) -> int:
    """The next place behind so many bytes."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


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
        size += align(array.nbytes)
    staged = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    for name, array in arrays.items():
        _part(staged, offsets[name], array).copy_(torch.from_numpy(array))
    copied = staged.to(device, non_blocking=True)
    return {name: _part(copied, offsets[name], array) for name, array in arrays.items()}


def _part(buffer: torch.Tensor, offset: int, like: np.ndarray) -> torch.Tensor:
    """The part of a buffer of bytes that holds an array."""
    return buffer[offset : offset + like.nbytes].view(torch.from_numpy(like).dtype).view(like.shape)


def wait_for(event: torch.cuda.Event) -> None:
    """Wait for what a step before has recorded; as a rule it has happened, and asking whether it has is no wait."""
    if not event.query():
        event.synchronize()


class StagedBuffer:
    """A buffer of bytes on a GPU that keeps its address, and pinned ones on the host that are copied to it in turn.

    What is written for a step is read by the copy when the GPU gets there: the next step is written to the other one.

    Args:
        num_bytes: Its size.
        device: A GPU.
    """

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.on_device = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        self._staged = [torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._copied = [torch.cuda.Event() for _ in range(2)]
        self._turn = 0

    def begin(self) -> np.ndarray:
        """The bytes to write, uint8 ``[num_bytes]``; waits until the copy before the last one is done."""
        self._turn = 1 - self._turn
        wait_for(self._copied[self._turn])
        return self._staged[self._turn].numpy()

    def send(self, num_bytes: int) -> None:
        """Copy the first bytes that were written since :meth:`begin`, without waiting."""
        self.on_device[:num_bytes].copy_(self._staged[self._turn][:num_bytes], non_blocking=True)
        self._copied[self._turn].record()

    def views(self, places: Mapping[str, tuple[int, type, tuple[int, ...]]]) -> dict[str, torch.Tensor]:
        """Arrays on the device, by name: their places in bytes, dtypes and shapes."""
        found = {}
        for name, (offset, dtype, shape) in places.items():
            num_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
            torch_dtype = torch.from_numpy(np.empty(0, dtype)).dtype
            found[name] = self.on_device[offset : offset + num_bytes].view(torch_dtype).view(shape)
        return found
