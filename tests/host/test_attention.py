"""Steps run as CUDA graphs where attention's metadata is nothing but tensors."""

import pytest
from vllm.config.compilation import CUDAGraphMode

from vllm_osdt.host.attention import graph_mode


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
