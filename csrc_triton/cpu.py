"""The CPU path of every op: loops that Numba compiles, NumPy where it is as fast.

Called by ``csrc_triton.ops``, which has checked the arguments. A small batch takes about ten NumPy calls' time, so the
loops are one call each.
"""

import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch

from csrc_triton.noise import GUMBEL_MAX, gumbel_noise_np, mix_key
from csrc_triton.types import (
    ENTROPY_SCALE,
    NO_CONFIDENCE,
    UNCERTAINTY_UNITS,
    Blocks,
    Proposals,
    Rule,
    Rules,
    UnmaskResult,
)

CHUNK_ELEMENTS = 1 << 18  # 1 MiB of fp32: a converted chunk stays in the second-level cache
LOG2_E = np.float32(1.4426950408889634)
# Taylor series of 2**f; its remainder is below 6e-9 for |f| <= 1/2.
C0, C1, C2, C3, C4, C5, C6, C7 = (np.float32(math.log(2) ** k / math.factorial(k)) for k in range(8))
HALF, ONE = np.float32(0.5), np.float32(1)
SMALLEST_EXPONENT = np.float32(-126)
MANTISSA_BITS, EXPONENT_BIAS = np.int32(23), np.int32(127)
SCALE, SMALLEST_DIFFERENCE = np.float32(ENTROPY_SCALE), np.float32(-87)
WITHOUT_LOGITS = np.float32(NO_CONFIDENCE)
THRESHOLD, TOP_K = int(Rule.THRESHOLD), int(Rule.TOP_K)
FACTOR, JOINT_BOUND = int(Rule.FACTOR), int(Rule.JOINT_BOUND)


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Numba's decorator for machine code that is kept on disk, or made anew where no folder can be written to."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            return numba.njit(function, cache=True, **options)
        except RuntimeError:  # no folder for the cache
            return numba.njit(function, **options)

    return decorate


