"""Nemotron-Labs-Diffusion: Ministral's layers; committed text is causal, the active block sees itself both ways.

Source: the model code that the checkpoints bring, and its ``generate`` with ``causal_context``, the default. A masked
position is predicted from its own logits (no shift). The pass that commits a block also predicts the token behind it.
"""

from collections.abc import Iterable

import torch
from vllm.model_executor.models.mistral import MistralAttention
from vllm.model_executor.models.utils import WeightsMapper

from vllm_osdt.models.canvas_llama import CanvasAttention, CanvasDecoderLayer, CanvasForCausalLM


class NemotronAttention(CanvasAttention, MistralAttention):
    """Attention with Llama 4's scaling of queries by position."""

    def scale_queries(self, positions: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        """See the base class; 1 + beta ln(1 + floor(position / original range)), as vLLM computes it."""
        if not self.do_llama_4_scaling:
            return query
        return (query * self._get_llama_4_attn_scale(positions)).to(query.dtype)


class NemotronDecoderLayer(CanvasDecoderLayer):
    """A layer with that attention."""

    attention = NemotronAttention


class NemotronLabsDiffusionModel(CanvasForCausalLM):
    """Nemotron-Labs-Diffusion-3B, 8B and 14B, Base and instruct."""

    layer = NemotronDecoderLayer
    hf_to_vllm_mapper = WeightsMapper(orig_to_new_prefix={"encoder.": "model.", "diffusion_head.": "lm_head."})

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a checkpoint under its own names."""
        return super().load_weights(self.hf_to_vllm_mapper.apply(weights))
