"""A step's arrays on the device: all in one copy, or shared with the host."""

import numpy as np
import pytest
import torch

from vllm_osdt.worker import transfer
from vllm_osdt.worker.transfer import send, to_device

ARRAYS = {
    "flags": np.array([True, False, True]),
    "empty": np.empty(0, dtype=np.int64),
    "wide": np.arange(12, dtype=np.int64).reshape(3, 4),
    "small": np.array([-3], dtype=np.int8),
    "shares": np.array([0.5, np.inf, -0.0], dtype=np.float32),
    "every other": np.arange(10, dtype=np.int32)[::2],
}


class OtherDevice:
    """Stands for a device that is not the host; tensors stay where they are."""

    type = "other"


@pytest.fixture
def copies(monkeypatch):
    """What was copied to the other device."""
    found = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **options: empty(*size, **options))
    monkeypatch.setattr(
        torch.Tensor, "to", lambda tensor, device, non_blocking: found.append(tensor.nbytes) or tensor.clone()
    )
    return found


def test_all_arrays_go_in_one_copy_and_arrive_as_they_are(copies):
    sent = send(ARRAYS, OtherDevice())
    assert list(sent) == list(ARRAYS) and len(copies) == 1
    for name, array in ARRAYS.items():
        assert sent[name].dtype == torch.from_numpy(array).dtype and tuple(sent[name].shape) == array.shape
        assert sent[name].numpy().tobytes() == array.tobytes()
        assert sent[name].storage_offset() * sent[name].element_size() % transfer.ALIGNMENT == 0
    assert copies[0] <= sum(array.nbytes + transfer.ALIGNMENT for array in ARRAYS.values())


def test_a_later_change_of_an_array_does_not_reach_the_device(copies):
    array = np.arange(4)
    sent = send({0: array}, OtherDevice())[0]
    array[:] = 9
    assert sent.tolist() == [0, 1, 2, 3]


def test_on_the_host_tensors_share_the_arrays_memory():
    array = np.arange(6, dtype=np.int32)
    for sent in (send({"a": array}, torch.device("cpu"))["a"], to_device(array, torch.device("cpu"))):
        assert sent.data_ptr() == array.ctypes.data
