"""``vllm serve PATH --plugin osdt`` as the README says it, in a process group of its own."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.forked import Program

VLLM = Path(sys.executable).with_name("vllm")
# Two engines and two API servers on a busy machine take minutes, on the stand-in for CUDA many; one that fails ends at
# once, so that nothing waits for these but a server that hangs.
START_LIMIT_S = 1800
ANSWER_LIMIT_S = 600


@dataclass
class Server:
    """A running server and where to reach it."""

    process: Program | subprocess.Popen[bytes]
    url: str
    model: str
    log: Path

    def complete(self, prompt: str | list[int], **fields) -> httpx.Response:
        """POST /v1/completions, greedy, for at most 96 tokens unless told otherwise."""
        body = {"model": self.model, "max_tokens": 96, "temperature": 0, "prompt": prompt, **fields}
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=ANSWER_LIMIT_S)


def has_shut_down(status: int, log: str) -> bool:
    """Whether a server that was interrupted has ended as it should, by its exit status and its log.

    vLLM, once its engine has ended, asks for the command line of whoever holds its port. That may be this engine, which
    nobody has waited for yet.
    """
    has_met_its_engine = status == 1 and "".join(log.splitlines()[-1:]).startswith("psutil.ZombieProcess")
    is_clean = status in (0, -signal.SIGINT, 128 + signal.SIGINT) or has_met_its_engine
    return is_clean and "EngineDeadError" not in log


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def serving(
    model: str | Path, name: str, log: Path, *arguments: str, is_forked: bool = True
) -> contextlib.AbstractContextManager[Server]:
    """A server of a checkpoint, under a name, in float32.

    Its processes are forks of one that has imported vLLM, unless told; on the stand-in for CUDA they never are.
    """
    port, command = free_port(), [str(VLLM)]
    if "tests.cuda_stand_in.cuda" in sys.modules:
        is_forked, command = False, [sys.executable, "-m", "tests.cuda_stand_in.vllm"]
    command += ["serve", str(model), "--plugin", "osdt"]
    command += ["--served-model-name", name, "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    environment = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_ENGINE_READY_TIMEOUT_S": str(START_LIMIT_S),
    }
    url = f"http://127.0.0.1:{port}"
    return waiting_for([*command, *arguments], environment, url, name, log, is_forked=is_forked)


@contextlib.contextmanager
def waiting_for(
    command: list[str], environment: dict[str, str], url: str, name: str, log: Path, *, is_forked: bool = False
) -> Iterator[Server]:
    """Start a server, wait until it answers, and kill what is left of it at the end."""
    process: Program | subprocess.Popen[bytes]
    if is_forked:
        process = Program(command, environment, log, log)
    else:
        with log.open("w") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
    try:
        deadline = time.monotonic() + START_LIMIT_S
        while True:
            try:
                if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.5)
        yield Server(process, url, name, log)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
