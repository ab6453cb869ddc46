"""Who calibrates and who uses a profile: the life cycle of the profiles of one engine."""

import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from vllm_osdt.calibration.profile import CalibrationProfile, ProfileKey, stack
from vllm_osdt.calibration.recording import Recording
from vllm_osdt.calibration.store import ProfileStore

LOOK_INTERVAL_S = 1.0  # between two looks at whether a task's file has changed


@dataclass
class _Round:
    """A calibration in progress: what was recorded, and the requests that are recording, by the order they began in."""

    recordings: dict[int, Recording] = field(default_factory=dict)
    req_ids: dict[str, int] = field(default_factory=dict)
    num_begun: int = 0
    num_at_last_look: int = -1  # recordings there were when the store was last asked
    early: CalibrationProfile | None = None  # of the recordings so far
    is_turn: bool = False  # whether the next request is to record, where others use the early profile

    def known(self) -> list[Recording]:
        """The recordings of requests that began before all that are still under way, in that order."""
        first_under_way = min(self.req_ids.values(), default=self.num_begun)
        return [self.recordings[index] for index in sorted(self.recordings) if index < first_under_way]


class ProfileRegistry:
    """The profiles in use, by key, and for each key at most one round of requests that calibrate it.

    A profile is published whole or not at all. Files are written by a thread of their own, beside the engine's steps.

    Args:
        max_profiles: Profiles kept in memory; the one unused for longest makes room, and comes back from the store.
        store: Where profiles outlive the process; None to keep them in memory only.

    Attributes:
        counts: ``made``, ``failed`` (a calibrating request did not end well), ``rejected`` (a file that cannot be
            used), ``loaded``.
    """

    def __init__(self, max_profiles: int = 256, store: ProfileStore | None = None) -> None:
        self.profiles: OrderedDict[ProfileKey, CalibrationProfile] = OrderedDict()
        self.counts: Counter[str] = Counter()
        self._max_profiles = max_profiles
        self._store = store
        self._rounds: OrderedDict[ProfileKey, _Round] = OrderedDict()
        self._pinned: OrderedDict[str, CalibrationProfile] = OrderedDict()
        self._stale: OrderedDict[ProfileKey, str] = OrderedDict()
        self._writer: ThreadPoolExecutor | None = None  # ends with the process, and not before it has written
        self._writing: dict[str, Future] = {}  # by task
        # By task: when its file was last looked at, and which version of it was there.
        self._seen: OrderedDict[str, tuple[float, tuple[int, int] | None]] = OrderedDict()

    @property
    def num_calibrating(self) -> int:
        """Requests that calibrate now."""
        return sum(len(ongoing.req_ids) for ongoing in self._rounds.values())

    def find(self, key: ProfileKey, num_requests: int = 1) -> CalibrationProfile | None:
        """The profile of a key that was made from at least ``num_requests``, from memory or else from the store.

        One that another process has written since, such as ``vllm-osdt tune``, replaces that in memory.
        """
        found = self.profiles.get(key)
        if found is not None:
            self.profiles.move_to_end(key)
            found = self._replaced(found)
        elif self._store is not None:
            ongoing = self._rounds.get(key)
            if ongoing is not None:
                if ongoing.num_at_last_look == len(ongoing.recordings):
                    return None  # nothing was decoded since: another engine is asked once per recording
                ongoing.num_at_last_look = len(ongoing.recordings)
            found = self._load(key.task, lambda store: store.load(key))
            if found is not None and self._stale.get(key) == found.profile_id:
                found = None
            if found is not None:
                self.counts["loaded"] += 1
                self._keep(found)
        return found if found is not None and found.num_requests >= num_requests else None

    def _replaced(self, profile: CalibrationProfile) -> CalibrationProfile:
        """A profile in memory, or that which another process has put in its place."""
        key = profile.key
        if self._store is None or not self._is_rewritten(key.task):
            return profile
        found = self._load(key.task, lambda store: store.load(key))
        if found is None or found.profile_id in (profile.profile_id, self._stale.get(key)):
            return profile
        if found.created < profile.created:  # that in memory could not be written
            return profile
        self.counts["loaded"] += 1
        self._keep(found)
        return found

    def _is_rewritten(self, task: str) -> bool:
        """Whether a task's file is another than at the last look; looks at most every LOOK_INTERVAL_S."""
        assert self._store is not None
        looked, before = self._seen.get(task, (-LOOK_INTERVAL_S, None))
        now = time.monotonic()
        writing = self._writing.get(task)
        if now - looked < LOOK_INTERVAL_S or (writing is not None and not writing.done()):
            return False
        version = self._store.version(task)
        self._seen[task] = now, version
        self._seen.move_to_end(task)
        _shrink(self._seen, self._max_profiles)
        return version is not None and version != before

    def find_pinned(self, task: str, profile_id: str) -> CalibrationProfile | None:
        """The profile with an id, be it replaced or stale, as long as the store or the memory has it."""
        for profile in self.profiles.values():
            if profile.profile_id == profile_id:
                return profile
        if profile_id not in self._pinned and self._store is not None:
            found = self._load(task, lambda store: store.load_id(task, profile_id))
            if found is not None:
                self._pinned[profile_id] = found
                _shrink(self._pinned, self._max_profiles)
        return self._pinned.get(profile_id)

    def early(self, key: ProfileKey) -> CalibrationProfile | None:
        """What the round of a key has recorded so far, as a profile; None before the first recording.

        Recordings of requests that began after one that still runs are left out: of requests that run at the same time,
        those that the model is sure of end first. The profile is neither stored nor found by its id.
        """
        ongoing = self._rounds.get(key)
        if ongoing is None:
            return None
        known = ongoing.known()
        if not known:
            return None
        if ongoing.early is None or ongoing.early.num_requests != len(known):
            ongoing.early = CalibrationProfile(key, stack(known))
        return ongoing.early

    def claim(self, key: ProfileKey, req_id: str, num_requests: int = 1, *, is_shared: bool = False) -> bool:
        """Whether ``req_id`` is to calibrate ``key``: fewer than ``num_requests`` have done so or do.

        Args:
            key: The profile's.
            req_id: The request's id.
            num_requests: How many calibrate.
            is_shared: Whether, once there is an :meth:`early` profile, only every other request does, and the rest use
                :meth:`early`. A request under lowered thresholds cannot calibrate: what passes them becomes final, so
                that no record shows whether it was wrong.
        """
        ongoing = self._rounds.setdefault(key, _Round())
        self._rounds.move_to_end(key)
        if is_shared and req_id not in ongoing.req_ids and ongoing.known():
            ongoing.is_turn = not ongoing.is_turn
            if ongoing.is_turn:  # the first one after a recording profits
                return False
        if len(ongoing.recordings) + len(ongoing.req_ids) >= num_requests:
            return req_id in ongoing.req_ids
        if req_id not in ongoing.req_ids:
            ongoing.req_ids[req_id] = ongoing.num_begun
            ongoing.num_begun += 1
        if len(self._rounds) > self._max_profiles:
            idle = next((other for other, round_ in self._rounds.items() if not round_.req_ids), None)
            if idle is not None:
                del self._rounds[idle]
        return True

    def deliver(
        self, key: ProfileKey, req_id: str, recording: Recording, num_requests: int = 1
    ) -> CalibrationProfile | None:
        """End ``req_id``'s part in a calibration with what it recorded.

        Returns:
            The profile, when this was the last of ``num_requests``; it has replaced an earlier one.
        """
        ongoing = self._rounds[key]
        ongoing.recordings[ongoing.req_ids.pop(req_id)] = recording
        if len(ongoing.recordings) < num_requests:
            return None
        profile = CalibrationProfile(key, stack([ongoing.recordings[index] for index in sorted(ongoing.recordings)]))
        ongoing.recordings.clear()
        if not ongoing.req_ids:
            del self._rounds[key]
        self.publish(profile)
        return profile

    def publish(self, profile: CalibrationProfile) -> None:
        """Use a profile from now on, in place of an earlier one."""
        self.counts["made"] += 1
        self._stale.pop(profile.key, None)
        self._keep(profile)
        if self._store is not None:
            self._writer = self._writer or ThreadPoolExecutor(1, thread_name_prefix="vllm-osdt-profiles")
            self._writing[profile.key.task] = self._writer.submit(self._store.save, profile)

    def flush(self) -> None:
        """Wait until every profile made so far is on disk."""
        for task in list(self._writing):
            self._wait_for(task)

    def _wait_for(self, task: str) -> None:
        written = self._writing.pop(task, None)
        if written is not None:
            written.result()

    def release(self, key: ProfileKey, req_id: str) -> None:
        """End ``req_id``'s part in a calibration without a record: another request takes its place."""
        ongoing = self._rounds.get(key)
        if ongoing is None or req_id not in ongoing.req_ids:
            return
        self.counts["failed"] += 1
        del ongoing.req_ids[req_id]
        if not ongoing.req_ids and not ongoing.recordings:
            del self._rounds[key]

    def mark_stale(self, profile: CalibrationProfile) -> None:
        """Stop using a profile: the task's next requests calibrate, or find what another engine has made since."""
        if self.profiles.get(profile.key) is profile:
            del self.profiles[profile.key]
        self._stale[profile.key] = profile.profile_id
        _shrink(self._stale, self._max_profiles)

    def forget(self, store: ProfileStore | None = None) -> None:
        """The weights are others: drop every profile and every calibration under way.

        Args:
            store: That of the new weights; None to keep their profiles in memory only. A store knows weights by their
                files.
        """
        self.flush()
        self._store = store
        for table in (self.profiles, self._rounds, self._pinned, self._stale, self._seen):
            table.clear()

    def _load(self, task: str, ask: Callable[[ProfileStore], CalibrationProfile | None]) -> CalibrationProfile | None:
        assert self._store is not None
        self._wait_for(task)
        before = self._store.num_set_aside
        found = ask(self._store)
        self.counts["rejected"] += self._store.num_set_aside - before
        return found

    def _keep(self, profile: CalibrationProfile) -> None:
        self.profiles[profile.key] = profile
        self.profiles.move_to_end(profile.key)
        _shrink(self.profiles, self._max_profiles)


def _shrink(table: OrderedDict, size: int) -> None:
    while len(table) > size:
        table.popitem(last=False)
