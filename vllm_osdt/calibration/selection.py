"""Which setting of a policy may be used: exact tests on how many requests lose by it; pure functions.

Source: Learn then Test (Angelopoulos, Bates, Candès, Jordan and Lei, arXiv 2110.01052), with fixed-sequence testing
(section 4) in place of one test for all settings. The hypothesis of a setting is that more than a share ``risk`` of
requests lose by it. A request loses or does not, so the binomial p-value is exact, and no larger than that of Hoeffding
and Bentkus. The settings of a policy are tested from the most cautious on, each at the policy's whole level, up to the
first whose hypothesis is not rejected. Policies share the error among them (Bonferroni). With probability at least
``confidence``, no setting that is accepted loses more than ``risk``, so one of them may be chosen by whatever else was
measured.

To decode no more prompts than a decision needs is safe: a setting that is given up early counts as not rejected.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

NUM_HALVINGS = 40  # of the interval [0, 1] that holds a bound


def level_of_policy(confidence: float, num_policies: int) -> float:
    """The level at which every policy's sequence is tested."""
    return (1.0 - confidence) / num_policies


def binomial_cdf(num: int, num_tested: int, share: float) -> float:
    """The probability that at most ``num`` of ``num_tested`` requests lose, each with probability ``share``."""
    if num < 0:
        return 0.0
    if num >= num_tested or share <= 0.0:
        return 1.0
    if share >= 1.0:
        return 0.0
    k = np.arange(num)
    ratios = np.log((num_tested - k) / (k + 1)) + math.log(share) - math.log1p(-share)  # of neighboring terms
    terms = num_tested * math.log1p(-share) + np.concatenate(([0.0], np.cumsum(ratios)))
    return min(1.0, float(np.exp(terms).sum()))


def p_value(num_lost: int, num_tested: int, risk: float) -> float:
    """How probable so few losses are where a share ``risk`` of requests loses: of "more than ``risk`` lose"."""
    return binomial_cdf(num_lost, num_tested, risk)


def upper_bound(num_lost: int, num_tested: int, level: float) -> float:
    """The share of requests that loses at most, but for a probability ``level`` (Clopper and Pearson, one side).

    It is at most ``risk`` exactly where :func:`p_value` is at most ``level``.
    """
    if num_lost >= num_tested:
        return 1.0
    return _root(lambda share: binomial_cdf(num_lost, num_tested, share) > level)


def lower_bound(num_lost: int, num_tested: int, level: float) -> float:
    """The share of requests that loses at least, but for a probability ``level``."""
    if num_lost <= 0:
        return 0.0
    return _root(lambda share: 1.0 - binomial_cdf(num_lost - 1, num_tested, share) <= level)


def _root(is_below: Callable[[float], bool]) -> float:
    """The share up to which a condition holds."""
    low, high = 0.0, 1.0
    for _ in range(NUM_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if is_below(middle) else (low, middle)
    return high


def num_needed(risk: float, level: float) -> int:
    """The fewest prompts that certify a risk, where no request loses: (1 - risk)^n <= level."""
    return max(1, math.ceil(math.log(level) / math.log1p(-risk) - 1e-9))


def smallest_risk(num_tested: int, level: float) -> float:
    """The smallest risk that so many prompts certify, where no request loses; 1 without prompts."""
    return -math.expm1(math.log(level) / num_tested) if num_tested else 1.0


@lru_cache
def most_losses(num_tested: int, risk: float, level: float) -> int:
    """The most losses with which a setting is accepted, -1 where it is not even without a loss."""
    most = -1
    while most + 1 < num_tested and p_value(most + 1, num_tested, risk) <= level:
        most += 1
    return most


def is_hopeless(num_lost: int, num_seen: int, num_tested: int, risk: float, level: float) -> bool:
    """Whether to give a setting up before all prompts are decoded.

    It cannot be accepted any more, or it very probably would not be: what was seen says that it loses more than
    ``risk``, but for a probability ``level``.
    """
    if num_lost > most_losses(num_tested, risk, level):
        return True
    return num_seen > 0 and lower_bound(num_lost, num_seen, level) > risk


def fixed_sequence(p_values: Sequence[float], level: float) -> int:
    """How many settings of one policy are accepted: those before the first whose p-value is above the level.

    Args:
        p_values: In the order that was fixed before anything was measured.
        level: Of the policy.
    """
    return next((index for index, value in enumerate(p_values) if not value <= level), len(p_values))


def cheapest(costs: Sequence[float], is_accepted: Sequence[bool]) -> int | None:
    """The place of the accepted setting of least cost, the first of equals; None where none is accepted."""
    places = [place for place, accepted in enumerate(is_accepted) if accepted]
    return min(places, key=lambda place: costs[place]) if places else None
