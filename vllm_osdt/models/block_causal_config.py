"""What the config classes of the block-causal families have in common."""

from typing import Any

from vllm_osdt.errors import UnsupportedModelError


class BlockCausalConfigMixin:
    """Put before the Hugging Face config class that the family descends from.

    ``block_length`` (the checkpoints also write ``block_size``) is the block that the model was trained with;
    ``mask_token_id`` the token of positions that are not decided yet.
    """

    attribute_map = {"canvas_length": "block_length", "block_size": "block_length"}
    is_block_causal = True
    is_threshold_strict = True  # their decoders unmask what is above a static threshold, not what equals it
    logits_shift = 0
    sub_block_length: int | None = None  # positions denoised together within a block, from left to right
    can_edit = False  # whether the model was trained to replace tokens that it has written

    block_length: int | None
    assumed_block_length: int | None = None
    mask_token_id: int
    vocab_size: int

    def assume_block_length(self, length: int) -> None:
        """Take a length where the checkpoint's config has none, and remember that (see ``engine_config``)."""
        self.assumed_block_length = None
        if self.block_length is None:
            self.block_length = self.assumed_block_length = length

    def check(self, family: str, **required: Any) -> None:
        """Refuse what the model code does not implement.

        Args:
            family: Its name, for the message.
            required: Further fields and the only value that each may have.

        Raises:
            UnsupportedModelError: A field has a value that is not implemented.
        """
        for name, allowed in {"hidden_act": "silu", "use_sliding_window": False, **required}.items():
            value = getattr(self, name, allowed)
            if value != allowed:
                raise UnsupportedModelError(
                    f"{family} config field {name} is {value!r}; only {allowed!r} is implemented. Use a checkpoint "
                    "with that value."
                )
