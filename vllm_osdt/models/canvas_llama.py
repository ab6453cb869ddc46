"""Llama layers under a canvas: what LLaDA, iLLaDA, Dream and Stable-DiffCoder have in common.

What attention sees, the whole canvas or blocks, the model state decides. The layers are vLLM's: its parallel and
quantized linear layers apply as they are. The last one computes nothing behind its attention for rows whose logits are
not read.
"""

import torch
from vllm.config import CompilationMode, VllmConfig
from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM
from vllm.model_executor.models.utils import extract_layer_index
from vllm.sequence import IntermediateTensors

from vllm_osdt.models.canvas_mixin import CanvasMixin


class CanvasAttention(LlamaAttention):
    """Attention that gives its output for chosen rows only; keys and values are those of all rows."""

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The output of all rows, or of ``rows`` (int64 ``[M]``)."""
        qkv, _ = self.qkv_proj(hidden_states)
        query, key, value = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        query, key = self.rotary_emb(positions, query, key)
        attended = self.attn(self.scale_queries(positions, query), key, value)
        output, _ = self.o_proj(attended if rows is None else attended[rows])
        return output

    def scale_queries(self, positions: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        """What attention takes of the rotated queries ``[rows, heads * head size]``; here the same."""
        return query


class CanvasDecoderLayer(LlamaDecoderLayer):
    """A layer that, as the last one, computes nothing behind its attention for rows whose logits are not read."""

    attention: type[CanvasAttention] = CanvasAttention

    def __init__(self, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config, prefix, attn_layer_type=self.attention)
        self.is_last = extract_layer_index(prefix) == vllm_config.model_config.hf_config.num_hidden_layers - 1

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
        logit_rows: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states and residual of all rows; of ``logit_rows`` (int64 ``[M]``) alone behind the last layer."""
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


class CanvasForCausalLM(CanvasMixin, LlamaForCausalLM):
    """vLLM's Llama with these layers and the model state of a canvas."""

    layer: type[CanvasDecoderLayer] = CanvasDecoderLayer

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=self.layer)
        self.vocab_size = vllm_config.model_config.hf_config.vocab_size
        # vLLM traces a model once, before there are logit rows, and never looks at its arguments again.
        self.narrows_last_layer = vllm_config.compilation_config.mode in (None, CompilationMode.NONE)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        logit_rows: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        """Hidden states of all rows, or of ``logit_rows`` (int64 ``[M]``) in their order."""
        read = logit_rows if self.narrows_last_layer else None
        hidden_states = self.model(input_ids, positions, intermediate_tensors, inputs_embeds, logit_rows=read)
        return hidden_states if read is logit_rows else hidden_states[logit_rows]
