"""The conformal metric: what it computes, what it promises, and what holds where requests are too few."""

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.calibration.records import KEY, NAN, recorded
from tests.calibration.test_calibration import as_lists, records
from tests.reference import decode as reference
from vllm_osdt.calibration.profile import CalibrationProfile, Setting, stack
from vllm_osdt.calibration.recording import Recording
from vllm_osdt.calibration.thresholds import GROUP_LENGTH, Fallback, calibrate, conformal, num_requests_needed
from vllm_osdt.geometry import DecodeShape
from vllm_osdt.options import DecodingOptions
from vllm_osdt.policies import POLICIES

RISKS = [Fraction(1, n) for n in (2, 3, 4, 5, 7, 10)] + [Fraction(2, 5), Fraction(9, 10)]
# A share of 20,000 trials is off by more than four standard errors of 0.35 % once in 15,000 runs; the seed is fixed.
NUM_TRIALS, CHANCE = 20_000, 0.014


@settings(deadline=None)
@given(st.data(), st.sampled_from(RISKS), st.sampled_from(["block", "step_block"]))
def test_thresholds_equal_a_calculation_by_hand(data, risk, mode):
    length = data.draw(st.integers(1, 3))
    recordings = data.draw(st.lists(records(length=length), min_size=1, max_size=12))
    profile = CalibrationProfile(KEY, stack(recordings))
    got = profile.thresholds(Setting(mode, "conformal", risk=float(risk))).values
    expected = reference.conformal([as_lists(record, "wrong") for record in recordings], mode, risk, length)
    assert got.shape == (len(expected), profile.record.confidence.shape[2])
    for row, by_hand in zip(got.tolist(), expected, strict=True):
        plain = [NAN if value is None else value for value in by_hand]
        assert row == pytest.approx(plain + [plain[-1]] * (len(row) - len(plain)), abs=0, nan_ok=True)


@pytest.mark.parametrize(("risk", "num_requests"), [(0.04, 24), (0.04, 32), (0.1, 19), (0.25, 8), (0.5, 1)])
@pytest.mark.parametrize("is_discrete", [False, True])
def test_a_new_request_exceeds_the_threshold_at_most_as_often_as_the_risk(risk, num_requests, is_discrete):
    """Exchangeable, not independent: requests of a trial share a level."""
    rng = np.random.default_rng(num_requests)
    scores = (rng.random((NUM_TRIALS, 1)) + rng.random((NUM_TRIALS, num_requests + 1))) / 2
    scores = scores.round(1) if is_discrete else scores
    exceeds = np.mean([new > conformal(known, risk) for known, new in zip(scores[:, 1:], scores[:, 0], strict=True)])
    assert exceeds <= risk + CHANCE
    if not is_discrete:  # and is not bought by a threshold that nothing exceeds
        assert exceeds >= risk - 1 / (num_requests + 1) - CHANCE


