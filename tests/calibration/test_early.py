"""Thresholds while a task calibrates: how cautious they are, who uses them and who records."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.calibration.records import KEY, one_recording, same
from vllm_osdt.calibration.profile import CalibrationProfile, Setting, stack
from vllm_osdt.calibration.registry import ProfileRegistry
from vllm_osdt.calibration.thresholds import Fallback, conformal, early, num_requests_needed

SCORES = st.lists(st.floats(0, 0.9), min_size=1, max_size=60).map(np.array)
RISKS = st.sampled_from([0.01, 0.04, 0.1, 0.5])
STATIC = 0.9


@given(SCORES, RISKS)
def test_a_threshold_is_between_the_highest_score_and_the_static_threshold(scores, risk):
    threshold = early(scores, risk, STATIC)
    if scores.size >= num_requests_needed(risk):
        assert threshold == conformal(scores, risk)
    else:
        assert scores.max() <= threshold <= STATIC


@given(st.integers(1, 200), RISKS)
def test_the_predictive_chance_of_a_higher_score_is_the_risk(num_scores, risk):
    threshold = early(np.zeros(num_scores), risk, 1.0)
    if num_scores >= num_requests_needed(risk):
        assert threshold == 0.0
    else:
        assert (3 * (1 - threshold)) ** 5 / (num_scores + 1) == pytest.approx(risk)
        assert threshold > 2 / 3


@pytest.mark.parametrize("risk", [0.01, 0.04, 0.1])
def test_every_request_without_a_wrong_proposal_lowers_the_threshold(risk):
    falling = [early(np.zeros(number), risk, STATIC) for number in range(1, num_requests_needed(risk) + 1)]
    assert sorted(falling, reverse=True) == falling and len(set(falling)) == len(falling)
    assert falling[0] < STATIC and falling[-1] == 0.0


def test_a_block_that_few_requests_reached_has_an_early_threshold_only_while_the_task_calibrates():
    profile = CalibrationProfile(KEY, stack([one_recording(seed=seed) for seed in range(3)]))
    whole, so_far = (profile.thresholds(Setting(risk=0.04, is_early=is_early)) for is_early in (False, True))
    assert np.isnan(whole.values).all() and (whole.fallback == Fallback.CELL).all()
    assert (so_far.values <= np.float32(KEY.threshold)).all() and (so_far.fallback == Fallback.NONE).all()


def shared(registry, *req_ids, num_requests=4):
    return [registry.claim(KEY, req_id, num_requests, is_shared=True) for req_id in req_ids]


def test_every_other_request_records_once_there_is_something_to_use():
    registry = ProfileRegistry()
    assert registry.early(KEY) is None
    assert shared(registry, "a", "b") == [True, True]  # nothing to use yet
    assert registry.early(KEY) is None
    registry.deliver(KEY, "a", one_recording(seed=1), 4)
    assert registry.early(KEY).num_requests == 1 and registry.early(KEY) is registry.early(KEY)
    assert shared(registry, "c", "d", "e", "f", "g") == [False, True, False, True, False]
    assert shared(registry, "b", "d") == [True, True]  # they hold a place
    registry.deliver(KEY, "b", one_recording(seed=2), 4)
    assert registry.early(KEY).num_requests == 2 and registry.find(KEY, 4) is None
    registry.deliver(KEY, "d", one_recording(seed=3), 4)
    profile = registry.deliver(KEY, "f", one_recording(seed=4), 4)
    assert profile is registry.find(KEY, 4) and registry.early(KEY) is None
    assert registry.counts == Counter(made=1)
    assert same(profile, CalibrationProfile(KEY, profile.record, profile.created, profile.versions))


def test_a_request_that_asks_for_a_calibration_records_whatever_the_turn():
    registry = ProfileRegistry()
    registry.claim(KEY, "a", 8)
    registry.deliver(KEY, "a", one_recording(seed=1), 8)
    assert [registry.claim(KEY, req_id, 8) for req_id in "bcd"] == [True] * 3
