"""When a task is said to have left its profile, and when not."""

import math
from dataclasses import replace
from itertools import count

import numpy as np
import pytest

from tests.calibration.records import KEY, NAN, flat, of_task
from vllm_osdt.calibration.guard import NUM_STANDARD_ERRORS, AgreementGuard, DriftGuard, compare
from vllm_osdt.calibration.profile import CalibrationProfile
from vllm_osdt.calibration.recording import Recording

WINDOW, MAX_GAP, MIN_COSINE = 32, 0.03, 0.95
NUM_CALIBRATIONS = 32
MEANS = np.array([0.55, 0.7, 0.8])  # at block entry of three blocks
SPREAD = 0.1  # of a request around them
IDS = count()


def entries(rng, number, shift=0.0, means=MEANS):
    """Mean confidence at block entry of requests, ``[requests, blocks]``; one in four ends after two blocks."""
    seen = np.clip(rng.normal(means + shift, SPREAD, (number, means.size)), 0.0, 1.0)
    seen[rng.random(number) < 0.25, 2:] = NAN
    return seen


def profile_of(seen, key=KEY):
    """A profile of requests that had these means at block entry, at all positions alike."""
    confidence = np.full((*seen.shape, 2, key.block_length), 0.99, dtype=np.float32)
    confidence[:, :, 0] = seen[:, :, None]
    confidence[np.isnan(seen)] = NAN
    return CalibrationProfile(key, Recording(confidence, np.zeros(confidence.shape, bool), confidence > 2))


def make_guard(**changes):
    return DriftGuard(
        **{"action": "recalibrate", "window": WINDOW, "max_gap": MAX_GAP, "min_cosine": MIN_COSINE} | changes
    )


def drifts(guard, profile, seen):
    """(request, drift) of every request after which there is one."""
    found = []
    for index, entry in enumerate(seen):
        req_id = f"{next(IDS)}"
        guard.begin(profile, req_id)
        found.append((index, guard.end(profile, req_id, entry)))
    return [(index, drift) for index, drift in found if drift is not None]


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("num_calibrations", [NUM_CALIBRATIONS, 4])
def test_500_requests_like_those_calibrated_on_are_no_drift(seed, num_calibrations):
    rng = np.random.default_rng(seed)
    profile = profile_of(entries(rng, num_calibrations))
    assert drifts(make_guard(), profile, entries(rng, 500)) == []


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("shift", [-0.2, 0.15])
def test_a_task_that_changes_is_reported_once_in_the_window_that_shows_it(seed, shift):
    rng = np.random.default_rng(seed)
    profile = profile_of(entries(rng, NUM_CALIBRATIONS))
    guard = make_guard()
    assert drifts(guard, profile, entries(rng, 5 * WINDOW)) == []
    [(index, drift)] = drifts(guard, profile, entries(rng, 5 * WINDOW, shift))
    assert index == WINDOW - 1
    assert drift.num_requests == WINDOW and drift.gap == pytest.approx(abs(shift), abs=0.1) and drift.gap > MAX_GAP


def test_a_profile_that_replaces_a_drifted_one_is_watched_anew():
    rng = np.random.default_rng(0)
    guard = make_guard()
    old, new = profile_of(entries(rng, NUM_CALIBRATIONS)), profile_of(entries(rng, NUM_CALIBRATIONS, -0.2))
    assert len(drifts(guard, old, entries(rng, WINDOW, -0.2))) == 1
    assert drifts(guard, new, entries(rng, 5 * WINDOW, -0.2)) == []
    assert len(drifts(guard, new, entries(rng, WINDOW))) == 1


def test_the_same_blocks_in_another_order_are_a_drift_by_cosine_alone():
    profile = profile_of(np.tile([0.1, 0.9], (NUM_CALIBRATIONS, 1)))
    seen = np.tile([0.9, 0.1], (WINDOW, 1))
    [(_, drift)] = drifts(make_guard(max_gap=1.0), profile, seen)
    assert drift.cosine == pytest.approx(0.18 / 0.82)
    assert drifts(make_guard(max_gap=1.0, min_cosine=0.0), profile, seen) == []


