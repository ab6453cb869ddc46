"""What policies read off logits: gaps, likeliest tokens, averages and divergences of distributions.

On the CPU each is one compiled loop (``cpu_reading``), which passes over a row of logits once or twice and copies none.
Elsewhere they are tensor operations, the loops' twins in ``reference_reading``. A row knows nothing of the others.
Arguments are not checked. Those that are written are fp32 of any strides: ``memory``, what a policy keeps of each row
from step to step, zero at first, and ``reading``.
"""

from collections.abc import Sequence
from typing import Any

import torch

from csrc_triton import reference_reading
from csrc_triton.types import KeptLogits


def _implementation(logits: torch.Tensor) -> Any:
    """The loops are compiled when they are imported, which only a CPU has use for."""
    if logits.device.type != "cpu":
        return reference_reading
    from csrc_triton import cpu_reading

    return cpu_reading


def best_two(logits: torch.Tensor, reading: torch.Tensor) -> None:
    """Read how far apart the two best logits are, and which token has the best one, the first among equals.

    Args:
        logits: [S, vocabulary] fp32.
        reading: [S, at least 3], written: the difference, 0 where it is not finite; whether it is; the token.
    """
    _implementation(logits).best_two(logits, reading)


def count_steady(
    logits: torch.Tensor, before: KeptLogits, bound: torch.Tensor, memory: torch.Tensor, reading: torch.Tensor
) -> None:
    """Count the steps in a row whose distribution p is near that of the step before, q: KL(p || q) < bound, in nats.

    Args:
        logits: [S, vocabulary] fp32, of p; -inf of what is left out, of q too.
        before: S rows, of q; anything in the first step.
        bound: [S] fp32.
        memory: [S, at least 2], written: steps with logits, and those in a row.
        reading: [S, at least 1], written: those in a row.
    """
    _implementation(logits).count_steady(logits, before, bound, memory, reading)


def compare_coarsely(logits: torch.Tensor, number: int, memory: torch.Tensor, reading: torch.Tensor) -> None:
    """Compare the likeliest tokens with those of the step before.

    Their Jensen-Shannon divergence is that of distributions that have these tokens and one more, the rest. A token that
    only one of two steps has among them is 0 in the other, whose share of it is in its rest.

    Args:
        logits: [S, vocabulary] fp32.
        number: Of tokens, at most the vocabulary.
        memory: [S, 2 + 2 K], K at least ``number``, written: the best token, in how many steps in a row it was, the
            likeliest tokens, and from 2 + K on their probabilities. A float32 holds ids up to 2^24.
        reading: [S, at least 2], written: the divergence in nats, 1 in the first step; and the steps in a row.
    """
    _implementation(logits).compare_coarsely(logits, number, memory, reading)


def average(
    logits: torch.Tensor,
    before: Sequence[KeptLogits],
    counts: Sequence[torch.Tensor],
    token: torch.Tensor,
    confidence: torch.Tensor,
    reading: torch.Tensor,
) -> None:
    """Average a row's distribution with those of the steps before that count.

    Args:
        logits: [S, vocabulary] fp32; -inf of what is left out, of the others too.
        before: S rows each; at most two of them.
        counts: [S] fp32 each, any strides, more than 0 where they count.
        token: [S] int64, proposals. Where some of ``before`` count, those that are the row's own best token become the
            likeliest of the mean.
        confidence: [S] fp32, written likewise: the probability of it in the mean.
        reading: [S, at least 3], written: the largest probability of the row's own distribution; 1 - H / 32, with H the
            entropy of the mean in nats; and the row's own best token.
    """
    _implementation(logits).average(logits, before, counts, token, confidence, reading)
