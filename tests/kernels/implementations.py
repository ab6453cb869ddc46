"""Runs an op by one of its implementations on CPU tensors; a GPU, where present, is used behind the scenes."""

import importlib

import pytest
import torch
from selection import HAS_GPU

import csrc_triton
from csrc_triton import Blocks, Proposals, Rules, UnmaskResult, reference
from csrc_triton.types import NO_CONFIDENCE


def run_confidence(implementation: str, logits: torch.Tensor, **options) -> tuple[torch.Tensor, torch.Tensor]:
    return _run(implementation, "confidence", "confidence_kernel", logits, **options)


def run_lm_head_confidence(implementation: str, hidden, weight, **options) -> tuple[torch.Tensor, torch.Tensor]:
    return _run(implementation, "lm_head_confidence", "lm_head_kernel", hidden, weight, **options)


def run_lm_head_partials(implementation: str, hidden, weight, **options) -> torch.Tensor:
    return _run(implementation, "lm_head_partials", "lm_head_kernel", hidden, weight, **options)


def run_combine_partials(implementation: str, partials, **options) -> tuple[torch.Tensor, torch.Tensor]:
    return _run(implementation, "combine_partials", "partials_kernel", partials, **options)


def _run(implementation: str, op: str, module: str, *tensors: torch.Tensor, **options):
    if implementation == "cpu":
        return getattr(csrc_triton, op)(*tensors, **options)
    if HAS_GPU:
        on_gpu = {name: _to_gpu(value) for name, value in options.items()}
        found = getattr(csrc_triton, op)(*map(_to_gpu, tensors), **on_gpu)
        if "margin" in options:
            options["margin"].copy_(on_gpu["margin"])
        return found.cpu() if isinstance(found, torch.Tensor) else tuple(each.cpu() for each in found)
    return getattr(_interpreted(module), op)(*tensors, **options)


def run_unmask_in_tables(
    implementation: str, blocks: Blocks, proposals: Proposals, rules: Rules
) -> tuple[torch.Tensor, torch.Tensor, UnmaskResult]:
    """``blocks`` change in place."""
    if implementation == "reference":
        return reference.unmask(blocks, proposals, rules)
    if implementation == "cpu":
        return csrc_triton.unmask(blocks, proposals, rules)
    if not HAS_GPU:
        return _interpreted("unmask_kernel").unmask(blocks, proposals, rules)
    on_gpu, *others = (some._make(map(_to_gpu, some)) for some in (blocks, proposals, rules))
    canvas, confidence, result = csrc_triton.unmask(on_gpu, *others)
    blocks.cells.copy_(on_gpu.cells)
    blocks.masked.copy_(on_gpu.masked)
    return canvas.cpu(), confidence.cpu(), UnmaskResult(*(count.cpu() for count in result))


def run_unmask(implementation: str, **state: torch.Tensor) -> UnmaskResult:
    """The direct form: arguments of ``in_tables``; ``canvas`` and ``masked`` change in place."""
    blocks, proposals, rules = in_tables(**state)
    canvas, confidence, result = run_unmask_in_tables(implementation, blocks, proposals, rules)
    assert (canvas.dtype, confidence.dtype) == (torch.int32, torch.float32)
    assert torch.equal(canvas.flatten(), blocks.cells)
    expected = state["confidence"].where(state["has_logits"], NO_CONFIDENCE)
    assert torch.equal(confidence.nan_to_num(nan=99.0), expected.nan_to_num(nan=99.0))
    state["canvas"].copy_(canvas)
    return result


def in_tables(
    *,
    canvas: torch.Tensor,
    masked: torch.Tensor,
    proposal: torch.Tensor,
    confidence: torch.Tensor,
    has_logits: torch.Tensor,
    rule: torch.Tensor,
    parameter: torch.Tensor,
    end_token_ids: torch.Tensor,
    num_output_positions: torch.Tensor,
    min_unmask: torch.Tensor,
) -> tuple[Blocks, Proposals, Rules]:
    """The arguments of ``unmask`` for blocks that follow each other in the tables.

    The first five are [num_blocks, block_length], and only ``masked`` is shared with what is returned.
    """
    position = has_logits.flatten().nonzero().flatten()
    blocks = Blocks(
        cells=canvas.flatten().int(),
        masked=masked,
        slots=torch.arange(canvas.shape[0]),
        canvas_index=torch.arange(canvas.numel()).view(canvas.shape),
        end_token_ids=end_token_ids,
        num_output_positions=num_output_positions,
    )
    proposals = Proposals(position, proposal.flatten()[position], confidence.flatten()[position])
    return blocks, proposals, Rules(rule, parameter, min_unmask)


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
    return importlib.import_module(f"csrc_triton.{module}")
