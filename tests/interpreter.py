"""Triton's interpreter with the bf16 arithmetic of a GPU, and faster; imported where Triton interprets."""

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import GridExecutor, InterpretedFunction, InterpreterBuilder, TensorHandle

_cast, _dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot
_launch, _call = GridExecutor.__call__, InterpretedFunction.__call__
_called: set[Any] = set()  # device functions that the running launch has called


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


def launch(self, *args, **kwargs):
    """Run a kernel's whole grid."""
    _called.clear()
    return _launch(self, *args, **kwargs)


def call(self, *args, **kwargs):
    """Call a device function.

    Every call of Triton's looks through the whole language for what it has to put the interpreter's operations in place
    of, which took a third of the time. All of that stays in place to the end of the launch.
    """
    if self.fn in _called:
        return self.rewrite()(*args, **kwargs)
    _called.add(self.fn)
    return _call(self, *args, **kwargs)


CORRECTIONS: tuple[tuple[type, str, Any], ...] = (
    (InterpreterBuilder, "cast_impl", cast_impl),
    (InterpreterBuilder, "create_dot", create_dot),
    (GridExecutor, "__call__", launch),
    (InterpretedFunction, "__call__", call),
)


def correct() -> None:
    """Apply them for the rest of the process."""
    for owner, name, method in CORRECTIONS:
        setattr(owner, name, method)
