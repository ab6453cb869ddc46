"""The public ops: what they promise, what they refuse, and which implementation runs.

Arguments are checked here, once for all implementations, by shape, dtype, stride and device; values are not read,
because that would make a GPU wait.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from csrc_triton import cpu, reference
from csrc_triton.types import WITHOUT_MARGIN, Blocks, Partial, Proposals, Rules, UnmaskResult

MAX_VOCABULARY = 262_144
MAX_BLOCK_LENGTH = 128
LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Implementations(NamedTuple):
    """The ops of one device."""

    confidence: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    unmask: Callable[[Blocks, Proposals, Rules], tuple[torch.Tensor, torch.Tensor, UnmaskResult]]
    lm_head_confidence: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    lm_head_partials: Callable[..., torch.Tensor]
    combine_partials: Callable[..., tuple[torch.Tensor, torch.Tensor]]


def confidence(
    logits: torch.Tensor,
    *,
    excluded_token_id: int | None = None,
    temperature: torch.Tensor | None = None,
    noise_key: torch.Tensor | None = None,
    by_entropy: torch.Tensor | None = None,
    margin: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Proposes the best token of every row and says how probable the model finds it.

    With a temperature t > 0 the proposal is the argmax of ``logit + t * g``, with g standard Gumbel noise: a sample of
    softmax(logits / t). The noise is a hash of the row's key and the vocabulary id, so a proposal depends neither on
    the batch nor on the device. The probability always comes from the plain softmax. Implementations agree on the
    hash bit for bit, on the noise and the probability up to rounding.

    A row's result depends on that row alone, bit for bit: not on the number of rows, nor on what others ask for. In
    particular a greedy row gets the same with ``temperature`` 0 and without it, one without entropy with ``by_entropy``
    False and without it.

    A row that contains NaN, or whose allowed logits are all -inf, gets the lowest allowed id with probability 0.

    Args:
        logits: [num_rows, vocabulary], fp32, bf16 or fp16, any row stride, not modified; a logit may be -inf
            (probability 0) but not +inf. Vocabulary up to 262,144.
        excluded_token_id: id that is never proposed, usually the mask token; it still counts in the softmax.
        temperature: [num_rows] fp32, >= 0; 0 means greedy. None: all rows are greedy.
        noise_key: [num_rows] int64, any value; required with ``temperature``.
        by_entropy: [num_rows] bool, rows whose confidence is 1 - H / 32, with the entropy H of the plain softmax in
            nats, whatever the proposal. None: no row's is.
        margin: [num_rows] fp32, written: the largest logit of an allowed id less the largest of the other allowed ids,
            without noise; +inf where no two are above -inf, or the row contains NaN. None: it is not computed.

    Returns:
        Token, [num_rows] int64, the lowest id among equals; its softmax probability (see ``by_entropy``), [num_rows]
        fp32 in [0, 1].

    Raises:
        ValueError: on a wrong shape, stride, device or ``excluded_token_id``, or a temperature without noise key.
        TypeError: on a wrong dtype.

    Source: LLaDA, arXiv 2502.09992, low-confidence remasking; its reference decoder may propose the mask token, we
        do not. Noisy argmax with the confidence of the plain softmax: Fast-dLLM, arXiv 2505.22618. Entropy:
        EB-Sampler, arXiv 2505.24857.
    """
    if logits.dim() != 2:
        raise ValueError(f"logits: shape is {tuple(logits.shape)}, expected [num_rows, vocabulary]")
    vocabulary = logits.shape[1]
    if not 1 <= vocabulary <= MAX_VOCABULARY:
        raise ValueError(f"logits: vocabulary is {vocabulary}, expected 1 to {MAX_VOCABULARY}")
    _check("logits", logits, logits.shape, LOGIT_DTYPES, logits.device)
    _check_row_options(logits, vocabulary, excluded_token_id, temperature, noise_key, by_entropy)
    _check_margin(margin, logits)

    options = excluded_token_id, temperature, noise_key, by_entropy, margin
    return implementations(logits.device).confidence(logits, *options)


