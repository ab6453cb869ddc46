"""A stand-in for CUDA, so that vLLM's GPU worker and ours run on a machine that has no GPU.

vLLM's CUDA build and torch for CUDA are real. So is all that runs on the host: platform, configuration, worker, runner,
memory profile, warm-up, attention metadata. Here is what stands in for the rest:

- Memory. A tensor "on the device" lies in ordinary memory, and its storage is marked. It says that its device is
  ``cuda:0``. Results of marked tensors are marked. As on a GPU, NumPy cannot read a marked tensor, an operation refuses
  operands of both kinds, and a copy to the other side shares no memory.
- Triton kernels run in Triton's interpreter, with a GPU's bf16 (:mod:`tests.interpreter`). vLLM's C++ kernels run as
  PyTorch (:mod:`tests.cuda_stand_in.kernels`). What ``torch.compile`` would compile runs as it is written.
- Streams and events: everything is done at once, in order.
- The driver: ``torch.cuda`` and NVML answer as if there were one card of compute capability 9.0.

``LEDGER`` counts what would cost time on a GPU: copies, what makes the host wait, and kernels' compilations.

It cannot show speed, races between host and device or between streams, memory that runs out, the arithmetic of a GPU
(TF32, order of sums), or whether Triton's compiler takes a kernel (``tests/kernels/test_compile.py`` shows that).

Call :func:`install` before anything imports vLLM.
"""

import contextlib
import ctypes
import functools
import importlib
import os
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Read when torch, Triton and vLLM are imported.
os.environ["TORCHDYNAMO_DISABLE"] = "1"
os.environ["VLLM_USE_AOT_COMPILE"] = "0"  # it needs a torch that compiles; vLLM reads it once in a process
os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")

import torch
from torch.overrides import TorchFunctionMode

from tests.cuda_stand_in import graphs, kernels

CARD = "NVIDIA H100 (stand-in)"
CAPABILITY = (9, 0)
MEMORY_BYTES = 1 << 30
MAX_PROGRAMS_AT_START = 64  # along the first dimension: rows of two blocks of 32, what our warm-up decides at most
CUDA, CPU = torch.device("cuda:0"), torch.device("cpu")


@dataclass
class Ledger:
    """What a GPU would have had to do since the last :meth:`clear`.

    Attributes:
        to_device: Copies from the host to the device, by the line of ours or vLLM's that asks for them.
        to_host: Copies from the device to the host, likewise.
        waits: What makes the host wait for the device, but for events, likewise.
        event_waits: Waits for events, likewise.
        launches: Launches of Triton kernels by specialization: what Triton would compile apart.
        allocations: New memory on the device, by line.
    """

    to_device: Counter[str] = field(default_factory=Counter)
    to_host: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    event_waits: Counter[str] = field(default_factory=Counter)
    launches: Counter[tuple[Any, ...]] = field(default_factory=Counter)
    allocations: Counter[str] = field(default_factory=Counter)

    def clear(self) -> None:
        """Begin anew."""
        for counter in vars(self).values():
            counter.clear()


LEDGER = Ledger()


def _caller(what: str) -> str:
    """The innermost line of vLLM or ours that led here, for a message; not that of a helper for copies."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        is_helper = "cuda_stand_in" in name or name.endswith(("torch_utils.py", "transfer.py"))
        if ("vllm" in name or "csrc_triton" in name) and not is_helper:
            return f"{what} at {'/'.join(Path(name).parts[-2:])}:{frame.f_lineno}"
        frame = frame.f_back
    return what


# ---------------------------------------------------------------- memory

# How a storage is marked; without a mark it is pageable memory of the host. "mapped" is the device's view of pinned
# memory (vLLM's "UVA"), which every use reads over the bus.
DEVICE, MAPPED, PINNED = "device", "mapped", "pinned"


def place_of(tensor: torch.Tensor) -> str | None:
    """The mark of a tensor's storage."""
    return getattr(torch.Tensor.untyped_storage(tensor), "place", None)


def is_on_device(tensor: torch.Tensor) -> bool:
    """Whether a GPU would have it, or its own view of it."""
    return place_of(tensor) in (DEVICE, MAPPED)


