"""Steps run as CUDA graphs where attention's metadata is nothing but tensors."""

from types import SimpleNamespace

import pytest
import torch
from vllm.config.compilation import CUDAGraphMode

from vllm_osdt.host.attention import graph_mode
from vllm_osdt.host.compat.engine import patch_scheduler_metadata


@pytest.mark.parametrize(
    ("names", "has_graphs"),
    [
        ({"FLASH_ATTN"}, True),
        ({"TRITON_ATTN", "FLASH_ATTN"}, True),
        ({"FLEX_ATTENTION"}, False),
        ({"FLASH_ATTN", "FLASHINFER"}, False),
    ],
)
def test_graphs_are_for_attention_whose_metadata_are_tensors(names, has_graphs):
    assert graph_mode(CUDAGraphMode.FULL, names) == (CUDAGraphMode.FULL if has_graphs else CUDAGraphMode.NONE)
    assert graph_mode(CUDAGraphMode.NONE, names) == CUDAGraphMode.NONE


@pytest.mark.parametrize(("num_queries", "num_numbers"), [(100, 513), (128, 513), (129, 529), (8192, 32769)])
def test_flash_attentions_metadata_has_room_for_every_block_of_a_step(num_queries, num_numbers):
    builder = SimpleNamespace(scheduler_metadata=torch.ones(1 + 4 * 128, dtype=torch.int32))
    patch_scheduler_metadata(builder, num_queries)
    assert builder.scheduler_metadata.numel() == num_numbers
    assert builder.scheduler_metadata.dtype == torch.int32
    others = SimpleNamespace()
    patch_scheduler_metadata(others, num_queries)
    assert not vars(others)
