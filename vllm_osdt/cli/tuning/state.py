"""What a run of ``vllm-osdt tune`` has decoded so far, on disk."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from vllm_osdt.cli.common import CommandError
from vllm_osdt.cli.tuning.decoders import Decoded


class State:
    """What was decoded so far, in a file of JSON lines, so that an interrupted run goes on.

    Args:
        path: Of the file; lines of other runs in it are left alone.
        run: What tells the run apart.
    """

    def __init__(self, path: Path, run: str) -> None:
        self.path = path
        self.run = run
        self._decoded: dict[tuple[str, int], Decoded] = {}
        self.num_calibrating: int | None = None  # prompts that were spent on the calibration
        if path.exists():
            self._read()

    def _read(self) -> None:
        try:
            lines = self.path.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise CommandError(f"the state file cannot be read: {error}; name another one with --state") from None
        for line in lines:
            try:
                found = json.loads(line)
                if found["run"] != self.run:
                    continue
                if "num_calibrating" in found:
                    self.num_calibrating = found["num_calibrating"]
                else:
                    self._decoded[found["setting"], found["prompt"]] = Decoded(*found["decoded"])
            except (ValueError, KeyError, TypeError):
                continue  # cut off where a run was interrupted

    def find(self, setting: str, index: int) -> Decoded | None:
        """The outcome of a prompt, None where it was not decoded yet."""
        return self._decoded.get((setting, index))

    def add(self, setting: str, indices: Sequence[int], decoded: Sequence[Decoded]) -> None:
        """Keep outcomes."""
        self._decoded.update({(setting, index): one for index, one in zip(indices, decoded, strict=True)})
        self._write({"setting": setting, "prompt": i, "decoded": one} for i, one in zip(indices, decoded, strict=True))

    def calibrated(self, num_calibrating: int) -> None:
        """The calibration is over."""
        self.num_calibrating = num_calibrating
        self._write([{"num_calibrating": num_calibrating}])

    def _write(self, lines: Iterable[dict[str, Any]]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.writelines(json.dumps({"run": self.run, **line}) + "\n" for line in lines)