def _mark(tensor: torch.Tensor, place: str) -> torch.Tensor:
    torch.Tensor.untyped_storage(tensor).place = place
    return tensor


def _is_cuda(device: Any) -> bool:
    return (isinstance(device, str | torch.device) and str(device).startswith("cuda")) or type(device) is int


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))


# Operations whose result, or its shape, the host needs: on a device tensor they wait.
_READS = {"item", "tolist", "nonzero", "masked_select", "unique", "unique_consecutive", "argwhere", "equal", "allclose",
          "__bool__", "__int__", "__float__", "__index__", "__contains__", "_local_scalar_dense"}  # fmt: skip
# Those that may have operands on both sides.
_COPIES = {"copy_", "to", "cpu", "cuda", "__setitem__", "__getitem__", "type_as", "as_tensor", "tensor", "set_",
           "lora_shrink", "lora_expand"}  # fmt: skip


class _Memory(TorchFunctionMode):
    """Keeps the marks, and counts."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return self._get(func, args)
        operands = [*_tensors(args), *_tensors(kwargs)]
        any_on_device = any(map(is_on_device, operands))
        if special := getattr(self, "_" + name.strip("_"), None):
            return special(func, args, kwargs, any_on_device)
        if any_on_device and name in _READS:
            _wait(name)
        if any_on_device and name in ("numpy", "__array__"):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")
        if any_on_device and name not in _COPIES:
            for operand in operands:
                if not is_on_device(operand) and operand.dim():
                    raise RuntimeError(f"{name}: expected all tensors to be on the same device, found cuda:0 and cpu")
        asks_cuda = _is_cuda(kwargs.get("device"))
        if "device" in kwargs:
            kwargs["device"] = CPU if asks_cuda else kwargs["device"]
        is_pinned = kwargs.pop("pin_memory", False)
        result = func(*args, **kwargs)
        inherits = any_on_device and kwargs.get("device") is None
        if asks_cuda or inherits or is_pinned:
            for tensor in _tensors(result):
                if place_of(tensor) is None:
                    if not is_pinned:
                        LEDGER.allocations[_caller(name)] += 1
                    _mark(tensor, PINNED if is_pinned else DEVICE)
        return result

    def _get(self, func: Any, args: tuple) -> Any:
        owner = args[0] if args else None
        if func == torch.Tensor.device.__get__:
            return CUDA if is_on_device(owner) else func(*args)
        if func == torch.Tensor.is_cuda.__get__:
            return is_on_device(owner)
        if func == torch.Tensor.is_cpu.__get__:
            return not is_on_device(owner)
        return func(*args)

    def _get_device(self, func: Any, args: tuple, kwargs: dict[str, Any], any_on_device: bool) -> int:
        return 0 if any_on_device else -1

    def _pin_memory(self, func: Any, args: tuple, kwargs: dict[str, Any], any_on_device: bool) -> torch.Tensor:
        return _mark(args[0].clone(), PINNED)

    def _is_pinned(self, func: Any, args: tuple, kwargs: dict[str, Any], any_on_device: bool) -> bool:
        return place_of(args[0]) == PINNED

    def _record_stream(self, func: Any, args: tuple, kwargs: dict[str, Any], any_on_device: bool) -> None:
        return None

    def _cpu(self, func: Any, args: tuple, kwargs: dict[str, Any], any_on_device: bool) -> torch.Tensor:
        return self._moved(args[0], CPU, False)

    def _cuda(self, func: Any, args: tuple, kwargs: dict[str, Any], any_on_device: bool) -> torch.Tensor:
        return self._moved(args[0], CUDA, kwargs.get("non_blocking", False))

    def _to(self, func: Any, args: tuple, kwargs: dict[str, Any], any_on_device: bool) -> torch.Tensor:
        source, rest = args[0], list(args[1:])
        target, is_async = kwargs.pop("device", None), kwargs.pop("non_blocking", False)
        if target is not None or (rest and isinstance(rest[0], str)):
            kwargs.pop("copy", None)
        if rest and isinstance(rest[0], torch.Tensor):  # of that one's device and dtype
            target, rest[0] = rest[0].device, rest[0].dtype
        elif rest and isinstance(rest[0], str | torch.device | int) and not isinstance(rest[0], bool):
            target = rest.pop(0)
        moved = source if target is None else self._moved(source, CUDA if _is_cuda(target) else CPU, is_async)
        if rest or kwargs:
            changed = func(moved, *rest, **kwargs)
            return _mark(changed, DEVICE) if is_on_device(moved) and changed is not moved else changed
        return moved

    def _moved(self, source: torch.Tensor, target: torch.device, is_async: bool) -> torch.Tensor:
        """The tensor on the other side, a copy; itself where it is there."""
        if is_on_device(source) == (target.type == "cuda"):
            return source
        copied = torch.Tensor.clone(source)
        if target.type == "cuda":
            LEDGER.allocations[_caller("copy")] += 1
            _mark(copied, DEVICE)
        elif is_async:
            _mark(copied, PINNED)  # as torch does
        _count(copied, source, is_async)
        return copied

    def _copy(self, func: Any, args: tuple, kwargs: dict[str, Any], any_on_device: bool) -> torch.Tensor:
        target, source, *rest = args
        if isinstance(source, torch.Tensor):
            _count(target, source, kwargs.get("non_blocking", rest[0] if rest else False))
        return func(*args, **kwargs)

    def _setitem(self, func: Any, args: tuple, kwargs: dict[str, Any], any_on_device: bool) -> None:
        target, index, value = args
        self._count_index(target, index)
        if isinstance(value, torch.Tensor) and value.dim():
            _count(target, value, False)
        return func(*args, **kwargs)

    def _getitem(self, func: Any, args: tuple, kwargs: dict[str, Any], any_on_device: bool) -> torch.Tensor:
        self._count_index(*args)
        result = func(*args, **kwargs)
        if any_on_device and place_of(result) is None:
            LEDGER.allocations[_caller("index")] += 1
            _mark(result, DEVICE)
        return result

    def _count_index(self, target: torch.Tensor, index: Any) -> None:
        """An index of the host's is copied first; one of booleans is counted by the host."""
        if not is_on_device(target):
            if any(map(is_on_device, _tensors(index))):
                raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
            return
        for part in _tensors(index):
            if not is_on_device(part) and part.dim():
                LEDGER.to_device[_caller("index")] += 1
                _wait("index of the host's")
            elif part.dtype == torch.bool and part.dim():
                _wait("index of booleans")

    def _tensor(self, func: Any, args: tuple, kwargs: dict[str, Any], any_on_device: bool) -> torch.Tensor:
        """From values of Python's: pageable memory, whose copy the host waits for."""
        asks_cuda = _is_cuda(kwargs.get("device"))
        if "device" in kwargs:
            kwargs["device"] = CPU
        is_pinned = kwargs.pop("pin_memory", False)
        result = func(*args, **kwargs)
        if asks_cuda:
            LEDGER.to_device[_caller("tensor")] += 1
            _wait("tensor of Python values")
        return _mark(result, DEVICE) if asks_cuda else _mark(result, PINNED) if is_pinned else result

    def _as_tensor(self, func: Any, args: tuple, kwargs: dict[str, Any], any_on_device: bool) -> torch.Tensor:
        device = kwargs.pop("device", None)
        result = func(*args, **kwargs)
        return result if device is None else self._moved(result, CUDA if _is_cuda(device) else CPU, False)


