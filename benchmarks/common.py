"""What the benchmarks share: the environment record, percentiles, JSON lines and workers in other processes.

Standard library only, so that a worker under another interpreter can import it too.
"""

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = ("vllm-osdt", "vllm", "torch", "transformers", "triton", "numpy")


def commit_of(folder: str | Path) -> str:
    """The commit of the git checkout at ``folder``, with "+changes" when tracked files differ; else "unknown"."""

    def git(*arguments: str) -> str:
        command = ("git", "-C", str(folder), *arguments)
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != Path(folder).resolve():
            return "unknown"  # a copy inside another repository
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Versions of Python and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def cpu_name() -> str:
    """The processor's model name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def gpu_names() -> list[str]:
    """The GPUs that torch sees, if the caller has imported torch."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def environment(**conditions: Any) -> dict[str, Any]:
    """What a figure depends on beside the code measured, as the start of a JSON line.

    Args:
        conditions: More fields, such as dtype and threads.
    """
    return {
        "commit": commit_of(REPOSITORY),
        "versions": versions(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "gpu": gpu_names(),
        "load_average": round(os.getloadavg()[0], 2),  # over the last minute: above 0 something else was running
        **conditions,
    }


def percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    """20th percentile, median and 80th percentile, interpolated."""
    if len(values) < 2:
        return (float(values[0]),) * 3
    cuts = statistics.quantiles((float(value) for value in values), n=10, method="inclusive")
    return cuts[1], cuts[4], cuts[7]


def summary(values: Sequence[float]) -> dict[str, float]:
    """The same as a JSON object."""
    return dict(zip(("p20", "median", "p80"), percentiles(values), strict=True))


def write_lines(path: str | Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Append JSON lines to a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for line in lines:
            file.write(json.dumps(line) + "\n")


class Worker:
    """A process that answers JSON lines; :func:`serve` is its other end."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str]) -> None:
        """Start it and wait until it is ready.

        Raises:
            RuntimeError: It ended; its own error is on stderr.
        """
        self.command = list(command)
        self._process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=dict(env)
        )
        self.hello = self._read()

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Send one request and wait for its answer.

        Raises:
            RuntimeError: As for the start.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.command[0]} {self.command[1]} ended with status {self._process.wait()}.")
        return json.loads(line)


def serve(start: Callable[[], tuple[dict[str, Any], Callable[[dict[str, Any]], dict[str, Any]]]]) -> None:
    """Answer JSON lines on standard output until standard input ends.

    Args:
        start: Loads what is needed; returns the first line to send and the function that answers requests. Whatever
            it and its libraries print goes to stderr.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    hello, answer = start()
    print(json.dumps(hello), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=answers, flush=True)
