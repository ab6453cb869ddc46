"""A task's calibration profile: the recorded statistics and the thresholds made from them."""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from importlib import metadata
from typing import Any

import numpy as np

from vllm_osdt.calibration.recording import Recording
from vllm_osdt.calibration.thresholds import CONFORMAL, DEFAULT_RISK, Thresholds, calibrate
from vllm_osdt.geometry import CACHE_MODES

# How keys and values were approximated, as profiles tell it apart: cache mode, sub-blocks ("c": with their cache),
# confidence of token editing, blocks between refreshes, confidence below which a block is refreshed again, blocks of
# masks behind the active one that take part, what cuts blocks, and what changes logits: modifiers with their numbers.
CUT_KEY = "adablock"  # of a key with blocks of many lengths
CACHE_KEY = rf"({'|'.join(CACHE_MODES)})(:\d+c?)?(:e[0-9.e-]+)?(:r\d+)?(:u[0-9.e-]+)?(:w\d+)?(:[a-z]{{2,}}[0-9.,e+-]+)*"


def cache_key(
    cache_mode: str,
    *,
    sub_block_length: int | None = None,
    sub_block_cache: bool = False,
    edit_threshold: float | None = None,
    refresh_interval: int = 1,
    refresh_confidence: float = 0.0,
    suffix_window: int | None = None,
    cuts: str | None = None,
    modifiers: Iterable[str] = (),
) -> str:
    """A cache mode as profiles tell it apart (:data:`CACHE_KEY`): recorded confidences depend on all of these."""
    key = cache_mode
    if sub_block_length is not None:
        key += f":{sub_block_length}{'c' if sub_block_cache else ''}"
    if edit_threshold is not None:
        key += f":e{edit_threshold:g}"
    if refresh_interval > 1:
        key += f":r{refresh_interval}"
    if refresh_confidence > 0:
        key += f":u{refresh_confidence:g}"
    if suffix_window is not None:
        key += f":w{suffix_window}"
    return ":".join((key, *([] if cuts is None else [cuts]), *modifiers))


@dataclass(frozen=True)
class ProfileKey:
    """What must be equal for a profile to apply to a request; the model is that of the engine.

    Attributes:
        task: Name of the task, ``name@adapter`` with a LoRA adapter.
        block_length: Positions denoised together.
        cache: See :func:`cache_key`.
        threshold: Static threshold of the calibration.
    """

    task: str
    block_length: int
    cache: str
    threshold: float

    @property
    def num_positions(self) -> int:
        """Positions that are recorded of a block; twice its length where blocks may begin anywhere in these."""
        return self.block_length * (2 if f":{CUT_KEY}" in self.cache else 1)


@dataclass(frozen=True)
class Setting:
    """How thresholds are made from a record: options of the same names.

    Attributes:
        is_early: Whether the task still calibrates, so that few requests have to do (``thresholds.early``).
    """

    granularity: str = "block"
    statistic: str = CONFORMAL
    record: str = "masked"
    risk: float = DEFAULT_RISK
    is_early: bool = False

    def __str__(self) -> str:
        risk = f"/{self.risk:g}" if self.statistic == CONFORMAL else ""
        return f"{self.granularity}/{self.statistic}/{self.record}{risk}{'/early' if self.is_early else ''}"


OptionValue = bool | int | float | str


@dataclass(frozen=True)
class Choice:
    """How a task's requests are decoded that leave it open, as ``vllm-osdt tune`` found it.

    Attributes:
        policy: Name of the policy.
        options: Its options, by name.
        reference: Policy and options that it was compared with.
        loss: In words, what a request has that loses by the choice.
        risk: At most this share of requests loses; 0 where the choice is the reference itself.
        confidence: With this probability, over the draw of the prompts.
        num_prompts: Prompts that it was tested on.
        num_lost: Those of them that lost.
        num_changed: Those of them that got another text than the reference's; None where that was not counted.
        decoding: What else the prompts were decoded with, such as ``max_tokens``.
    """

    policy: str
    options: dict[str, OptionValue]
    reference: dict[str, OptionValue]
    loss: str
    risk: float
    confidence: float
    num_prompts: int
    num_lost: int
    decoding: dict[str, OptionValue] = field(default_factory=dict)
    num_changed: int | None = None

    def __str__(self) -> str:
        return setting_in_words({"policy": self.policy, **self.options})


def setting_in_words(setting: Mapping[str, Any]) -> str:
    """A policy and its options, such as ``static_threshold threshold=0.8``."""
    options = [
        f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}" for name, value in setting.items()
    ]
    return " ".join(option.removeprefix("policy=") for option in options)


def installed_versions() -> dict[str, str]:
    """Versions of vLLM and of this package."""
    return {name: metadata.version(name) for name in ("vllm", "vllm-osdt")}


def stack(recordings: Sequence[Recording]) -> Recording:
    """Recordings of several requests as one, ``[requests, blocks, steps, positions]``, cut to what any of them used.

    What a request has less than others is NaN and False.
    """
    used = [_used(recording.confidence) for recording in recordings]
    num_blocks, num_steps = (max(sizes) for sizes in zip(*used, strict=True))
    shape = (len(recordings), num_blocks, num_steps, recordings[0].confidence.shape[2])
    stacked = Recording(np.full(shape, np.nan, dtype=np.float32), np.zeros(shape, bool), np.zeros(shape, bool))
    for index, (recording, (blocks, steps)) in enumerate(zip(recordings, used, strict=True)):
        for whole, part in zip(stacked, recording, strict=True):
            whole[index, :blocks, :steps] = part[:blocks, :steps]
    return stacked


