"""What the commands share: profiles on disk by name, tables, and how a command fails."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from vllm_osdt.calibration.fingerprint import ModelFingerprint
from vllm_osdt.calibration.profile import CalibrationProfile
from vllm_osdt.calibration.store import default_folder, read_folder
from vllm_osdt.declaration import did_you_mean
from vllm_osdt.errors import OSDTError
from vllm_osdt.mini import MODELS, model_path


class CommandError(OSDTError):
    """What was asked for is not there or cannot be done; ends the command with status 1."""


@dataclass(frozen=True)
class Found:
    """A profile on disk and the model it is for; one that was replaced is kept for a while, to be pinned by its id."""

    fingerprint: ModelFingerprint
    model: str
    profile: CalibrationProfile
    is_replaced: bool

    def is_of(self, model: str) -> bool:
        """Whether its model is meant by a name, by the last part of one, or by the beginning of its fingerprint."""
        return model in (self.model, self.model.rsplit("/", 1)[-1]) or self.fingerprint.digest.startswith(model)

    def summary(self) -> dict[str, Any]:
        """One line of ``profiles list``."""
        key, used = self.profile.key, ~np.isnan(self.profile.record.confidence)
        return {
            "id": self.profile.profile_id,
            "task": key.task,
            "model": self.model or self.fingerprint.digest,
            "fingerprint": self.fingerprint.digest,
            "dtype": self.fingerprint.dtype,
            "quantization": self.fingerprint.quantization,
            "block_length": key.block_length,
            "cache": key.cache,
            "threshold": key.threshold,
            "choice": "" if self.profile.choice is None else str(self.profile.choice),
            "requests": self.profile.num_requests,
            "blocks": used.shape[1],
            "forwards": int(used.any(axis=3).sum()),
            "samples": int(used.sum()),
            "replaced": self.is_replaced,
            "created": self.profile.created,
            "versions": self.profile.versions,
        }


def find_profiles(folder: Path, model: str | None = None) -> list[Found]:
    """The profiles in a folder, of one model or of all.

    Raises:
        CommandError: There is no such folder. (The user's own is made with its first profile.)
    """
    if not folder.is_dir() and folder != default_folder():
        raise CommandError(f"there is no folder {folder}")
    found = []
    for fingerprint, name, profiles in read_folder(folder):
        newest = {profile.key: profile for profile in profiles}  # files have it last
        found += [Found(fingerprint, name, profile, newest[profile.key] is not profile) for profile in profiles]
    if model is not None:
        found = [one for one in found if one.is_of(model)]
    return sorted(found, key=lambda one: (one.profile.key.task, one.model, one.profile.created))


def one_profile(args: argparse.Namespace, name: str) -> Found:
    """The profile of an id, of the beginning of an id, or of a task that has one."""
    everything = find_profiles(args.dir, args.model_name)
    matching = [one for one in everything if one.profile.profile_id.startswith(name)]
    matching = matching or [one for one in everything if one.profile.key.task == name and not one.is_replaced]
    if len(matching) != 1:
        what = "no profile" if not matching else f"{len(matching)} profiles"
        ids = "".join(
            f"\n  {one.profile.profile_id}  {one.profile.key.task} of {one.summary()['model']}"
            for one in matching or everything
        )
        remedy = "name one of these by its id"
        if len({one.fingerprint for one in matching}) > 1:
            remedy += ", or their model with --model"
        raise CommandError(f"{what} in {args.dir} for {name!r}; {remedy}:{ids or ' (none)'}")
    return matching[0]


def find_model(name: str) -> str:
    """What vLLM loads for the name of a bundled model, a folder, or a checkpoint of the Hugging Face hub.

    Raises:
        CommandError: It can be none of them: the hub's names are ``owner/name``.
    """
    if name in MODELS:
        return model_path(name)
    if not Path(name).exists() and (name.count("/") != 1 or name[0] in "/.~"):
        raise CommandError(
            f"{name!r} is neither a folder nor a bundled model{did_you_mean(name, MODELS)}; the bundled ones are "
            f"{', '.join(MODELS)}, and those of the Hugging Face hub are named owner/name"
        )
    return name


def print_table(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Print rows under the names of their fields, numbers to the right."""
    table = Table(title=title, title_justify="left")
    for name in rows[0]:
        table.add_column(name, justify="right" if isinstance(rows[0][name], int | float) else "left")
    for row in rows:
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))
    width = None if sys.stdout.isatty() else 160
    Console(width=width).print(table)


def read_lines(path: Path, field: str) -> list[str]:
    """One prompt or answer a line, or the field of that name in JSON lines.

    Raises:
        CommandError: The file cannot be read, holds nothing, or a line of it has no such field.
    """
    try:
        lines = [line for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"the {field}s cannot be read: {error}") from None
    if path.suffix == ".jsonl":
        try:
            lines = [str(json.loads(line)[field]) for line in lines]
        except (ValueError, KeyError, TypeError):
            raise CommandError(f"{path}: every line must be a JSON object with the field {field}") from None
    if not lines:
        raise CommandError(f"{path} holds no {field}")
    return lines
