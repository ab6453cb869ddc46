"""The CPU path of every op: NumPy and PyTorch calls on cache-sized pieces.

Called by ``csrc_triton.ops``, which has checked the arguments. Integer hashing wraps in uint32 here, so it equals the
reference bit for bit.
"""

import numpy as np
import torch

from csrc_triton.reference import Rule, UnmaskResult

CHUNK_ELEMENTS = 1 << 18  # 1 MiB of fp32: a chunk stays in the second-level cache between passes
GUMBEL_MAX = 16.7  # above the largest noise value, 24 ln 2 = 16.64
LOG2_E = np.float32(1.4426950408889634)
UINT32_MASK = 0xFFFFFFFF


def confidence(
    logits: torch.Tensor,
    banned_token_id: int | None,
    temperature: torch.Tensor | None,
    noise_key: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``ops.confidence``.

    Measured on one core: NumPy's argmax is 10 to 50 times as fast as PyTorch's, and base-2 exponentials with a separate
    sum beat a fused softmax, whose sum moreover loses 1e-5 over 126,464 ids. PyTorch's ``exp2`` is vectorised
    everywhere, NumPy's only with AVX-512.
    """
    num_rows, vocabulary = logits.shape
    token = torch.empty(num_rows, dtype=torch.int64)
    probability = torch.empty(num_rows, dtype=torch.float32)
    token_np, probability_np = token.numpy(), probability.numpy()
    chunk_rows = max(1, min(num_rows, CHUNK_ELEMENTS // vocabulary))
    buffer = torch.empty(chunk_rows, vocabulary)
    logits = logits.detach()

    # a row of -inf becomes NaN and is mended below; a difference beyond fp32 becomes -inf, weight 0
    with np.errstate(invalid="ignore", over="ignore"):
        for start in range(0, num_rows, chunk_rows):
            stop = min(start + chunk_rows, num_rows)
            weight = buffer[: stop - start]
            chunk = logits[start:stop]
            if chunk.dtype != torch.float32:
                chunk = weight.copy_(chunk)
            chunk_np, weight_np = chunk.numpy(), weight.numpy()
            lines = np.arange(stop - start)
            best = chunk_np.argmax(axis=-1)  # NaN counts as the maximum
            largest = chunk_np[lines, best]
            if banned_token_id is not None:
                for row in np.flatnonzero(best == banned_token_id):
                    best[row] = _argmax_allowed(chunk_np[row], banned_token_id)
            if temperature is not None and noise_key is not None:
                noise = temperature[start:stop].numpy(), noise_key[start:stop].numpy()
                best = _sample(chunk_np, best, *noise, banned_token_id)
            np.subtract(chunk_np, largest[:, None], out=weight_np)
            np.multiply(weight_np, LOG2_E, out=weight_np)
            total = weight.exp2_().sum(dim=-1).numpy()
            token_np[start:stop] = best
            np.divide(weight_np[lines, best], total, out=probability_np[start:stop])

    hopeless = np.isnan(probability_np)  # rows with NaN, rows of -inf
    if hopeless.any():
        token_np[hopeless] = 1 if banned_token_id == 0 else 0
        probability_np[hopeless] = 0.0
    return token, probability


def _argmax_allowed(logits: np.ndarray, banned_token_id: int) -> int:
    """The first argmax of one row besides the banned id; NaN counts as the maximum."""
    before, after = logits[:banned_token_id], logits[banned_token_id + 1 :]
    if not after.size:
        return int(before.argmax())
    right = banned_token_id + 1 + int(after.argmax())
    if not before.size:
        return right
    left = int(before.argmax())
    return right if logits[right] > logits[left] else left


def _sample(
    logits: np.ndarray, best: np.ndarray, temperature: np.ndarray, noise_key: np.ndarray, banned_token_id: int | None
) -> np.ndarray:
    """Argmax of every row under Gumbel noise; ``best`` is its argmax without, kept where the temperature is 0.

    Noise is bounded, so it is computed only for ids that can still overtake the noisy best one.
    """
    top = logits[np.arange(best.size), best].astype(np.float64)
    first, second = _mix_keys(noise_key)
    to_beat = top + temperature * _gumbel_noise(first, second, best)
    slack = 1e-6 * (1 + np.abs(top))  # rounding of the fp32 scores
    cutoff = (to_beat - temperature * GUMBEL_MAX - slack).astype(np.float32)
    token = best.copy()
    for row in np.flatnonzero((temperature > 0) & np.isfinite(top)):
        ids = np.flatnonzero(logits[row] >= cutoff[row])
        score = logits[row, ids] + temperature[row] * _gumbel_noise(first[row : row + 1], second[row : row + 1], ids)
        if banned_token_id is not None:
            score[ids == banned_token_id] = -np.inf
        token[row] = ids[score.argmax()]
    return token


def _gumbel_noise(first: np.ndarray, second: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """``reference.gumbel_noise``, with the mixed key of every id or one for all of them."""
    bits = _mix(_mix(ids.astype(np.uint32) + first) ^ second)
    u = ((bits >> 9).astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-23)
    return -np.log(-np.log(u))


def _mix_keys(noise_key: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    first = _mix((noise_key & UINT32_MASK).astype(np.uint32) + np.uint32(0x9E3779B9))
    second = _mix(((noise_key >> 32 & UINT32_MASK).astype(np.uint32) ^ first) + np.uint32(0x9E3779B9))
    return first, second


def _mix(bits: np.ndarray) -> np.ndarray:
    """MurmurHash3's 32-bit finaliser on uint32; overwrites its argument."""
    bits ^= bits >> 16
    bits *= np.uint32(0x85EBCA6B)
    bits ^= bits >> 13
    bits *= np.uint32(0xC2B2AE35)
    bits ^= bits >> 16
    return bits


def unmask(
    canvas: torch.Tensor,
    masked: torch.Tensor,
    proposal: torch.Tensor,
    confidence: torch.Tensor,
    rule: torch.Tensor,
    parameter: torch.Tensor,
    eos_token_id: torch.Tensor,
    num_needed: torch.Tensor,
) -> UnmaskResult:
    """See ``ops.unmask``. Blocks are ranked only if one of them has a rule other than ``THRESHOLD``."""
    ids, undecided = canvas.numpy(), masked.numpy()
    rules, cutoff = rule.numpy(), parameter.numpy()[:, None]
    rows = np.arange(ids.shape[0])
    # NaN counts as -1; decided positions rank behind every undecided one
    score = np.where(undecided, np.fmax(confidence.numpy(), np.float32(-1)), np.float32(-np.inf))
    if rules.any():  # THRESHOLD is 0
        accepted = _accept_ranked(score, rules[:, None], cutoff)
    else:
        accepted = score >= cutoff
        accepted[rows, score.argmax(axis=1)] = True
    accepted &= undecided

    np.copyto(ids, proposal.numpy(), where=accepted, casting="same_kind")
    undecided ^= accepted

    eos, needed = eos_token_id.numpy()[:, None], num_needed.numpy()
    stop = (ids == eos) & (eos >= 0)  # positions where emission ends, one way or the other
    stop |= undecided
    first = stop.argmax(axis=1)
    ends = stop[rows, first] & (first < needed)
    num_ready = np.where(ends, np.where(undecided[rows, first], 0, first + 1), needed)
    return UnmaskResult(
        num_unmasked=torch.from_numpy(accepted.sum(axis=1, dtype=np.int32)),
        num_masked=torch.from_numpy(undecided.sum(axis=1, dtype=np.int32)),
        num_ready=torch.from_numpy(num_ready.astype(np.int32)),
    )


def _accept_ranked(score: np.ndarray, rule: np.ndarray, parameter: np.ndarray) -> np.ndarray:
    """Positions accepted under any mix of rules, [num_blocks, block_length]; may include decided ones, whose score is
    -inf."""
    num_blocks, block_length = score.shape
    order = np.argsort(-score, axis=1, kind="stable") + np.arange(num_blocks)[:, None] * block_length
    ranked = score.take(order)  # descending
    rank = np.arange(1, block_length + 1, dtype=np.float32)
    passing = np.where(
        rule == Rule.THRESHOLD,
        ranked >= parameter,
        np.where(rule == Rule.TOP_K, rank <= parameter, (rank + 1) * (1 - ranked) < parameter),
    )
    num_accepted = np.where(passing, rank, np.float32(1)).max(axis=1, keepdims=True)
    accepted = np.empty(score.shape, dtype=bool)
    accepted.put(order, rank <= num_accepted)
    return accepted
