"""Recordings and profiles as an engine makes them, from a seed."""

from dataclasses import replace

import numpy as np

from vllm_osdt.calibration.fingerprint import ModelFingerprint
from vllm_osdt.calibration.profile import CalibrationProfile, Choice, ProfileKey, stack
from vllm_osdt.calibration.recording import Recording

MODEL = ModelFingerprint("abc", "none", "float32", 100, 99)
KEY = ProfileKey("gsm", 4, "dual", 0.9)
NAN = float("nan")


def one_recording(block_length=4, num_blocks=2, seed=0, num_positions=None):
    """One request: fewer positions are masked from step to step, unused steps are empty, some proposals were wrong."""
    rng = np.random.default_rng(seed)
    num_positions = num_positions or block_length
    shape = (num_blocks, block_length, num_positions)
    recording = Recording(np.full(shape, np.nan, np.float32), np.zeros(shape, bool), np.zeros(shape, bool))
    for block in range(num_blocks):
        masked = np.ones(num_positions, bool)
        for step in range(block_length):
            if not masked.any():
                break
            recording.confidence[block, step, masked] = rng.random(masked.sum(), dtype=np.float32)
            recording.committed[block, step] = masked & (rng.random(num_positions) < 0.7)
            recording.wrong[block, step] = (
                masked & ~recording.committed[block, step] & (rng.random(num_positions) < 0.5)
            )
            masked &= ~recording.committed[block, step]
    return recording


def recorded(key=KEY, seed=0, num_blocks=2, num_requests=1):
    """A profile of several requests; some reach fewer blocks than others."""
    rng = np.random.default_rng(seed)
    blocks = [num_blocks, *rng.integers(1, num_blocks + 1, num_requests - 1)]
    return CalibrationProfile(
        key,
        stack([one_recording(key.block_length, n, 1000 * seed + i, key.num_positions) for i, n in enumerate(blocks)]),
    )


def flat(value, key=KEY, num_requests=1, num_blocks=1):
    """A profile all of whose confidences are one value, committed at once."""
    shape = (num_requests, num_blocks, 1, key.block_length)
    record = Recording(np.full(shape, value, np.float32), np.ones(shape, bool), np.zeros(shape, bool))
    return CalibrationProfile(key, record)


def chosen(policy="factor", **options):
    """A choice that promises something."""
    reference = {"policy": "static_threshold", "threshold": 0.9}
    return Choice(policy, options, reference, "another text", 0.01, 0.95, 500, 1, {"max_tokens": 96})


def of_task(task):
    """The key of another task."""
    return replace(KEY, task=task)


def same(left, right):
    """Whether two profiles hold the same."""
    return (
        (left.key, left.created, left.versions, left.choice, left.profile_id)
        == (right.key, right.created, right.versions, right.choice, right.profile_id)
        and np.array_equal(left.record.confidence, right.record.confidence, equal_nan=True)
        and np.array_equal(left.record.committed, right.record.committed)
        and np.array_equal(left.record.wrong, right.record.wrong)
    )
