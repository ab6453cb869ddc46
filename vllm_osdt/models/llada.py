"""LLaDA (8B Base and Instruct, 1.5): Llama layers under their own weight names, attention over the whole canvas.

Source: LLaDA (arXiv 2502.09992). A position is predicted from its own logits (no shift).
"""

import re
from collections.abc import Iterable

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, extract_layer_index
from vllm.sequence import IntermediateTensors

_LAYER = r"^model\.transformer\.blocks\.(\d+)\."


class CanvasAttention(LlamaAttention):
    """Attention that gives its output for chosen rows only; keys and values are those of all rows."""

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        qkv, _ = self.qkv_proj(hidden_states)
        query, key, value = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        query, key = self.rotary_emb(positions, query, key)
        attended = self.attn(query, key, value)
        output, _ = self.o_proj(attended if rows is None else attended[rows])
        return output


class CanvasDecoderLayer(LlamaDecoderLayer):
    """A layer that, as the last one, computes nothing behind its attention for rows whose logits are not read."""

    def __init__(self, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config, prefix, attn_layer_type=CanvasAttention)
        self.is_last = extract_layer_index(prefix) == vllm_config.model_config.hf_config.num_hidden_layers - 1

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
        logit_rows: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if residual is None:
            residual = hidden_states
            hidden_states = self.input_layernorm(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        rows = logit_rows if self.is_last else None
        hidden_states = self.self_attn(positions, hidden_states, rows)
        if rows is not None:
            residual = residual[rows]
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        return self.mlp(hidden_states), residual


class LLaDAModelLM(LlamaForCausalLM):
    """vLLM's Llama with LLaDA's weight names; its parallel and quantised layers apply as they are."""

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

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=CanvasDecoderLayer)
        self.vocab_size = vllm_config.model_config.hf_config.vocab_size

    @staticmethod
    def get_model_state_cls() -> type:
        """vLLM's hook for the model state of Model Runner V2."""
        from vllm_osdt.worker.model_state import CanvasModelState

        return CanvasModelState

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        logit_rows: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        """Hidden states of all rows, or of ``logit_rows`` (int64 ``[M]``) in their order."""
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds, logit_rows=logit_rows)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a checkpoint; embedding rows beyond ``vocab_size`` (padding to ``embedding_size``) are left out."""
        return AutoWeightsLoader(self).load_weights(self._without_padding(weights), mapper=self.hf_to_vllm_mapper)

    def _without_padding(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterable[tuple[str, torch.Tensor]]:
        padded = {"model.transformer.wte.weight", "model.transformer.ff_out.weight"}
        for name, weight in weights:
            yield name, weight[: self.vocab_size] if name in padded else weight
