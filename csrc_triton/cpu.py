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
    CHOSEN,
    ENTROPY_SCALE,
    NO_CONFIDENCE,
    UNCERTAINTY_UNITS,
    Blocks,
    Grids,
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
# The bits of an fp32 are an integer of the same order once those besides the sign are flipped where it is set.
SIGN_SHIFT, ALL_BUT_SIGN = np.int32(31), np.int32(0x7FFFFFFF)
LOWEST_KEY = np.float32(-np.inf).view(np.int32) ^ ALL_BUT_SIGN
SCALE, SMALLEST_DIFFERENCE = np.float32(ENTROPY_SCALE), np.float32(-87)
WITHOUT_LOGITS, IS_CHOSEN = np.float32(NO_CONFIDENCE), np.float32(CHOSEN)
THRESHOLD, TOP_K = int(Rule.THRESHOLD), int(Rule.TOP_K)
FACTOR, JOINT_BOUND = int(Rule.FACTOR), int(Rule.JOINT_BOUND)


def compiled(*signature: str, **options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Numba's decorator for machine code that is kept on disk, or made anew where no folder can be written to.

    With a signature it is made when the module is imported, else when the function is first called.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            return numba.njit(*signature, cache=True, **options)(function)
        except RuntimeError:  # no folder for the cache
            return numba.njit(*signature, **options)(function)

    return decorate


def confidence(
    logits: torch.Tensor,
    excluded_token_id: int | None = None,
    temperature: torch.Tensor | None = None,
    noise_key: torch.Tensor | None = None,
    by_entropy: torch.Tensor | None = None,
    margin: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``ops.confidence``. NumPy's argmax is vectorized, a compiled loop for it is not."""
    num_rows, vocabulary = logits.shape
    token_np, probability_np = np.empty(num_rows, np.int64), np.empty(num_rows, np.float32)
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
        if margin is not None:
            _find_margins(chunk_np, best, chosen, excluded, margin.numpy()[start:stop])
        if temperature is not None and noise_key is not None:
            noise = temperature[start:stop].numpy(), noise_key[start:stop].numpy()
            chosen[:] = _sample(chunk_np, chosen, *noise, excluded_token_id)
        _choose_probability(chunk_np, best, excluded, chosen, probability_np[start:stop])
        if by_entropy is not None:
            _replace_by_entropy(chunk_np, best, by_entropy.numpy()[start:stop], probability_np[start:stop])
    return torch.from_numpy(token_np), torch.from_numpy(probability_np)


def lm_head_confidence(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    excluded_token_id: int | None = None,
    temperature: torch.Tensor | None = None,
    noise_key: torch.Tensor | None = None,
    by_entropy: torch.Tensor | None = None,
    margin: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``ops.lm_head_confidence``; writes the logits, which a CPU's memory has room for."""
    return confidence(hidden @ weight.T, excluded_token_id, temperature, noise_key, by_entropy, margin)


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
def _find_margins(logits: np.ndarray, best: np.ndarray, token: np.ndarray, excluded: int, margin: np.ndarray) -> None:
    """How far the best allowed logit of every row, that of ``token``, is above the second best.

    ``best`` is the argmax of all ids, where NaN counts as the maximum.
    """
    for row in range(logits.shape[0]):
        line = logits[row]
        margin[row] = np.inf
        if np.isnan(line[best[row]]):
            continue
        low, high = min(token[row], excluded), max(token[row], excluded)
        if low < 0:
            low = high
        second = max(_largest(line[:low]), _largest(line[low + 1 : high]), _largest(line[high + 1 :]))
        if second > -np.inf:
            margin[row] = line[token[row]] - second


@compiled()
def _largest(line: np.ndarray) -> np.float32:
    """The largest fp32, -inf of none; there is no NaN. A loop over integers of the same order is vectorized."""
    bits, found = line.view(np.int32), LOWEST_KEY
    for k in range(bits.size):
        found = max(found, bits[k] ^ ((bits[k] >> SIGN_SHIFT) & ALL_BUT_SIGN))
    return np.int32(found ^ ((found >> SIGN_SHIFT) & ALL_BUT_SIGN)).view(np.float32)


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
    shape = blocks.canvas_index.shape
    canvas, confidence = np.empty(shape, np.int32), np.empty(shape, np.float32)
    counts = [np.empty(shape[0], np.int32) for _ in UnmaskResult._fields]
    _unmask(*map(torch.Tensor.numpy, (*blocks, *proposals, *rules)), canvas, confidence, *counts)
    found = map(torch.from_numpy, counts)
    return torch.from_numpy(canvas), torch.from_numpy(confidence), UnmaskResult(*found)


@compiled()
def _unmask(
    cells: np.ndarray,
    all_masked: np.ndarray,
    slots: np.ndarray,
    canvas_index: np.ndarray,
    end_token_ids: np.ndarray,
    output_positions: np.ndarray,
    position: np.ndarray,
    proposed: np.ndarray,
    proposed_confidence: np.ndarray,
    rule: np.ndarray,
    parameter: np.ndarray,
    min_unmask: np.ndarray,
    canvas: np.ndarray,
    confidence: np.ndarray,
    all_unmasked: np.ndarray,
    all_left: np.ndarray,
    all_ready: np.ndarray,
) -> None:
    """Fills the last five; the others are what ``Blocks``, ``Proposals`` and ``Rules`` have, in this order.

    Arrays one by one: a call takes less of them than of tuples.
    """
    num_blocks, block_length = canvas.shape
    token = np.zeros(canvas.shape, np.int64)
    confidence[:] = WITHOUT_LOGITS
    for n in range(len(position)):
        row, k = divmod(position[n], block_length)
        token[row, k], confidence[row, k] = proposed[n], proposed_confidence[n]
    order = np.empty(block_length, np.int64)  # masked positions, the most confident first
    score = np.empty(block_length, np.float32)  # of those
    for row in range(num_blocks):
        cell, masked = canvas_index[row], all_masked[slots[row]]
        num_masked = 0
        for k in range(block_length):
            canvas[row, k] = cells[cell[k]]
            if not masked[k]:
                continue
            value = -ONE if np.isnan(confidence[row, k]) else confidence[row, k]
            place = num_masked
            while place > 0 and score[place - 1] < value:
                order[place], score[place] = order[place - 1], score[place - 1]
                place -= 1
            order[place], score[place] = k, value
            num_masked += 1
        num_unmasked = _count_accepted(score[:num_masked], rule[row], parameter[row], min_unmask[row])
        for k in order[:num_unmasked]:
            canvas[row, k] = token[row, k]
            cells[cell[k]] = token[row, k]
            masked[k] = False
        num_output_positions = int(output_positions[row])
        num_ready = num_output_positions
        for k in range(num_output_positions):
            if masked[k]:
                num_ready = 0
                break
            is_end = False
            for end in end_token_ids[row]:
                is_end |= end >= 0 and canvas[row, k] == end
            if is_end:
                num_ready = k + 1
                break
        all_unmasked[row], all_left[row], all_ready[row] = num_unmasked, num_masked - num_unmasked, num_ready


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


def grids(proposals: Proposals, masked: torch.Tensor, slots: torch.Tensor, block_length: int) -> Grids:
    """See ``adjusting.grids``."""
    shape = slots.shape[0], block_length
    found = [np.empty(shape, dtype) for dtype in (np.int64, np.float32, np.float32, np.bool_, np.bool_)]
    _grids(*map(torch.Tensor.numpy, (*proposals, masked, slots)), *found)
    return Grids(*map(torch.from_numpy, found))  # less work than empty tensors and their arrays


@compiled("(i8[:], i8[:], f4[:], b1[:, :], i8[:], i8[:, :], f4[:, :], f4[:, :], b1[:, :], b1[:, :])")
def _grids(
    position: np.ndarray,
    found: np.ndarray,
    found_confidence: np.ndarray,
    masked: np.ndarray,
    slots: np.ndarray,
    token: np.ndarray,
    confidence: np.ndarray,
    score: np.ndarray,
    is_open: np.ndarray,
    own: np.ndarray,
) -> None:
    """Fills the last five."""
    num_blocks, block_length = token.shape
    for row in range(num_blocks):
        of_slot = masked[slots[row]]
        for k in range(block_length):
            token[row, k], confidence[row, k], score[row, k] = 0, WITHOUT_LOGITS, WITHOUT_LOGITS
            is_open[row, k], own[row, k] = False, of_slot[k]
    for n in range(position.size):
        row, k = divmod(position[n], block_length)
        if row < num_blocks:
            token[row, k] = found[n]
            if own[row, k]:
                value = -ONE if np.isnan(found_confidence[n]) else found_confidence[n]
                confidence[row, k], score[row, k], is_open[row, k] = value, value, value != WITHOUT_LOGITS


def best(score: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    """See ``adjusting.best``."""
    is_best = np.empty(score.shape, np.bool_)
    _best(score.numpy(), number.long().numpy(), is_best)
    return torch.from_numpy(is_best)


@compiled("(f4[:, :], i8[:], b1[:, :])")
def _best(score: np.ndarray, number: np.ndarray, is_best: np.ndarray) -> None:
    """Fills the last: as often as ``number`` says, the best position that is left."""
    for row in range(score.shape[0]):
        is_best[row] = number[row] >= score.shape[1]
        for _ in range(0 if is_best[row, 0] else number[row]):
            choice, largest = -1, np.float32(-np.inf)
            for k in range(score.shape[1]):
                value = -ONE if np.isnan(score[row, k]) else score[row, k]
                if not is_best[row, k] and (choice < 0 or value > largest):
                    choice, largest = k, value
            is_best[row, choice] = True


def ranks(score: torch.Tensor) -> torch.Tensor:
    """See ``adjusting.ranks``."""
    found = np.empty(score.shape, np.int64)
    _ranks(score.numpy(), found)
    return torch.from_numpy(found)


@compiled("(f4[:, :], i8[:, :])")
def _ranks(score: np.ndarray, found: np.ndarray) -> None:
    """Fills the last."""
    for row in range(score.shape[0]):
        for k in range(score.shape[1]):
            value = -ONE if np.isnan(score[row, k]) else score[row, k]
            found[row, k] = 0
            for other in range(k):
                before = -ONE if np.isnan(score[row, other]) else score[row, other]
                found[row, k] += before >= value
                found[row, other] += value > before


def choose(
    score: torch.Tensor, parameter: torch.Tensor, rank: torch.Tensor, chosen: torch.Tensor, is_open: torch.Tensor
) -> None:
    """See ``adjusting.choose``."""
    _choose(*map(torch.Tensor.numpy, (score, parameter, rank, chosen, is_open)))


@compiled("(f4[:, :], f4[:], f4[:, :], b1[:, :], b1[:, :])")
def _choose(
    score: np.ndarray, parameter: np.ndarray, rank: np.ndarray, chosen: np.ndarray, is_open: np.ndarray
) -> None:
    """Fills the first two."""
    for row in range(score.shape[0]):
        parameter[row] = IS_CHOSEN
        for k in range(score.shape[1]):
            value = rank[row, k]
            value = ONE if value > ONE else -ONE if value < -ONE else value
            value = IS_CHOSEN if chosen[row, k] else value
            score[row, k] = value if is_open[row, k] else WITHOUT_LOGITS


def quota(numbers: torch.Tensor, step_index: torch.Tensor) -> torch.Tensor:
    """See ``adjusting.quota``."""
    found = np.empty(step_index.shape[0], np.int64)
    _quota(numbers.numpy(), step_index.numpy(), found)
    return torch.from_numpy(found)


@compiled("(f4[:, :], i8[:], i8[:])")
def _quota(numbers: np.ndarray, step_index: np.ndarray, found: np.ndarray) -> None:
    """Fills the last."""
    for row in range(found.size):
        share, num_larger, num_alone, num_steps = numbers[row]
        index = step_index[row]
        found[row] = 1
        if num_alone <= index < num_steps:
            found[row] = np.int64(share) + (index < num_alone + num_larger)


def take_rows(
    numbers: torch.Tensor, memory: torch.Tensor, slot: torch.Tensor, offset: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``adjusting.take_rows``."""
    own = np.empty((slot.shape[0], numbers.shape[1]), np.float32)
    kept = np.empty((slot.shape[0], memory.shape[2]), np.float32)
    _take_rows(numbers.numpy(), memory.numpy(), slot.numpy(), offset.numpy(), own, kept)
    return torch.from_numpy(own), torch.from_numpy(kept)


@compiled("(f4[:, ::1], f4[:, :, :], i8[::1], i8[::1], f4[:, ::1], f4[:, ::1])")
def _take_rows(
    numbers: np.ndarray, memory: np.ndarray, slot: np.ndarray, offset: np.ndarray, own: np.ndarray, kept: np.ndarray
) -> None:
    """Fills the last two."""
    for row in range(slot.size):
        for k in range(own.shape[1]):
            own[row, k] = numbers[slot[row], k]
        for k in range(kept.shape[1]):
            kept[row, k] = memory[slot[row], offset[row], k]


def put_rows(table: torch.Tensor, index: torch.Tensor, offset: torch.Tensor, own: torch.Tensor) -> None:
    """See ``adjusting.put_rows``."""
    _put_rows(*map(torch.Tensor.numpy, (table, index, offset, own)))


@compiled("(f4[:, :, :], i8[::1], i8[::1], f4[:, ::1])")
def _put_rows(table: np.ndarray, index: np.ndarray, offset: np.ndarray, own: np.ndarray) -> None:
    """Writes the first."""
    for row in range(index.size):
        for k in range(own.shape[1]):
            table[index[row], offset[row], k] = own[row, k]
