"""Infilling: text that a request pins at positions of its canvas, and the holes that the model fills.

Three ways to say it: ``osdt_infill``, a list of text and lengths of holes; ``osdt_suffix``, text behind an answer of
at most ``max_tokens``; vLLM's ``diffusion_seed_canvas`` with ``diffusion_pinned``, token ids of a canvas and the
positions that hold theirs. Pinned positions never change. A hole of a given length is filled to its end, an open one to
its first end token, if it has one.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from vllm_osdt.errors import InvalidOptionError, shown
from vllm_osdt.geometry import Canvas, Limits, canvas_start
from vllm_osdt.messages import HOLE, OPEN_HOLE, answer_start

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams

    from vllm_osdt.options import DecodingOptions

INFILL, SUFFIX, SEED, PINNED = "osdt_infill", "osdt_suffix", "diffusion_seed_canvas", "diffusion_pinned"
LENGTH = "max_tokens"  # of an open hole, {"max_tokens": 8}
NAMES = (INFILL, SUFFIX, SEED, PINNED)
Encode = Callable[[str], list[int]]


class Template(NamedTuple):
    """Tokens of a canvas.

    Attributes:
        tokens: Token ids from the prompt's end on, ``HOLE`` or ``OPEN_HOLE`` where the model writes.
        num_output: How many of them, from the first, are the request's output.
        name: The field that says so.
        ends_itself: Whether the output ends at an end token, as it does without a template.
    """

    tokens: list[int]
    num_output: int
    name: str
    ends_itself: bool = False


class Reader(NamedTuple):
    """What a template is read with.

    Attributes:
        encode: Text to token ids; None without a tokenizer.
        vocabulary: Token ids of the model.
        mask_token_id: With which a masked position begins.
        max_model_len: The engine's limit on prompt and canvas.
    """

    encode: Encode | None
    vocabulary: int
    mask_token_id: int
    max_model_len: int

    def read(
        self,
        extra: dict[str, Any],
        max_tokens: int | None,
        *,
        ignores_ends: bool = False,
        is_default_limit: bool = False,
    ) -> Template | None:
        """Take the template out of a request's ``extra_args``; None without one.

        Args:
            extra: Changed in place.
            max_tokens: The limit that the client sent; None for none.
            ignores_ends: No end token ends anything: no hole is open.
            is_default_limit: It did not, and a template is as long as it is.

        Raises:
            InvalidOptionError: It cannot be read.
        """
        for name in extra:
            if name.startswith("diffusion_") and name not in NAMES:
                raise InvalidOptionError(
                    f"{name} is {shown(extra[name])}, which is of vLLM's own diffusion models; leave it out.",
                    refusal="vllm-diffusion",
                    parameter=name,
                )
        found = {name: value for name in NAMES if (value := extra.pop(name, None)) is not None}
        if not found:
            return None
        if len(set(found) - {PINNED}) != 1 or (PINNED in found and SEED not in found):
            raise InvalidOptionError(
                f"{' and '.join(found)} are sent; send one of {INFILL}, {SUFFIX}, and {SEED} with {PINNED}.",
                refusal="infill-names",
                parameter=next(iter(found)),
            )
        if INFILL in found:
            template = self._of_parts(found[INFILL], HOLE if ignores_ends else OPEN_HOLE)
        elif SUFFIX in found:
            template = self._of_suffix(found[SUFFIX], max_tokens)
        else:
            template = self._of_seed(found[SEED], found.get(PINNED, []))
        if min(template.tokens[: template.num_output], default=0) >= 0:
            raise InvalidOptionError(
                f"{template.name} has no hole; leave one to be filled.", refusal="infill-value", parameter=template.name
            )
        if max_tokens is not None and not is_default_limit and max_tokens < template.num_output:
            raise InvalidOptionError(
                f"max_tokens is {max_tokens}, but {template.name} has {template.num_output} tokens; send as many, or "
                "leave max_tokens out.",
                refusal="infill-length",
                parameter="max_tokens",
            )
        return template

    def _of_parts(self, parts: Any, open_hole: int) -> Template:
        if not isinstance(parts, list | tuple) or not parts:
            raise _value(INFILL, parts)
        tokens: list[int] = []
        for part in parts:
            mark, length = HOLE, part
            if isinstance(part, dict) and part.keys() == {LENGTH}:
                mark, length = open_hole, part[LENGTH]
            if isinstance(length, bool) or not isinstance(length, int):
                tokens += self._ids(INFILL, part)
            elif length < 1:
                raise _value(INFILL, part)
            else:
                self._check_length(INFILL, len(tokens) + length)
                tokens += [mark] * length
        return Template(tokens, len(tokens), INFILL)

    def _of_suffix(self, suffix: Any, max_tokens: int | None) -> Template:
        if max_tokens is None:
            raise InvalidOptionError(
                f"{SUFFIX} is sent without max_tokens, the length of what comes before it; send both.",
                refusal="infill-length",
                parameter=SUFFIX,
            )
        self._check_length(SUFFIX, max_tokens)
        return Template([HOLE] * max_tokens + self._ids(SUFFIX, suffix), max_tokens, SUFFIX, ends_itself=True)

    def _check_length(self, name: str, length: int) -> None:
        """Refuse what can fit no context, before it is made."""
        if length > self.max_model_len:
            raise InvalidOptionError(
                f"{name} has {length} tokens or more, but max_model_len is {self.max_model_len}; shorten it.",
                refusal="infill-room",
                parameter=name,
            )

    def _of_seed(self, seed: Any, pinned: Any) -> Template:
        ids = self._ids(SEED, seed)
        if not isinstance(pinned, list | tuple) or not all(
            isinstance(place, int) and not isinstance(place, bool) and 0 <= place < len(ids) for place in pinned
        ):
            raise InvalidOptionError(
                f"{PINNED} is {shown(pinned)}; expected positions in {SEED}, from 0 to {len(ids) - 1}.",
                refusal="infill-value",
                parameter=PINNED,
            )
        held = set(pinned)
        stray = next((k for k, one in enumerate(ids) if k not in held and one != self.mask_token_id), None)
        if stray is not None:
            raise InvalidOptionError(
                f"{SEED} has token {ids[stray]} at position {stray}, which is not pinned; a masked model begins there "
                f"with its mask token, {self.mask_token_id}. Send that, or pin the position.",
                refusal="infill-seed",
                parameter=SEED,
            )
        return Template([one if k in held else HOLE for k, one in enumerate(ids)], len(ids), SEED)

    def _ids(self, name: str, part: Any) -> list[int]:
        """Token ids of a text, or of a list of them; refuses anything else."""
        found = self.ids_of(part)
        if found is None:
            raise _value(name, part)
        return found

    def ids_of(self, part: Any) -> list[int] | None:
        """Token ids of a text, or of a list of them; None of anything else."""
        if isinstance(part, str) and self.encode is not None:
            return list(self.encode(part))
        if isinstance(part, list | tuple) and all(
            isinstance(one, int) and not isinstance(one, bool) and 0 <= one < self.vocabulary for one in part
        ):
            return list(part)
        return None


def check_company(
    template: Template,
    options: "DecodingOptions",
    asked: "SamplingParams",
    sent_gen_length: bool,
    name_of: Callable[[str], str] = str,
) -> None:
    """Refuse what cannot be combined with a template.

    Args:
        template: Of the request.
        options: Of the request.
        asked: Its sampling parameters, as they came.
        sent_gen_length: Whether it asks for a canvas length of its own.
        name_of: What the client calls a sampling parameter.

    Raises:
        InvalidOptionError: Names the parameter.
    """
    others = {
        "gen_length": sent_gen_length and "the template is as long as it is",
        "suffix_window": options.suffix_window is not None and "a hole sees all that follows it",
        "edit_threshold": options.edit_threshold is not None and "pinned tokens must not be replaced",
        "logprobs": asked.logprobs is not None and "no step chooses a pinned token",
        "structured_outputs": asked.structured_outputs is not None and "a grammar does not know of holes",
        "min_tokens": OPEN_HOLE in template.tokens and asked.min_tokens > 0 and "its open holes may end anywhere",
    }
    if not template.ends_itself:
        why = "nothing but its holes' own ends shortens a template"
        others |= {"stop": bool(asked.stop) and why, "stop_token_ids": bool(asked.stop_token_ids) and why}
    for name, reason in others.items():
        if reason:
            raise InvalidOptionError(
                f"{name_of(name)} cannot be sent with {template.name}: {reason}. Leave one of them out.",
                refusal="infill-company",
                parameter=name,
            )


def check_region(template: Template | None, length: int | None) -> None:
    """Refuse to watch the answer behind given text (``prophet_region``) where there is none.

    Args:
        template: Of the request; None for none.
        length: Positions to watch; None for all.

    Raises:
        InvalidOptionError: Says so.
    """
    if length is not None and (template is None or answer_start(template.tokens) is None):
        raise InvalidOptionError(
            f"prophet_region is {length}, but the request gives no text that a hole follows; send {INFILL} with such "
            "text, or leave prophet_region out.",
            refusal="region-text",
            parameter="prophet_region",
            value=length,
        )


def template_canvas(template: Template, prompt_length: int, options: "DecodingOptions", limits: Limits) -> Canvas:
    """The canvas of a template.

    Where no block sees a later one, text that follows a hole has to be in the hole's block, or the model would not know
    of it.

    Raises:
        InvalidOptionError: It does not fit, or a hole does not see what follows it.
    """
    length, block = len(template.tokens), options.block_length
    start = canvas_start(prompt_length, block, is_on_grid=options.is_on_grid)
    end, limit = prompt_length + length, limits.max_model_len
    if options.is_block_causal:
        end, limit = start + -(-(end - start) // block) * block, start + (limit - start) // block * block
        _check_holes(template, prompt_length - start, block)
    else:
        limit = min(limit, limits.max_num_batched_tokens)
    if end > limit:
        raise InvalidOptionError(
            f"{template.name} has {length} tokens, but the prompt of {prompt_length} leaves "
            f"{max(limit - prompt_length, 0)} of {limit}. Shorten one of them.",
            refusal="infill-room",
            parameter=template.name,
        )
    return Canvas(start, end, prompt_length + template.num_output, block)


def _check_holes(template: Template, offset: int, block: int) -> None:
    """``offset``: positions of the first block that the prompt has."""
    begin = None
    for k, token in enumerate(template.tokens):
        if token < 0:
            begin = k if begin is None else begin
        elif begin is not None:
            first, last = (offset + begin) // block, (offset + k) // block
            if first != last:
                raise InvalidOptionError(
                    f"{template.name} has a hole at position {begin} whose text behind it, at {k}, is in a later block "
                    f"of {block}, which this block-causal model does not see while it fills the hole. Shorten the "
                    "hole, or use a model whose positions see the whole canvas.",
                    refusal="infill-blocks",
                    parameter=template.name,
                )
            begin = None


def _value(name: str, value: Any) -> InvalidOptionError:
    kinds = "text or a list of token ids"
    if name == INFILL:
        kinds += f', or the length of a hole, or {{"{LENGTH}": length}} of an open one'
    return InvalidOptionError(f"{name} has {shown(value)}; expected {kinds}.", refusal="infill-value", parameter=name)
