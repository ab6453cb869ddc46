"""CUDA graphs of the stand-in: a capture records what the device is asked to do, a replay does it again.

The recorder sees operations of PyTorch below views and wrappers, vLLM's C++ kernels, attention, and launches of Triton
kernels. A replay runs each of them on the tensors of the capture and puts the results where they were then: what a step
has not written to the memory that the capture read does not reach it, as on a GPU. A capture runs no kernel, and a read
by the host is an error.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Namespaces of operations that are Python functions: what these call is recorded (see ``recorder``), not they.
WRAPPERS = ("vllm",)


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)


class CUDAGraph:
    """Stands in for ``torch.cuda.CUDAGraph``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.calls: list[Callable[[], None]] = []

    def replay(self) -> None:
        """Do what was recorded."""
        with torch.inference_mode(), torch._C.DisableTorchFunction():
            for call in self.calls:
                call()

    def reset(self) -> None:
        """Forget it."""
        self.calls.clear()


class _Recorder(TorchDispatchMode):
    """Records the operations of a capture."""

    def __init__(self, graph: CUDAGraph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.namespace in WRAPPERS:
            return result
        if func is torch.ops.aten._local_scalar_dense.default:
            if getattr(args[0].untyped_storage(), "place", None) is not None:  # else it is the host's own
                raise RuntimeError("the host reads a value while a graph is captured")
            return result
        given = {tensor.untyped_storage().data_ptr() for tensor in _tensors([*args, *kwargs.values()])}
        new = [tensor for tensor in _tensors(result) if tensor.untyped_storage().data_ptr() not in given]
        if new or func._schema.is_mutable:  # else a view
            self.graph.calls.append(lambda: self._again(func, args, kwargs, new))
        return result

    @staticmethod
    def _again(func: Any, args: tuple, kwargs: dict[str, Any], new: list[torch.Tensor]) -> None:
        result = func(*args, **kwargs)
        if new and "empty" not in func.__name__:
            given = {tensor.untyped_storage().data_ptr() for tensor in _tensors([*args, *kwargs.values()])}
            fresh = [one for one in _tensors(result) if one.untyped_storage().data_ptr() not in given]
            for old, one in zip(new, fresh, strict=True):
                old.copy_(one)


_capturing: list[_Recorder] = []


def is_capturing() -> bool:
    """Whether a graph is being captured."""
    return bool(_capturing)


def launch(run: Callable[[], Any]) -> Any:
    """Run what the device does as one kernel, or record it whole: a capture runs nothing."""
    if not _capturing:
        return run()
    _capturing[-1].graph.calls.append(run)
    return None


def recorder() -> Any:
    """The recorder of the graph that is being captured, to be entered in a function that an operation calls."""
    return _capturing[-1] if _capturing else contextlib.nullcontext()


@contextlib.contextmanager
def capture(graph: CUDAGraph, *args: Any, **kwargs: Any) -> Iterator[None]:
    """Stands in for ``torch.cuda.graph``."""
    one = _Recorder(graph)
    _capturing.append(one)
    try:
        with one:
            yield
    finally:
        _capturing.remove(one)
