"""Hugging Face config classes of Tiny-A2D, so that its checkpoints load without remote code."""

import re
from typing import Any

from transformers import LlamaConfig, Qwen2Config, Qwen3Config

from vllm_osdt.calibration.fingerprint import model_name
from vllm_osdt.errors import UnsupportedModelError
from vllm_osdt.models.traits import CanvasConfigMixin

DEFAULT_BLOCK_LENGTH = 32


class A2DConfigMixin(CanvasConfigMixin):
    """Put before the config class of the model that a checkpoint was made of.

    Checkpoints trained over the whole canvas (MDLM) and in blocks (BD3LM) have the same config and tell the difference
    in their names. No config names the mask token, which dLLM adds to the tokenizer.

    Blocks lie on a grid from the start of the prompt, as in training. (dLLM's sampler of BD3LM pads a prompt on its
    left, so that its end is the end of a block.)

    Attributes:
        block_causal: Whether blocks see no later ones. None: whether the checkpoint's name has the word ``bd3lm``.
        block_length: Ours: 32, as BD3LM was trained with, when a checkpoint names none.
    """

    required: dict[str, tuple[Any, ...]] = {"hidden_act": ("silu",), "use_sliding_window": (False, None)}
    attribute_map = {"canvas_length": "block_length"}
    block_causal: bool | None
    name_or_path: str

    @property
    def is_block_causal(self) -> bool:  # type: ignore[override]
        """See ``block_causal``."""
        if self.block_causal is not None:
            return self.block_causal
        name = model_name(self.name_or_path).rsplit("/", 1)[-1]
        return re.search(r"(^|[-_])bd3lm($|[-_])", name.lower()) is not None

    def check_fields(self) -> None:
        """As of the base class."""
        super().check_fields()
        if self.block_causal is not None and not isinstance(self.block_causal, bool):
            raise UnsupportedModelError(
                f"{self.family} config field block_causal is {self.block_causal!r}; it must be true or false, or "
                "absent where the checkpoint's name says it. Say it with --hf-overrides '{\"block_causal\": true}'."
            )


class A2DQwen3Config(A2DConfigMixin, Qwen3Config):
    """Config of A2D models made of Qwen3 (``model_type: a2d-qwen3``)."""

    model_type = "a2d-qwen3"
    family = "A2D-Qwen3"
    vocab_size: int = 151936
    mask_token_id: int = 151669
    block_length: int = DEFAULT_BLOCK_LENGTH
    block_causal: bool | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """See ``CanvasConfigMixin.check_fields``."""
        super().__post_init__(**kwargs)
        self.check_fields()


class A2DQwen2Config(A2DConfigMixin, Qwen2Config):
    """Config of A2D models made of Qwen2 and Qwen2.5 (``model_type: a2d-qwen2``)."""

    model_type = "a2d-qwen2"
    family = "A2D-Qwen2"
    vocab_size: int = 151936
    mask_token_id: int = 151665
    block_length: int = DEFAULT_BLOCK_LENGTH
    block_causal: bool | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """See ``CanvasConfigMixin.check_fields``."""
        super().__post_init__(**kwargs)
        self.qkv_bias = True  # of vLLM's Llama layers: query, key and value have biases, the output has none
        self.check_fields()


class A2DLlamaConfig(A2DConfigMixin, LlamaConfig):
    """Config of A2D models made of Llama (``model_type: a2d-llama``).

    No such checkpoint of the authors is public: the mask token has no default.
    """

    model_type = "a2d-llama"
    family = "A2D-Llama"
    required = {"hidden_act": ("silu",), "attention_bias": (False, None), "mlp_bias": (False, None)}
    mask_token_id: int | None = None
    block_length: int = DEFAULT_BLOCK_LENGTH
    block_causal: bool | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """See ``CanvasConfigMixin.check_fields``."""
        super().__post_init__(**kwargs)
        self.check_fields()
