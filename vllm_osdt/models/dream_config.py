"""Hugging Face config class of Dream, so that its checkpoints load without remote code."""

from typing import Any

from transformers import PreTrainedConfig

from vllm_osdt.errors import UnsupportedModelError

DEFAULT_BLOCK_LENGTH = 32


class DreamConfig(PreTrainedConfig):
    """Config of Dream-7B, Dream-Coder-7B and DiffuCoder-7B (``model_type: Dream``).

    ``block_length`` is ours: the block that the checkpoint wants to be decoded with, 32 when it names none.
    """

    model_type = "Dream"
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
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
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
        rope_theta, rope_scaling = self.rope_theta, self.rope_scaling
        super().__post_init__(**kwargs)
        self.sliding_window = None
        self.qkv_bias = True  # of vLLM's Llama layers: query, key and value have biases, the output has none
        self.logits_shift = 1
        # vLLM reads rotary parameters from this dict; the checkpoints have the plain fields.
        self.rope_parameters = {"rope_type": "default", "rope_theta": float(rope_theta), **(rope_scaling or {})}
        for name, allowed in (("hidden_act", "silu"), ("use_sliding_window", False)):
            if getattr(self, name) != allowed:
                raise UnsupportedModelError(
                    f"Dream config field {name} is {getattr(self, name)!r}; only {allowed!r} is implemented. Use a "
                    "checkpoint with that value."
                )
        if not 0 <= self.mask_token_id < self.vocab_size:
            raise UnsupportedModelError(
                f"Dream config field mask_token_id is {self.mask_token_id}; it must be in [0, {self.vocab_size})."
            )
