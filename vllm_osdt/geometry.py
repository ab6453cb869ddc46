"""Where a canvas lies: its start and end, its blocks and its denoising steps, computed once for each request."""

import math
from dataclasses import dataclass
from typing import NamedTuple

from vllm_osdt.declaration import count
from vllm_osdt.errors import InvalidOptionError

MAX_BLOCK_LENGTH = 128  # the unmask kernel ranks a block in one program
BlockLength = count(1, MAX_BLOCK_LENGTH)
BLOCK_CACHE = "block"  # cache mode of block-causal models, the only one they have
CANVAS_CACHES = ("none", "prefix", "dual")  # those of models whose positions see the whole canvas
CAUSAL_CACHE, CAUSAL_FUSED_CACHE = "causal", "causal_fused"  # those of models that commit causally
CAUSAL_CACHES = (CAUSAL_CACHE, CAUSAL_FUSED_CACHE)
CACHES_OF_FAMILIES = (CANVAS_CACHES, (BLOCK_CACHE,), CAUSAL_CACHES)
CACHE_MODES = tuple(mode for modes in CACHES_OF_FAMILIES for mode in modes)
PROMPT = "prompt"  # parameter of refusals for the prompt's length; each endpoint has its own name for it
FEWEST_READ_BLOCKS = 8  # blocks of the longest kind whose logits a step may read, however few requests it may have
USUAL_LENGTH = 128  # of a canvas at first, where neither operator nor checkpoint names one


def max_logit_rows(max_num_seqs: int, max_num_rows: int) -> int:
    """Rows of which a step reads logits at most: blocks of as many requests as may run, and branches beside them.

    Args:
        max_num_seqs, max_num_rows: Requests and rows of a step at most.
    """
    return min(max_num_rows, max(max_num_seqs, FEWEST_READ_BLOCKS) * MAX_BLOCK_LENGTH)


class Limits(NamedTuple):
    """What bounds a canvas.

    Attributes:
        max_model_len: The engine's limit on prompt plus canvas, in tokens.
        max_num_batched_tokens: The engine's limit on the rows of one step. A refresh has prompt plus canvas rows; a
            step of a block-causal model has at most two blocks, since its prompt may be cut.
        gen_length: The operator's canvas length, None for none: the shortest canvas of a request without its own.
        open_ended: Output tokens of a request that names no limit; None where neither operator nor checkpoint says
            so, which means as many as the context holds.
        usual_length: Length of the canvas that the model is used to, by its config; None where that says none.
    """

    max_model_len: int
    max_num_batched_tokens: int
    gen_length: int | None = None
    open_ended: int | None = None
    usual_length: int | None = None

    @property
    def first_length(self) -> int:
        """The canvas that a request starts with, in whole blocks, where positions see all of it."""
        return self.gen_length or self.usual_length or min(self.open_ended or USUAL_LENGTH, USUAL_LENGTH)


