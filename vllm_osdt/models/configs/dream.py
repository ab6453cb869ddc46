"""Hugging Face config class of Dream, so that its checkpoints load without remote code."""

from typing import Any

from transformers import PreTrainedConfig

from vllm_osdt.models.traits import CanvasConfigMixin

DEFAULT_BLOCK_LENGTH = 32


class DreamConfig(CanvasConfigMixin, PreTrainedConfig):
    """Config of Dream-7B, Dream-Coder-7B and DiffuCoder-7B (``model_type: Dream``).

    ``block_length`` is ours: the block that the checkpoint wants to be decoded with, 32 when it names none.
    """

    model_type = "Dream"
    family = "Dream"
    logits_shift = 1
    required = {"hidden_act": ("silu",), "use_sliding_window": (False, None)}
    attribute_map = {"canvas_length": "block_length"}

    vocab_size: int = 151936
    hidden_size: int = 4096
    intermediate_size: int = 22016
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 32
    hidden_act: str = "silu"
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] | None = None
    use_sliding_window: bool = False
    sliding_window: int | None = None
    mask_token_id: int = 151666
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    block_length: int = DEFAULT_BLOCK_LENGTH

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in derived fields.

        Raises:
            UnsupportedModelError: A field has a value that the model code does not implement.
        """
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        super().__post_init__(**kwargs)
        self.sliding_window = None
        self.qkv_bias = True  # of vLLM's Llama layers: query, key and value have biases, the output has none
        self.check_fields()
