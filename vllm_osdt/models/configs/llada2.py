"""Hugging Face config class of LLaDA2, so that its checkpoints load without remote code."""

from typing import Any

from transformers import PreTrainedConfig

from vllm_osdt.models.traits import BlockCausalConfigMixin


class LLaDA2MoeConfig(BlockCausalConfigMixin, PreTrainedConfig):
    """Config of LLaDA2.0 and LLaDA2.1, mini and flash (``model_type: llada2_moe``)."""

    model_type = "llada2_moe"
    family = "LLaDA2"
    required = {
        **BlockCausalConfigMixin.required,
        "use_qk_norm": (True,),
        "use_rmsnorm": (True,),
        "norm_topk_prob": (True,),
        "score_function": ("sigmoid",),
        "moe_router_enable_expert_bias": (True,),
        "router_dtype": ("fp32",),
    }
    default_theta = 600000.0
    can_edit = True

    vocab_size: int = 157184
    hidden_size: int = 2048
    intermediate_size: int = 5120
    num_hidden_layers: int = 20
    num_attention_heads: int = 16
    num_key_value_heads: int = 4
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    partial_rotary_factor: float = 0.5  # before the dict, whose own comes first
    rope_parameters: dict[str, Any] | None = None
    tie_word_embeddings: bool = False
    use_bias: bool = False
    use_qkv_bias: bool = False
    use_qk_norm: bool = True
    use_sliding_window: bool = False
    sliding_window: int | None = None
    norm_head: bool = False
    embedding_dropout: float = 0.0
    num_experts: int = 256
    num_experts_per_tok: int = 8
    num_shared_experts: int = 1
    n_group: int = 8
    topk_group: int = 4
    moe_intermediate_size: int = 512
    first_k_dense_replace: int = 1
    routed_scaling_factor: float = 2.5
    mask_token_id: int = 156895
    pad_token_id: int | None = None
    eos_token_id: int | list[int] | None = 156892
    block_length: int = 32

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in what the family has in common and Ling's configs state.

        Raises:
            UnsupportedModelError: A field has a value that the model code does not implement.
        """
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)
        self.sliding_window = None
        assert self.rope_parameters is not None
        self.partial_rotary_factor = self.rope_parameters["partial_rotary_factor"]
        self.check_fields()
        for name, allowed in self.required.items():  # what vLLM's layers read and the checkpoints leave out
            setattr(self, name, allowed[0])
