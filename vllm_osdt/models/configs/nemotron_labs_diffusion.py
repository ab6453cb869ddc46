"""Hugging Face config class of Nemotron-Labs-Diffusion, so that its checkpoints load without remote code."""

from typing import Any

from transformers import LlamaConfig

from vllm_osdt.errors import UnsupportedModelError
from vllm_osdt.models.traits import BlockCausalConfigMixin


class NemotronLabsDiffusionConfig(BlockCausalConfigMixin, LlamaConfig):
    """Config of Nemotron-Labs-Diffusion (``model_type: nemotron_labs_diffusion``): Ministral's fields.

    ``dlm_paradigm`` says how a checkpoint was trained. ``bidirectional`` and ``block_diff`` mean the same layers, and
    are decoded in the same way.
    """

    model_type = "nemotron_labs_diffusion"
    family = "Nemotron-Labs-Diffusion"
    required = {
        "hidden_act": ("silu",),
        "attention_bias": (False, None),
        "mlp_bias": (False, None),
        "sliding_window": (None,),
        "dlm_paradigm": ("bidirectional", "block_diff"),
    }
    ignore_keys_at_rope_validation = {"llama_4_scaling_beta", "max_position_embeddings"}
    commits_causally = True
    is_threshold_strict = False  # the authors' decoder takes back what is below its threshold

    vocab_size: int = 131072
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 34
    num_key_value_heads: int | None = 8
    head_dim: int | None = 128
    max_position_embeddings: int = 262144
    rms_norm_eps: float = 1e-5
    mask_token_id: int = 100
    block_length: int = 32

    def __post_init__(self, **kwargs: Any) -> None:
        """See ``CanvasConfigMixin.check_fields``."""
        super().__post_init__(**kwargs)
        self.check_fields()

    @property
    def llama_4_scaling(self) -> dict[str, float] | None:
        """The scaling of queries as vLLM's Mistral layers read it; None for none."""
        rope = self.rope_parameters or {}
        if not rope.get("llama_4_scaling_beta"):
            return None
        name = "original_max_position_embeddings"
        return {"beta": rope["llama_4_scaling_beta"], name: rope[name]}

    def check_fields(self) -> None:
        """As of the base class."""
        super().check_fields()
        rope = self.rope_parameters or {}
        if rope.get("llama_4_scaling_beta") and not rope.get("original_max_position_embeddings"):
            raise UnsupportedModelError(
                f"{self.family} config field rope_parameters has llama_4_scaling_beta "
                f"{rope['llama_4_scaling_beta']!r}, but no original_max_position_embeddings: add it."
            )
