"""vLLM's compiled CPU normalization kernel, as an implementation of its IR op.

vLLM for CPU leaves ``fused_add_rms_norm`` to torch.compile. Our models run eagerly there (a compilation takes longer
than many jobs), where the native form is several passes; the compiled kernel is in the wheel all the same. Registered
under a name of its own, and given priority only in the engines of our models.
"""

import torch
from torch import Tensor
from vllm import ir
from vllm.platforms import current_platform

PROVIDER = "osdt_cpu"


def _supported(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> bool:
    return (
        variance_size is None
        and weight is not None
        and weight.dtype == x.dtype == x_residual.dtype
        and x.is_contiguous()
        and x_residual.is_contiguous()
    )


def register() -> None:
    """Register the implementation; safe to call twice."""
    op = ir.ops.fused_add_rms_norm
    if PROVIDER in op.impls:
        return
    current_platform.import_kernels()

    @op.register_impl(
        PROVIDER,
        supported=current_platform.is_cpu() and hasattr(torch.ops._C, "fused_add_rms_norm"),
        supports_args=_supported,
        inplace=True,
    )
    def fused_add_rms_norm(
        x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
    ) -> tuple[Tensor, Tensor]:
        torch.ops._C.fused_add_rms_norm(x, x_residual, weight, epsilon)
        return x, x_residual
