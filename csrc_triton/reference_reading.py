"""Twins of the loops of ``csrc_triton.reading``, as tensor operations."""

from collections.abc import Sequence

import torch

from csrc_triton.types import ENTROPY_SCALE, KeptLogits


def best_two(logits: torch.Tensor, reading: torch.Tensor) -> None:
    """See ``reading.best_two``."""
    top = logits.topk(2, dim=1)
    gap = top.values[:, 0] - top.values[:, 1]
    has_two = torch.isfinite(gap)
    reading[:, 0] = torch.where(has_two, gap, 0.0)
    reading[:, 1] = has_two
    reading[:, 2] = logits.argmax(dim=1)


def count_steady(
    logits: torch.Tensor, before: KeptLogits, bound: torch.Tensor, memory: torch.Tensor, reading: torch.Tensor
) -> None:
    """See ``reading.count_steady``."""
    is_left = logits > -torch.inf
    now = logits.log_softmax(dim=-1)
    old = before.gather().masked_fill(~is_left, -torch.inf).log_softmax(dim=-1)
    divergence = (now.exp() * (now - old)).masked_fill(~is_left, 0.0).sum(dim=-1, dtype=torch.float64).float()
    is_near = (memory[:, 0] > 0) & (divergence < bound)
    memory[:, 1] = torch.where(is_near, memory[:, 1] + 1, 0.0)
    memory[:, 0] += 1
    reading[:, 0] = memory[:, 1]


def compare_coarsely(logits: torch.Tensor, number: int, memory: torch.Tensor, reading: torch.Tensor) -> None:
    """See ``reading.compare_coarsely``."""
    best, run, tokens = memory[:, 0], memory[:, 1], memory[:, 2:].unflatten(1, (2, -1))[:, :, :number]
    share, token = logits.softmax(dim=-1).topk(number, dim=-1)
    winner, token = logits.argmax(dim=-1).float(), token.float()
    divergence = _coarse_divergence((token, share), tuple(tokens.unbind(dim=1)))
    reading[:, 0] = torch.where(run > 0, divergence, 1.0)
    run.copy_(torch.where((run > 0) & (best == winner), run + 1, 1.0))
    reading[:, 1] = run
    best.copy_(winner)
    tokens.copy_(torch.stack([token, share], dim=1))


def _coarse_divergence(now: tuple[torch.Tensor, ...], before: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Jensen-Shannon divergence of distributions, fp32 [S]; token ids and shares [S, K] of each."""
    (token, p), (token_before, q) = now, before
    is_same = token.unsqueeze(2) == token_before.unsqueeze(1)  # [S, K, K]
    q_of_p = (is_same * q.unsqueeze(1)).sum(dim=2)
    q_alone = q.masked_fill(is_same.any(dim=1), 0.0)
    rest, rest_before = ((1.0 - one.sum(dim=1, keepdim=True)).clamp(min=0.0) for one in (p, q))
    total = _half_divergence(p, q_of_p) + _half_divergence(q_of_p, p)
    total += _half_divergence(rest, rest_before) + _half_divergence(rest_before, rest)
    return total + _half_divergence(q_alone, q_alone * 0.0)


def _half_divergence(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Half of KL(p || (p + q) / 2) by row; 0 where p is."""
    return 0.5 * (torch.special.xlogy(p, p) - torch.special.xlogy(p, 0.5 * (p + q))).sum(dim=1)


def average(
    logits: torch.Tensor,
    before: Sequence[KeptLogits],
    counts: Sequence[torch.Tensor],
    token: torch.Tensor,
    confidence: torch.Tensor,
    reading: torch.Tensor,
) -> None:
    """See ``reading.average``."""
    is_left = logits > -torch.inf
    total = logits.softmax(dim=-1)
    reading[:, 0], best = total.max(dim=-1)
    reading[:, 2] = best
    number = torch.ones_like(best)
    for one, count in zip(before, counts, strict=True):
        share = one.gather().masked_fill(~is_left, -torch.inf).softmax(dim=-1)
        total = torch.where(count.unsqueeze(1) > 0, total + share, total)
        number += count > 0
    mean = total / number.unsqueeze(1)
    entropy = -torch.special.xlogy(mean, mean).sum(dim=-1, dtype=torch.float64)
    reading[:, 1] = 1.0 - entropy.float() / ENTROPY_SCALE
    share, likeliest = mean.max(dim=-1)
    is_averaged = (number > 1) & (token == best)  # which a sample of another token is not
    token.copy_(torch.where(is_averaged, likeliest, token))
    confidence.copy_(torch.where(is_averaged, share, confidence))
