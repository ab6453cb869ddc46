"""``vllm-osdt doctor``: check an installation."""

import argparse
import json
import os
from collections.abc import Callable
from typing import Any

from vllm_osdt import __version__
from vllm_osdt.calibration.store import default_folder
from vllm_osdt.cli.common import CommandError, find_profiles

GIB = 2**30


def doctor(args: argparse.Namespace) -> None:
    """Whether this installation can serve, line by line."""
    checks = [_check(name, check) for name, check in _CHECKS.items()]
    if args.json:
        print(json.dumps(checks, indent=2))
    else:
        for check in checks:
            print(f"{'ok ' if check['ok'] else 'BAD'}  {check['name']:<16}{check['found']}")
    if not all(check["ok"] for check in checks):
        raise CommandError("not everything is as it should be")


def _check(name: str, check: Callable[[], tuple[bool, str]]) -> dict[str, Any]:
    try:
        ok, found = check()
    except Exception as error:  # a broken installation may fail in any way; that is the finding
        ok, found = False, f"{type(error).__name__}: {error}"
    return {"name": name, "ok": ok, "found": found}


def _versions() -> tuple[bool, str]:
    from importlib import metadata

    import torch
    from packaging.requirements import Requirement

    vllm = metadata.version("vllm")
    ours = map(Requirement, metadata.requires("vllm-osdt") or ())
    supported = next(one.specifier for one in ours if one.name == "vllm")
    found = f"vllm-osdt {__version__}, vllm {vllm} ({supported} needed), torch {torch.__version__}"
    return supported.contains(vllm, prereleases=True), found


def _plugin() -> tuple[bool, str]:
    from vllm.model_executor.models import ModelRegistry
    from vllm.plugins import load_general_plugins

    from vllm_osdt.models.registry import FAMILIES

    load_general_plugins()
    missing = set(FAMILIES) - set(ModelRegistry.get_supported_archs())
    return not missing, f"vLLM does not know {sorted(missing)}" if missing else f"serves {', '.join(FAMILIES)}"


def _triton() -> tuple[bool, str]:
    import triton

    from vllm_osdt.host.cpu.triton_backend.interpreter import is_interpreting

    if is_interpreting():
        return (
            True,
            f"triton {triton.__version__}, no GPU: its interpreter stands in, hot loops are compiled with Numba",
        )
    return True, f"triton {triton.__version__} with a compiler"


def _kernels() -> tuple[bool, str]:
    import torch

    import csrc_triton

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    token, probability = csrc_triton.confidence(torch.tensor([[0.0, 3.0, 1.0]], device=device), excluded_token_id=1)
    right = token.item() == 2 and abs(probability.item() - 0.1141952) < 1e-4
    return right, f"{csrc_triton.implementations(device).confidence.__module__} on {device.type}"


def _folder() -> tuple[bool, str]:
    folder = default_folder()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return existing.is_dir() and os.access(existing, os.W_OK), f"{folder} ({len(find_profiles(folder))} profiles)"


def _processor() -> tuple[bool, str]:
    """What it serves in by default."""
    import torch

    if torch.cuda.is_available():
        return True, f"{torch.cuda.get_device_name()}: the checkpoint's dtype, bfloat16 for float32"
    from vllm_osdt.engine.engine_config import has_fast_bfloat16

    can = [
        name
        for name, has in (
            ("AVX2", torch.cpu._is_avx2_supported()),
            ("AVX512", torch.cpu._is_avx512_supported()),
            ("AVX512-BF16", torch.cpu._is_avx512_bf16_supported()),
            ("AMX", torch.cpu._is_amx_tile_supported()),
        )
        if has
    ]
    dtype = "bfloat16" if has_fast_bfloat16() else "float32, since bfloat16 would be slower"
    return True, f"CPU with {', '.join(can) or 'none of AVX2, AVX512, AMX'}; serves in {dtype}"


def _memory() -> tuple[bool, str]:
    """Whether an engine finds the memory that it asks for where nobody says how much KV pages may take."""
    import psutil
    import torch
    from vllm.config import CacheConfig

    share, space = CacheConfig.gpu_memory_utilization, os.environ.get("VLLM_CPU_KVCACHE_SPACE")
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
    else:
        memory = psutil.virtual_memory()
        free, total = memory.available, memory.total
    found = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
    if torch.cuda.is_available():
        remedy = "start it with a lower --gpu-memory-utilization"
    elif space:
        return int(space) * GIB <= free, f"{found}, {space} of them for KV pages (VLLM_CPU_KVCACHE_SPACE)"
    else:
        remedy = "set VLLM_CPU_KVCACHE_SPACE to the GiB that KV pages may take, such as 1 for the bundled models"
    if free < share * total:
        return False, f"{found}, but vLLM does not start unless {share:.0%} are: {remedy}"
    return True, f"{found}, of which vLLM takes {share:.0%}"


_CHECKS = {
    "versions": _versions,
    "processor": _processor,
    "memory": _memory,
    "plugin": _plugin,
    "triton": _triton,
    "kernels": _kernels,
    "profile folder": _folder,
}
