"""Hugging Face config class of Stable-DiffCoder, whose checkpoints say that they are Llama's."""

from typing import Any

from transformers import LlamaConfig

from vllm_osdt.models.traits import BlockCausalConfigMixin


class StableDiffcoderConfig(BlockCausalConfigMixin, LlamaConfig):
    """Config of Stable-DiffCoder-8B, Base and Instruct: Llama's fields.

    The checkpoints say ``model_type: llama`` and are told by their architecture (``CanvasConfigParser``). They name
    neither the mask token nor the block; both are defaults of the authors' decoder.
    """

    model_type = "stable_diffcoder"
    family = "Stable-DiffCoder"
    required = {**BlockCausalConfigMixin.required, "attention_bias": (False,), "mlp_bias": (False,)}
    is_threshold_strict = False  # the authors' decoder keeps masked what is below its threshold

    vocab_size: int = 155136
    mask_token_id: int = 5
    block_length: int = 4

    def __post_init__(self, **kwargs: Any) -> None:
        """See ``CanvasConfigMixin.check_fields``."""
        super().__post_init__(**kwargs)
        self.check_fields()
