"""The stand-in refuses what a GPU refuses, and counts what would cost time there."""

import numpy as np
import pytest
import torch

from tests.cuda_stand_in.cuda import CUDA, LEDGER


@pytest.fixture(autouse=True)
def empty_ledger():
    LEDGER.clear()


def counts():
    return tuple(counter.total() for counter in (LEDGER.to_device, LEDGER.to_host, LEDGER.waits))


def test_what_is_made_of_device_tensors_is_on_the_device():
    tensor = torch.zeros(4, 3, device="cuda")
    for other in (tensor + 1, tensor[1:], tensor.view(-1), torch.empty_like(tensor), torch.cat([tensor, tensor])):
        assert other.device == CUDA and other.is_cuda and not other.is_cpu
    parameter = torch.nn.Parameter(tensor)
    assert parameter.device == CUDA and torch.zeros(4).device.type == "cpu"
    assert counts() == (0, 0, 0)


def test_operands_of_both_sides_are_refused():
    with pytest.raises(RuntimeError, match="same device"):
        torch.zeros(3, device="cuda") + torch.zeros(3)
    with pytest.raises(RuntimeError, match="indices"):
        torch.zeros(3)[torch.zeros(1, dtype=torch.int64, device="cuda")]
    with pytest.raises(TypeError, match="numpy"):
        torch.zeros(3, device="cuda").numpy()
    torch.zeros(3, device="cuda") * torch.tensor(2.0)  # a number


@pytest.mark.parametrize(
    "ask",
    [
        lambda on_device: on_device[0].item(),
        lambda on_device: on_device.tolist(),
        lambda on_device: on_device.cpu(),
        lambda on_device: on_device.nonzero(),
        lambda on_device: on_device[on_device > 0],
        lambda on_device: on_device.copy_(torch.zeros(3)),
        lambda on_device: on_device.copy_(torch.zeros(3).pin_memory(), non_blocking=True),
        lambda on_device: torch.tensor([1.0], device="cuda"),
        lambda on_device: torch.cuda.synchronize(),
    ],
)
def test_a_capture_allows_neither_waits_nor_copies_to_or_from_the_host(ask):
    on_device = torch.ones(3, device="cuda")
    with pytest.raises(RuntimeError, match="while a graph is captured"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        ask(on_device)


def test_waits_for_events_are_counted_by_themselves():
    event = torch.cuda.Event()
    event.record()
    event.synchronize()
    assert LEDGER.event_waits.total() == 1 and counts() == (0, 0, 0)


def test_a_copy_shares_no_memory():
    host = torch.zeros(3)
    device = host.to("cuda")
    back = device.cpu()
    device.fill_(1)
    assert host.sum() == 0 and back.sum() == 0 and device.to("cuda:0") is device


def test_pinned_memory_is_copied_without_a_wait_and_other_memory_is_not():
    pinned, device = torch.zeros(3, pin_memory=True), torch.zeros(3, device="cuda")
    device.copy_(pinned, non_blocking=True)
    pinned.copy_(device, non_blocking=True)
    assert device.to("cpu", non_blocking=True).is_pinned()
    assert counts() == (1, 2, 0)
    device.copy_(torch.zeros(3), non_blocking=True)
    torch.tensor([1, 2], device="cuda")
    assert counts() == (3, 2, 2)


@pytest.mark.parametrize(
    "read",
    [
        lambda tensor: tensor.sum().item(),
        lambda tensor: bool(tensor.any()),
        lambda tensor: tensor.tolist(),
        lambda tensor: tensor.nonzero(),
        lambda tensor: tensor[tensor > 0],
        lambda tensor: tensor.cpu(),
        lambda tensor: tensor[torch.tensor([1, 0])],
        lambda tensor: torch.cuda.synchronize(),
    ],
)
def test_what_waits_for_the_device_is_counted(read):
    tensor = torch.ones(3, device="cuda")
    LEDGER.clear()
    read(tensor)
    assert LEDGER.waits.total() == 1


def test_the_device_sees_what_is_written_to_mapped_memory():
    from vllm.v1.worker.gpu.buffer_utils import UvaBuffer

    buffer = UvaBuffer(3, torch.int32)
    buffer.np[:] = np.arange(3)
    assert buffer.uva().device == CUDA and buffer.cpu.device.type == "cpu"
    assert buffer.uva().clone().tolist() == [0, 1, 2]
