"""The public ops: what they promise, what they refuse, and which implementation runs.

Arguments are checked here, once for all implementations, by shape, dtype, stride and device; values are not read,
because that would make a GPU wait.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch

from csrc_triton import cpu, tables
from csrc_triton.reference import UnmaskResult

MAX_VOCABULARY = 262_144
MAX_BLOCK_LENGTH = 128
LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ID_DTYPES = (torch.int64, torch.int32)


class Implementations(NamedTuple):
    """The ops of one device."""

    confidence: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    unmask: Callable[..., UnmaskResult]
    unmask_in_tables: Callable[..., tuple[torch.Tensor, torch.Tensor, UnmaskResult]]


def confidence(
    logits: torch.Tensor,
    *,
    banned_token_id: int | None = None,
    temperature: torch.Tensor | None = None,
    noise_key: torch.Tensor | None = None,
    by_entropy: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Proposes the best token of every row and says how probable the model finds it.

    With a temperature t > 0 the proposal is the argmax of ``logit + t * g``, with g standard Gumbel noise: a sample of
    softmax(logits / t). The noise is a hash of the row's key and the vocabulary id, so a proposal depends neither on
    the batch nor on the device. The probability always comes from the plain softmax. Implementations agree on the
    hash bit for bit, on the noise and the probability up to rounding.

    A row that contains NaN, or whose allowed logits are all -inf, gets the lowest allowed id with probability 0.

    Args:
        logits: [num_rows, vocabulary], fp32, bf16 or fp16, any row stride, not modified; a logit may be -inf
            (probability 0) but not +inf. Vocabulary up to 262,144.
        banned_token_id: id that is never proposed, usually the mask token; it still counts in the softmax.
        temperature: [num_rows] fp32, >= 0; 0 means greedy. None: all rows are greedy.
        noise_key: [num_rows] int64, any value; required with ``temperature``.
        by_entropy: [num_rows] bool, rows whose confidence is 1 - H / 32, with the entropy H of the plain softmax in
            nats, whatever the proposal. None: no row's is.

    Returns:
        Token, [num_rows] int64, the lowest id among equals; its softmax probability (see ``by_entropy``), [num_rows]
        fp32 in [0, 1].

    Raises:
        ValueError: on a wrong shape, stride, device or ``banned_token_id``, or a temperature without noise key.
        TypeError: on a wrong dtype.

    Source: LLaDA, arXiv 2502.09992, low-confidence remasking; its reference decoder may propose the mask token, we
        do not. Noisy argmax with the confidence of the plain softmax: Fast-dLLM, arXiv 2505.22618. Entropy:
        EB-Sampler, arXiv 2505.24857.
    """
    if logits.dim() != 2:
        raise ValueError(f"logits: shape is {tuple(logits.shape)}, expected [num_rows, vocabulary]")
    num_rows, vocabulary = logits.shape
    if not 1 <= vocabulary <= MAX_VOCABULARY:
        raise ValueError(f"logits: vocabulary is {vocabulary}, expected 1 to {MAX_VOCABULARY}")
    _check("logits", logits, logits.shape, LOGIT_DTYPES, logits.device)
    if banned_token_id is not None:
        if not 0 <= banned_token_id < vocabulary:
            raise ValueError(f"banned_token_id is {banned_token_id}, expected 0 to {vocabulary - 1} or None")
        if vocabulary == 1:
            raise ValueError(f"banned_token_id is {banned_token_id}, but the vocabulary has no other id; use None")
    if (temperature is None) != (noise_key is None):
        given, missing = ("noise_key", "temperature") if temperature is None else ("temperature", "noise_key")
        raise ValueError(f"{given} is given but {missing} is None; pass both or neither")
    if temperature is not None and noise_key is not None:
        _check("temperature", temperature, (num_rows,), (torch.float32,), logits.device)
        _check("noise_key", noise_key, (num_rows,), (torch.int64,), logits.device)

    if by_entropy is not None:
        _check("by_entropy", by_entropy, (num_rows,), (torch.bool,), logits.device)

    return implementations(logits.device).confidence(logits, banned_token_id, temperature, noise_key, by_entropy)


