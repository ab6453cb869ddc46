"""Exact tests of settings, and what they promise together."""

import math

import numpy as np
import pytest

from vllm_osdt.calibration.selection import (
    binomial_cdf,
    cheapest,
    fixed_sequence,
    is_hopeless,
    level_of_policy,
    lower_bound,
    most_losses,
    num_needed,
    p_value,
    smallest_risk,
    upper_bound,
)

ROUNDING = 1e-9  # of sums of up to a thousand float64 terms


@pytest.mark.parametrize(("num_tested", "share"), [(1, 0.5), (7, 0.01), (60, 0.3), (400, 0.02)])
def test_the_distribution_is_the_binomial_one(num_tested, share):
    total = 0.0
    for num in range(num_tested + 1):
        total += math.comb(num_tested, num) * share**num * (1 - share) ** (num_tested - num)
        assert binomial_cdf(num, num_tested, share) == pytest.approx(total, abs=ROUNDING)


def test_the_distribution_at_its_edges():
    assert binomial_cdf(-1, 5, 0.5) == 0.0 and binomial_cdf(5, 5, 0.5) == 1.0 == binomial_cdf(0, 5, 0.0)
    assert binomial_cdf(4, 5, 1.0) == 0.0 and binomial_cdf(0, 0, 0.5) == 1.0
    assert 0.0 <= binomial_cdf(3, 100_000, 0.01) < 1e-300**0.5


@pytest.mark.parametrize("risk", [0.001, 0.01, 0.1, 0.5])
@pytest.mark.parametrize("level", [0.05, 0.05 / 7, 1e-4])
def test_as_many_prompts_are_needed_as_certify_the_risk_without_a_loss(risk, level):
    needed = num_needed(risk, level)
    assert p_value(0, needed, risk) <= level * (1 + ROUNDING) < p_value(0, needed - 1, risk) * (1 + 1e-6)
    assert smallest_risk(needed, level) <= risk * (1 + ROUNDING)
    assert needed == 1 or smallest_risk(needed - 1, level) > risk
    assert most_losses(needed - 1, risk, level) == -1
    assert smallest_risk(0, level) == 1.0


def test_known_numbers():
    assert (num_needed(0.01, 0.05), num_needed(0.05, 0.05)) == (299, 59)
    assert upper_bound(0, 100, 0.05) == pytest.approx(0.029513, abs=1e-6)  # 1 - 0.05^(1/100)
    assert upper_bound(2, 20, 0.05) == pytest.approx(0.282619, abs=1e-6)  # tables of Clopper and Pearson
    assert lower_bound(2, 20, 0.05) == pytest.approx(0.018065, abs=1e-6)


@pytest.mark.parametrize("num_tested", [5, 48, 300])
@pytest.mark.parametrize("risk", [0.02, 0.2])
def test_a_setting_is_accepted_exactly_where_its_upper_bound_is_within_the_risk(num_tested, risk):
    level = 0.01
    most = most_losses(num_tested, risk, level)
    for num_lost in range(num_tested + 1):
        is_accepted = p_value(num_lost, num_tested, risk) <= level
        assert is_accepted == (upper_bound(num_lost, num_tested, level) <= risk) == (num_lost <= most)
        assert (
            lower_bound(num_lost, num_tested, level)
            <= num_lost / num_tested
            <= upper_bound(num_lost, num_tested, level)
        )


def test_a_setting_that_can_no_longer_be_accepted_is_given_up_and_no_other_that_has_few_losses():
    most = most_losses(300, 0.05, 0.01)
    assert not is_hopeless(most, 300, 300, 0.05, 0.01) and is_hopeless(most + 1, 300, 300, 0.05, 0.01)
    assert not is_hopeless(0, 0, 300, 0.05, 0.01)
    assert is_hopeless(0, 0, 10, 0.05, 0.01)  # too few prompts
    most = most_losses(10_000, 0.05, 0.01)
    assert most > 30 and is_hopeless(30, 100, 10_000, 0.05, 0.01)  # could be accepted, but will not be
    assert not is_hopeless(5, 100, 10_000, 0.05, 0.01)


def test_a_sequence_ends_at_the_first_setting_that_is_not_accepted():
    assert fixed_sequence([0.001, 0.01, 0.02, 0.001], 0.01) == 2
    assert fixed_sequence([], 0.01) == 0 and fixed_sequence([0.5, 0.0], 0.01) == 0
    assert fixed_sequence([0.0, 0.0], 0.01) == 2 and fixed_sequence([math.nan], 0.01) == 0


def test_the_cheapest_accepted_setting_is_chosen():
    assert cheapest([1.0, 0.5, 0.3, 0.5], [True, True, False, True]) == 1
    assert cheapest([0.1], [False]) is None


def run_once(rng, shares, num_tested, risk, confidence):
    """The accepted settings, as (policy, place), of policies whose settings lose these shares of requests."""
    level = level_of_policy(confidence, len(shares))
    accepted = []
    for policy, settings in enumerate(shares):
        draws = rng.random(num_tested)  # settings see the same prompts
        for place, share in enumerate(settings):
            lost = np.cumsum(draws < share)
            given_up = any(is_hopeless(int(lost[n - 1]), n, num_tested, risk, level) for n in (num_tested // 2,))
            if given_up or p_value(int(lost[-1]), num_tested, risk) > level:
                break
            accepted.append((policy, place))
    return accepted


@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_too_bold_a_setting_is_accepted_no_more_often_than_the_confidence_allows(confidence):
    risk, num_tested, num_runs = 0.05, 200, 1500
    # At the boundary, where errors are most frequent: each policy has a setting that loses a little more than the risk.
    shares = [(0.0, 0.0501, 0.06), (0.0501, 0.07), (0.01, 0.02, 0.0501)]
    rng = np.random.default_rng(0)
    num_wrong = num_right = 0
    for _ in range(num_runs):
        accepted = run_once(rng, shares, num_tested, risk, confidence)
        num_wrong += any(shares[policy][place] > risk for policy, place in accepted)
        num_right += (0, 0) in accepted
    error = 1 - confidence
    assert num_wrong / num_runs <= error + 3 * math.sqrt(error * confidence / num_runs)
    assert num_wrong > 0  # the case is one where errors happen
    assert num_right == num_runs
