"""The README's examples do what it says, as they are written there."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.e2e.serving import free_port, waiting_for
from vllm_osdt.options import DecodingOptions, ServerOptions

pytestmark = pytest.mark.e2e

README = (REPOSITORY / "README.md").read_text()
BIN = Path(sys.executable).parent
ENVIRONMENT = {
    **os.environ,  # XDG_DATA_HOME among them: profiles do not go to the user's folder
    "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
}


def example(language: str, word: str) -> str:
    """The one fenced block of a language that contains a word."""
    blocks = re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)
    [block] = [block for block in blocks if word in block]
    return block


def run(command: list[str], **options) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False, **options)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_offline_example_answers_its_prompts(tmp_path):
    script = tmp_path / "offline.py"
    script.write_text(example("python", "LLM("))
    assert run([sys.executable, str(script)], cwd=tmp_path).count("answer is") == 2


@pytest.mark.skipif(shutil.which("curl") is None, reason="the README's example needs curl")
def test_server_and_client_examples(tmp_path):
    console = example("console", "vllm serve")
    serve, curl = (command.removeprefix("$ ") for command in re.split(r"\n(?=\$ )", console))
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = ["bash", "-c", f"exec {serve} --host 127.0.0.1 --port {port}"]
    with waiting_for(command, ENVIRONMENT, url, "llada-mini", tmp_path / "log"):
        completion = json.loads(run(["bash", "-c", curl.replace("http://localhost:8000", url)]))
        assert "answer is" in completion["choices"][0]["text"]
        assert completion["metrics"]["speculative_decoding"]["num_spec_steps"] >= 2
        client = example("python", "OpenAI(").replace("http://localhost:8000", url)
        assert "answer is" in run([sys.executable, "-c", client])


def test_options_table_is_complete_and_has_the_defaults():
    section = README.split("## Options")[1].split("\n## ")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", section, flags=re.MULTILINE))
    fields = (*dataclasses.fields(DecodingOptions), *dataclasses.fields(ServerOptions))
    defaults = {field.name: field.default for field in fields}
    assert rows.keys() == defaults.keys()
    in_words = {"steps", "block_length", "sub_block_length", "gen_length", "profile_dir"}
    told = {name: json.loads(text.strip("`")) for name, text in rows.items() if name not in in_words}
    assert told == {name: value for name, value in defaults.items() if name not in in_words}
