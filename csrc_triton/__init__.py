"""Sampling ops for masked diffusion decoding: they need PyTorch, on a GPU also Triton, and nothing of vLLM.

Tensors on the CPU take the native path (``cpu.py``), tensors on a GPU the Triton kernels, which are imported on first
use. ``csrc_triton.reference`` holds a slow, readable twin of every op with the same signature. A module named like an
op would replace it as attribute of this package, so the kernels are in ``confidence_kernel``, ``lm_head_kernel`` and
``unmask_kernel``.
"""

from typing import TYPE_CHECKING, Any

from csrc_triton.types import ENTROPY_SCALE, Blocks, Partial, Proposals, Rule, Rules, UnmaskResult

if TYPE_CHECKING:
    from csrc_triton.ops import (
        combine_partials,
        confidence,
        implementations,
        lm_head_confidence,
        lm_head_partials,
        unmask,
    )

__all__ = [
    "ENTROPY_SCALE",
    "Blocks",
    "Partial",
    "Proposals",
    "Rule",
    "Rules",
    "UnmaskResult",
    "combine_partials",
    "confidence",
    "implementations",
    "lm_head_confidence",
    "lm_head_partials",
    "unmask",
]


def __getattr__(name: str) -> Any:
    """The ops, which import torch, when they are first asked for: rules and shapes are read without it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from csrc_triton import ops

    return getattr(ops, name)
