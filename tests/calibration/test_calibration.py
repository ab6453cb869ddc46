"""Recording, CALIBRATE, and what a profile makes of its record."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.calibration.records import KEY, NAN, of_task, one_recording, recorded
from tests.reference import decode as reference
from vllm_osdt.calibration.profile import CalibrationProfile, Setting, stack
from vllm_osdt.calibration.recording import MAX_BLOCKS, Recorder, Recording
from vllm_osdt.calibration.thresholds import CONFORMAL, STATISTICS, Fallback, calibrate
from vllm_osdt.options import DECLARED

NAMES = tuple(DECLARED["statistic"].schema["enum"])

ROUNDING = 1e-6  # thresholds are float32


@st.composite
def records(draw, max_length=6, length=None):
    """A request's recording as a decoding leaves it: steps without gaps, later blocks possibly missing."""
    num_blocks, length = draw(st.integers(1, 3)), length or draw(st.integers(1, max_length))
    shape = (num_blocks, length, length)
    record = Recording(np.full(shape, np.nan, dtype=np.float32), np.zeros(shape, bool), np.zeros(shape, bool))
    for block in range(draw(st.integers(1, num_blocks))):
        masked = set(range(length))
        for step in range(length):
            if not masked:
                break
            chosen = draw(st.sets(st.sampled_from(sorted(masked)), min_size=1))
            for i in masked:
                record.confidence[block, step, i] = draw(st.floats(0, 1, width=32))
                record.committed[block, step, i] = i in chosen
                record.wrong[block, step, i] = i not in chosen and draw(st.booleans())
            masked -= chosen
    return record


@st.composite
def several_records(draw, max_requests=4):
    """Recordings of requests of one task."""
    length = draw(st.integers(1, 4))
    return draw(st.lists(records(length=length), min_size=1, max_size=max_requests))


def as_lists(record, flags="committed"):
    """A recording in the form of the plain decoder, with one of its flags beside each confidence."""
    return [
        [
            [(float(c), bool(k)) for c, k in zip(cells, kept, strict=True) if not np.isnan(c)]
            for cells, kept in zip(block, kept_block, strict=True)
            if not np.isnan(cells).all()
        ]
        for block, kept_block in zip(record.confidence, getattr(record, flags), strict=True)
        if not np.isnan(block).all()
    ]


def values(confidence, mode, metric):
    """Thresholds of one request's confidences."""
    return calibrate(confidence[None], None, mode, metric).values


def test_every_metric_a_user_may_ask_for_exists():
    assert (CONFORMAL, *STATISTICS) == NAMES


@settings(deadline=None)
@given(several_records(), st.sampled_from(list(STATISTICS)), st.sampled_from(["block", "step_block"]), st.booleans())
def test_thresholds_equal_a_calculation_by_hand(recordings, metric, mode, committed_only):
    profile = CalibrationProfile(KEY, stack(recordings))
    got = profile.thresholds(Setting(mode, metric, "committed" if committed_only else "masked")).values
    expected = reference.calibrate_together([as_lists(record) for record in recordings], mode, metric, committed_only)
    assert got.dtype == np.float32 and got.shape == (len(expected), profile.record.confidence.shape[2])
    for row, by_hand in zip(got.tolist(), expected, strict=True):
        padded = by_hand + [by_hand[-1]] * (len(row) - len(by_hand))
        assert row == pytest.approx(padded, abs=ROUNDING)


@settings(deadline=None)
@given(st.data(), several_records(), st.sampled_from(NAMES), st.sampled_from(["block", "step_block"]))
def test_the_order_of_the_requests_changes_no_threshold(data, recordings, metric, mode):
    shuffled = data.draw(st.permutations(recordings))
    tables = [
        CalibrationProfile(KEY, stack(some)).thresholds(Setting(mode, metric, risk=0.5))
        for some in (recordings, shuffled)
    ]
    assert tables[0].values == pytest.approx(tables[1].values, abs=ROUNDING, nan_ok=True)
    assert np.array_equal(tables[0].fallback, tables[1].fallback)