def lm_head_confidence(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    *,
    excluded_token_id: int | None = None,
    temperature: torch.Tensor | None = None,
    noise_key: torch.Tensor | None = None,
    by_entropy: torch.Tensor | None = None,
    margin: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``confidence`` of the logits ``hidden @ weight.T``, which a GPU does not write.

    Products are summed in fp32 and rounded to the dtype of ``hidden``, as a matrix product that writes logits rounds
    them; the order of the sum may be another one, so a logit may be its neighbor. fp32 is multiplied as fp32, not TF32.
    On a GPU a row's result depends on that row and the weight alone, bit for bit, as that of ``confidence`` does.

    Args:
        hidden: [num_rows, hidden_size], fp32, bf16 or fp16, any row stride.
        weight: [vocabulary, hidden_size], the dtype of ``hidden``, any row stride. Vocabulary up to 262,144.
        excluded_token_id: See ``confidence``, and for the other arguments.
        temperature: [num_rows] fp32.
        noise_key: [num_rows] int64.
        by_entropy: [num_rows] bool.
        margin: [num_rows] fp32, written.

    Returns:
        Token, [num_rows] int64, and confidence, [num_rows] fp32.

    Raises:
        ValueError: on a wrong shape, stride, device or ``excluded_token_id``, or a temperature without noise key.
        TypeError: on a wrong dtype.

    Source: online softmax over tiles, arXiv 1805.02867; cross entropy without logits, arXiv 2411.09009.
    """
    _check_lm_head(hidden, weight, 0, None)
    _check_row_options(hidden, weight.shape[0], excluded_token_id, temperature, noise_key, by_entropy)
    _check_margin(margin, hidden)
    return implementations(hidden.device).lm_head_confidence(
        hidden,
        weight,
        excluded_token_id=excluded_token_id,
        temperature=temperature,
        noise_key=noise_key,
        by_entropy=by_entropy,
        margin=margin,
    )


def lm_head_partials(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    *,
    first_id: int = 0,
    vocabulary: int | None = None,
    excluded_token_id: int | None = None,
    temperature: torch.Tensor | None = None,
    noise_key: torch.Tensor | None = None,
    by_entropy: torch.Tensor | None = None,
    with_margin: bool = False,
) -> torch.Tensor:
    """The part of ``lm_head_confidence`` that a rank does which holds a shard of the vocabulary.

    Ranks exchange partials in place of logits: ``combine_partials`` of those of all shards, joined along their first
    dimension, is the result of the whole weight. Its token is the same; its confidence is up to rounding, and bit for
    bit where every shard but the last is a multiple of a chunk. With equal shards the partials of all ranks have one
    shape, also where the last ones end in padding.

    Args:
        hidden: [num_rows, hidden_size], fp32, bf16 or fp16, any row stride; the same on every rank.
        weight: [num_weight_rows, hidden_size], the dtype of ``hidden``, any row stride.
        first_id: The id of the first row of ``weight``.
        vocabulary: Number of ids of all shards, up to 262,144; rows of ``weight`` from this id on are padding and do
            not count. None: the shard is the last one and has no padding.
        excluded_token_id: An id of any shard; see ``confidence``, and for the other arguments.
        temperature: [num_rows] fp32.
        noise_key: [num_rows] int64.
        by_entropy: [num_rows] bool.
        with_margin: Whether ``combine_partials`` will be asked for margins.

    Returns:
        [num_chunks, len(Partial), num_rows] fp32, see ``Partial``, or ``WITHOUT_MARGIN`` of its numbers. The chunks are
            an implementation's own.

    Raises:
        ValueError: on a wrong shape, stride, device, ``first_id``, ``vocabulary`` or ``excluded_token_id``, or a
            temperature without noise key.
        TypeError: on a wrong dtype.
    """
    total = _check_lm_head(hidden, weight, first_id, vocabulary)
    _check_row_options(hidden, total, excluded_token_id, temperature, noise_key, by_entropy)
    return implementations(hidden.device).lm_head_partials(
        hidden,
        weight,
        first_id=first_id,
        vocabulary=total,
        excluded_token_id=excluded_token_id,
        temperature=temperature,
        noise_key=noise_key,
        by_entropy=by_entropy,
        with_margin=with_margin,
    )


def combine_partials(
    partials: torch.Tensor,
    *,
    excluded_token_id: int | None = None,
    by_entropy: torch.Tensor | None = None,
    margin: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token and confidence of rows whose partials are those of all ids.

    Args:
        partials: [num_chunks, len(Partial) or WITHOUT_MARGIN, num_rows] fp32, contiguous, from ``lm_head_partials``; no
            id in two chunks.
        excluded_token_id: As the partials were made with.
        by_entropy: [num_rows] bool, likewise.
        margin: [num_rows] fp32, written; only of partials that were made with it. See ``confidence``.

    Returns:
        Token, [num_rows] int64, and confidence, [num_rows] fp32; see ``confidence``.

    Raises:
        ValueError: on a wrong shape, stride or device.
        TypeError: on a wrong dtype.
    """
    numbers = (len(Partial),) if margin is not None else (WITHOUT_MARGIN, len(Partial))
    if partials.dim() != 3 or partials.shape[0] < 1 or partials.shape[1] not in numbers:
        expected = f"[at least 1, {' or '.join(map(str, numbers))}, num_rows]"
        raise ValueError(f"partials: shape is {tuple(partials.shape)}, expected {expected}")
    _check("partials", partials, partials.shape, (torch.float32,), partials.device)
    if not partials.is_contiguous():
        raise ValueError(f"partials: strides are {partials.stride()}, expected contiguous; call .contiguous()")
    if by_entropy is not None:
        _check("by_entropy", by_entropy, partials.shape[2:], (torch.bool,), partials.device)
    if margin is not None:
        _check("margin", margin, partials.shape[2:], (torch.float32,), partials.device)
    return implementations(partials.device).combine_partials(
        partials, excluded_token_id=excluded_token_id, by_entropy=by_entropy, margin=margin
    )


def unmask(blocks: Blocks, proposals: Proposals, rules: Rules) -> tuple[torch.Tensor, torch.Tensor, UnmaskResult]:
    """Takes one denoising decision for every active block and writes it into ``cells`` and ``masked``.

    Every rule unmasks at least the most confident masked position of a block, if one is left. Equal confidences rank
    by position, lowest first; a NaN confidence counts as -1. See ``Rule`` for the rules. Token ids are never compared
    with a mask token.

    A masked position without logits ranks last and is not unmasked, unless the block has no other masked position;
    the first of them then becomes token 0.

    Args:
        blocks: The blocks, rows of tables that are written in place.
        proposals: Tokens and confidences of the positions with logits; only those of masked positions are read.
        rules: Rule, parameter and least number of positions of each block.

    Returns:
        The blocks' tokens after the decision, [num_blocks, block_length] int32; the confidences at their positions,
        [num_blocks, block_length] fp32, ``NO_CONFIDENCE`` where there are no logits; three counts per block, see
        ``UnmaskResult``.

    Raises:
        ValueError: on a wrong shape, stride or device.
        TypeError: on a wrong dtype.

    Sources: LLaDA, arXiv 2502.09992 (``TOP_K``); SDAR, arXiv 2510.06303 and its code (``min_unmask``,
        ``ENTROPY_BOUND``); Fast-dLLM++, arXiv 2606.02955 (``JOINT_BOUND``); Fast-dLLM, arXiv 2505.22618 (``THRESHOLD``
        and ``FACTOR``). Its code takes the last candidate even when the factor test fails there; we apply the test as
        published.
    """
    shape, device = blocks.canvas_index.shape, blocks.cells.device
    if len(shape) != 2 or not 1 <= shape[1] <= MAX_BLOCK_LENGTH:
        limit = f"[num_blocks, 1 to {MAX_BLOCK_LENGTH}]"
        raise ValueError(f"canvas_index: shape is {tuple(shape)}, expected {limit}")
    _check("canvas_index", blocks.canvas_index, shape, (torch.int64,), device)
    row = shape[:1]
    if blocks.cells.dim() != 1:
        raise ValueError(f"cells: shape is {tuple(blocks.cells.shape)}, expected [num_cells]")
    _check("cells", blocks.cells, blocks.cells.shape, (torch.int32,), device)
    if blocks.masked.dim() != 2 or blocks.masked.shape[1] < shape[1]:
        raise ValueError(f"masked: shape is {tuple(blocks.masked.shape)}, expected [num_slots, at least {shape[1]}]")
    _check("masked", blocks.masked, blocks.masked.shape, (torch.bool,), device)
    _check("slots", blocks.slots, row, (torch.int64,), device)
    if blocks.end_token_ids.dim() != 2:
        actual = tuple(blocks.end_token_ids.shape)
        raise ValueError(f"end_token_ids: shape is {actual}, expected [num_blocks, num_end_tokens]")
    _check("end_token_ids", blocks.end_token_ids, (*row, blocks.end_token_ids.shape[1]), (torch.int64,), device)
    _check("num_output_positions", blocks.num_output_positions, row, (torch.int32,), device)

    if proposals.position.dim() != 1:
        raise ValueError(f"position: shape is {tuple(proposals.position.shape)}, expected [num_proposals]")
    _check("position", proposals.position, proposals.position.shape, (torch.int64,), device)
    _check("token", proposals.token, proposals.position.shape, (torch.int64,), device)
    _check("confidence", proposals.confidence, proposals.position.shape, (torch.float32,), device)

    _check("rule", rules.rule, row, (torch.int8,), device)
    _check("parameter", rules.parameter, row, (torch.float32,), device)
    _check("min_unmask", rules.min_unmask, row, (torch.int32,), device)

    return implementations(device).unmask(blocks, proposals, rules)


def implementations(device: torch.device) -> Implementations:
    """The ops of a device without argument checks, for a hot path that builds its own arguments.

    They take the arguments of the public ops; those of ``confidence`` may be positional, in the same order.
    """
    if device.type == "cpu":
        return Implementations(
            cpu.confidence,
            cpu.unmask,
            cpu.lm_head_confidence,
            reference.lm_head_partials,
            reference.combine_partials,
        )
    # deferred: Triton without a GPU has no driver
    from csrc_triton import confidence_kernel, lm_head_kernel, partials_kernel, unmask_kernel

    return Implementations(
        confidence_kernel.confidence,
        unmask_kernel.unmask,
        lm_head_kernel.lm_head_confidence,
        lm_head_kernel.lm_head_partials,
        partials_kernel.combine_partials,
    )


def _check_lm_head(hidden: torch.Tensor, weight: torch.Tensor, first_id: int, vocabulary: int | None) -> int:
    """Refuses what is no product of rows and a shard; returns the number of ids of all shards."""
    if hidden.dim() != 2 or hidden.shape[1] < 1:
        raise ValueError(f"hidden: shape is {tuple(hidden.shape)}, expected [num_rows, hidden_size]")
    _check("hidden", hidden, hidden.shape, LOGIT_DTYPES, hidden.device)
    if weight.dim() != 2 or weight.shape[0] < 1 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"weight: shape is {tuple(weight.shape)}, expected [vocabulary, {hidden.shape[1]}]")
    _check("weight", weight, weight.shape, (hidden.dtype,), hidden.device)
    if first_id < 0:
        raise ValueError(f"first_id is {first_id}, expected at least 0")
    total = first_id + weight.shape[0] if vocabulary is None else vocabulary
    if not 1 <= total <= MAX_VOCABULARY:
        raise ValueError(f"vocabulary is {total}, expected 1 to {MAX_VOCABULARY}")
    return total


