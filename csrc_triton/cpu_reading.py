"""The CPU path of ``csrc_triton.reading``: loops that Numba compiles."""

import math
from collections.abc import Sequence

import numpy as np
import torch

from csrc_triton.cpu import LOG2_E, ONE, SCALE, _exp2, _sum_exp, compiled
from csrc_triton.types import KeptLogits

SMALLEST_DIFFERENCE, SMALLEST, LOWEST = np.float32(-87), np.finfo(np.float32).min, np.float32(-np.inf)
PART = 1024  # terms that are added in float32 before they are added to a sum in float64
LINE = "f4[::1], i8, i8"  # rows of logits: all their numbers, length of a row, and from one row to the next
KEPT = "f4[::1], i8, i8[:]"  # rows of a table: all its numbers, from one row to the next, and which rows


def _lines(logits: torch.Tensor) -> tuple[np.ndarray, int, int]:
    """``LINE`` of [S, vocabulary] fp32: slices of one contiguous array are known to be contiguous to the compiler."""
    num_rows, vocabulary = logits.shape
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    step = logits.stride(0)
    size = (num_rows - 1) * step + vocabulary if num_rows else 0
    return logits.as_strided((size,), (1,)).numpy(), vocabulary, step


def _kept(logits: KeptLogits) -> tuple[np.ndarray, int, np.ndarray]:
    """``KEPT`` of logits of any dtype; float32 is not copied."""
    table, row = logits
    if table.dtype != torch.float32:
        table, row = logits.gather(), torch.arange(row.shape[0])
    numbers, _, step = _lines(table)
    return numbers, step, row.numpy()


def best_two(logits: torch.Tensor, reading: torch.Tensor) -> None:
    """See ``reading.best_two``."""
    _best_two(*_lines(logits), reading.numpy())


@compiled(f"({LINE}, f4[:, :])")
def _best_two(logits: np.ndarray, vocabulary: int, step: int, reading: np.ndarray) -> None:
    """Writes the last."""
    for row in range(reading.shape[0]):
        line = logits[row * step : row * step + vocabulary]
        best, second, token = LOWEST, LOWEST, 0
        for k in range(vocabulary):
            value = line[k]
            if not value <= second:  # one comparison for most of them
                if np.isnan(value):
                    best, token = value, k
                    break
                if value > best:
                    best, second, token = value, best, k
                else:
                    second = value
        gap = best - second
        is_finite = np.isfinite(gap)
        reading[row, 0], reading[row, 1], reading[row, 2] = gap if is_finite else np.float32(0), is_finite, token


@compiled()
def _likeliest(line: np.ndarray, ids: np.ndarray, best: np.ndarray) -> None:
    """The likeliest tokens, the lowest ids first among equals, and their probabilities: fills the last two."""
    number = ids.size
    for k in range(line.size):
        value = line[k]
        if k < number or not value <= best[number - 1]:
            place = min(k, number - 1)
            while place > 0 and not value <= best[place - 1]:
                ids[place], best[place] = ids[place - 1], best[place - 1]
                place -= 1
            ids[place], best[place] = k, value
    largest = best[0]
    total = _sum_exp(line, largest)
    for place in range(number):
        best[place] = np.float32(0) if best[place] == LOWEST else _exp2((best[place] - largest) * LOG2_E) / total


@compiled()
def _half_divergence(p: float, q: float) -> float:
    """One term of half of KL(p || (p + q) / 2); 0 where p is."""
    return 0.5 * p * math.log(2.0 * p / (p + q)) if p > 0.0 else 0.0


@compiled()
def _coarse_divergence(token: np.ndarray, share: np.ndarray, old_token: np.ndarray, old_share: np.ndarray) -> float:
    """Jensen-Shannon divergence of two distributions of which a few tokens are known."""
    rest, old_rest, total = 1.0, 1.0, 0.0
    for j in range(token.size):
        q = float(old_share[j])
        old_rest -= q
        is_known = False
        for i in range(token.size):
            is_known |= token[i] == old_token[j]
        if not is_known:
            total += _half_divergence(q, 0.0)
    for i in range(token.size):
        p, q = float(share[i]), 0.0
        rest -= p
        for j in range(token.size):
            if token[i] == old_token[j]:
                q = float(old_share[j])
        total += _half_divergence(p, q) + _half_divergence(q, p)
    rest, old_rest = max(rest, 0.0), max(old_rest, 0.0)
    return total + _half_divergence(rest, old_rest) + _half_divergence(old_rest, rest)