def test_block_mode_pools_the_samples_of_all_steps():
    block = np.array([[0.1, 0.2, 0.9], [NAN, 0.4, NAN], [NAN] * 3], dtype=np.float32)
    assert values(block[None], "block", "mean") == pytest.approx(np.full((1, 3), 0.4), abs=ROUNDING)
    assert values(block[None], "block", "q1") == pytest.approx(np.full((1, 3), 0.175), abs=ROUNDING)


def test_step_mode_repeats_the_last_step_and_fills_an_empty_one_with_the_block():
    block = np.array([[0.2, 0.4], [NAN, NAN], [0.9, NAN], [NAN, NAN]], dtype=np.float32)
    got = calibrate(block[None, None], None, "step_block", "mean")
    assert got.values == pytest.approx(np.array([[0.3, 0.5, 0.9, 0.9]]), abs=ROUNDING)
    assert got.fallback.tolist() == [[Fallback.NONE, Fallback.CELL, Fallback.NONE, Fallback.STEP]]


def test_min_whisker_is_a_sample_and_leaves_outliers_out():
    samples = np.array([[[0.0] + [0.5 + i / 100 for i in range(9)]]])
    assert values(samples, "block", "min_whisker")[0, 0] == pytest.approx(0.5, abs=ROUNDING)
    assert values(samples[:, :, 1:], "block", "min_whisker")[0, 0] == pytest.approx(0.5, abs=ROUNDING)


def test_a_block_without_record_ends_the_table():
    record = np.full((3, 2, 2), NAN, dtype=np.float32)
    record[0, 0] = record[2, 0] = 0.5
    assert values(record, "block", "q2").shape == (1, 2)


@pytest.mark.parametrize("mode", ["block", "step_block"])
@pytest.mark.parametrize("metric", ["q1", "conformal"])
def test_an_empty_first_block_is_refused(mode, metric):
    record = np.full((1, 2, 3, 3), NAN, dtype=np.float32)
    record[:, 1] = 0.5
    with pytest.raises(ValueError, match="first block"):
        calibrate(record, np.zeros(record.shape, bool), mode, metric)


def test_stacked_recordings_are_cut_to_what_any_of_them_used():
    recordings = [one_recording(4, num_blocks=3, seed=seed) for seed in (1, 2)]
    for recording, num_blocks, num_steps in zip(recordings, (2, 1), (1, 3), strict=True):
        recording.confidence[:] = NAN
        recording.confidence[:num_blocks, :num_steps] = 0.5
    stacked = stack(recordings)
    assert [table.shape for table in stacked] == [(2, 2, 3, 4)] * 3
    reached = ~np.isnan(stacked.confidence).all(axis=3)
    assert reached.tolist() == [[[True, False, False]] * 2, [[True] * 3, [False] * 3]]
    for whole, (first, second) in zip(stacked[1:], zip(*(r[1:] for r in recordings), strict=True), strict=True):
        assert np.array_equal(whole[0, :, :1], first[:2, :1]) and np.array_equal(whole[1, :1], second[:1, :3])
        assert not whole[0, :, 1:].any() and not whole[1, 1].any()


TOKEN = np.arange(3)
NONE = np.zeros(3, dtype=bool)


def test_recorder_keeps_masked_and_committed_positions_of_each_step():
    recorder = Recorder(2, 3)
    all_masked, one_left = np.array([True] * 3), np.array([False, True, False])
    recorder.add(0, 0, np.array([0.9, 0.1, 0.8]), TOKEN, all_masked, one_left, TOKEN)
    recorder.add(0, 1, np.array([0.7, 0.2, 0.7]), TOKEN, one_left, NONE, TOKEN)
    confidence, committed, _ = recorder.recording()
    assert confidence[0] == pytest.approx(np.array([[0.9, 0.1, 0.8], [NAN, 0.2, NAN], [NAN] * 3]), nan_ok=True)
    assert committed[0].tolist() == [[True, False, True], [False, True, False], [False] * 3]
    assert len(confidence) == len(committed) == 1  # the second block was not reached


