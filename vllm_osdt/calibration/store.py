"""Profiles on disk: one JSON file per (model fingerprint, task), shared by every engine that uses the folder.

A writer locks the task, reads what is there, replaces its own entry and renames a complete, synced file into place: a
reader sees the old file or the new one, and of two writers of one entry the last wins. A file that cannot be used is
renamed aside and named in the log; the task then calibrates again.
"""

import contextlib
import fcntl
import hashlib
import logging
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import numpy as np
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from vllm_osdt.calibration.fingerprint import ModelFingerprint, model_fingerprint, model_name
from vllm_osdt.calibration.profile import CACHE_KEY, CalibrationProfile, Choice, ProfileKey
from vllm_osdt.calibration.recording import Recording
from vllm_osdt.geometry import MAX_BLOCK_LENGTH

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(f"vllm.{__name__}")  # below vLLM's own, whose handlers it uses

SCHEMA_VERSION: Literal[3] = 3
MAX_VERSIONS = 4  # of one key: a replaced profile can still be pinned for a while
_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


@dataclass(frozen=True, config=_STRICT)
class StoredStep:
    """One denoising step.

    Confidence of every position, null where it was not masked, positions unmasked, and masked positions with a proposal
    that was not chosen in the end. Tokens are not kept.
    """

    confidence: Annotated[list[float | None], Field(max_length=2 * MAX_BLOCK_LENGTH)]
    committed: list[int]
    wrong: list[int]


@dataclass(frozen=True, config=_STRICT)
class StoredProfile:
    """What one calibration recorded: the steps of every block of every request; and the task's choice."""

    id: str
    block_length: Annotated[int, Field(ge=1, le=MAX_BLOCK_LENGTH)]
    cache: Annotated[str, Field(pattern=f"^{CACHE_KEY}$")]
    threshold: Annotated[float, Field(gt=0, le=1)]
    created: str
    versions: dict[str, str]
    requests: Annotated[list[list[list[StoredStep]]], Field(min_length=1)]
    choice: Choice | None = None


@dataclass(frozen=True, config=_STRICT)
class ProfileFile:
    """A task's profiles for one model.

    The last few for each block length, cache mode and calibration threshold, the newest last. The model's name is for
    people; its fingerprint tells it.
    """

    schema_version: Literal[2, 3]
    fingerprint: ModelFingerprint
    task: str
    profiles: list[StoredProfile]
    model: str = ""  # files of schema 2 have none


_FILE = TypeAdapter(ProfileFile)


class UnusableFileError(Exception):
    """A profile file that cannot be used, with the reason."""


def default_folder() -> Path:
    """The user's data folder: ``$XDG_DATA_HOME/vllm-osdt/profiles``, ``~/.local/share/...`` by default."""
    return Path(os.environ.get("XDG_DATA_HOME") or "~/.local/share").expanduser() / "vllm-osdt" / "profiles"


def open_store(
    folder: str | None, vllm_config: "VllmConfig", checkpoint: tuple[str, str | None] | None = None
) -> "ProfileStore | None":
    """Where an engine's profiles outlive it; None when they do not.

    Args:
        folder: The operator's; None for the user's data folder, "" for none.
        vllm_config: The engine's configuration, which says what its model is.
        checkpoint: Model and revision whose files the engine's weights are; None for those it started with. Without
            local files there is no store, since others may have come under the name.
    """
    if folder is None:
        folder = str(default_folder())
    if not folder:
        return None
    fingerprint = model_fingerprint(vllm_config, checkpoint)
    if fingerprint is None:
        return None
    name = model_name(vllm_config.model_config.model if checkpoint is None else checkpoint[0])
    return ProfileStore(Path(folder).expanduser(), fingerprint, name)


