"""Who calibrates and who uses a profile: the life cycle of the profiles of one engine."""

from collections import OrderedDict
from collections.abc import Callable

from vllm_osdt.calibration.profile import CalibrationProfile, ProfileKey
from vllm_osdt.calibration.store import ProfileStore

Share = Callable[[CalibrationProfile | None], CalibrationProfile | None]


class ProfileRegistry:
    """The profiles in use, by key, and for each key at most one request that calibrates it.

    A profile is published whole or not at all. Every rank of a tensor-parallel group sees the same requests in the
    same order and so holds the same registry; what the first rank reads from disk, it shares.

    Args:
        max_profiles: Profiles kept in memory; the one unused for longest makes room, and comes back from the store.
        store: Where profiles outlive the process; None to keep them in memory only.
        is_writer: Whether this rank reads and writes the store.
        share: Gives every rank what the first one passes; called by all of them at once.
    """

    def __init__(
        self,
        max_profiles: int = 1024,
        store: ProfileStore | None = None,
        *,
        is_writer: bool = True,
        share: Share = lambda found: found,
    ) -> None:
        self.profiles: OrderedDict[ProfileKey, CalibrationProfile] = OrderedDict()
        self._max_profiles = max_profiles
        self._store = store
        self._is_writer = is_writer
        self._share = share
        self._calibrating: dict[ProfileKey, str] = {}

    @property
    def num_calibrating(self) -> int:
        """Requests that calibrate now."""
        return len(self._calibrating)

    def find(self, key: ProfileKey) -> CalibrationProfile | None:
        """The profile of a key, from memory or else from the store; one that is being made is not looked for."""
        if key in self.profiles:
            self.profiles.move_to_end(key)
            return self.profiles[key]
        if self._store is None or key in self._calibrating:
            return None
        found = self._share(self._store.load(key) if self._is_writer else None)
        if found is not None:
            self._keep(found)
        return found

    def claim(self, key: ProfileKey, req_id: str) -> bool:
        """Whether ``req_id`` is to calibrate ``key``: nobody else does."""
        return self._calibrating.setdefault(key, req_id) == req_id

    def publish(self, profile: CalibrationProfile, req_id: str) -> None:
        """End ``req_id``'s calibration with a profile, replacing an earlier one."""
        self.release(profile.key, req_id)
        self._keep(profile)
        if self._store is not None and self._is_writer:
            self._store.save(profile)

    def release(self, key: ProfileKey, req_id: str) -> None:
        """End ``req_id``'s calibration without a profile: the task's next request calibrates."""
        if self._calibrating.get(key) == req_id:
            del self._calibrating[key]

    def _keep(self, profile: CalibrationProfile) -> None:
        self.profiles[profile.key] = profile
        self.profiles.move_to_end(profile.key)
        while len(self.profiles) > self._max_profiles:
            self.profiles.popitem(last=False)
