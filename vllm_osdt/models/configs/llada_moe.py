"""Hugging Face config class of LLaDA-MoE, so that its checkpoints load without remote code."""

from typing import Any

from transformers import PreTrainedConfig

from vllm_osdt.errors import UnsupportedModelError
from vllm_osdt.models.traits import CanvasConfigMixin

DEFAULT_BLOCK_LENGTH = 32


class LLaDAMoEConfig(CanvasConfigMixin, PreTrainedConfig):
    """Config of LLaDA-MoE-7B-A1B, Base and Instruct.

    The checkpoints say ``model_type: llada`` as LLaDA's do, and are told by their architecture (``LLaDAConfig``).
    ``block_length`` is ours: the block that the checkpoint wants to be decoded with, 32 when it names none.
    """

    model_type = "llada_moe"
    family = "LLaDA-MoE"
    required = {
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
    default_theta = 50000.0
    attribute_map = {"canvas_length": "block_length", "moe_intermediate_size": "expert_intermediate_size"}

    vocab_size: int = 157184
    hidden_size: int = 2048
    num_hidden_layers: int = 16
    num_attention_heads: int = 16
    num_key_value_heads: int = 16
    max_position_embeddings: int = 8192
    rms_norm_eps: float = 1e-5
    rope_parameters: dict[str, Any] | None = None
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
        super().__post_init__(**kwargs)
        self.check_fields()
        self.head_dim = self.hidden_size // self.num_attention_heads
        self.hidden_act = "silu"
        # Of vLLM's Qwen3-MoE.
        self.intermediate_size = self.expert_intermediate_size
        self.norm_topk_prob = False
        self.shared_expert_intermediate_size = 0
        self.mlp_only_layers: list[int] = []
        self.decoder_sparse_step = 1

    def check_fields(self) -> None:
        """As of the base class."""
        super().check_fields()
        if self.moe_layer_freq is not None and not all(self.moe_layer_freq):
            raise UnsupportedModelError(
                f"LLaDA-MoE config field moe_layer_freq is {self.moe_layer_freq}; only layers with experts are "
                "implemented. Use a checkpoint of ones."
            )
        head_dim = self.hidden_size // self.num_attention_heads
        asked = getattr(self, "head_dim", None)
        if asked not in (None, head_dim):
            raise UnsupportedModelError(
                f"LLaDA-MoE config field head_dim is {asked}; only {head_dim}, hidden_size / "
                "num_attention_heads, is implemented. Use a checkpoint with that value."
            )
