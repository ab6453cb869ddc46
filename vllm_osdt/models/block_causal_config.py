"""What the config classes of the block-causal families have in common."""

from typing import Any

from vllm_osdt.models.canvas_config import CanvasConfigMixin


class BlockCausalConfigMixin(CanvasConfigMixin):
    """Put before the Hugging Face config class that the family descends from.

    ``block_length`` (the checkpoints also write ``block_size``) is the block that the model was trained with.
    """

    attribute_map = {"canvas_length": "block_length", "block_size": "block_length"}
    required: dict[str, tuple[Any, ...]] = {"hidden_act": ("silu",), "use_sliding_window": (False, None)}
    is_block_causal = True
    is_threshold_strict = True  # their decoders unmask what is above a static threshold, not what equals it
    logits_shift = 0
    can_edit = False  # whether the model was trained to replace tokens that it has written

    assumed_block_length: int | None = None

    def assume_block_length(self, length: int) -> None:
        """Take a length where the checkpoint's config has none, and remember that (see ``engine_config``)."""
        self.assumed_block_length = None
        if self.block_length is None:
            self.block_length = self.assumed_block_length = length