def _refuse_in_capture(what: str) -> None:
    """What no graph may hold."""
    if graphs.is_capturing():
        raise RuntimeError(f"while a graph is captured: {what}, at {_caller('asked')}")


def _wait(what: str) -> None:
    """Enter a wait of the host's into the ledger; a capture allows none."""
    _refuse_in_capture(f"the host waits ({what})")
    LEDGER.waits[_caller(what)] += 1


def _count(target: torch.Tensor, source: torch.Tensor, is_async: bool) -> None:
    """Enter a copy into the ledger; memory that is not pinned makes the host wait, whatever was asked for."""
    to, of = is_on_device(target), is_on_device(source)
    if to and place_of(source) != DEVICE:
        LEDGER.to_device[_caller("copy")] += 1
    if of and not to:
        LEDGER.to_host[_caller("copy")] += 1
    if to != of and not (is_async and place_of(source if to else target) == PINNED):
        _wait("copy")
    elif to != of:
        _refuse_in_capture("a copy to or from the host, whose memory a replay would read again")


def _mapped(tensor: torch.Tensor) -> torch.Tensor:
    """The device's view of a pinned tensor: the same memory as another storage."""
    return _mark(torch.from_numpy(tensor.numpy()), MAPPED)


# ---------------------------------------------------------------- driver


