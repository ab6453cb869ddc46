"""The machine and what vLLM brings for it: environment, rates, C++ kernels and FlashAttention."""

import functools
import importlib.util
import time

from benchmarks.gpu.lines import median_us, part
from benchmarks.gpu.sizes import IS_STAND_IN

COPY_BYTES = 2**30
MATMUL_SIZE = 8192


def check_environment(stage: str) -> None:
    """The machine, vLLM's platform, and that kernels are compiled and not interpreted."""
    with part(stage, "machine") as found:
        import torch

        from benchmarks.common import environment

        card = torch.cuda.get_device_properties(0)
        found |= environment(
            capability=f"{card.major}.{card.minor}",
            memory_gib=round(card.total_memory / 2**30, 1),
            num_multiprocessors=card.multi_processor_count,
        )
        del found["gpu"]
    with part(stage, "vLLM sees the GPU") as found:
        from vllm.platforms import current_platform

        found["platform"] = type(current_platform).__name__
        assert current_platform.is_cuda()
    with part(stage, "kernels are compiled"):
        from vllm_osdt.host.cpu.triton_backend.interpreter import is_interpreting
        from vllm_osdt.plugin import register

        register()
        assert IS_STAND_IN or not is_interpreting()
    with part(stage, "a small copy to the device, host time") as found:
        import numpy as np
        import torch

        from vllm_osdt.worker.transfer import to_device

        values, device = np.arange(256), torch.device("cuda:0")
        for _ in range(20):
            to_device(values, device)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(200):
            to_device(values, device)
        found["us"] = round((time.perf_counter() - start) / 200 * 1e6, 1)
    with part(stage, "rates") as found:
        bytes_per_s, operations_per_s = rates()
        if bytes_per_s and operations_per_s:
            found |= {"copy_GB_per_s": round(bytes_per_s / 1e9), "matmul_TFLOP_per_s": round(operations_per_s / 1e12)}


def rates() -> tuple[float | None, float | None]:
    """What this card does: bytes a second that a large copy moves, operations a second of a large product in bf16.

    None on the stand-in.
    """
    import torch

    if IS_STAND_IN:
        return None, None
    source = torch.empty(COPY_BYTES // 2, dtype=torch.bfloat16, device="cuda")
    copy_us = median_us(functools.partial(torch.empty_like(source).copy_, source))
    one, other = (torch.randn(MATMUL_SIZE, MATMUL_SIZE, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    product_us = median_us(functools.partial(torch.mm, one, other), rep_ms=100)
    del source, one, other
    torch.cuda.empty_cache()
    assert copy_us and product_us
    return 2 * COPY_BYTES / copy_us * 1e6, 2 * MATMUL_SIZE**3 / product_us * 1e6


def has_flash_attention_4() -> bool:
    """Whether what it is written in is there; vLLM looks for its source alone, and chooses it for diffusion models."""
    return importlib.util.find_spec("cutlass") is not None


def check_libraries(stage: str) -> None:
    """vLLM's C++ kernels and FlashAttention against PyTorch."""
    import torch

    with part(stage, "norm and activation, largest error") as found:
        import vllm._custom_ops as ops

        x, weight = (torch.randn(*size, device="cuda", dtype=torch.bfloat16) for size in ((37, 4096), (4096,)))
        out = torch.empty_like(x)
        ops.rms_norm(out, x, weight, 1e-6)
        expected = (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * weight
        found["rms_norm"] = (out.float() - expected.float()).abs().max().item()
        half = torch.empty(37, 2048, device="cuda", dtype=torch.bfloat16)
        torch.ops._C.silu_and_mul(half, x)
        expected = torch.nn.functional.silu(x[:, :2048].float()) * x[:, 2048:].float()
        found["silu_and_mul"] = (half.float() - expected).abs().max().item()
    with part(stage, "the device reads mapped memory"):
        from vllm.v1.worker.gpu.buffer_utils import UvaBuffer

        buffer = UvaBuffer(8, torch.int32)
        buffer.np[3] = 77
        assert buffer.uva().tolist()[3] == 77
    versions: tuple[int, ...] = (3, 4) if has_flash_attention_4() else (3,)
    for version in () if IS_STAND_IN else versions:  # its kernels need a card
        with part(stage, "FlashAttention without a mask, largest error", version=version) as found:
            from vllm.vllm_flash_attn import flash_attn_varlen_func

            query, key, value = (torch.randn(64, 8, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
            ends = torch.tensor([0, 64], dtype=torch.int32, device="cuda")
            lengths = {"max_seqlen_q": 64, "cu_seqlens_q": ends, "max_seqlen_k": 64, "cu_seqlens_k": ends}
            out = flash_attn_varlen_func(query, key, value, causal=False, fa_version=version, **lengths)
            out = out[0] if isinstance(out, tuple) else out
            heads = (tensor.transpose(0, 1)[None].float() for tensor in (query, key, value))
            expected = torch.nn.functional.scaled_dot_product_attention(*heads)[0].transpose(0, 1)
            found["error"] = (out.float() - expected).abs().max().item()
            assert found["error"] < 0.03
