"""Does a task still look like its profile?

Calibrated thresholds hold for requests like those they were made from. The guard compares what requests see now with
the profile, at *block entry*: the mean confidence of a block's masked positions at its first denoising step, for every
block. Entry is the one step that calibration and calibrated decoding share. Later steps start from what earlier ones
committed, so they differ between the two even when the task is the same.

Source: the block-step signature and its cosine are OSDT's (arXiv 2511.02077); window, gap and the restriction to block
entry are ours.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from vllm_osdt.calibration.profile import CalibrationProfile

NUM_STANDARD_ERRORS = 4.0  # a gap must be this far beyond what chance would give


@dataclass(frozen=True)
class Drift:
    """How far a window of requests is from the profile.

    Attributes:
        num_requests: Requests in the window.
        gap: Mean absolute difference of confidence, blocks weighted by the requests that reached them.
        standard_error: Of the gap, from the spread of the window's requests.
        cosine: Similarity of the two vectors over blocks, weighted likewise.
    """

    num_requests: int
    gap: float
    standard_error: float
    cosine: float


class DriftGuard:
    """Watches the profiles in use.

    Args:
        action: ``recalibrate`` or ``warn``; what the owner does about a drift.
        window: Requests of which a mean is taken.
        max_gap: Gap above which the task has drifted, if it is also beyond chance.
        min_cosine: Cosine similarity below which it has.
        max_profiles: Profiles watched; the one unused for longest makes room.
    """

    def __init__(self, action: str, window: int, max_gap: float, min_cosine: float, max_profiles: int = 256) -> None:
        self.action = action
        self._window = window
        self._max_gap = max_gap
        self._min_cosine = min_cosine
        self._max_profiles = max_profiles
        # By profile id: what requests saw at block entry, None once it has drifted.
        self._windows: OrderedDict[str, list[np.ndarray] | None] = OrderedDict()

    def observe(self, profile: CalibrationProfile, seen: np.ndarray) -> Drift | None:
        """Count a request.

        Args:
            profile: The one it used.
            seen: float32 ``[blocks]``, its mean confidence at block entry; NaN where it entered none.

        Returns:
            How far the window is, when that is too far; once for each profile.
        """
        window = self._windows.setdefault(profile.profile_id, [])
        self._windows.move_to_end(profile.profile_id)
        if len(self._windows) > self._max_profiles:
            self._windows.popitem(last=False)
        if window is None:
            return None
        expected, num_expected = profile.entry
        entry = np.full(expected.size, np.nan)
        entry[: len(seen)] = seen[: expected.size]
        window.append(entry)
        if len(window) < self._window:
            return None
        drift = compare(expected, num_expected, np.stack(window))
        too_far = drift.gap > max(self._max_gap, NUM_STANDARD_ERRORS * drift.standard_error)
        if too_far or drift.cosine < self._min_cosine:
            self._windows[profile.profile_id] = None
            return drift
        window.clear()
        return None


def compare(expected: np.ndarray, num_expected: np.ndarray, seen: np.ndarray) -> Drift:
    """The distance of a window from a profile.

    Args:
        expected: ``[blocks]``, mean confidence at block entry, NaN for blocks that were not recorded.
        num_expected: ``[blocks]``, requests it is the mean of.
        seen: ``[requests, blocks]``, that of the window's requests, NaN where a block was not reached.
    """
    count = (~np.isnan(seen)).sum(axis=0)
    both = (count > 0) & ~np.isnan(expected)
    if not both.any():
        return Drift(len(seen), 0.0, 0.0, 1.0)
    seen, count, num_expected = seen[:, both], count[both], num_expected[both]
    expected = expected[both].astype(np.float64)
    mean = np.nansum(seen, axis=0) / count
    spread = np.sqrt(np.nansum((seen - mean) ** 2, axis=0) / np.maximum(count - 1, 1))
    error = spread * np.sqrt(1 / count + 1 / num_expected)
    norm = math.sqrt((count * expected**2).sum() * (count * mean**2).sum())
    return Drift(
        num_requests=len(seen),
        gap=float(np.average(np.abs(mean - expected), weights=count)),
        standard_error=float(np.average(error, weights=count)),
        cosine=float((count * expected * mean).sum()) / norm if norm else 1.0,
    )
