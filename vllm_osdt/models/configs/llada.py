"""Hugging Face config class of LLaDA, so that its checkpoints load without remote code."""

from typing import Any

from transformers import PreTrainedConfig

from vllm_osdt.errors import UnsupportedModelError
from vllm_osdt.models.configs.llada_moe import LLaDAMoEConfig
from vllm_osdt.models.traits import CanvasConfigMixin

DEFAULT_BLOCK_LENGTH = 32
LLADA_MOE = "LLaDAMoEModelLM"


class LLaDAConfig(CanvasConfigMixin, PreTrainedConfig):
    """Config of LLaDA-8B-Base, LLaDA-8B-Instruct and LLaDA-1.5 (``model_type: llada``).

    The checkpoint's own field names stay; vLLM reads them by the standard ones through ``attribute_map``.
    ``block_length`` is ours: the block that the checkpoint wants to be decoded with, 32 when it names none.
    """

    model_type = "llada"
    family = "LLaDA"
    # Fields of the OLMo-derived config.
    required = {
        "block_type": ("llama",),
        "activation_type": ("silu",),
        "layer_norm_type": ("rms",),
        "rope": (True,),
        "alibi": (False,),
        "layer_norm_with_affine": (True,),
        "include_bias": (False, None),
        "include_qkv_bias": (False, None),
        "bias_for_layer_norm": (False, None),
        "attention_layer_norm": (False, None),
        "input_emb_norm": (False, None),
        "clip_qkv": (None,),
        "block_group_size": (1, None),
        "scale_logits": (False, None),
    }
    default_theta = 500000.0
    attribute_map = {
        "hidden_size": "d_model",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "num_hidden_layers": "n_layers",
        "intermediate_size": "mlp_hidden_size",
        "max_position_embeddings": "max_sequence_length",
        "hidden_act": "activation_type",
        "tie_word_embeddings": "weight_tying",
        "canvas_length": "block_length",
    }

    vocab_size: int = 126464
    embedding_size: int | None = None
    d_model: int = 4096
    n_heads: int = 32
    n_kv_heads: int | None = None
    multi_query_attention: bool | None = None
    n_layers: int = 32
    mlp_hidden_size: int | None = None
    mlp_ratio: int = 4
    max_sequence_length: int = 4096
    rms_norm_eps: float = 1e-5
    rope_parameters: dict[str, Any] | None = None
    activation_type: str = "silu"
    block_type: str = "llama"
    layer_norm_type: str = "rms"
    rope: bool = True
    alibi: bool = False
    weight_tying: bool = False
    mask_token_id: int = 126336
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    block_length: int = DEFAULT_BLOCK_LENGTH

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As of the base class; LLaDA-MoE's checkpoints have LLaDA's model type, and get their own class."""
        if LLADA_MOE in (config_dict.get("architectures") or ()):
            return LLaDAMoEConfig.from_dict({**config_dict, "model_type": LLaDAMoEConfig.model_type}, **kwargs)
        return super().from_dict(config_dict, **kwargs)

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in derived fields.

        Raises:
            UnsupportedModelError: A field has a value that the model code does not implement.
        """
        if self.n_kv_heads is None:
            self.n_kv_heads = 1 if self.multi_query_attention else self.n_heads
        if self.mlp_hidden_size is None:
            self.mlp_hidden_size = self.mlp_ratio * self.d_model
        if self.embedding_size is None:
            self.embedding_size = self.vocab_size
        super().__post_init__(**kwargs)
        self.check_fields()

    def check_fields(self) -> None:
        """As of the base class."""
        super().check_fields()
        assert self.embedding_size is not None
        if self.embedding_size < self.vocab_size:
            raise UnsupportedModelError(
                f"LLaDA config field embedding_size is {self.embedding_size}, below vocab_size {self.vocab_size}; the "
                "embedding must hold every token."
            )