class ProfileStore:
    """The profiles of one model in a folder.

    Args:
        folder: Shared by models and engines; made when the first profile is written.
        fingerprint: Of the model; profiles of others are neither seen nor touched.
        model: Its name, kept with profiles that are written.
    """

    def __init__(self, folder: Path, fingerprint: ModelFingerprint, model: str = "") -> None:
        self.fingerprint = fingerprint
        self.model = model
        self.folder = folder / fingerprint.digest
        self.num_set_aside = 0

    def path(self, task: str) -> Path:
        """Where a task's profiles are: a readable part of its name and a hash of all of it."""
        readable = re.sub(r"[^A-Za-z0-9]+", "-", task)[:40].strip("-")
        return self.folder / f"{readable}.{hashlib.sha256(task.encode()).hexdigest()[:12]}.json"

    def version(self, task: str) -> tuple[int, int] | None:
        """What changes when a task's file is written, None without a file."""
        try:
            status = self.path(task).stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_ino

    def load(self, key: ProfileKey) -> CalibrationProfile | None:
        """The newest profile of a key, None if there is none that can be used."""
        return self._load(key.task, lambda profile: _key(key.task, profile) == key)

    def load_id(self, task: str, profile_id: str) -> CalibrationProfile | None:
        """The profile of a task with an id, None if there is none that can be used."""
        return self._load(task, lambda profile: profile.id == profile_id)

    def _load(self, task: str, is_meant: Callable[[StoredProfile], bool]) -> CalibrationProfile | None:
        path = self.path(task)
        try:
            stored = self._read(path, task)
        except FileNotFoundError:
            return None
        except UnusableFileError as error:
            self._set_aside(path, error)
            return None
        except OSError as error:
            logger.warning("The profile file %s cannot be read (%s); the task calibrates again.", path, error)
            return None
        return next((from_stored(task, profile) for profile in reversed(stored.profiles) if is_meant(profile)), None)

    def save(self, profile: CalibrationProfile) -> None:
        """Write a profile, as the newest of its key. A folder that cannot be written to is logged."""
        try:
            self.write(profile)
        except OSError as error:
            logger.warning("The profile of task %r is kept in memory only: %s.", profile.key.task, error)

    def write(self, profile: CalibrationProfile) -> None:
        """As :meth:`save`.

        Raises:
            OSError: The folder cannot be written to.
        """
        with self._others(profile) as others:
            same = [other for other in others if _key(profile.key.task, other) == profile.key]
            for oldest in same[: max(0, len(same) + 1 - MAX_VERSIONS)]:
                others.remove(oldest)
            self._replace(profile.key.task, [*others, to_stored(profile)])

    def remove(self, profile: CalibrationProfile) -> None:
        """Delete a profile.

        Raises:
            OSError: The folder cannot be written to.
        """
        task = profile.key.task
        with self._others(profile) as others:
            if others:
                self._replace(task, others)
            else:
                self.path(task).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _others(self, profile: CalibrationProfile) -> Iterator[list[StoredProfile]]:
        """The other profiles of a profile's task, which is locked meanwhile."""
        path = self.path(profile.key.task)
        self.folder.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            others: list[StoredProfile] = []
            try:
                stored = self._read(path, profile.key.task).profiles
                others = [other for other in stored if other.id != profile.profile_id]
            except FileNotFoundError:
                pass
            except UnusableFileError as error:
                self._set_aside(path, error)
            yield others

    def _replace(self, task: str, profiles: list[StoredProfile]) -> None:
        write_file(self.path(task), ProfileFile(SCHEMA_VERSION, self.fingerprint, task, profiles, self.model))

    def export(self, profile: CalibrationProfile, path: Path) -> None:
        """Write one profile as a file of its own.

        Raises:
            OSError: The file cannot be written.
        """
        content = ProfileFile(SCHEMA_VERSION, self.fingerprint, profile.key.task, [to_stored(profile)], self.model)
        write_file(path, content)

    def _read(self, path: Path, task: str) -> ProfileFile:
        stored = _parse(path)
        if stored.fingerprint != self.fingerprint:
            raise UnusableFileError(f"fingerprint: {stored.fingerprint} is another model's")
        if stored.task != task:
            raise UnusableFileError(f"task: it is {stored.task!r}, expected {task!r}")
        return stored

    def _set_aside(self, path: Path, error: UnusableFileError) -> None:
        self.num_set_aside += 1
        aside = path.with_suffix(f".aside-{os.getpid()}-{self.num_set_aside}")
        try:
            path.replace(aside)
            what = f"is kept as {aside.name}"
        except FileNotFoundError:  # another engine was faster
            return
        except OSError as failure:  # a folder that this user may only read: serving goes on
            what = f"cannot be renamed ({failure})"
        logger.warning("The profile file %s cannot be used and %s; the task calibrates again. %s.", path, what, error)