def unmask(
    canvas: torch.Tensor,
    masked: torch.Tensor,
    proposal: torch.Tensor,
    confidence: torch.Tensor,
    rule: torch.Tensor,
    parameter: torch.Tensor,
    *,
    end_token_ids: torch.Tensor,
    num_needed: torch.Tensor,
    quota: torch.Tensor,
) -> UnmaskResult:
    """Takes one denoising decision for every active block and writes it into ``canvas`` and ``masked``.

    Every rule unmasks at least the most confident masked position of a block, if one is left. Equal confidences rank
    by position, lowest first; a NaN confidence counts as -1. See ``Rule`` for the rules.

    Args:
        canvas: [num_blocks, block_length], int64 or int32, written in place: token ids. Block length 1 to 128.
        masked: [num_blocks, block_length] bool, written in place: True where undecided. Ids are never compared with
            a mask token.
        proposal: [num_blocks, block_length], dtype of ``canvas`` or int64; read only where masked.
        confidence: [num_blocks, block_length] fp32 in [0, 1] or NaN; read only where masked.
        rule: [num_blocks] int8, values of ``Rule``.
        parameter: [num_blocks] fp32, read as the rule says. Equality passes a threshold: for a strict one pass the
            next larger float.
        end_token_ids: [num_blocks, num_end_tokens] int64: tokens that end the output, -1 for none.
        num_needed: [num_blocks] int32, 0 to block_length: leading positions the request still has to output.
        quota: [num_blocks] int32: so many positions, the most confident ones, are unmasked whatever the rule says; 0
            and 1 ask for no more than the promise above.

    Returns:
        Three counts per block, see ``UnmaskResult``.

    Raises:
        ValueError: on a wrong shape, stride or device.
        TypeError: on a wrong dtype.

    Sources: LLaDA, arXiv 2502.09992 (``TOP_K``); SDAR, arXiv 2510.06303 (``quota``); Fast-dLLM++, arXiv 2606.02955
        (``JOINT_BOUND``); Fast-dLLM, arXiv 2505.22618 (``THRESHOLD`` and ``FACTOR``). Its code takes the last candidate
        even when the factor test fails there; we apply the test as published.
    """
    if canvas.dim() != 2 or not 1 <= canvas.shape[1] <= MAX_BLOCK_LENGTH:
        limit = f"[num_blocks, 1 to {MAX_BLOCK_LENGTH}]"
        raise ValueError(f"canvas: shape is {tuple(canvas.shape)}, expected {limit}")
    shape, device = canvas.shape, canvas.device
    row = shape[:1]
    _check("canvas", canvas, shape, ID_DTYPES, device)
    _check("masked", masked, shape, (torch.bool,), device)
    _check("proposal", proposal, shape, (canvas.dtype, torch.int64), device)
    _check("confidence", confidence, shape, (torch.float32,), device)
    _check("rule", rule, row, (torch.int8,), device)
    _check("parameter", parameter, row, (torch.float32,), device)
    if end_token_ids.dim() != 2:
        raise ValueError(f"end_token_ids: shape is {tuple(end_token_ids.shape)}, expected [num_blocks, num_end_tokens]")
    _check("end_token_ids", end_token_ids, (*row, end_token_ids.shape[1]), (torch.int64,), device)
    _check("num_needed", num_needed, row, (torch.int32,), device)
    _check("quota", quota, row, (torch.int32,), device)

    run = implementations(device).unmask
    return run(canvas, masked, proposal, confidence, rule, parameter, end_token_ids, num_needed, quota)


def implementations(device: torch.device) -> Implementations:
    """The ops of a device without argument checks, for a hot path that builds its own arguments.

    ``confidence`` and ``unmask`` take the same arguments in the same order, all positional; ``unmask_in_tables`` those
    of ``tables.unmask_in_tables`` but the first.
    """
    if device.type == "cpu":
        return Implementations(cpu.confidence, cpu.unmask, cpu.unmask_in_tables)
    from csrc_triton import confidence_kernel, unmask_kernel  # deferred: Triton without a GPU has no driver

    in_tables = functools.partial(tables.unmask_in_tables, unmask_kernel.unmask)
    return Implementations(confidence_kernel.confidence, unmask_kernel.unmask, in_tables)


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
