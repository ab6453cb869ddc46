"""What distinguishes the families, as typed traits, and what their config classes have in common."""

from dataclasses import dataclass
from typing import Any

from vllm_osdt.declaration import Declaration
from vllm_osdt.errors import InvalidOptionError, UnsupportedModelError
from vllm_osdt.geometry import BlockLength

_ROPE_FIELDS = ("rope_parameters", "rope_scaling")
_FROM_A_RANGE = ("llama3", "yarn", "longrope")
_BESIDE_ROPE = ("rope_theta", "partial_rotary_factor")  # older configs have them beside the dict
_BLOCK_LENGTH = Declaration(BlockLength, "Positions denoised together.")


@dataclass(frozen=True)
class Traits:
    """How a model decodes, for everything that does not run its layers.

    Attributes:
        block_length: Positions denoised together.
        sub_block_length: Positions of a block that are denoised together, from left to right; None for all of them.
        mask_token_id: Token of positions that are not decided yet.
        is_block_causal: Whether a position sees the blocks up to its own, which lie on a grid from position 0; else it
            sees the whole canvas.
        commits_causally: Of a block-causal model: whether keys and values of prompt and finished blocks are those of
            causal passes. Only positions of the active block then see later ones, and blocks begin behind the prompt.
        is_threshold_strict: Whether a confidence that equals a static threshold does not pass.
        logits_shift: Position i is predicted from the logits at i - logits_shift.
        can_edit: Whether the model was trained to replace tokens that it has written.
        has_experts: Whether its layers are a mixture of experts.
        gen_length: Length of the canvas that the model is used to, where its config says one.
    """

    block_length: int
    mask_token_id: int
    sub_block_length: int | None = None
    is_block_causal: bool = False
    commits_causally: bool = False
    is_threshold_strict: bool = False
    logits_shift: int = 0
    can_edit: bool = False
    has_experts: bool = False
    gen_length: int | None = None


class CanvasConfigMixin:
    """Put before the Hugging Face config class that a family descends from.

    RoPE settings are read as vLLM reads them, from ``rope_parameters``; ``transformers`` brings ``rope_theta`` and
    ``rope_scaling`` (``type`` or ``rope_type``) of older configs there. What is set later, as vLLM does with
    ``--hf-overrides``, gets there too, whatever its spelling.

    Attributes:
        family: Its name, for messages.
        required: Fields that the model code takes for granted, and the values that mean it. The first is the one that
            a message names; a field that is absent has it.
        assumed_block_length: The block length that was assumed where the checkpoint's config has none; else None.

    The other attributes are :class:`Traits`; a family overrides those in which it differs.
    """

    family: str = ""
    required: dict[str, tuple[Any, ...]] = {}
    block_length: int | None
    mask_token_id: int | None
    sub_block_length: int | None = None
    is_block_causal: bool = False
    commits_causally: bool = False
    is_threshold_strict: bool = False
    logits_shift: int = 0
    can_edit: bool = False
    gen_length: int | None = None
    assumed_block_length: int | None = None
    vocab_size: int
    max_position_embeddings: int

    @property
    def traits(self) -> Traits:
        """The family's traits, with what the checkpoint and the operator's overrides say."""
        assert self.block_length is not None and self.mask_token_id is not None
        return Traits(
            block_length=self.block_length,
            mask_token_id=self.mask_token_id,
            sub_block_length=self.sub_block_length,
            is_block_causal=self.is_block_causal,
            commits_causally=self.commits_causally,
            is_threshold_strict=self.is_threshold_strict,
            logits_shift=self.logits_shift,
            can_edit=self.can_edit,
            has_experts=bool(getattr(self, "num_experts", 0)),  # a field of some families' configs only
            gen_length=self.gen_length,
        )

    def __setattr__(self, name: str, value: Any) -> None:
        known = self.__dict__.get("rope_parameters") or {}
        if name in _ROPE_FIELDS and {"rope_type", "rope_theta"} <= known.keys():
            value = {**{field: known[field] for field in _BESIDE_ROPE if field in known}, **_as_rope_type(value or {})}
            value.setdefault("rope_type", "default")
            if value["rope_type"] in _FROM_A_RANGE:  # as transformers does where it reads a config
                value.setdefault("original_max_position_embeddings", self.max_position_embeddings)
            name = "rope_parameters"
        elif name in _BESIDE_ROPE and "rope_theta" in known and value is not None:
            super().__setattr__("rope_parameters", {**known, name: value})
        super().__setattr__(name, value)
        if name == "rope_parameters" and value and "partial_rotary_factor" in self.__dict__:
            factor = value.get("partial_rotary_factor", self.__dict__["partial_rotary_factor"])
            super().__setattr__("partial_rotary_factor", factor)  # some layers read it here

    def check_fields(self) -> None:
        """Refuse what the model code does not implement, and what no request could be decoded with.

        Called when a checkpoint's config is read, and again when an engine starts, after its overrides.

        Raises:
            UnsupportedModelError: Names the first such field, its value and the one expected.
        """
        for name, allowed in self.required.items():
            value = getattr(self, name, allowed[0])
            if value not in allowed:
                raise UnsupportedModelError(
                    f"{self.family} config field {name} is {value!r}; only {allowed[0]!r} is implemented. Use a "
                    "checkpoint with that value."
                )
        for name in ("block_length", "sub_block_length"):
            value = getattr(self, name)
            if value is not None:
                try:
                    _BLOCK_LENGTH.check(name, value)
                except InvalidOptionError as error:
                    raise UnsupportedModelError(
                        f"{self.family} config field {error} Say another one with --hf-overrides "
                        f"'{{\"{name}\": LENGTH}}'."
                    ) from None

    def check_mask_token(self) -> None:
        """Refuse a mask token that is none. Not called before an engine's overrides are known, which may name it.

        Raises:
            UnsupportedModelError: It is no token of the vocabulary.
        """
        token = self.mask_token_id
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < self.vocab_size:
            raise UnsupportedModelError(
                f"{self.family} config field mask_token_id is {token!r}; it must be a token id in [0, "
                f"{self.vocab_size}). Name the mask token with --hf-overrides '{{\"mask_token_id\": ID}}'."
            )


class BlockCausalConfigMixin(CanvasConfigMixin):
    """What the block-causal families have in common.

    ``block_length`` (the checkpoints also write ``block_size``) is the block that the model was trained with.
    """

    attribute_map = {"canvas_length": "block_length", "block_size": "block_length"}
    required: dict[str, tuple[Any, ...]] = {"hidden_act": ("silu",), "use_sliding_window": (False, None)}
    is_block_causal = True
    is_threshold_strict = True  # their decoders unmask what is above a static threshold, not what equals it

    def assume_block_length(self, length: int) -> None:
        """Take a length where the checkpoint's config has none, and remember that (see ``engine_config``)."""
        self.assumed_block_length = None
        if self.block_length is None:
            self.block_length = self.assumed_block_length = length


def _as_rope_type(parameters: dict[str, Any]) -> dict[str, Any]:
    """RoPE settings with the newer name of their kind."""
    if "type" not in parameters:
        return dict(parameters)
    kind = parameters.get("rope_type", parameters["type"])
    return {**{name: value for name, value in parameters.items() if name != "type"}, "rope_type": kind}
