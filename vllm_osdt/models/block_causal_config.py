"""What the config classes of the block-causal families have in common."""

from vllm_osdt.errors import UnsupportedModelError


class BlockCausalConfigMixin:
    """Put before the Hugging Face config class that the family descends from.

    ``block_length`` (the checkpoints also write ``block_size``) is the block that the model was trained with;
    ``mask_token_id`` the token of positions that are not decided yet.
    """

    attribute_map = {"canvas_length": "block_length", "block_size": "block_length"}
    is_block_causal = True
    logits_shift = 0

    block_length: int
    mask_token_id: int
    vocab_size: int

    def check(self, family: str) -> None:
        """Refuse what the model code does not implement.

        Raises:
            UnsupportedModelError: A field has a value that is not implemented.
        """
        for name, allowed in (("hidden_act", "silu"), ("use_sliding_window", False)):
            value = getattr(self, name, allowed)
            if value != allowed:
                raise UnsupportedModelError(
                    f"{family} config field {name} is {value!r}; only {allowed!r} is implemented. Use a checkpoint "
                    "with that value."
                )
        if not 0 <= self.mask_token_id < self.vocab_size:
            raise UnsupportedModelError(
                f"{family} config field mask_token_id is {self.mask_token_id}; it must be in [0, {self.vocab_size})."
            )
