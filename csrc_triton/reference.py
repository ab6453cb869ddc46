"""Slow, readable twins of every op, the vocabulary of ``unmask``, and the noise all implementations share.

The other implementations are tested against this file. Arguments are those of ``csrc_triton.ops``; they are taken as
valid.
"""

from enum import IntEnum
from typing import NamedTuple

import torch

UINT32_MASK = 0xFFFFFFFF
NO_CONFIDENCE = -2.0  # of a position without logits: below every other, and below NaN, which counts as -1
ENTROPY_SCALE = 32.0  # above the entropy of any vocabulary, in nats
DOUBT_UNITS = 1 << 24  # in 1; a doubt 1 - c in fp32 is a whole number of them


class Rule(IntEnum):
    """How a block chooses the positions to unmask; each has one parameter p.

    With the masked confidences sorted, c_(1) >= c_(2) >= ...
    """

    THRESHOLD = 0
    """Every position with confidence >= p."""
    TOP_K = 1
    """The floor(p) most confident positions."""
    FACTOR = 2
    """The n most confident, n the largest with (n + 1) * (1 - c_(n)) < p, evaluated in fp32."""
    JOINT_BOUND = 3
    """The n most confident, n the largest with (1 - c_(1)) + ... + (1 - c_(n)) + (1 - c_(n)) < p. Each doubt 1 - c is
    taken in fp32, where it is a multiple of 2**-24; the sum is exact."""
    DOUBT_BOUND = 4
    """The n most confident, n the largest with (1 - c_(1)) + ... + (1 - c_(n)) < p, likewise."""


class UnmaskResult(NamedTuple):
    """Counts of one ``unmask`` call, all [num_blocks] int32."""

    num_unmasked: torch.Tensor
    """Positions decided by this call."""
    num_masked: torch.Tensor
    """Positions of the block that are still undecided."""
    num_ready: torch.Tensor
    """Leading tokens that can be emitted now: through the first end token among the needed positions if all before it
    are decided, else all needed ones if those are decided, else 0."""


def confidence(
    logits: torch.Tensor,
    *,
    banned_token_id: int | None = None,
    temperature: torch.Tensor | None = None,
    noise_key: torch.Tensor | None = None,
    by_entropy: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The twin of ``ops.confidence``; its softmax runs in fp64, so that it is the more exact side of a comparison."""
    num_rows, vocabulary = logits.shape
    logits = logits.float()  # [num_rows, vocabulary]
    probability = logits.double().softmax(dim=-1).float()
    ids = torch.arange(vocabulary, device=logits.device)
    score = logits.clone()
    if temperature is not None and noise_key is not None:
        score += temperature.unsqueeze(-1) * gumbel_noise(noise_key, ids)
    if banned_token_id is not None:
        score[:, banned_token_id] = -torch.inf
    best = score.amax(dim=-1, keepdim=True)
    token = ids.where(score == best, vocabulary).amin(dim=-1)  # argmax may return any of several equals
    hopeless = logits.isnan().any(dim=-1) | (best.squeeze(-1) == -torch.inf)
    token = token.masked_fill(hopeless, 1 if banned_token_id == 0 else 0)
    chosen = probability.gather(-1, token.unsqueeze(-1)).squeeze(-1)
    if by_entropy is not None:
        exact = logits.double().softmax(dim=-1)
        entropy = -torch.special.xlogy(exact, exact).sum(dim=-1)
        chosen = torch.where(by_entropy, (1.0 - entropy / ENTROPY_SCALE).float(), chosen)
    return token, chosen.masked_fill(hopeless, 0.0)


def gumbel_noise(noise_key: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise of every (key, vocabulary id), [num_keys, num_ids] fp32, within [-2.82, 16.64].

    u has 23 random bits and half a step on top, which fp32 holds exactly: 2**-24 <= u <= 1 - 2**-24.
    """
    low = noise_key & UINT32_MASK
    high = (noise_key >> 32) & UINT32_MASK
    first = _mix((low + 0x9E3779B9) & UINT32_MASK)
    second = _mix(((high ^ first) + 0x9E3779B9) & UINT32_MASK)
    bits = _mix(_mix((ids + first.unsqueeze(-1)) & UINT32_MASK) ^ second.unsqueeze(-1))  # [num_keys, num_ids]
    u = ((bits >> 9).float() + 0.5) * 2.0**-23
    return -torch.log(-torch.log(u))


def _mix(bits: torch.Tensor) -> torch.Tensor:
    """MurmurHash3's 32-bit finaliser, on int64 that holds 32-bit values."""
    bits = bits ^ (bits >> 16)
    bits = (bits * 0x85EBCA6B) & UINT32_MASK
    bits = bits ^ (bits >> 13)
    bits = (bits * 0xC2B2AE35) & UINT32_MASK
    return bits ^ (bits >> 16)


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
    """The twin of ``ops.unmask``: one block after the other, in place."""
    counts = []
    for row in range(canvas.shape[0]):
        score = confidence[row].nan_to_num(nan=-1.0)
        undecided = [k for k in range(canvas.shape[1]) if masked[row, k]]
        ranking = sorted(undecided, key=lambda k: (-score[k].item(), k))
        num_unmasked = _num_accepted(score[ranking], int(rule[row]), parameter[row], int(quota[row]))
        for k in ranking[:num_unmasked]:
            canvas[row, k] = proposal[row, k]
            masked[row, k] = False
        num_ready = _num_ready(
            canvas[row].tolist(), masked[row].tolist(), end_token_ids[row].tolist(), int(num_needed[row])
        )
        counts.append((num_unmasked, len(undecided) - num_unmasked, num_ready))
    table = torch.tensor(counts, dtype=torch.int32, device=canvas.device).reshape(-1, 3)
    return UnmaskResult(*table.unbind(dim=1))


def _num_accepted(ranked: torch.Tensor, rule: int, parameter: torch.Tensor, quota: int) -> int:
    """How many of the masked positions to unmask; ``ranked`` has their confidences, descending."""
    num_masked = ranked.shape[0]
    if rule == Rule.THRESHOLD:
        passing = [n for n in range(1, num_masked + 1) if ranked[n - 1] >= parameter]
    elif rule == Rule.TOP_K:
        passing = [n for n in range(1, num_masked + 1) if n <= parameter]
    elif rule == Rule.FACTOR:
        passing = [n for n in range(1, num_masked + 1) if (n + 1) * (1 - ranked[n - 1]) < parameter]
    else:
        again = int(rule == Rule.JOINT_BOUND)
        doubts = [int((1 - c).double() * DOUBT_UNITS) for c in ranked]
        limit = parameter.double() * DOUBT_UNITS
        passing = [n for n in range(1, num_masked + 1) if sum(doubts[:n]) + again * doubts[n - 1] < limit]
    passing += range(1, min(quota, num_masked) + 1)
    passing = [n for n in passing if ranked[n - 1] > NO_CONFIDENCE]
    return max(passing, default=min(1, num_masked))


def _num_ready(canvas: list[int], masked: list[bool], end_token_ids: list[int], num_needed: int) -> int:
    for k in range(num_needed):
        if masked[k]:
            return 0
        if canvas[k] >= 0 and canvas[k] in end_token_ids:
            return k + 1
    return num_needed
