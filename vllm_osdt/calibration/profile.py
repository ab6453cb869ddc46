"""A task's calibration profile: the recorded statistics and the thresholds made from them."""

import math
from dataclasses import asdict, dataclass, field
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


@dataclass(frozen=True)
class CalibrationProfile:
    """Confidences recorded on one request of a task.

    Attributes:
        key: What the profile applies to.
        confidence: float32 ``[blocks, steps, positions]``, NaN where a position was not masked.
        committed: bool, same shape: the positions that the step unmasked.
    """

    key: ProfileKey
    confidence: np.ndarray
    committed: np.ndarray
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

    def as_dict(self) -> dict[str, Any]:
        """Key, mean confidence by block and step (None where nothing was recorded) and thresholds by setting."""
        rows = self.mean_confidence.tolist()
        return {
            **asdict(self.key),
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
