"""Recording, CALIBRATE, and who makes and uses a profile."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference import decode as reference
from vllm_osdt.calibration.calibrate import METRICS, calibrate
from vllm_osdt.calibration.profile import CalibrationProfile, ProfileKey
from vllm_osdt.calibration.recorder import Recorder
from vllm_osdt.calibration.registry import ProfileRegistry
from vllm_osdt.config import METRICS as METRIC_NAMES

ROUNDING = 1e-6  # thresholds are float32
KEY = ProfileKey("gsm", 4, "dual", 0.9)
NAN = float("nan")


@st.composite
def records(draw):
    """``[blocks, steps, positions]`` as a decoding leaves it: steps without gaps, later blocks possibly missing."""
    num_blocks, length = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    confidence = np.full((num_blocks, length, length), np.nan, dtype=np.float32)
    committed = np.zeros(confidence.shape, dtype=bool)
    for block in range(draw(st.integers(1, num_blocks))):
        masked = set(range(length))
        for step in range(length):
            if not masked:
                break
            chosen = draw(st.sets(st.sampled_from(sorted(masked)), min_size=1))
            for i in masked:
                confidence[block, step, i] = draw(st.floats(0, 1, width=32))
                committed[block, step, i] = i in chosen
            masked -= chosen
    return confidence, committed


def as_lists(confidence, committed):
    """The same record in the form of the plain decoder."""
    return [
        [
            [(float(c), bool(k)) for c, k in zip(cells, kept, strict=True) if not np.isnan(c)]
            for cells, kept in zip(block, kept_block, strict=True)
            if not np.isnan(cells).all()
        ]
        for block, kept_block in zip(confidence, committed, strict=True)
    ]


def test_every_metric_a_user_may_ask_for_exists():
    assert tuple(METRICS) == METRIC_NAMES


@settings(deadline=None)
@given(records(), st.sampled_from(METRIC_NAMES), st.sampled_from(["block", "step_block"]), st.booleans())
def test_thresholds_equal_a_calculation_by_hand(record, metric, mode, committed_only):
    profile = CalibrationProfile(KEY, *record)
    got = profile.thresholds(mode, metric, "committed" if committed_only else "masked")
    expected = reference.calibrate(as_lists(*record), mode, metric, committed_only)
    assert got.dtype == np.float32 and got.shape == (len(expected), record[0].shape[1])
    for row, by_hand in zip(got.tolist(), expected, strict=True):
        padded = by_hand + [by_hand[-1]] * (len(row) - len(by_hand))
        assert row == pytest.approx(padded, abs=ROUNDING)


def test_block_mode_pools_the_samples_of_all_steps():
    block = np.array([[0.1, 0.2, 0.9], [NAN, 0.4, NAN], [NAN] * 3], dtype=np.float32)
    assert calibrate(block[None], "block", "mean") == pytest.approx(np.full((1, 3), 0.4), abs=ROUNDING)
    assert calibrate(block[None], "block", "q1") == pytest.approx(np.full((1, 3), 0.175), abs=ROUNDING)


def test_step_mode_repeats_the_last_step_and_fills_an_empty_one_with_the_block():
    block = np.array([[0.2, 0.4], [NAN, NAN], [0.9, NAN], [NAN, NAN]], dtype=np.float32)
    assert calibrate(block[None], "step_block", "mean") == pytest.approx(np.array([[0.3, 0.5, 0.9, 0.9]]), abs=ROUNDING)


def test_min_whisker_is_a_sample_and_leaves_outliers_out():
    samples = np.array([[[0.0] + [0.5 + i / 100 for i in range(9)]]])
    assert calibrate(samples, "block", "min_whisker")[0, 0] == pytest.approx(0.5, abs=ROUNDING)
    assert calibrate(samples[:, :, 1:], "block", "min_whisker")[0, 0] == pytest.approx(0.5, abs=ROUNDING)


def test_a_block_without_record_ends_the_table():
    record = np.full((3, 2, 2), NAN, dtype=np.float32)
    record[0, 0] = record[2, 0] = 0.5
    assert calibrate(record, "block", "q2").shape == (1, 2)


@pytest.mark.parametrize("mode", ["block", "step_block"])
def test_an_empty_first_block_is_refused(mode):
    record = np.full((2, 3, 3), NAN, dtype=np.float32)
    record[1] = 0.5
    with pytest.raises(ValueError, match="first block"):
        calibrate(record, mode, "q1")


def test_recorder_keeps_masked_and_committed_positions_of_each_step():
    recorder = Recorder(2, 3, torch.device("cpu"))
    all_masked, one_left = torch.tensor([True] * 3), torch.tensor([False, True, False])
    recorder.add(0, 0, torch.tensor([0.9, 0.1, 0.8]), all_masked, one_left)
    recorder.add(0, 1, torch.tensor([0.7, 0.2, 0.7]), one_left, torch.zeros(3, dtype=torch.bool))
    confidence, committed = recorder.to_arrays()
    assert confidence[0] == pytest.approx(np.array([[0.9, 0.1, 0.8], [NAN, 0.2, NAN], [NAN] * 3]), nan_ok=True)
    assert committed[0].tolist() == [[True, False, True], [False, True, False], [False] * 3]
    assert np.isnan(confidence[1]).all() and not committed[1].any()


def test_a_block_that_starts_again_overwrites_its_record_and_no_other():
    recorder = Recorder(2, 2, torch.device("cpu"))
    both, none = torch.tensor([True, True]), torch.tensor([False, False])
    first = torch.tensor([False, True])
    for block in (0, 1):
        recorder.add(block, 0, torch.tensor([0.6, 0.3]), both, first)
        recorder.add(block, 1, torch.tensor([0.1, 0.4]), first, none)
    recorder.add(1, 0, torch.tensor([0.8, 0.9]), both, none)
    confidence, committed = recorder.to_arrays()
    assert confidence[1] == pytest.approx(np.array([[0.8, 0.9], [NAN, NAN]]), nan_ok=True)
    assert committed[1].tolist() == [[True, True], [False, False]]
    assert confidence[0] == pytest.approx(np.array([[0.6, 0.3], [NAN, 0.4]]), nan_ok=True)


def profile(key=KEY, value=0.5):
    shape = (1, key.block_length, key.block_length)
    return CalibrationProfile(key, np.full(shape, value, np.float32), np.ones(shape, bool))


def test_one_request_at_a_time_calibrates_a_key():
    registry = ProfileRegistry()
    assert registry.claim(KEY, "a") and registry.num_calibrating == 1
    assert not registry.claim(KEY, "b")
    other = ProfileKey("code", 4, "dual", 0.9)
    assert registry.claim(other, "b") and registry.num_calibrating == 2


def test_a_released_key_is_calibrated_by_the_next_request():
    registry = ProfileRegistry()
    registry.claim(KEY, "a")
    registry.release(KEY, "b")
    assert not registry.claim(KEY, "b")  # b did not hold it
    registry.release(KEY, "a")
    assert registry.find(KEY) is None and registry.claim(KEY, "b")


def test_a_published_profile_is_used_until_it_is_replaced():
    registry = ProfileRegistry()
    registry.claim(KEY, "a")
    first, second = profile(value=0.5), profile(value=0.7)
    registry.publish(first, "a")
    assert registry.find(KEY) is first
    assert registry.claim(KEY, "c")
    assert registry.find(KEY) is first
    registry.publish(second, "c")
    assert registry.find(KEY) is second and registry.num_calibrating == 0


@pytest.mark.parametrize("change", [{"task": "b"}, {"block_length": 8}, {"cache": "none"}, {"threshold": 0.8}])
def test_profiles_apply_to_exactly_their_key(change):
    registry = ProfileRegistry()
    registry.publish(profile(), "a")
    other = ProfileKey(**{"task": "gsm", "block_length": 4, "cache": "dual", "threshold": 0.9, **change})
    assert registry.find(other) is None


def test_mean_confidence_counts_recorded_positions_only():
    confidence = np.array([[[0.2, 0.6], [NAN, 0.1]], [[NAN, NAN], [NAN, NAN]]], dtype=np.float32)
    mean = CalibrationProfile(KEY, confidence, ~np.isnan(confidence)).mean_confidence
    assert mean == pytest.approx(np.array([[0.4, 0.1], [NAN, NAN]]), nan_ok=True)
