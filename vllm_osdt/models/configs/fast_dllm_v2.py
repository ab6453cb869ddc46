"""Hugging Face config class of Fast-dLLM v2, so that its checkpoints load without remote code."""

from typing import Any

from transformers import Qwen2Config

from vllm_osdt.models.traits import BlockCausalConfigMixin


class FastDLLMv2Config(BlockCausalConfigMixin, Qwen2Config):
    """Config of Fast-dLLM v2 (``model_type: Fast_dLLM_Qwen``): Qwen2's fields; the block is called ``bd_size``."""

    model_type = "Fast_dLLM_Qwen"
    family = "Fast-dLLM v2"
    attribute_map = {**BlockCausalConfigMixin.attribute_map, "bd_size": "block_length"}
    logits_shift = 1

    mask_token_id: int = 151665
    block_length: int = 32
    sub_block_length: int = 8

    def __post_init__(self, **kwargs: Any) -> None:
        """See ``CanvasConfigMixin.check_fields``."""
        super().__post_init__(**kwargs)
        self.check_fields()