def _used(confidence: np.ndarray) -> tuple[int, int]:
    """Blocks and steps up to the last with a record, at least 1 each."""
    seen = ~np.isnan(confidence).all(axis=2)
    blocks, steps = np.flatnonzero(seen.any(axis=1)), np.flatnonzero(seen.any(axis=0))
    return int(blocks[-1]) + 1 if blocks.size else 1, int(steps[-1]) + 1 if steps.size else 1


@dataclass(frozen=True)
class CalibrationProfile:
    """What was recorded on the calibrating requests of a task.

    Attributes:
        key: What the profile applies to.
        record: As :func:`stack` makes it, ``[requests, blocks, steps, positions]``.
        created: When it was made, UTC, ISO 8601.
        versions: Of the packages that made it.
        choice: How requests that leave it open are decoded; None for the policy ``osdt``.
    """

    key: ProfileKey
    record: Recording
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    versions: dict[str, str] = field(default_factory=installed_versions)
    choice: Choice | None = None
    _thresholds: dict[Setting, Thresholds] = field(default_factory=dict, compare=False, repr=False)

    @property
    def num_requests(self) -> int:
        """How many requests were recorded."""
        return len(self.record.confidence)

    def thresholds(self, setting: Setting) -> Thresholds:
        """Calibrated T, ``[blocks, steps]``, computed on first use for each setting."""
        if setting not in self._thresholds:
            confidence = self.record.confidence
            if setting.record == "committed":
                confidence = np.where(self.record.committed, confidence, np.nan)
            self._thresholds[setting] = calibrate(
                confidence,
                self.record.wrong,
                setting.granularity,
                setting.statistic,
                setting.risk,
                self.key.threshold if setting.is_early else None,
                block_length=self.key.block_length,
            )
        return self._thresholds[setting]

    @cached_property
    def profile_id(self) -> str:
        """16 hexadecimal digits made from the key, the record and the choice: equal ids decode alike."""
        digest = hashlib.sha256(repr((sorted(asdict(self.key).items()), self.record.confidence.shape)).encode())
        digest.update(np.nan_to_num(self.record.confidence, nan=-1.0).tobytes())
        for flags in (self.record.committed, self.record.wrong):
            digest.update(np.packbits(flags).tobytes())
        if self.choice is not None:
            digest.update(repr((self.choice.policy, sorted(self.choice.options.items()))).encode())
        return digest.hexdigest()[:16]

    def expected_forwards(self, parameters: np.ndarray) -> tuple[float, float]:
        """Mean forwards a recorded request took, and would about take with other thresholds.

        The estimate replays the record: a position leaves at the first step where its confidence reaches the
        threshold, or where it left. What earlier commits would have done to other confidences is not known. Blocks of
        many lengths that begin in the same place count as one.

        Args:
            parameters: float32 ``[blocks, steps]``, thresholds passed by equality.
        """
        confidence = self.record.confidence
        _, num_blocks, num_steps, _ = confidence.shape
        blocks = np.minimum(np.arange(num_blocks), parameters.shape[0] - 1)
        steps = np.minimum(np.arange(num_steps), parameters.shape[1] - 1)
        passes = confidence >= parameters[np.ix_(blocks, steps)][None, :, :, None]  # False for NaN
        leaves = passes | self.record.committed
        first = np.where(leaves.any(axis=2), leaves.argmax(axis=2), -1)  # [requests, blocks, positions]
        taken = (~np.isnan(confidence)).any(axis=3).sum(axis=(1, 2))
        return float(taken.mean()), float((first.max(axis=2) + 1).sum(axis=1).mean())

    def as_dict(self) -> dict[str, Any]:
        """Id, key, number of requests, choice, mean confidence by block and step.

        None where nothing was recorded), thresholds by setting (None where the static threshold holds.
        """
        return {
            "id": self.profile_id,
            **asdict(self.key),
            "created": self.created,
            "num_requests": self.num_requests,
            "choice": None if self.choice is None else asdict(self.choice),
            "mean_confidence": as_lists(self.mean_confidence),
            "thresholds": {str(setting): as_lists(table.values) for setting, table in self._thresholds.items()},
        }

    @cached_property
    def entry(self) -> tuple[np.ndarray, np.ndarray]:
        """What requests saw when they entered a block.

        Mean confidence, float32 ``[blocks]``, NaN where none did, and the number of requests, ``[blocks]``.
        """
        return self.mean_confidence[:, 0], (~np.isnan(self.record.confidence[:, :, 0])).any(axis=-1).sum(axis=0)

    @cached_property
    def mean_confidence(self) -> np.ndarray:
        """Mean confidence of masked positions over all requests.

        float32 ``[blocks, steps]``, NaN where nothing was recorded.
        """
        recorded = ~np.isnan(self.record.confidence)
        count = recorded.sum(axis=(0, 3))
        total = np.where(recorded, self.record.confidence, 0.0).sum(axis=(0, 3))
        return np.where(count > 0, total / np.maximum(count, 1), np.nan).astype(np.float32)


def as_lists(table: np.ndarray) -> list[list[float | None]]:
    """Rows as plain values, None for NaN."""
    return [[None if math.isnan(value) else value for value in row] for row in table.tolist()]