def confidence(
    logits: torch.Tensor,
    excluded_token_id: int | None = None,
    temperature: torch.Tensor | None = None,
    noise_key: torch.Tensor | None = None,
    by_entropy: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``ops.confidence``. NumPy's argmax is vectorized, a compiled loop for it is not."""
    num_rows, vocabulary = logits.shape
    token = torch.empty(num_rows, dtype=torch.int64)
    probability = torch.empty(num_rows, dtype=torch.float32)
    token_np, probability_np = token.numpy(), probability.numpy()
    excluded = -1 if excluded_token_id is None else excluded_token_id
    logits = logits.detach()
    is_plain = logits.dtype == torch.float32 and logits.is_contiguous()
    chunk_rows = max(1, num_rows if is_plain else min(num_rows, CHUNK_ELEMENTS // vocabulary))
    buffer = None if is_plain else torch.empty(chunk_rows, vocabulary)

    for start in range(0, num_rows, chunk_rows):
        stop = min(start + chunk_rows, num_rows)
        chunk = logits if buffer is None else buffer[: stop - start].copy_(logits[start:stop])
        chunk_np, chosen = chunk.numpy(), token_np[start:stop]
        best = chunk_np.argmax(axis=-1)  # NaN counts as the maximum
        _choose_allowed(chunk_np, best, excluded, chosen)
        if temperature is not None and noise_key is not None:
            noise = temperature[start:stop].numpy(), noise_key[start:stop].numpy()
            chosen[:] = _sample(chunk_np, chosen, *noise, excluded_token_id)
        _choose_probability(chunk_np, best, excluded, chosen, probability_np[start:stop])
        if by_entropy is not None:
            _replace_by_entropy(chunk_np, best, by_entropy.numpy()[start:stop], probability_np[start:stop])
    return token, probability


def lm_head_confidence(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    excluded_token_id: int | None = None,
    temperature: torch.Tensor | None = None,
    noise_key: torch.Tensor | None = None,
    by_entropy: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``ops.lm_head_confidence``; writes the logits, which a CPU's memory has room for."""
    return confidence(hidden @ weight.T, excluded_token_id, temperature, noise_key, by_entropy)


@compiled()
def _choose_allowed(logits: np.ndarray, best: np.ndarray, excluded: int, token: np.ndarray) -> None:
    """The argmax of every row besides the excluded id; NaN counts as the maximum."""
    for row in range(logits.shape[0]):
        token[row] = best[row]
        if best[row] == excluded:
            line = logits[row]
            choice = 1 if excluded == 0 else 0
            for k in range(choice + 1, line.size):
                if k != excluded and (line[k] > line[choice] or (np.isnan(line[k]) and not np.isnan(line[choice]))):
                    choice = k
            token[row] = choice


@compiled()
def _choose_probability(
    logits: np.ndarray, best: np.ndarray, excluded: int, token: np.ndarray, probability: np.ndarray
) -> None:
    """The probability of every row's token; rows with NaN and rows without a finite logit get the lowest id, 0."""
    for row in range(logits.shape[0]):
        line = logits[row]
        largest = line[best[row]]
        share = _exp2((line[token[row]] - largest) * LOG2_E) / _sum_exp(line, largest)
        if np.isnan(share):
            token[row] = 1 if excluded == 0 else 0
            share = np.float32(0)
        elif line[token[row]] == -np.inf:
            share = np.float32(0)
        probability[row] = share


@compiled()
def _replace_by_entropy(logits: np.ndarray, best: np.ndarray, by_entropy: np.ndarray, probability: np.ndarray) -> None:
    """1 - H / 32 of the rows that ask for it; those without a proposal keep their 0."""
    for row in range(logits.shape[0]):
        if by_entropy[row] and probability[row] > 0:
            largest = logits[row, best[row]]
            total = _sum_exp(logits[row], largest)
            entropy = np.log(total) - _sum_x_exp(logits[row], largest) / total
            probability[row] = min(ONE - entropy / SCALE, ONE)


@compiled(fastmath={"reassoc", "contract", "nsz"})
def _sum_x_exp(line: np.ndarray, largest: np.float32) -> np.float32:
    """Sum of x exp(x), x = line - largest, vectorized."""
    total = np.float32(0)
    for k in range(line.size):
        x = max(line[k] - largest, SMALLEST_DIFFERENCE)
        total += x * _exp2(x * LOG2_E)
    return total


@compiled(fastmath={"reassoc", "contract", "nsz"})
def _sum_exp(line: np.ndarray, largest: np.float32) -> np.float32:
    """Sum of exp(line - largest), vectorized; NaN if one of them is."""
    total = np.float32(0)
    for k in range(line.size):
        total += _exp2((line[k] - largest) * LOG2_E)
    return total


@compiled(fastmath={"contract", "nsz"}, inline="always")
def _exp2(exponent: np.float32) -> np.float32:
    """2**exponent up to 2e-7, for an exponent of at most 0; below -126 it is 2**-126, NaN stays NaN."""
    if exponent < SMALLEST_EXPONENT:
        exponent = SMALLEST_EXPONENT
    whole = np.floor(exponent + HALF)
    f = exponent - whole
    series = ((((((C7 * f + C6) * f + C5) * f + C4) * f + C3) * f + C2) * f + C1) * f + C0
    return series * np.int32((np.int32(whole) + EXPONENT_BIAS) << MANTISSA_BITS).view(np.float32)


def _sample(
    logits: np.ndarray, best: np.ndarray, temperature: np.ndarray, noise_key: np.ndarray, excluded_token_id: int | None
) -> np.ndarray:
    """Argmax of every row under Gumbel noise; ``best`` is its argmax without, kept where the temperature is 0.

    Noise is bounded, so it is computed only for ids that can still overtake the noisy best one.
    """
    top = logits[np.arange(best.size), best].astype(np.float64)
    first, second = (word.astype(np.uint32) for word in mix_key(noise_key))
    to_beat = top + temperature * gumbel_noise_np(first, second, best)
    slack = 1e-6 * (1 + np.abs(top))  # rounding of the fp32 scores
    cutoff = (to_beat - temperature * GUMBEL_MAX - slack).astype(np.float32)
    token = best.copy()
    for row in np.flatnonzero((temperature > 0) & np.isfinite(top)):
        ids = np.flatnonzero(logits[row] >= cutoff[row])
        score = logits[row, ids] + temperature[row] * gumbel_noise_np(first[row : row + 1], second[row : row + 1], ids)
        if excluded_token_id is not None:
            score[ids == excluded_token_id] = -np.inf
        token[row] = ids[score.argmax()]
    return token


def unmask(blocks: Blocks, proposals: Proposals, rules: Rules) -> tuple[torch.Tensor, torch.Tensor, UnmaskResult]:
    """See ``ops.unmask``."""
    canvas = torch.empty(blocks.canvas_index.shape, dtype=torch.int32)
    confidence = torch.empty(blocks.canvas_index.shape, dtype=torch.float32)
    counts = torch.empty(3, canvas.shape[0], dtype=torch.int32)
    _unmask(
        Blocks._make(map(torch.Tensor.numpy, blocks)),
        Proposals._make(map(torch.Tensor.numpy, proposals)),
        Rules._make(map(torch.Tensor.numpy, rules)),
        canvas.numpy(),
        confidence.numpy(),
        counts.numpy(),
    )
    return canvas, confidence, UnmaskResult(*counts)


@compiled()
def _unmask(
    blocks: Blocks, proposals: Proposals, rules: Rules, canvas: np.ndarray, confidence: np.ndarray, counts: np.ndarray
) -> None:
    """Fills the last three; the tensors of the others are arrays here."""
    num_blocks, block_length = canvas.shape
    token = np.zeros(canvas.shape, np.int64)
    confidence[:] = WITHOUT_LOGITS
    for n in range(len(proposals.position)):
        row, k = divmod(proposals.position[n], block_length)
        token[row, k], confidence[row, k] = proposals.token[n], proposals.confidence[n]
    order = np.empty(block_length, np.int64)  # masked positions, the most confident first
    score = np.empty(block_length, np.float32)  # of those
    for row in range(num_blocks):
        cell, masked = blocks.canvas_index[row], blocks.masked[blocks.slots[row]]
        num_masked = 0
        for k in range(block_length):
            canvas[row, k] = blocks.cells[cell[k]]
            if not masked[k]:
                continue
            value = -ONE if np.isnan(confidence[row, k]) else confidence[row, k]
            place = num_masked
            while place > 0 and score[place - 1] < value:
                order[place], score[place] = order[place - 1], score[place - 1]
                place -= 1
            order[place], score[place] = k, value
            num_masked += 1
        num_unmasked = _count_accepted(score[:num_masked], rules.rule[row], rules.parameter[row], rules.min_unmask[row])
        for k in order[:num_unmasked]:
            canvas[row, k] = token[row, k]
            blocks.cells[cell[k]] = token[row, k]
            masked[k] = False
        num_output_positions = int(blocks.num_output_positions[row])
        num_ready = num_output_positions
        for k in range(num_output_positions):
            if masked[k]:
                num_ready = 0
                break
            is_end = False
            for end in blocks.end_token_ids[row]:
                is_end |= end >= 0 and canvas[row, k] == end
            if is_end:
                num_ready = k + 1
                break
        counts[0, row], counts[1, row], counts[2, row] = num_unmasked, num_masked - num_unmasked, num_ready


@compiled()
def _count_accepted(ranked: np.ndarray, rule: int, parameter: np.float32, min_unmask: int) -> int:
    """How many of the masked positions to unmask; ``ranked`` has their confidences, descending."""
    num_accepted = min(1, ranked.size)
    total = np.int64(0)
    for n in range(1, ranked.size + 1):
        if ranked[n - 1] <= WITHOUT_LOGITS:
            break
        if rule == THRESHOLD:
            passes = ranked[n - 1] >= parameter
        elif rule == TOP_K:
            passes = np.float32(n) <= parameter
        elif rule == FACTOR:
            passes = np.float32(n + 1) * (ONE - ranked[n - 1]) < parameter
        else:
            uncertainty = np.int64(np.float64(ONE - ranked[n - 1]) * UNCERTAINTY_UNITS)
            total += uncertainty
            bound = total + uncertainty if rule == JOINT_BOUND else total
            passes = bound < np.float64(parameter) * UNCERTAINTY_UNITS
        if passes or n <= min_unmask:
            num_accepted = n
    return num_accepted
