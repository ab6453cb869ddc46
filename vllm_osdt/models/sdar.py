"""SDAR and TraDo: Qwen3 layers (norms on query and key heads) under a block-causal mask.

Source: SDAR (arXiv 2510.06303). A position is predicted from its own logits (no shift). Weights have Qwen3's names.
"""

from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.model_executor.models.qwen3_moe import Qwen3MoeForCausalLM

from vllm_osdt.models.canvas_mixin import CanvasMixin


class SDARForCausalLM(CanvasMixin, Qwen3ForCausalLM):
    """SDAR-1.7B, 4B, 8B and the TraDo models."""


class SDARMoeForCausalLM(CanvasMixin, Qwen3MoeForCausalLM):
    """SDAR-30B-A3B."""
