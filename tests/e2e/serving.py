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

START_LIMIT_S = 480  # two engines and two API servers on a busy machine take minutes


@dataclass
class Server:
    """A running server and where to reach it."""

    process: subprocess.Popen
    url: str
    model: str
    log: Path

    def complete(self, prompt: str | list[int], **fields) -> httpx.Response:
        """POST /v1/completions, greedy, for at most 96 tokens unless told otherwise."""
        body = {"model": self.model, "max_tokens": 96, "temperature": 0, "prompt": prompt, **fields}
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=120)


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def vllm() -> list[str]:
    """The ``vllm`` command; where the tests run on the stand-in for CUDA, so does it."""
    if "tests.cuda_stand_in.cuda" in sys.modules:
        return [sys.executable, "-m", "tests.cuda_stand_in.vllm"]
    return [str(Path(sys.executable).with_name("vllm"))]


def serving(model: str | Path, name: str, log: Path, *arguments: str) -> contextlib.AbstractContextManager[Server]:
    """A server of a checkpoint, under a name, in float32."""
    port = free_port()
    command = [*vllm(), "serve", str(model), "--plugin", "osdt"]
    command += ["--served-model-name", name, "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    return waiting_for([*command, *arguments], environment, f"http://127.0.0.1:{port}", name, log)


@contextlib.contextmanager
def waiting_for(command: list[str], environment: dict[str, str], url: str, name: str, log: Path) -> Iterator[Server]:
    """Start a server, wait until it answers, and kill what is left of it at the end."""
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
