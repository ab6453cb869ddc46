"""Triton's interpreter with the bf16 arithmetic of a GPU; imported where Triton interprets."""

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_cast, _dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot


def cast_impl(self, src, dst_type):
    """Round fp32 to the nearest bf16; the interpreter rounds toward zero."""
    if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
        return _cast(self, src, dst_type)
    with torch._C.DisableTorchFunction():
        rounded = torch.from_numpy(np.ascontiguousarray(src.data)).bfloat16()
        return TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)


def create_dot(self, a, b, *others):
    """Multiply bf16 operands as numbers; the interpreter multiplies their bits as integers.

    See https://github.com/triton-lang/triton/issues/11584.
    """
    wide = [_cast(self, x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)]
    return _dot(self, *wide, *others)


CORRECTIONS = {"cast_impl": cast_impl, "create_dot": create_dot}  # of InterpreterBuilder


def correct_bfloat16() -> None:
    """Apply them for the rest of the process."""
    for name, method in CORRECTIONS.items():
        setattr(InterpreterBuilder, name, method)
