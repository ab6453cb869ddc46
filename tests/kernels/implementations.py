"""Runs an op by one of its implementations on CPU tensors; a GPU, where present, is used behind the scenes."""

import pytest
import torch

import csrc_triton
from csrc_triton import UnmaskResult

HAS_GPU = torch.cuda.is_available()
IMPLEMENTATIONS = ["cpu", "triton"]


def run_confidence(implementation: str, logits: torch.Tensor, **options) -> tuple[torch.Tensor, torch.Tensor]:
    if implementation == "cpu":
        return csrc_triton.confidence(logits, **options)
    if HAS_GPU:
        on_gpu = {name: _to_gpu(value) for name, value in options.items()}
        token, probability = csrc_triton.confidence(_to_gpu(logits), **on_gpu)
        return token.cpu(), probability.cpu()
    kernel = _interpreted("confidence_kernel")
    names = ("banned_token_id", "temperature", "noise_key", "by_entropy")
    return kernel.confidence(logits, *(options.get(name) for name in names))


def run_unmask(implementation: str, **state: torch.Tensor) -> UnmaskResult:
    """Arguments by name; ``canvas`` and ``masked`` change in place."""
    if implementation == "cpu":
        return csrc_triton.unmask(**state)
    if HAS_GPU:
        on_gpu = {name: _to_gpu(value) for name, value in state.items()}
        result = csrc_triton.unmask(**on_gpu)
        for name in ("canvas", "masked"):
            state[name].copy_(on_gpu[name])
        return UnmaskResult(*(count.cpu() for count in result))
    return _interpreted("unmask_kernel").unmask(**state)


def _to_gpu(value):
    """Keeps the strides, which Tensor.to does not for rows that have gaps."""
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda").copy_(value)


def _interpreted(module: str):
    import triton
    import triton.language as tl

    if isinstance(tl.max, triton.JITFunction):
        pytest.skip("Triton was imported before TRITON_INTERPRET=1 was set, so it needs a GPU")
    if module == "confidence_kernel":
        from csrc_triton import confidence_kernel

        return confidence_kernel
    from csrc_triton import unmask_kernel

    return unmask_kernel