def test_a_block_that_starts_again_overwrites_its_record_and_no_other():
    recorder = Recorder(2, 2)
    both, none = np.array([True, True]), np.array([False, False])
    first, token = np.array([False, True]), np.array([5, 6])
    for block in (0, 1):
        recorder.add(block, 0, np.array([0.6, 0.3]), np.array([5, 9]), both, first, np.array([5, 99]))
        recorder.add(block, 1, np.array([0.1, 0.4]), token, first, none, token)
    recorder.add(1, 0, np.array([0.8, 0.9]), np.array([7, 9]), both, none, np.array([7, 9]))
    confidence, committed, wrong = recorder.recording()
    assert confidence[1] == pytest.approx(np.array([[0.8, 0.9], [NAN, NAN]]), nan_ok=True)
    assert committed[1].tolist() == [[True, True], [False, False]]
    assert wrong[1].tolist() == [[False, False], [False, False]]
    assert confidence[0] == pytest.approx(np.array([[0.6, 0.3], [NAN, 0.4]]), nan_ok=True)
    assert wrong[0].tolist() == [[False, True], [False, False]]


def test_blocks_that_begin_in_the_same_place_are_recorded_side_by_side():
    """One of 2 positions and one of 3, which ends behind the place; the second begins again."""
    recorder = Recorder(1, 3, 6)
    two, none, token = np.array([True, True, False]), np.array([False] * 3), np.array([5, 6, 99])
    recorder.add(0, 0, np.array([0.6, 0.3, 0.0]), np.array([5, 9, 0]), two, np.array([False, True, False]), token)
    recorder.add(0, 1, np.array([0.0, 0.4, 0.0]), token, np.array([False, True, False]), none, token)
    for value in (0.1, 0.7):
        later = np.array([7, 8, 9])
        recorder.add(0, 0, np.full(3, value), later, ~none, none, later, offset=2)
    confidence, committed, wrong = recorder.recording()
    first, second = [0.6, 0.3, 0.7, 0.7, 0.7, NAN], [NAN, 0.4, NAN, NAN, NAN, NAN]
    assert confidence[0] == pytest.approx(np.array([first, second, [NAN] * 6]), nan_ok=True)
    assert committed[0, :2].tolist() == [[True, False, True, True, True, False], [False, True] + [False] * 4]
    assert np.argwhere(wrong[0]).tolist() == [[0, 1]]


@settings(deadline=None)
@given(st.data())
def test_wrong_are_masked_positions_whose_proposal_was_not_the_token_put_there(data):
    length = data.draw(st.integers(1, 5))
    recorder = Recorder(1, length)
    masked, final, seen = set(range(length)), {}, []
    for step in range(data.draw(st.integers(1, length))):
        if not masked:
            break
        proposal = data.draw(st.lists(st.integers(0, 2), min_size=length, max_size=length))
        chosen = data.draw(st.sets(st.sampled_from(sorted(masked)), min_size=1))
        before, after = (np.array([i in some for i in range(length)]) for some in (masked, masked - chosen))
        final |= {i: proposal[i] for i in chosen}
        tokens = np.array([final.get(i, 99) for i in range(length)])
        recorder.add(
            0,
            step,
            np.random.default_rng(step).random(length, dtype=np.float32),
            np.array(proposal),
            before,
            after,
            tokens,
        )
        seen += [(step, i, proposal[i]) for i in masked]
        masked -= chosen
    # A position that is left never got a token: nothing is known against its proposals.
    expected = {(step, i) for step, i, token in seen if i in final and token != final[i]}
    confidence, committed, wrong = recorder.recording()
    assert {(step, i) for step, i in np.argwhere(wrong[0])} == expected
    assert not (wrong & committed).any() and not (wrong & np.isnan(confidence)).any()


def test_mean_confidence_counts_recorded_positions_of_all_requests():
    confidence = np.array([[[[0.2, 0.6], [NAN, 0.1]]], [[[0.1, 0.3], [NAN, NAN]]]], dtype=np.float32)
    confidence = np.concatenate((confidence, np.full_like(confidence, NAN)), axis=1)
    flags = np.zeros(confidence.shape, bool)
    profile = CalibrationProfile(KEY, Recording(confidence, ~np.isnan(confidence), flags))
    assert profile.num_requests == 2
    assert profile.mean_confidence == pytest.approx(np.array([[0.3, 0.1], [NAN, NAN]]), nan_ok=True)


