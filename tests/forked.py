"""Python programs that run vLLM and need not import it: they are forked from a process that has.

Importing vLLM takes ten seconds of a CPU, and a server does it in each of its three processes. Here a process without
threads imports vLLM once for all tests of a pytest process; each program is a fork of it, and so is what the program
itself would spawn. The examples of the README start as a user starts them: ``tests/e2e/test_readme.py``.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.vllm_imported"])


class Program:
    """A running program in a session of its own; what :class:`subprocess.Popen` has under the same names.

    Args:
        command: A Python file and its arguments.
        env: The whole environment.
        stdout: A file to be written.
        stderr: Another, or the same.
        cwd: The working folder; None for the tests' own.
    """

    def __init__(
        self, command: Sequence[str], env: Mapping[str, str], stdout: Path, stderr: Path, cwd: Path | None = None
    ) -> None:
        for file in (stdout, stderr):
            file.write_bytes(b"")
        files, folder = [str(stdout.resolve()), str(stderr.resolve())], str(cwd or Path.cwd())
        self._process = _context.Process(target=_run, args=(list(command), dict(env), files, folder))
        self._process.start()

    @property
    def pid(self) -> int:
        """Of the process and of its group."""
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        """The exit status; None while it runs."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Sends a signal to the process alone."""
        os.kill(self.pid, number)

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, once there is one.

        Raises:
            subprocess.TimeoutExpired: It has not ended after ``timeout`` seconds.
        """
        self._process.join(timeout)
        status = self._process.exitcode
        if status is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout or 0.0)
        return status


def _run(command: list[str], environment: dict[str, str], files: list[str], folder: str) -> None:
    """In the forked process: takes on what a new process would have been given, and runs the program."""
    import tests.vllm_imported  # noqa: F401  where the server of forks could not

    os.setsid()
    for number, path in enumerate(files, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


def run(
    command: Sequence[str], *, env: Mapping[str, str], timeout: float, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs a Python file with arguments to its end, as :func:`subprocess.run` does with text that is captured.

    Raises:
        subprocess.TimeoutExpired: It took longer than ``timeout`` seconds; it and what it started are killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("stdout", "stderr")]
        program = Program(command, env, *files, cwd)
        try:
            status = program.wait(timeout)
        finally:
            if program.poll() is None:
                os.killpg(program.pid, signal.SIGKILL)
                program.wait()
        return subprocess.CompletedProcess(command, status, *(file.read_text() for file in files))
