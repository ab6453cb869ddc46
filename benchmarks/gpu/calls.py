"""What a step calls: launches, kernels, and what makes the host wait."""

import contextlib
import gzip
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu.lines import OUT
from benchmarks.gpu.sizes import IS_STAND_IN

WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize")
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")
OTHERS = ("cudaMemcpyAsync", "cudaHostAlloc", "cudaMalloc", "aten::item", "aten::nonzero", "aten::copy_")
NUM_STEPS = 6


def profile_steps(llm: Any, name: str) -> dict[str, Any]:
    """What some steps call, launch and wait for, per step; writes a trace.

    Args:
        llm: Has requests for more steps.
        name: Of the trace.
    """
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    for _ in range(2):
        llm.llm_engine.step()
    torch.cuda.synchronize()
    activities = [ProfilerActivity.CPU] + ([] if IS_STAND_IN else [ProfilerActivity.CUDA])
    waited: Counter[str] = Counter()
    if IS_STAND_IN:
        from tests.cuda_stand_in.cuda import LEDGER

        waited = LEDGER.waits
        waited.clear()
    with profile(activities=activities) as profiled:
        for _ in range(NUM_STEPS):
            llm.llm_engine.step()
        if not IS_STAND_IN:
            torch.cuda.current_stream().synchronize()  # one wait that is no step's
    events = profiled.key_averages()
    counts = {event.key: event.count for event in events}
    on_device = [event for event in events if event.device_type == DeviceType.CUDA]
    on_device.sort(key=lambda event: -event.self_device_time_total)
    on_host = sorted(events, key=lambda event: -event.self_cpu_time_total)
    _write(profiled, name)
    num_waits = sum(counts.get(key, 0) for key in WAITS[:2]) - 1  # the third is the profiler's own
    if IS_STAND_IN:
        num_waits = waited.total()
    return {
        "waits_per_step": round(num_waits / NUM_STEPS, 2),
        "launches_per_step": round(sum(counts.get(key, 0) for key in LAUNCHES) / NUM_STEPS, 1),
        "kernels_per_step": round(sum(e.count for e in on_device if "Mem" not in e.key) / NUM_STEPS, 1),
        "calls_per_step": {
            key: round(counts[key] / NUM_STEPS, 1) for key in (*WAITS, *LAUNCHES, *OTHERS) if key in counts
        },
        "kernels_us": {e.key[:80]: round(e.self_device_time_total / NUM_STEPS, 1) for e in on_device[:20]},
        "host_us": {e.key[:60]: round(e.self_cpu_time_total / NUM_STEPS, 1) for e in on_host[:15]},
    }


def _write(profiled: Any, name: str) -> None:
    """Write a trace, compressed."""
    trace = OUT / f"trace-{name}.json"
    profiled.export_chrome_trace(str(trace))
    (OUT / f"{trace.name}.gz").write_bytes(gzip.compress(trace.read_bytes(), 6))
    trace.unlink()


def find_waits(llm: Any) -> dict[str, int]:
    """The lines of vLLM and ours that make the host wait in some steps, as PyTorch's own check sees them."""
    import warnings

    import torch

    found: dict[str, int] = {}

    def note(message: Any, *others: Any) -> None:
        if "synchroniz" in str(message):
            frames = [frame for frame in traceback.extract_stack() if "vllm" in frame.filename]
            line = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "elsewhere"
            found[line] = found.get(line, 0) + 1

    llm.llm_engine.step()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note  # type: ignore[assignment]
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for _ in range(NUM_STEPS):
                llm.llm_engine.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return found


@contextlib.contextmanager
def find_compilations() -> Iterator[list[str]]:
    """Names of the Triton kernels that are compiled meanwhile, in this process for the first time."""
    from triton import knobs

    names: list[str] = []
    before = knobs.runtime.jit_cache_hook

    def note(*, key: str, repr: str, fn: Any, compile: Any, is_manual_warmup: bool, already_compiled: bool) -> None:
        if not already_compiled:
            names.append(getattr(fn, "name", str(fn)))

    knobs.runtime.jit_cache_hook = note
    try:
        yield names
    finally:
        knobs.runtime.jit_cache_hook = before
