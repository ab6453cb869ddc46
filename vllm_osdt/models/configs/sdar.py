"""Hugging Face config classes of SDAR, so that its checkpoints load without remote code."""

from typing import Any

from transformers import Qwen3Config, Qwen3MoeConfig

from vllm_osdt.models.traits import BlockCausalConfigMixin

DEFAULT_BLOCK_LENGTH = 4
MASK_TOKEN_ID = 151669


class SDARConfig(BlockCausalConfigMixin, Qwen3Config):
    """Config of SDAR and TraDo (``model_type: sdar``): Qwen3's fields, and the two of ``BlockCausalConfigMixin``."""

    model_type = "sdar"
    family = "SDAR"
    vocab_size: int = 151936
    mask_token_id: int = MASK_TOKEN_ID
    block_length: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """See ``BlockCausalConfigMixin``."""
        super().__post_init__(**kwargs)
        self.assume_block_length(DEFAULT_BLOCK_LENGTH)
        self.check_fields()


class SDARMoeConfig(BlockCausalConfigMixin, Qwen3MoeConfig):
    """Config of SDAR-30B-A3B (``model_type: sdar_moe``)."""

    model_type = "sdar_moe"
    family = "SDAR-MoE"
    vocab_size: int = 151936
    mask_token_id: int = MASK_TOKEN_ID
    block_length: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """See ``BlockCausalConfigMixin``."""
        super().__post_init__(**kwargs)
        self.assume_block_length(DEFAULT_BLOCK_LENGTH)
        self.check_fields()