def test_profile_ids_tell_records_and_keys_apart():
    profiles = [recorded(), recorded(seed=1), recorded(num_requests=2), recorded(of_task("b"))]
    flipped = recorded()
    flipped.record.wrong[0, 0, 0] = ~flipped.record.wrong[0, 0, 0] & ~flipped.record.committed[0, 0, 0]
    assert not np.array_equal(flipped.record.wrong, recorded().record.wrong)
    assert len({profile.profile_id for profile in [*profiles, flipped]}) == 5
    assert recorded().profile_id == profiles[0].profile_id


def hand_made():
    """Two requests of one block of three positions.

    The first takes three steps, one position each, the last position first; the second commits two positions in its
    first step and ends there: the third never got a token.
    """
    confidence = np.full((2, 1, 3, 3), NAN, dtype=np.float32)
    committed = np.zeros(confidence.shape, bool)
    confidence[0, 0] = [[0.3, 0.5, 0.9], [0.6, 0.8, NAN], [0.7, NAN, NAN]]
    committed[0, 0] = [[False, False, True], [False, True, False], [True, False, False]]
    confidence[1, 0, 0], committed[1, 0, 0] = [0.95, 0.92, 0.4], [True, True, False]
    return CalibrationProfile(KEY, Recording(confidence, committed, np.zeros(confidence.shape, bool)))


@pytest.mark.parametrize(
    ("thresholds", "expected"),
    [
        ([[1.0]], 2.0),  # nothing leaves sooner than it did
        ([[0.9]], 2.0),
        ([[0.6]], 1.5),  # all of the first request's positions pass by its second step: 2 and 1
        ([[0.6, 0.8, 0.5]], 2.0),  # its first position waits for the third step
        ([[0.3]], 1.0),  # equality passes
        ([[0.3, 1.0, 1.0], [1.0] * 3], 1.0),  # a table of more blocks
    ],
)
def test_expected_forwards_replay_the_record(thresholds, expected):
    before, after = hand_made().expected_forwards(np.array(thresholds, dtype=np.float32))
    assert (before, after) == (2.0, expected)


def test_blocks_beyond_the_table_are_replayed_with_its_last():
    profile = recorded(num_blocks=3, num_requests=2)
    zero = profile.expected_forwards(np.zeros((1, 4), dtype=np.float32))
    num_reached = (~np.isnan(profile.record.confidence)).any(axis=(2, 3)).sum(axis=1).mean()
    assert zero[1] == num_reached < zero[0]


def test_a_proposal_is_wrong_where_the_token_was_edited_later():
    recorder = Recorder(1, 2)
    both, none = np.array([True, True]), np.array([False, False])
    recorder.add(
        0,
        0,
        np.array([0.6, 0.3]),
        np.array([5, 9]),
        both,
        ~both | np.array([False, True]),
        np.array([5, 99]),
    )
    recorder.add(0, 1, np.array([0.1, 0.4]), np.array([5, 9]), np.array([False, True]), none, np.array([5, 9]))
    recorder.add(0, 2, np.array([0.9, 0.9]), np.array([7, 9]), none, none, np.array([7, 9]))  # an edit
    _, _, wrong = recorder.recording()
    assert wrong[0].tolist() == [[True, False], [False, False]]


def test_blocks_beyond_the_limit_are_left_out():
    recorder = Recorder(MAX_BLOCKS + 5, 1)
    one = np.array([True])
    for block in (0, MAX_BLOCKS - 1, MAX_BLOCKS + 1):
        recorder.add(block, 0, np.array([0.5]), np.array([3]), one, ~one, np.array([3]))
    confidence, _, _ = recorder.recording()
    assert confidence.shape == (MAX_BLOCKS, 1, 1)
    assert np.flatnonzero(confidence == 0.5).tolist() == [0, MAX_BLOCKS - 1]
