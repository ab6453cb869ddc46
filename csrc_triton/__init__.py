"""Sampling ops for masked diffusion decoding: they need PyTorch, on a GPU also Triton, and nothing of vLLM.

Tensors on the CPU take the native path (``cpu.py``), tensors on a GPU the Triton kernels, which are imported on first
use. ``csrc_triton.reference`` holds a slow, readable twin of every op with the same signature. A module named like an
op would replace it as attribute of this package, so the kernels are in ``confidence_kernel`` and ``unmask_kernel``.
"""

from csrc_triton.ops import confidence, implementations, unmask
from csrc_triton.types import Blocks, Proposals, Rule, Rules, UnmaskResult

__all__ = ["Blocks", "Proposals", "Rule", "Rules", "UnmaskResult", "confidence", "implementations", "unmask"]