class _Stream:
    """A stream that has always done everything."""

    cuda_stream = stream_id = device_index = 0
    device, device_type = CUDA, 1

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def synchronize(self) -> None:
        _wait("stream.synchronize")

    def query(self) -> bool:
        return True

    def record_event(self, event: Any = None) -> Any:
        return event or _Event()

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *error: Any) -> None:
        pass


class _Event:
    """An event that has always happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        LEDGER.event_waits[_caller("event.synchronize")] += 1

    def wait(self, stream: Any = None) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: "_Event") -> float:
        return 1.0


class _Generator(torch.Generator):
    """Random numbers of the device come from the host."""

    def __new__(cls, device: Any = None) -> "_Generator":
        return super().__new__(cls, CPU)


def _answers(**values: Any) -> dict[str, Callable[..., Any]]:
    """Functions that answer with these values, whatever they are asked."""
    return {name: lambda *args, _value=value, **kwargs: _value for name, value in values.items()}


def _synchronize(*args: Any) -> None:
    _wait("synchronize")


def _install_driver() -> None:
    stream = _Stream()
    memory = _answers(
        empty_cache=None, reset_peak_memory_stats=None, memory_stats={}, memory_allocated=0, memory_reserved=0,
        max_memory_allocated=0, max_memory_reserved=0,
    )  # fmt: skip
    properties = types.SimpleNamespace(
        name=CARD, major=CAPABILITY[0], minor=CAPABILITY[1], total_memory=MEMORY_BYTES, multi_processor_count=132,
        L2_cache_size=50 << 20, warp_size=32, max_threads_per_multi_processor=2048, regs_per_multiprocessor=65536,
        shared_memory_per_block=49152, shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472,
        gcnArchName="", uuid="stand-in", is_integrated=False,
    )  # fmt: skip
    answers = memory | _answers(
        is_available=True, is_initialized=True, device_count=1, current_device=0, init=None, _lazy_init=None,
        get_device_capability=CAPABILITY, get_device_name=CARD, get_device_properties=properties,
        mem_get_info=(MEMORY_BYTES, MEMORY_BYTES), set_device=None, ipc_collect=None, current_stream=stream,
        default_stream=stream, set_stream=None, stream=contextlib.nullcontext(), device=contextlib.nullcontext(),
        manual_seed=None, manual_seed_all=None, _is_in_bad_fork=False, graph_pool_handle=(0, 1),
        can_device_access_peer=True, is_bf16_supported=True,
    )  # fmt: skip
    for name, function in answers.items():
        setattr(torch.cuda, name, function)
    torch.cuda.synchronize = _synchronize
    torch.cuda.is_current_stream_capturing = graphs.is_capturing
    torch.cuda.CUDAGraph, torch.cuda.graph = graphs.CUDAGraph, graphs.capture
    torch.cuda.memory.empty_cache = torch.cuda.empty_cache
    torch.Generator = _Generator
    torch.cuda.Stream = torch.Stream = _Stream
    torch.cuda.Event = torch.Event = _Event
    answers = memory | _answers(
        is_available=True, device_count=1, current_accelerator=torch.device("cuda"), set_device_index=None,
        set_device_idx=None, current_device_index=0, current_device_idx=0, current_stream=stream, set_stream=None,
        get_memory_info=(MEMORY_BYTES, MEMORY_BYTES),
    )  # fmt: skip
    for name, function in answers.items():
        setattr(torch.accelerator, name, function)
    torch.accelerator.synchronize = _synchronize
    torch._C._host_emptyCache = lambda: None


def _install_launches() -> None:
    """Every launch of a Triton kernel enters the ledger with what Triton specializes a kernel on."""
    from triton.runtime.interpreter import InterpretedFunction

    from tests import interpreter

    interpreter.correct()
    run = InterpretedFunction.run

    def counted(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        LEDGER.launches[specialization(self, args, kwargs)] += 1

        def launch() -> Any:
            return run(self, *args, grid=_shortened(grid) if _is_starting else grid, warmup=warmup, **kwargs)

        return graphs.launch(launch)

    InterpretedFunction.run = counted


_is_starting = False


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """While an engine starts, run the first programs of a large launch only.

    The memory profile and the warm-up of each graph launch thousands of them, and nobody reads the results; our own
    warm-up, whose steps decide, has less.
    """
    global _is_starting
    _is_starting = True
    try:
        yield
    finally:
        _is_starting = False


def _shortened(grid: Any) -> Any:
    if callable(grid):
        return lambda arguments: _shortened(grid(arguments))
    return (min(grid[0], MAX_PROGRAMS_AT_START), *grid[1:])


def specialization(kernel: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Name and arguments of a launch as far as Triton compiles by them.

    Constants and None by value, tensors by dtype, numbers by type; numbers and addresses also by whether 16 divides
    them, and numbers by whether they are 1, unless the kernel says otherwise.
    """
    annotations, is_plain = kernel.fn.__annotations__, kernel.kwargs.get("do_not_specialize") or ()

    def kind(name: str, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.dtype, value.data_ptr() % 16 == 0
        if value is None or isinstance(value, str | bool) or "constexpr" in str(annotations.get(name)):
            return value
        if not isinstance(value, int) or name in is_plain:
            return type(value).__name__
        return 1 if value == 1 else ("int", value % 16 == 0)

    named = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
    return (kernel.fn.__name__, *((name, kind(name, value)) for name, value in named.items()))


def install() -> None:
    """Turn the stand-in on for the rest of the process; safe to call twice."""
    if getattr(torch.cuda, "is_stand_in", False):
        return
    # Before the patches: these look at torch.cuda while they are imported.
    for name in ("torch._dynamo.convert_frame", "torch._inductor.config"):
        importlib.import_module(name)
    importlib.import_module("torch._dynamo.trace_rules").get_torch_obj_rule_map()
    torch.cuda.is_stand_in = True
    ctypes.CDLL(str(Path(sys.prefix) / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)
    _install_driver()
    _Memory().__enter__()
    _install_launches()
    _install_nvml()
    from vllm.platforms import current_platform
    from vllm.platforms.cuda import CudaPlatformBase

    CudaPlatformBase.dist_backend = "gloo"
    CudaPlatformBase.dispatch_key = "CPU"  # of the operations that vLLM defines in Python
    assert current_platform.is_cuda(), f"vLLM's platform is {current_platform}, not CUDA"
    _install_operations()
    torch.cuda.stand_in_kernels = kernels.register()
    for name in ("vllm.utils.torch_utils", "vllm.v1.worker.gpu.buffer_utils"):
        importlib.import_module(name).get_accelerator_view_from_cpu_tensor = _mapped


def _install_operations() -> None:
    """The operations that vLLM defines in Python are seen inside, too: torch leaves the mode where it calls one."""
    utils = importlib.import_module("vllm.utils.torch_utils")
    register = utils.direct_register_custom_op

    def registered(op_name: str, op_func: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        @functools.wraps(op_func)
        def seen(*operands: Any, **options: Any) -> Any:
            with graphs.recorder(), _Memory():
                return op_func(*operands, **options)

        register(op_name, seen, *args, **kwargs)

    utils.direct_register_custom_op = registered


def _install_nvml() -> None:
    nvml = importlib.import_module("vllm.third_party.pynvml")
    memory = types.SimpleNamespace(total=MEMORY_BYTES, free=MEMORY_BYTES, used=0)
    answers = _answers(
        nvmlInit=None, nvmlShutdown=None, nvmlDeviceGetCount=1, nvmlDeviceGetHandleByIndex=0,
        nvmlDeviceGetCudaComputeCapability=CAPABILITY, nvmlDeviceGetName=CARD, nvmlDeviceGetUUID="stand-in",
        nvmlDeviceGetMemoryInfo=memory, nvmlSystemGetDriverVersion="580.0", nvmlDeviceGetNumaNodeId=0,
    )  # fmt: skip
    for name, function in answers.items():
        setattr(nvml, name, function)
