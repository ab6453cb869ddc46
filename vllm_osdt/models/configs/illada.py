"""Hugging Face config class of iLLaDA, so that its checkpoints load without remote code."""

from typing import Any

from transformers import LlamaConfig

from vllm_osdt.errors import UnsupportedModelError
from vllm_osdt.models.traits import CanvasConfigMixin

DEFAULT_BLOCK_LENGTH = 32  # of the authors' evaluations


class ILLaDAConfig(CanvasConfigMixin, LlamaConfig):
    """Config of iLLaDA-8B, Base and Instruct (``model_type: illada``): Llama's fields.

    The checkpoints do not name the mask token; the authors decode with 5. ``block_length`` is ours: the block that the
    checkpoint wants to be decoded with, 32 when it names none.
    """

    model_type = "illada"
    family = "iLLaDA"
    has_no_defaults_at_init = True  # transformers need not make one of nothing
    required = {
        "hidden_act": ("silu",),
        "attention_bias": (False, None),
        "mlp_bias": (False, None),
        "layer_norm_eps": (None,),  # with a value, norms take the mean away
    }
    default_theta = None  # the checkpoint's own, or none
    attribute_map = {"canvas_length": "block_length"}

    vocab_size: int = 155136
    intermediate_size: int = 14336
    num_key_value_heads: int | None = 8
    max_position_embeddings: int = 8192
    tie_word_embeddings: bool = True
    mask_token_id: int = 5
    block_length: int = DEFAULT_BLOCK_LENGTH

    def __post_init__(self, **kwargs: Any) -> None:
        """See ``CanvasConfigMixin.check_fields``."""
        super().__post_init__(**kwargs)
        self.check_fields()

    def check_fields(self) -> None:
        """As of the base class."""
        super().check_fields()
        if not (self.rope_parameters or {}).get("rope_theta"):
            raise UnsupportedModelError(
                "iLLaDA config field rope_theta is absent, and there is no default. Add the checkpoint's own to its "
                "config.json."
            )
        head_dim = self.hidden_size // self.num_attention_heads
        if self.head_dim != head_dim:
            raise UnsupportedModelError(
                f"iLLaDA config field head_dim is {self.head_dim}; only {head_dim}, hidden_size / num_attention_heads, "
                "is implemented. Use a checkpoint with that value."
            )