class Canvas(NamedTuple):
    """The positions of one request, in tokens from the start of its prompt.

    Attributes:
        start: First position of the first block: behind the prompt, or the start of the prompt's last, incomplete block
            where blocks lie on a grid.
        end: Position behind the last block; the end of the context may cut that block.
        max_output_end: Position behind the last token that the request may output.
        block_length: Positions denoised together.
        first_end: Where positions see the whole canvas, the position behind the part that is there at first, whole
            blocks; None for all of it. The rest joins block by block, when all before it is decided and goes on.
    """

    start: int
    end: int
    max_output_end: int
    block_length: int
    first_end: int | None = None

    @property
    def length(self) -> int:
        """Positions of the canvas."""
        return self.end - self.start

    @property
    def num_blocks(self) -> int:
        """Blocks, the last of which may be cut by the end of the context."""
        return -(-self.length // self.block_length)

    def end_at(self, position: int) -> int:
        """The position behind the part of the canvas that is there when ``position`` is the first undecided one."""
        if self.first_end is None or self.first_end >= self.end:
            return self.end
        behind = max(position + 1 - self.first_end, 0)
        return min(self.first_end + -(-behind // self.block_length) * self.block_length, self.end)

    def block_index(self, position: int) -> int:
        """The block that a position belongs to."""
        return (position - self.start) // self.block_length


def canvas_start(prompt_length: int, block_length: int, *, is_on_grid: bool) -> int:
    """The first position of a canvas (see :class:`Canvas`); ``is_on_grid``: blocks lie on a grid from position 0."""
    return prompt_length // block_length * block_length if is_on_grid else prompt_length


def canvas_of(prompt_length: int, gen_length: int, max_tokens: int, block_length: int, *, is_on_grid: bool) -> Canvas:
    """The canvas of a request whose length is known."""
    start = canvas_start(prompt_length, block_length, is_on_grid=is_on_grid)
    return Canvas(start, start + gen_length, prompt_length + max_tokens, block_length)


def rest_of_canvas(
    canvas: Canvas, position: int, block_length: int, *, is_block_causal: bool, is_on_grid: bool
) -> Canvas:
    """The part of a canvas that is undecided, in blocks of another length.

    Args:
        canvas: Decided up to ``position``.
        position: Behind the last decided token, before ``canvas.max_output_end``.
        block_length: A divisor of the canvas's, so that blocks on a grid end no later; others end no later where it
            is 1.
        is_block_causal, is_on_grid: See :class:`CanvasRequest`.
    """
    start = canvas_start(position, block_length, is_on_grid=is_on_grid)
    if is_block_causal:
        num_blocks = math.ceil((canvas.max_output_end - start) / block_length)
        return Canvas(start, start + num_blocks * block_length, canvas.max_output_end, block_length)
    first_blocks = math.ceil((canvas.end_at(position) - start) / block_length)
    first_end = min(start + first_blocks * block_length, canvas.end)
    return Canvas(start, canvas.end, canvas.max_output_end, block_length, first_end)


@dataclass(frozen=True)
class DecodeShape:
    """What a policy knows of a request besides its own options.

    Attributes:
        num_blocks: Blocks of the canvas.
        block_length: Positions of a block, and an upper bound of its denoising steps.
        sub_block_length: Positions of a block that are denoised together, from left to right; None for all of them.
        decides_first_alone: Whether a block's first step decides its first position alone (shifted logits).
        is_strict: Whether a confidence that equals a static threshold does not pass.
        answer_start: Index in the output of the first position behind the last given text that a hole follows; None
            without such text.
    """

    num_blocks: int
    block_length: int
    sub_block_length: int | None = None
    decides_first_alone: bool = False
    is_strict: bool = False
    answer_start: int | None = None


class CanvasRequest(NamedTuple):
    """What a canvas is computed from.

    Attributes:
        prompt_length: Prompt tokens.
        max_tokens: The request's limit on output tokens; None when it names none.
        gen_length: The canvas length that it asks for itself; None for none.
        block_length: Positions denoised together.
        max_tokens_name: What the client calls its limit.
        sub_block_length: Positions of a block that are denoised together; None for all of them.
        is_block_causal: Whether a position sees the blocks up to its own; else it sees the whole canvas.
        can_grow: Whether the canvas may be a part of what the output may need at first.
        is_on_grid: Whether a block-causal model's blocks lie on a grid from position 0; else they begin behind the
            prompt.
    """

    prompt_length: int
    max_tokens: int | None
    gen_length: int | None
    block_length: int
    max_tokens_name: str = "max_tokens"
    sub_block_length: int | None = None
    is_block_causal: bool = False
    can_grow: bool = True
    is_on_grid: bool = True


def full_attention_canvas(asked: CanvasRequest, limits: Limits) -> Canvas:
    """The canvas where every position sees all of it: what the request asks for, else what its output needs.

    The latter is there in full at first only as far as models are used to; then it grows.

    Raises:
        InvalidOptionError: The canvas does not fit, or has a part of a block.
    """
    prompt_length, max_tokens, gen_length, block, name = asked[:5]
    limit = min(limits.max_model_len, limits.max_num_batched_tokens)
    bound = f"max_model_len {limit}"
    if limit < limits.max_model_len:
        bound = (
            f"max_num_batched_tokens {limit}, which holds both since this model refreshes them at once (the operator "
            "can raise --max-num-batched-tokens)"
        )
    room = limit - prompt_length
    if room < 1:
        raise InvalidOptionError(
            f"The prompt has {prompt_length} tokens and leaves no room for output in {bound}; shorten the prompt.",
            refusal="prompt-room",
            parameter=PROMPT,
        )
    if gen_length is not None:
        if gen_length % block:
            raise InvalidOptionError(
                f"gen_length is {gen_length}, no multiple of block_length {block}; use "
                f"{math.ceil(gen_length / block) * block}.",
                refusal="gen-length-blocks",
                parameter="gen_length",
                value=gen_length,
            )
        if gen_length > room:
            raise InvalidOptionError(
                f"gen_length is {gen_length}, but the prompt of {prompt_length} tokens leaves {room} of "
                f"{bound}; lower gen_length or shorten the prompt.",
                refusal="gen-length-room",
                parameter="gen_length",
                value=gen_length,
            )
        length = first_length = gen_length
    else:
        if max_tokens is not None and max_tokens > room:
            raise InvalidOptionError(
                f"{name} is {max_tokens}, but the prompt of {prompt_length} tokens leaves {room} of {bound}; lower "
                f"{name} or shorten the prompt.",
                refusal="max-tokens-room",
                parameter=name,
                value=max_tokens,
            )
        first_length = math.ceil(limits.first_length / block) * block
        open_ended = (limits.open_ended or room) if asked.can_grow else first_length
        wanted = open_ended if max_tokens is None else max_tokens
        length = min(math.ceil(max(wanted, limits.gen_length or 0) / block) * block, room)
        if not asked.can_grow:
            first_length = length
        if max_tokens is None:
            max_tokens = wanted
    if max_tokens is None:
        max_tokens = length
    start = prompt_length
    end = start + length
    return Canvas(start, end, start + min(max_tokens, length), block, min(start + first_length, end))


def block_causal_canvas(asked: CanvasRequest, limits: Limits) -> Canvas:
    """The canvas of a block-causal model: whole blocks, from the prompt's last, incomplete one on or behind the prompt.

    Raises:
        InvalidOptionError: The canvas does not fit.
    """
    prompt_length, max_tokens, _, block, name = asked[:5]
    limit = limits.max_model_len
    if 2 * block > limits.max_num_batched_tokens:
        raise InvalidOptionError(
            f"block_length is {block}; a step computes up to two blocks, but one forward pass holds "
            f"max_num_batched_tokens {limits.max_num_batched_tokens}: lower block_length or start the engine with a "
            "larger --max-num-batched-tokens.",
            refusal="block-length-rows",
            parameter="block_length",
            value=block,
        )
    start = canvas_start(prompt_length, block, is_on_grid=asked.is_on_grid)
    end = start + (limit - start) // block * block
    if prompt_length >= end:
        raise InvalidOptionError(
            f"The prompt has {prompt_length} tokens; its first block of {block} new ones would end at "
            f"{start + block}, beyond max_model_len {limit}: shorten the prompt.",
            refusal="prompt-room",
            parameter=PROMPT,
        )
    room = end - prompt_length
    if max_tokens is not None and max_tokens > room:
        raise InvalidOptionError(
            f"{name} is {max_tokens}, but the prompt of {prompt_length} tokens leaves {room} of "
            f"max_model_len {limit} in whole blocks of {block}; lower {name} or shorten the prompt.",
            refusal="max-tokens-room",
            parameter=name,
            value=max_tokens,
        )
    if max_tokens is None:
        max_tokens = room if limits.open_ended is None else min(limits.open_ended, room)
    max_output_end = prompt_length + max_tokens
    return Canvas(start, start + math.ceil((max_output_end - start) / block) * block, max_output_end, block)