def compare_coarsely(logits: torch.Tensor, number: int, memory: torch.Tensor, reading: torch.Tensor) -> None:
    """See ``reading.compare_coarsely``."""
    _compare_coarsely(*_lines(logits), number, memory.numpy(), reading.numpy())


@compiled(f"({LINE}, i8, f4[:, :], f4[:, :])")
def _compare_coarsely(
    logits: np.ndarray, vocabulary: int, step: int, number: int, memory: np.ndarray, reading: np.ndarray
) -> None:
    """Writes the last two."""
    token, share = np.empty(number, np.float32), np.empty(number, np.float32)
    first_share = 2 + (memory.shape[1] - 2) // 2
    for row in range(memory.shape[0]):
        _likeliest(logits[row * step : row * step + vocabulary], token, share)
        own, run = memory[row], memory[row, 1]
        old_token, old_share = own[2 : 2 + number], own[first_share : first_share + number]
        reading[row, 0] = _coarse_divergence(token, share, old_token, old_share) if run > 0 else 1.0
        own[1] = run + 1 if run > 0 and own[0] == token[0] else 1.0
        reading[row, 1] = own[1]
        own[0] = token[0]
        old_token[:], old_share[:] = token, share


@compiled()
def _largest(line: np.ndarray, left: np.ndarray) -> np.float32:
    """The largest of some logits where ``left`` is not -inf, NaN if one of them is."""
    largest = LOWEST
    for k in range(line.size):
        if not line[k] <= largest and left[k] != LOWEST:
            largest = line[k]
            if np.isnan(largest):
                break
    return largest


@compiled(fastmath={"reassoc", "contract", "nsz"})
def _divergence_of(
    line: np.ndarray, other: np.ndarray, largest: np.float32, largest_before: np.float32
) -> tuple[np.float32, np.float32, np.float32]:
    """Sums of exp(x), exp(y) and exp(x) (x - y), where x and y are less the largest ones, vectorized."""
    total, total_before, terms = np.float32(0), np.float32(0), np.float32(0)
    for k in range(line.size):
        x, y = max(line[k] - largest, SMALLEST_DIFFERENCE), max(other[k] - largest_before, SMALLEST)
        is_left = np.float32(line[k] > LOWEST)
        p = _exp2(x * LOG2_E) * is_left
        total += p
        total_before += _exp2(max(y, SMALLEST_DIFFERENCE) * LOG2_E) * is_left
        terms += p * (x - y)
    return total, total_before, terms


@compiled()
def _divergence(line: np.ndarray, other: np.ndarray) -> np.float32:
    """KL(p || q) of the distributions of two rows; 0 where nothing is left, NaN where nothing is known."""
    largest, largest_before = _largest(line, line), _largest(other, line)
    if largest == LOWEST or np.isnan(largest) or np.isnan(largest_before):
        return np.float32(0 if largest == LOWEST else np.nan)
    total, total_before, terms = 0.0, 0.0, 0.0
    for start in range(0, line.size, PART):
        part = _divergence_of(line[start : start + PART], other[start : start + PART], largest, largest_before)
        total, total_before, terms = total + part[0], total_before + part[1], terms + part[2]
    return np.float32(terms / total - math.log(total) + math.log(total_before))


def count_steady(
    logits: torch.Tensor, before: KeptLogits, bound: torch.Tensor, memory: torch.Tensor, reading: torch.Tensor
) -> None:
    """See ``reading.count_steady``."""
    _count_steady(*_lines(logits), *_kept(before), bound.numpy(), memory.numpy(), reading.numpy())


@compiled(f"({LINE}, {KEPT}, f4[:], f4[:, :], f4[:, :])")
def _count_steady(
    logits: np.ndarray,
    vocabulary: int,
    step: int,
    before: np.ndarray,
    step_before: int,
    rows_before: np.ndarray,
    bound: np.ndarray,
    memory: np.ndarray,
    reading: np.ndarray,
) -> None:
    """Writes the last two."""
    for row in range(memory.shape[0]):
        run = np.float32(0)
        if memory[row, 0] > 0:
            at = rows_before[row] * step_before
            line, other = logits[row * step : row * step + vocabulary], before[at : at + vocabulary]
            if _divergence(line, other) < bound[row]:
                run = memory[row, 1] + np.float32(1)
        memory[row, 0] += 1
        memory[row, 1] = reading[row, 0] = run


