"""A task's calibration profile: the recorded statistics and the thresholds made from them."""

import hashlib
import math
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

import numpy as np

from vllm_osdt.calibration.calibrate import calibrate


@dataclass(frozen=True)
class ProfileKey:
    """What must be equal for a profile to apply to a request; the model is that of the engine."""

    task: str
    block_length: int
    cache: str
    threshold: float


def installed_versions() -> dict[str, str]:
    """Versions of vLLM and of this package."""
    return {name: metadata.version(name) for name in ("vllm", "vllm-osdt")}


@dataclass(frozen=True)
class CalibrationProfile:
    """Confidences recorded on one request of a task.

    Attributes:
        key: What the profile applies to.
        confidence: float32 ``[blocks, steps, positions]``, NaN where a position was not masked.
        committed: bool, same shape: the positions that the step unmasked.
        created: When it was made, UTC, ISO 8601.
        versions: Of the packages that made it.
    """

    key: ProfileKey
    confidence: np.ndarray
    committed: np.ndarray
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    versions: dict[str, str] = field(default_factory=installed_versions)
    _thresholds: dict[tuple[str, str, str], np.ndarray] = field(default_factory=dict, compare=False, repr=False)

    def thresholds(self, mode: str, metric: str, record: str) -> np.ndarray:
        """Calibrated T, float32 ``[blocks, steps]``, computed on first use for each setting."""
        setting = (mode, metric, record)
        if setting not in self._thresholds:
            confidence = self.confidence
            if record == "committed":
                confidence = np.where(self.committed, confidence, np.nan)
            self._thresholds[setting] = calibrate(confidence, mode, metric)
        return self._thresholds[setting]

    @property
    def profile_id(self) -> str:
        """16 hexadecimal digits made from the key and the record: equal ids decode alike."""
        digest = hashlib.sha256(repr(sorted(asdict(self.key).items())).encode())
        digest.update(np.nan_to_num(self.confidence, nan=-1.0).tobytes())
        digest.update(np.packbits(self.committed).tobytes())
        return digest.hexdigest()[:16]

    def as_dict(self) -> dict[str, Any]:
        """Id, key, mean confidence by block and step (None where nothing was recorded), thresholds by setting."""
        rows = self.mean_confidence.tolist()
        return {
            "id": self.profile_id,
            **asdict(self.key),
            "created": self.created,
            "mean_confidence": [[None if math.isnan(value) else value for value in row] for row in rows],
            "thresholds": {"/".join(setting): table.tolist() for setting, table in self._thresholds.items()},
        }

    @property
    def mean_confidence(self) -> np.ndarray:
        """Mean confidence of masked positions, float32 ``[blocks, steps]``, NaN where nothing was recorded."""
        recorded = ~np.isnan(self.confidence)
        count = recorded.sum(axis=-1)
        total = np.where(recorded, self.confidence, 0.0).sum(axis=-1)
        return np.where(count > 0, total / np.maximum(count, 1), np.nan).astype(np.float32)