def _check_row_options(
    rows: torch.Tensor,
    vocabulary: int,
    excluded_token_id: int | None,
    temperature: torch.Tensor | None,
    noise_key: torch.Tensor | None,
    by_entropy: torch.Tensor | None,
) -> None:
    """Refuses options that do not fit ``rows``, [num_rows, ...], and the vocabulary."""
    num_rows, device = rows.shape[:1], rows.device
    if excluded_token_id is not None:
        if not 0 <= excluded_token_id < vocabulary:
            raise ValueError(f"excluded_token_id is {excluded_token_id}, expected 0 to {vocabulary - 1} or None")
        if vocabulary == 1:
            raise ValueError(f"excluded_token_id is {excluded_token_id}, but the vocabulary has no other id; use None")
    if (temperature is None) != (noise_key is None):
        given, missing = ("noise_key", "temperature") if temperature is None else ("temperature", "noise_key")
        raise ValueError(f"{given} is given but {missing} is None; pass both or neither")
    if temperature is not None and noise_key is not None:
        _check("temperature", temperature, num_rows, (torch.float32,), device)
        _check("noise_key", noise_key, num_rows, (torch.int64,), device)
    if by_entropy is not None:
        _check("by_entropy", by_entropy, num_rows, (torch.bool,), device)


def _check_margin(margin: torch.Tensor | None, rows: torch.Tensor) -> None:
    """Refuses a tensor for the margins of ``rows``, [num_rows, ...], that they do not fit."""
    if margin is not None:
        _check("margin", margin, rows.shape[:1], (torch.float32,), rows.device)


def _check(
    name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], device: torch.device
) -> None:
    """Refuses a tensor the implementations could not read as described; the message names value and limit."""
    if tensor.shape != shape:
        raise ValueError(f"{name}: shape is {tuple(tensor.shape)}, expected {tuple(shape)}")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name}: dtype is {tensor.dtype}, expected {' or '.join(map(str, dtypes))}")
    if tensor.device != device:
        raise ValueError(f"{name}: device is {tensor.device}, expected {device}")
    if shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name}: last stride is {tensor.stride(-1)}, expected 1; call .contiguous()")
