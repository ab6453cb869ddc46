"""Who calibrates and who uses a profile: the life cycle of the profiles of one engine, in memory."""

from vllm_osdt.calibration.profile import CalibrationProfile, ProfileKey


class ProfileRegistry:
    """Profiles by key, and for each key at most one request that calibrates it.

    A profile is published whole or not at all. Every rank of a tensor-parallel group sees the same requests in the
    same order and so holds the same registry.
    """

    def __init__(self) -> None:
        self.profiles: dict[ProfileKey, CalibrationProfile] = {}
        self._calibrating: dict[ProfileKey, str] = {}

    @property
    def num_calibrating(self) -> int:
        """Requests that calibrate now."""
        return len(self._calibrating)

    def claim(self, key: ProfileKey, req_id: str, *, recalibrate: bool) -> bool:
        """Whether ``req_id`` is to calibrate ``key``: nobody else does, and there is no profile or a new one is
        asked for."""
        if key in self._calibrating or (key in self.profiles and not recalibrate):
            return False
        self._calibrating[key] = req_id
        return True

    def publish(self, profile: CalibrationProfile, req_id: str) -> None:
        """End ``req_id``'s calibration with a profile, replacing an earlier one."""
        self.release(profile.key, req_id)
        self.profiles[profile.key] = profile

    def release(self, key: ProfileKey, req_id: str) -> None:
        """End ``req_id``'s calibration without a profile: the task's next request calibrates."""
        if self._calibrating.get(key) == req_id:
            del self._calibrating[key]
