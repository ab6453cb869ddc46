"""Does a task still look like its profile?

Calibrated thresholds hold for requests like those they were made from. The guard compares what requests see now with
the profile, at *block entry*: the mean confidence of a block's masked positions at its first denoising step, for every
block. Entry is the one step that calibration and calibrated decoding share. Later steps start from what earlier ones
committed, so they differ between the two even when the task is the same.

Source: the block-step signature and its cosine are OSDT's (arXiv 2511.02077); window, gap and the restriction to block
entry are ours.

Confidence says nothing of answers. Where audits (``engine.audit``) decode some requests with the static threshold as
well, :class:`AgreementGuard` watches how many get other tokens.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np

from vllm_osdt.calibration.profile import CalibrationProfile

NUM_STANDARD_ERRORS = 4.0  # a gap must be this far beyond what chance would give
AUDITS_PER_FALSE_ALARM = 1000.0  # mean number, where just as many requests change as may
CHANGES_SOUGHT = 3.0  # times as many changed requests as may are found soonest


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


@dataclass
class _Cohort:
    """Requests that began one after another; those that have ended, and what they saw."""

    num_begun: int = 0
    under_way: set[str] = field(default_factory=set)
    seen: list[np.ndarray] = field(default_factory=list)


class DriftGuard:
    """Watches the profiles in use.

    A mean is taken of requests that *began* one after another, once all of them have ended. Of requests that run at the
    same time, those that the model is sure of end first, so the first to end are not like the others.

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
        # By profile id: cohorts that are not complete, the newest last; None once it has drifted.
        self._cohorts: OrderedDict[str, list[_Cohort] | None] = OrderedDict()

    def forget(self) -> None:
        """Forget all that was seen."""
        self._cohorts.clear()

    def begin(self, profile: CalibrationProfile, req_id: str) -> None:
        """A request begins that uses the profile."""
        cohorts = self._cohorts.setdefault(profile.profile_id, [])
        self._cohorts.move_to_end(profile.profile_id)
        if len(self._cohorts) > self._max_profiles:
            self._cohorts.popitem(last=False)
        if cohorts is None:
            return
        if not cohorts or cohorts[-1].num_begun >= self._window:
            cohorts.append(_Cohort())
        cohorts[-1].num_begun += 1
        cohorts[-1].under_way.add(req_id)

    def end(self, profile: CalibrationProfile, req_id: str, seen: np.ndarray | None) -> Drift | None:
        """The request has ended.

        Args:
            profile: The one it used.
            req_id: Its id.
            seen: float32 ``[blocks]``, its mean confidence at block entry, NaN where it entered none; None where it was
                not decoded to its end, so that it does not count.

        Returns:
            How far its cohort is, when that is complete and too far; once for each profile.
        """
        cohorts = self._cohorts.get(profile.profile_id)
        cohort = next((one for one in cohorts or () if req_id in one.under_way), None)
        if cohorts is None or cohort is None:
            return None
        cohort.under_way.remove(req_id)
        expected, num_expected = profile.entry
        if seen is not None:
            entry = np.full(expected.size, np.nan)
            entry[: len(seen)] = seen[: expected.size]
            cohort.seen.append(entry)
        if cohort.under_way or cohort.num_begun < self._window:
            return None
        cohorts.remove(cohort)
        if not cohort.seen:
            return None
        drift = compare(expected, num_expected, np.stack(cohort.seen))
        too_far = drift.gap > max(self._max_gap, NUM_STANDARD_ERRORS * drift.standard_error)
        if too_far or drift.cosine < self._min_cosine:
            self._cohorts[profile.profile_id] = None
            return drift
        return None


class AgreementGuard:
    """Watches how often audited requests have other tokens than the static threshold gives.

    For each profile the Shiryaev-Roberts statistic R <- (R + 1) L, where L is the likelihood ratio of one audit between
    a share of changed requests ``CHANGES_SOUGHT`` times as high as allowed and the allowed one. With the allowed share
    or a lower one, an alarm comes after ``AUDITS_PER_FALSE_ALARM`` audits or more in the mean, however long the guard
    watches (Pollak 1985, doi 10.1214/aos/1176346587; R - n is a supermartingale).

    Args:
        max_profiles: Profiles watched; the one unused for longest makes room.
    """

    def __init__(self, max_profiles: int = 256) -> None:
        self._max_profiles = max_profiles
        self._watched: OrderedDict[str, Agreement | None] = OrderedDict()  # None once there was an alarm

    def observe(self, profile_id: str, *, is_same: bool, allowed: float) -> "Agreement | None":
        """Count an audit.

        Args:
            profile_id: Of the profile that decoded the request.
            is_same: Whether the static threshold gives the same tokens.
            allowed: Share of requests that may change, in (0, 1).

        Returns:
            What was seen so far, when that is an alarm; once for each profile.
        """
        seen = self._watched.setdefault(profile_id, Agreement())
        self._watched.move_to_end(profile_id)
        if len(self._watched) > self._max_profiles:
            self._watched.popitem(last=False)
        if seen is None:
            return None
        sought = min(CHANGES_SOUGHT * allowed, (1 + allowed) / 2)
        ratio = (1 - sought) / (1 - allowed) if is_same else sought / allowed
        seen = Agreement(seen.num_audits + 1, seen.num_changed + (not is_same), (seen.evidence + 1) * ratio)
        is_alarm = seen.evidence >= AUDITS_PER_FALSE_ALARM
        self._watched[profile_id] = None if is_alarm else seen
        return seen if is_alarm else None


@dataclass(frozen=True)
class Agreement:
    """The audits of a profile's requests.

    Attributes:
        num_audits, num_changed: All of them, and those with other tokens.
        evidence: The Shiryaev-Roberts statistic.
    """

    num_audits: int = 0
    num_changed: int = 0
    evidence: float = 0.0


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