def test_the_length_of_a_block_says_which_share_a_threshold_not_the_length_of_a_record():
    half = replace(KEY, block_length=GROUP_LENGTH // 2, cache="dual:adablock0.3,8,14")
    assert half.num_positions == GROUP_LENGTH
    rng = np.random.default_rng(1)
    confidence = rng.random((9, 4, 1, half.num_positions), dtype=np.float32)
    wrong = rng.random(confidence.shape) < 0.1
    got = CalibrationProfile(half, Recording(confidence, ~wrong, wrong)).thresholds(Setting(risk=0.1)).values
    assert got[0] == got[1] == np.where(wrong, confidence, 0)[:, :2].max() and got[2] == got[3] != got[0]


def test_a_request_without_a_wrong_proposal_has_the_lowest_score():
    confidence = np.full((3, 1, 1, 2), 0.7, dtype=np.float32)
    wrong = np.zeros(confidence.shape, bool)
    wrong[0, 0, 0, 0] = True
    assert calibrate(confidence, wrong, "block", "conformal", 0.5).values[0, 0] == 0.0
    assert calibrate(confidence, wrong, "block", "conformal", 0.25).values[0, 0] == np.float32(0.7)


def test_requests_that_did_not_reach_a_block_do_not_count_for_it():
    """Two of four reach the second block: enough for a risk of a half, not for a quarter."""
    confidence = np.full((4, 2, 1, GROUP_LENGTH), 0.5, dtype=np.float32)
    confidence[2:, 1] = NAN
    for risk, has_value in ((0.5, True), (0.25, False)):
        table = calibrate(confidence, np.ones(confidence.shape, bool), "block", "conformal", risk)
        assert table.values[0, 0] == 0.5 and math.isnan(table.values[1, 0]) != has_value
        assert table.fallback[:, 0].tolist() == [Fallback.NONE, Fallback.NONE if has_value else Fallback.CELL]


@pytest.mark.parametrize(("length", "shared"), [(8, 4), (20, 1), (32, 1), (128, 1)])
def test_short_blocks_share_the_highest_score_of_their_group(length, shared):
    confidence = np.full((1, 8, 1, length), 0.1, dtype=np.float32)
    confidence[0, 2] = 0.7
    confidence[0, 5] = 0.4
    table = calibrate(confidence, np.ones(confidence.shape, bool), "block", "conformal", 0.5)
    expected = [[0.7] * 4 + [0.4] * 4, [0.1, 0.1, 0.7, 0.1, 0.1, 0.4, 0.1, 0.1]][shared == 1]
    assert table.values[:, 0] == pytest.approx(expected)
    paper = calibrate(confidence, None, "block", "q1").values[:, 0]  # the paper's statistics are of one block
    assert paper == pytest.approx([0.1, 0.1, 0.7, 0.1, 0.1, 0.4, 0.1, 0.1])


def test_a_step_that_too_few_requests_took_has_its_blocks_threshold():
    profile = recorded(num_requests=6, num_blocks=1, seed=3)
    took = (~np.isnan(profile.record.confidence)).any(axis=3).sum(axis=0)[0].tolist()
    assert took[0] == 6 and 0 < took[-1] < 4
    block, step_block = (profile.thresholds(Setting(mode, risk=0.2)) for mode in ("block", "step_block"))
    few = [step for step, number in enumerate(took) if number < num_requests_needed(0.2)]
    kinds = [Fallback.CELL if step in few else Fallback.NONE for step in range(len(took))]
    assert step_block.fallback[0].tolist() == kinds
    assert (step_block.values[0, few] == block.values[0, few]).all()
    assert step_block.values[0, 0] <= block.values[0, 0]  # a step's worst is no worse than the block's


@pytest.mark.parametrize("mode", ["block", "step_block"])
def test_with_too_few_requests_the_static_threshold_holds_and_equality_passes(mode):
    profile = recorded(num_requests=num_requests_needed(0.25) - 1)
    table = profile.thresholds(Setting(mode, risk=0.25))
    assert np.isnan(table.values).all()
    assert (table.fallback[:, 0] == Fallback.CELL).all()
    options = DecodingOptions(
        granularity=mode, threshold=0.8, threshold_cap=0.5, slack=0.3, block_length=4, gen_length=8
    )
    shape = DecodeShape(2, 4)
    schedule = POLICIES["osdt"].schedule(options, shape, table)
    static = POLICIES["static_threshold"].schedule(options, shape)
    assert np.array_equal(schedule.parameters, static.parameters)
    assert schedule.parameters[0, 0] == np.float32(0.8)  # as the kernel reads it: confidence >= parameter
    assert (schedule.fallback[:, 0] == Fallback.CELL).all()
    enough = replace(profile, record=recorded(num_requests=num_requests_needed(0.25)).record, _thresholds={})
    assert not np.isnan(enough.thresholds(Setting(mode, risk=0.25)).values[0]).any()


def test_the_requests_needed_are_the_fewest_that_give_a_threshold():
    risks = [1 / n for n in range(2, 1026)] + [n / 1000 for n in range(1, 1000)]
    risks += np.random.default_rng(0).uniform(0.001, 0.999, 500).tolist()
    for risk in risks:
        needed = num_requests_needed(risk)
        assert not math.isnan(conformal(np.zeros(needed), risk)), risk
        assert math.isnan(conformal(np.zeros(needed - 1), risk)), risk


def test_the_default_options_calibrate_on_enough_requests():
    assert DecodingOptions().num_calibration_requests >= num_requests_needed(DecodingOptions().risk)
