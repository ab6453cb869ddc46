"""LLaDA (8B Base and Instruct, 1.5): Llama layers under their own weight names, attention over the whole canvas.

Source: LLaDA (arXiv 2502.09992). A position is predicted from its own logits (no shift).
"""

import re
from collections.abc import Iterable

import torch
from vllm.model_executor.models.utils import WeightsMapper

from vllm_osdt.models.canvas_llama import CanvasForCausalLM

_LAYER = r"^model\.transformer\.blocks\.(\d+)\."


class LLaDAModelLM(CanvasForCausalLM):
    """vLLM's Llama with LLaDA's weight names; its parallel and quantized layers apply as they are."""

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_regex={
            re.compile(_LAYER + r"(q_proj|k_proj|v_proj)\b"): r"model.layers.\1.self_attn.\2",
            re.compile(_LAYER + r"attn_out\b"): r"model.layers.\1.self_attn.o_proj",
            re.compile(_LAYER + r"ff_proj\b"): r"model.layers.\1.mlp.gate_proj",
            re.compile(_LAYER + r"up_proj\b"): r"model.layers.\1.mlp.up_proj",
            re.compile(_LAYER + r"ff_out\b"): r"model.layers.\1.mlp.down_proj",
            re.compile(_LAYER + r"attn_norm\b"): r"model.layers.\1.input_layernorm",
            re.compile(_LAYER + r"ff_norm\b"): r"model.layers.\1.post_attention_layernorm",
            re.compile(r"^model\.transformer\.wte\b"): "model.embed_tokens",
            re.compile(r"^model\.transformer\.ln_f\b"): "model.norm",
            re.compile(r"^model\.transformer\.ff_out\b"): "lm_head",
        }
    )

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a checkpoint; embedding rows beyond ``vocab_size`` (padding to ``embedding_size``) are left out."""
        return super().load_weights(self.hf_to_vllm_mapper.apply(self._without_padding(weights)))

    def _without_padding(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterable[tuple[str, torch.Tensor]]:
        padded = {"model.transformer.wte.weight", "model.transformer.ff_out.weight"}
        for name, weight in weights:
            yield name, weight[: self.vocab_size] if name in padded else weight
