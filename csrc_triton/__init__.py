"""Sampling ops for masked diffusion decoding: they need PyTorch, on a GPU also Triton, and nothing of vLLM.

Tensors on the CPU take the native path (``cpu.py``), tensors on a GPU the Triton kernels, which are imported on first
use. ``csrc_triton.reference`` holds a slow, readable twin of every op with the same signature.
"""

from csrc_triton.ops import confidence, implementations, unmask
from csrc_triton.reference import Rule, UnmaskResult

__all__ = ["Rule", "UnmaskResult", "confidence", "implementations", "unmask"]