def write_file(path: Path, content: ProfileFile) -> None:
    """Put a complete, synced file in place of an earlier one."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            # A choice that is not there is left out, as in files of earlier releases.
            file.write(_FILE.dump_json(content, exclude_none=True) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _parse(path: Path) -> ProfileFile:
    """A file whose every field holds.

    Raises:
        UnusableFileError: Names the first field that does not.
        OSError: It cannot be read.
    """
    try:
        stored = _FILE.validate_json(path.read_bytes())
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(map(str, problem["loc"])) or "the file"
        raise UnusableFileError(f"{field}: {problem['msg']}") from None
    for index, profile in enumerate(stored.profiles):
        if from_stored(stored.task, profile).profile_id != profile.id:
            raise UnusableFileError(f"profiles.{index}.id: {profile.id} does not fit the record")
    return stored


class FileContent(NamedTuple):
    """The profiles of a file, and the model they are for: its fingerprint, and its name, "" for none."""

    fingerprint: ModelFingerprint
    model: str
    profiles: list[CalibrationProfile]


def read_file(path: Path) -> FileContent:
    """The content of a file.

    Raises:
        UnusableFileError: A field does not hold.
        OSError: It cannot be read.
    """
    stored = _parse(path)
    profiles = [from_stored(stored.task, profile) for profile in stored.profiles]
    return FileContent(stored.fingerprint, stored.model, profiles)


def read_folder(folder: Path) -> Iterator[FileContent]:
    """What :func:`read_file` finds in the files of all models; files that cannot be used are logged and left alone."""
    for path in sorted(folder.glob("*/*.json")):
        try:
            yield read_file(path)
        except (UnusableFileError, OSError) as error:
            logger.warning("The profile file %s cannot be used: %s.", path, error)


def _key(task: str, profile: StoredProfile) -> ProfileKey:
    return ProfileKey(task, profile.block_length, profile.cache, profile.threshold)


def to_stored(profile: CalibrationProfile) -> StoredProfile:
    """The form on disk; blocks and steps behind a request's last record are left out."""
    return StoredProfile(
        id=profile.profile_id,
        block_length=profile.key.block_length,
        cache=profile.key.cache,
        threshold=profile.key.threshold,
        created=profile.created,
        versions=profile.versions,
        requests=[_stored_blocks(Recording(*request)) for request in zip(*profile.record, strict=True)],
        choice=profile.choice,
    )


def _stored_blocks(request: Recording) -> list[list[StoredStep]]:
    num_steps = [_last(~np.isnan(block).all(axis=1)) for block in request.confidence]
    return [
        [
            StoredStep(
                # The shortest decimal that is this float32 and no other.
                [None if math.isnan(value) else float(str(value)) for value in confidence[step]],
                np.flatnonzero(committed[step]).tolist(),
                np.flatnonzero(wrong[step]).tolist(),
            )
            for step in range(steps)
        ]
        for steps, confidence, committed, wrong in zip(num_steps, *request, strict=True)
    ][: _last(np.array(num_steps) > 0)]


def _last(flags: np.ndarray) -> int:
    """Entries up to the last that is set."""
    used = np.flatnonzero(flags)
    return int(used[-1]) + 1 if used.size else 0


def from_stored(task: str, stored: StoredProfile) -> CalibrationProfile:
    """The profile of a task that a file holds.

    Raises:
        UnusableFileError: A step has another number of positions than the block, or a block more steps than it may.
    """
    blocks = [block for request in stored.requests for block in request]
    num_blocks = max(map(len, stored.requests))
    num_steps = max(map(len, blocks), default=0)
    if num_steps > stored.block_length:
        raise UnusableFileError(f"requests: a block of {num_steps} steps, at most block_length expected")
    key = _key(task, stored)
    shape = (len(stored.requests), num_blocks, num_steps, key.num_positions)
    record = Recording(np.full(shape, np.nan, dtype=np.float32), np.zeros(shape, bool), np.zeros(shape, bool))
    for index, request in enumerate(stored.requests):
        for block, steps in enumerate(request):
            for step, found in enumerate(steps):
                _fill_step(record, (index, block, step), found)
    profile = CalibrationProfile(key, record, stored.created, stored.versions, stored.choice)
    if not record.confidence.size or np.isnan(record.confidence[:, 0]).all():
        raise UnusableFileError("requests: nothing is recorded in the first block")
    return profile


def _fill_step(record: Recording, where: tuple[int, int, int], found: StoredStep) -> None:
    place = "requests." + ".".join(map(str, where))
    num_positions = record.confidence.shape[-1]
    if len(found.confidence) != num_positions:
        raise UnusableFileError(f"{place}.confidence: {len(found.confidence)} values, expected {num_positions}")
    values = np.array(found.confidence, dtype=np.float32)
    if ((values < 0) | (values > 1)).any():
        raise UnusableFileError(f"{place}.confidence: a value is not in [0, 1]")
    record.confidence[where] = values
    for name, positions in (("committed", found.committed), ("wrong", found.wrong)):
        if any(not 0 <= position < num_positions for position in positions):
            raise UnusableFileError(f"{place}.{name}: a position is not in the block")
        getattr(record, name)[where][positions] = True
