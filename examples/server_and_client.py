"""Start a server, ask it with the OpenAI client, and stop it.

python examples/server_and_client.py
"""

import argparse
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from openai import OpenAI

from vllm_osdt.mini import model_path

START_LIMIT_S = 300
QUESTION = "quiz : pick one beast . A saw B dog C plum ."


def wait_until_ready(server: subprocess.Popen, url: str) -> None:
    """Return when the server answers.

    Raises:
        SystemExit: It ended, or did not answer in time.
    """
    deadline = time.monotonic() + START_LIMIT_S
    while server.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise SystemExit("the server did not start")


def ask(url: str) -> None:
    """Send a completion and a chat of one task, and print the answers."""
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    options = {"osdt_task": "quiz"}
    completion = client.completions.create(
        model="mini", prompt=f"{QUESTION} Answer:", max_tokens=96, extra_body=options
    )
    print("completion:", completion.choices[0].text)
    print("decoded:", completion.osdt)
    messages = [{"role": "user", "content": QUESTION}]
    chat = client.chat.completions.create(model="mini", messages=messages, extra_body=options)
    print("chat:", chat.choices[0].message.content)


def main() -> None:
    """Serve a checkpoint as long as the questions take."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=model_path("llada-mini"), help="checkpoint (default: bundled llada-mini)")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()

    command = [str(Path(sys.executable).with_name("vllm")), "serve", args.model, "--plugin", "osdt"]
    command += ["--served-model-name", "mini", "--host", "127.0.0.1", "--port", str(args.port)]
    url = f"http://127.0.0.1:{args.port}"
    server = subprocess.Popen(command)
    try:
        wait_until_ready(server, url)
        ask(url)
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