@compiled(fastmath={"reassoc", "contract", "nsz"})
def _entropy_of(line: np.ndarray, largest: np.float32) -> tuple[np.float32, np.float32]:
    """Sums of exp(x) and x exp(x), x = line - largest, vectorized."""
    total, terms = np.float32(0), np.float32(0)
    for k in range(line.size):
        x = max(line[k] - largest, SMALLEST_DIFFERENCE)
        p = _exp2(x * LOG2_E)
        total += p
        terms += p * x
    return total, terms


@compiled(fastmath={"reassoc", "contract", "nsz"})
def _sum_left(line: np.ndarray, left: np.ndarray, largest: np.float32) -> np.float32:
    """Sum of exp(line - largest) where ``left`` is not -inf, vectorized."""
    total = np.float32(0)
    for k in range(line.size):
        total += _exp2((line[k] - largest) * LOG2_E) * np.float32(left[k] > LOWEST)
    return total


@compiled()
def _add(mean: np.ndarray, line: np.ndarray, left: np.ndarray, largest: np.float32) -> None:
    """Add the probabilities of some logits where ``left`` is not -inf; all NaN where one of them is or none is left."""
    if largest == LOWEST or np.isnan(largest):
        mean[:] = np.nan
        return
    total = 0.0
    for start in range(0, line.size, PART):
        total += _sum_left(line[start : start + PART], left[start : start + PART], largest)
    scale = np.float32(1.0 / total)
    for k in range(line.size):
        mean[k] += _exp2((line[k] - largest) * LOG2_E) * scale * np.float32(left[k] > LOWEST)


def average(
    logits: torch.Tensor,
    before: Sequence[KeptLogits],
    counts: Sequence[torch.Tensor],
    token: torch.Tensor,
    confidence: torch.Tensor,
    reading: torch.Tensor,
) -> None:
    """See ``reading.average``."""
    lines = _lines(logits)
    first, second = (_kept(one) for one in (*before, *2 * (KeptLogits(logits, token),))[:2])
    none = np.zeros(token.shape[0], np.float32)
    counted = [one.numpy() for one in counts] + [none, none]
    _average(*lines, *first, counted[0], *second, counted[1], token.numpy(), confidence.numpy(), reading.numpy())


@compiled(f"({LINE}, {KEPT}, f4[:], {KEPT}, f4[:], i8[:], f4[:], f4[:, :])")
def _average(
    logits: np.ndarray,
    vocabulary: int,
    step: int,
    first: np.ndarray,
    first_step: int,
    first_rows: np.ndarray,
    counts_first: np.ndarray,
    second: np.ndarray,
    second_step: int,
    second_rows: np.ndarray,
    counts_second: np.ndarray,
    token: np.ndarray,
    confidence: np.ndarray,
    reading: np.ndarray,
) -> None:
    """Writes the last three. Rows that nothing is added to, most of them, keep no probabilities."""
    mean = np.empty(vocabulary, np.float32)
    for row in range(token.size):
        line = logits[row * step : row * step + vocabulary]
        best, largest = 0, LOWEST
        for k in range(vocabulary):
            if not line[k] <= largest:
                best, largest = k, line[k]
                if np.isnan(largest):
                    break
        reading[row, 2] = best
        if largest == LOWEST or np.isnan(largest):
            reading[row, 0] = reading[row, 1] = np.nan
            continue
        total, terms = 0.0, 0.0
        for start in range(0, vocabulary, PART):
            part = _entropy_of(line[start : start + PART], largest)
            total, terms = total + part[0], terms + part[1]
        reading[row, 0] = 1.0 / total
        entropy = math.log(total) - terms / total
        number = 1 + (counts_first[row] > 0) + (counts_second[row] > 0)
        if number > 1:
            mean[:] = np.float32(0)
            _add(mean, line, line, largest)
            if counts_first[row] > 0:
                at = first_rows[row] * first_step
                other = first[at : at + vocabulary]
                _add(mean, other, line, _largest(other, line))
            if counts_second[row] > 0:
                at = second_rows[row] * second_step
                other = second[at : at + vocabulary]
                _add(mean, other, line, _largest(other, line))
            likeliest, entropy = 0, 0.0
            for k in range(vocabulary):
                mean[k] /= np.float32(number)
                if not mean[k] <= mean[likeliest]:
                    likeliest = k
                if mean[k] != 0:
                    entropy -= mean[k] * np.log(mean[k])
            if token[row] == best:  # which a sample of another token is not
                token[row], confidence[row] = likeliest, mean[likeliest]
        reading[row, 1] = ONE - np.float32(entropy) / SCALE
