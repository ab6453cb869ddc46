"""Hugging Face config class of LLaDA-MoE, so that its checkpoints load without remote code."""

from typing import Any

from transformers import PreTrainedConfig

from vllm_osdt.errors import UnsupportedModelError

DEFAULT_BLOCK_LENGTH = 32

# Fields that vLLM's layers take for granted, with the values that mean it.
_REQUIRED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "clip_qkv": (None,),
    "qk_layernorm": (True,),
    "partial_rotary_factor": (1.0, 1, None),
    "moe_router_score_function": ("softmax", None),
    "moe_router_enable_expert_bias": (False, None),
    "router_num_group": (None,),
    "router_topk_group": (None,),
    "routed_scaling_factor": (1.0, 1, None),
    "shared_expert_intermediate_size": (None, 0),
    "norm_topk_prob": (False, None),
}


class LLaDAMoEConfig(PreTrainedConfig):
    """Config of LLaDA-MoE-7B-A1B, Base and Instruct.

    The checkpoints say ``model_type: llada`` as LLaDA's do, and are told by their architecture (``LLaDAConfig``).
    ``block_length`` is ours: the block that the checkpoint wants to be decoded with, 32 when it names none.
    """

    model_type = "llada_moe"
    attribute_map = {"canvas_length": "block_length", "moe_intermediate_size": "expert_intermediate_size"}

    vocab_size: int = 157184
    hidden_size: int = 2048
    num_hidden_layers: int = 16
    num_attention_heads: int = 16
    num_key_value_heads: int = 16
    max_position_embeddings: int = 8192
    rms_norm_eps: float = 1e-5
    rope_theta: float = 50000.0
    rope_scaling: dict[str, Any] | None = None
    tie_word_embeddings: bool = False
    expert_intermediate_size: int = 1024
    num_experts: int = 64
    num_experts_per_tok: int = 8
    moe_layer_freq: list[int] | None = None
    mask_token_id: int = 156895
    pad_token_id: int | None = 156892
    eos_token_id: int | list[int] | None = 156892
    block_length: int = DEFAULT_BLOCK_LENGTH

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in what vLLM's layers ask for.

        Raises:
            UnsupportedModelError: A field has a value that the model code does not implement.
        """
        rope_theta, rope_scaling, rope = self.rope_theta, self.rope_scaling, kwargs.get("rope_parameters")
        super().__post_init__(**kwargs)
        for name, allowed in _REQUIRED.items():
            value = getattr(self, name, allowed[0])
            if value not in allowed:
                raise UnsupportedModelError(
                    f"LLaDA-MoE config field {name} is {value!r}; only {allowed[0]!r} is implemented. Use a checkpoint "
                    "with that value."
                )
        if self.moe_layer_freq is not None and not all(self.moe_layer_freq):
            raise UnsupportedModelError(
                f"LLaDA-MoE config field moe_layer_freq is {self.moe_layer_freq}; only layers with experts are "
                "implemented. Use a checkpoint of ones."
            )
        self.head_dim = self.hidden_size // self.num_attention_heads
        self.hidden_act = "silu"
        self.rope_parameters = {"rope_type": "default", "rope_theta": float(rope_theta), **(rope_scaling or rope or {})}
        # Of vLLM's Qwen3-MoE.
        self.intermediate_size = self.expert_intermediate_size
        self.norm_topk_prob = False
        self.shared_expert_intermediate_size = 0
        self.mlp_only_layers: list[int] = []
        self.decoder_sparse_step = 1