@pytest.mark.parametrize("num_standard_errors", [0.75 * NUM_STANDARD_ERRORS, 1.25 * NUM_STANDARD_ERRORS])
def test_a_gap_within_four_standard_errors_is_chance(num_standard_errors):
    """Half of the requests above, half below a mean that is off; both gaps are above the largest one allowed."""
    spread = 0.2
    sides = np.tile([-spread, spread], WINDOW // 2)
    standard_error = sides.std(ddof=1) * math.sqrt(1 / WINDOW + 1 / 8)
    seen = (0.4 + num_standard_errors * standard_error + sides)[:, None]
    drift = compare(np.array([0.4]), np.array([8]), seen)
    assert drift.standard_error == pytest.approx(standard_error)
    assert drift.gap == pytest.approx(num_standard_errors * standard_error) and drift.gap > MAX_GAP
    found = drifts(make_guard(), flat(0.4, num_requests=8), seen)
    assert len(found) == (num_standard_errors > NUM_STANDARD_ERRORS)


def test_a_gap_that_is_certain_but_small_is_no_drift():
    profile = flat(0.5, num_requests=NUM_CALIBRATIONS)
    for gap, num_drifts in ((0.9 * MAX_GAP, 0), (1.1 * MAX_GAP, 1)):
        assert len(drifts(make_guard(), profile, np.full((WINDOW, 1), 0.5 + gap))) == num_drifts


@pytest.mark.parametrize("window", [8, 20])
def test_nothing_is_said_before_the_window_is_full(window):
    guard = make_guard(window=window)
    assert [index for index, _ in drifts(guard, flat(0.9), np.full((3 * window, 1), 0.1))] == [window - 1]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("at_once", [16, 64, 500])
def test_requests_of_which_the_surest_end_first_are_no_drift(seed, at_once):
    rng = np.random.default_rng(seed)
    guard, profile, seen = make_guard(), profile_of(entries(rng, 64)), entries(rng, 500)
    running, told = [], []
    for index in range(500):
        guard.begin(profile, f"{index}")
        running.append(index)
        if len(running) == at_once:
            surest = max(running, key=lambda one: seen[one, 0])
            running.remove(surest)
            told.append(guard.end(profile, f"{surest}", seen[surest]))
    told += [guard.end(profile, f"{index}", seen[index]) for index in sorted(running, key=lambda one: -seen[one, 0])]
    assert told == [None] * 500


def test_a_request_that_fails_is_left_out_and_nobody_waits_for_it():
    guard, profile, low = make_guard(window=8), flat(0.9), np.full(1, 0.1)
    for index in range(8):
        guard.begin(profile, f"{index}")
    assert [guard.end(profile, f"{index}", None if index % 2 else low) for index in range(7)] == [None] * 7
    drift = guard.end(profile, "7", None)
    assert drift.num_requests == 4
    assert guard.end(profile, "7", low) is None and guard.end(profile, "unknown", low) is None


def test_a_cohort_of_failures_says_nothing():
    guard, profile = make_guard(window=8), flat(0.9)
    for index in range(8):
        guard.begin(profile, f"{index}")
    assert [guard.end(profile, f"{index}", None) for index in range(8)] == [None] * 8
    assert len(drifts(guard, profile, np.full((8, 1), 0.1))) == 1


def test_windows_do_not_overlap():
    """One bad request in each of several windows never adds up."""
    profile, guard = flat(0.5, num_requests=NUM_CALIBRATIONS), make_guard(window=8)
    seen = np.full((80, 1), 0.5)
    seen[::8] = 0.1
    assert drifts(guard, profile, seen) == []


def test_blocks_that_requests_or_calibration_did_not_reach_are_left_out():
    profile = profile_of(np.tile([0.5, 0.6], (NUM_CALIBRATIONS, 1)))
    longer, shorter = np.tile([0.5, 0.6, 0.05], (WINDOW, 1)), np.tile([0.5], (WINDOW, 1))
    unreached = np.tile([0.5, NAN], (WINDOW, 1))
    assert all(drifts(make_guard(), profile, seen) == [] for seen in (longer, shorter, unreached))
    assert len(drifts(make_guard(), profile, longer - 0.1)) == len(drifts(make_guard(), profile, shorter - 0.1)) == 1
    gap = profile_of(np.tile([0.5, NAN, 0.6], (NUM_CALIBRATIONS, 1)))
    assert drifts(make_guard(), gap, np.tile([0.5, 0.05, 0.6], (WINDOW, 1))) == []


def test_requests_that_share_no_block_with_the_profile_say_nothing():
    drift = compare(np.array([0.5, NAN]), np.array([4, 0]), np.array([[NAN, 0.1], [NAN, 0.2]]))
    assert (drift.num_requests, drift.gap, drift.standard_error, drift.cosine) == (2, 0.0, 0.0, 1.0)


def test_warn_and_recalibrate_are_labels_and_decide_alike():
    rng = np.random.default_rng(3)
    profile, seen = profile_of(entries(rng, NUM_CALIBRATIONS)), entries(rng, 200, -0.15)
    found = {}
    for action in ("warn", "recalibrate"):
        guard = make_guard(action=action)
        assert guard.action == action
        found[action] = drifts(guard, profile, seen)
    assert found["warn"] == found["recalibrate"] != []


def test_profiles_are_told_apart_and_only_so_many_are_watched():
    guard = make_guard(window=8, max_profiles=3)
    profiles = [flat(0.9, key=of_task(f"task {index}")) for index in range(6)]
    low = np.full((7, 1), 0.1)
    for profile in profiles:
        assert drifts(guard, profile, low) == []  # one request short each
    assert len(guard._cohorts) == 3
    assert [len(drifts(guard, profile, low[:1])) for profile in profiles[3:]] == [1, 1, 1]
    assert drifts(guard, profiles[0], low) == [] and len(guard._cohorts) == 3  # forgotten, and counted anew
    assert len(drifts(guard, profiles[0], low[:1])) == 1


def test_the_distance_equals_a_calculation_by_hand():
    rng = np.random.default_rng(5)
    for num_requests in (2, 9, 40):
        seen = entries(rng, num_requests, means=np.array([0.5, 0.9, 0.3, 0.6]))
        seen[rng.random(seen.shape) < 0.2] = NAN
        expected, num_expected = np.array([0.4, 0.8, NAN, 0.7]), np.array([7, 6, 0, 3])
        gaps, errors, weights, products, squares = [], [], [], [], []
        for block in (0, 1, 3):
            column = [value for value in seen[:, block].tolist() if not math.isnan(value)]
            if not column:
                continue
            n, level = len(column), expected[block]
            mean = sum(column) / n
            variance = sum((value - mean) ** 2 for value in column) / max(n - 1, 1)
            gaps.append(n * abs(mean - level))
            errors.append(n * math.sqrt(variance * (1 / n + 1 / num_expected[block])))
            weights.append(n)
            products.append(n * mean * level)
            squares.append((n * mean**2, n * level**2))
        drift = compare(expected, num_expected, seen)
        assert drift.num_requests == num_requests
        assert drift.gap == pytest.approx(sum(gaps) / sum(weights))
        assert drift.standard_error == pytest.approx(sum(errors) / sum(weights))
        lengths = [math.sqrt(sum(side)) for side in zip(*squares, strict=True)]
        assert drift.cosine == pytest.approx(sum(products) / math.prod(lengths))


def test_a_profile_is_known_by_its_content():
    """Two objects with one id, as after a reload from disk, share a window."""
    guard, first = make_guard(window=8), flat(0.9)
    second = replace(flat(0.9))
    assert first is not second and first.profile_id == second.profile_id
    low = np.full((4, 1), 0.1)
    assert drifts(guard, first, low) == [] and len(drifts(guard, second, low)) == 1


@pytest.mark.parametrize("seed", range(20))
def test_blocks_that_few_requests_reach_do_not_alarm(seed):
    rng = np.random.default_rng(seed)
    means = np.array([0.6, 0.7, 0.8, 0.5, 0.7, 0.9])

    def some(number):
        seen = np.clip(rng.normal(means, 0.15, (number, means.size)), 0.0, 1.0)
        for entry in seen:
            entry[1 + rng.geometric(0.5) :] = NAN
        return seen

    assert drifts(make_guard(), profile_of(some(NUM_CALIBRATIONS)), some(500)) == []


def audit(guard, changed, profile="p", allowed=0.1):
    """What the guard says of audits in their order; ``changed`` is a 1 for each with other tokens."""
    return [guard.observe(profile, is_same=not one, allowed=allowed) for one in changed]


def test_evidence_of_audits_equals_a_calculation_by_hand():
    told = audit(AgreementGuard(), [1, 0, 1, 1, 1, 1, 1])
    evidence = 0.0
    for changed in (1, 0, 1, 1, 1, 1, 1):
        evidence = (evidence + 1) * (3.0 if changed else 0.7 / 0.9)
    assert told[:-1] == [None] * 6 and told[-1].evidence == pytest.approx(evidence) and evidence > 1000
    assert (told[-1].num_audits, told[-1].num_changed) == (7, 6)


def test_an_alarm_of_audits_comes_once_for_each_profile():
    guard = AgreementGuard(max_profiles=2)
    assert sum(one is not None for one in audit(guard, [1] * 100)) == 1
    assert sum(one is not None for one in audit(guard, [1] * 100, "q")) == 1
    assert sum(one is not None for one in audit(guard, [1] * 100, "r")) == 1
    assert len(guard._watched) == 2


@pytest.mark.parametrize("allowed", [0.02, 0.1, 0.3, 0.9])
def test_audits_alarm_rarely_while_as_many_change_as_may(allowed):
    rng = np.random.default_rng(3)
    lengths = []
    for _ in range(60):
        guard, length, told = AgreementGuard(), 0, None
        while told is None and length < 20_000:
            told = guard.observe("p", is_same=rng.random() >= allowed, allowed=allowed)
            length += 1
        lengths.append(length)
    assert np.mean(lengths) >= 1000


@pytest.mark.parametrize(("changed", "most"), [(0.3, 80), (0.5, 30), (1.0, 8)])
def test_audits_alarm_soon_after_a_change_however_long_all_was_well(changed, most):
    rng = np.random.default_rng(4)
    delays = []
    for _ in range(40):
        guard = AgreementGuard()
        assert audit(guard, rng.random(300) < 0.02)[-1] is None
        told = audit(guard, rng.random(1000) < changed)
        delays.append(next(index for index, one in enumerate(told) if one is not None) + 1)
    assert np.mean(delays) <= most
