"""The examples of the README and of the quickstart do what they say, as they are written there; links resolve."""

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

pytestmark = pytest.mark.e2e

README, QUICKSTART = REPOSITORY / "README.md", REPOSITORY / "docs" / "index.md"
MAX_README_LINES = 120
MAX_PICTURE_BYTES = 150_000
BIN = Path(sys.executable).parent
ENVIRONMENT = {
    **os.environ,  # XDG_DATA_HOME among them: profiles do not go to the user's folder
    "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
}


def example(page: Path, language: str, word: str) -> str:
    """The one fenced block of a language that contains a word."""
    blocks = re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.DOTALL)
    [block] = [block for block in blocks if word in block]
    return block


def run(command: list[str], **options) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False, **options)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_offline_example_answers_its_prompts(tmp_path):
    script = tmp_path / "offline.py"
    script.write_text(example(QUICKSTART, "python", "LLM("))
    assert run([sys.executable, str(script)], cwd=tmp_path).count("answer is") == 2


@pytest.mark.skipif(shutil.which("curl") is None, reason="the README's example needs curl")
def test_server_and_client_examples(tmp_path):
    console = example(README, "console", "vllm serve")
    assert console == example(QUICKSTART, "console", "vllm serve")
    export, serve, curl = (command.removeprefix("$ ") for command in re.split(r"\n(?=\$ )", console))
    without_memory = {name: value for name, value in ENVIRONMENT.items() if name != "VLLM_CPU_KVCACHE_SPACE"}
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = ["bash", "-c", f"{export}\nexec {serve} --host 127.0.0.1 --port {port}"]
    with waiting_for(command, without_memory, url, "llada-mini", tmp_path / "log"):
        completion = json.loads(run(["bash", "-c", curl.replace("http://localhost:8000", url)]))
        assert "answer is" in completion["choices"][0]["text"]
        assert completion["osdt"]["nfe"] >= 2
        for page in (README, QUICKSTART):
            client = example(page, "python", "OpenAI(").replace("http://localhost:8000", url)
            assert "answer is" in run([sys.executable, "-c", client])


def slug(heading: str) -> str:
    """The anchor that a Markdown heading gets."""
    return re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip())


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "examples/README.md"])
def test_links_between_pages_resolve(name):
    page = REPOSITORY / name
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()) if "://" not in link]
    assert links
    for link in links:
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), flags=re.MULTILINE)
            assert anchor in map(slug, headings), link


def test_readme_is_short_and_its_picture_is_small():
    text = README.read_text()
    assert len(text.splitlines()) <= MAX_README_LINES
    pictures = re.findall(r"!\[[^\]]*\]\((?!https:)([^)]+)\)", text)
    assert pictures and all((REPOSITORY / picture).stat().st_size < MAX_PICTURE_BYTES for picture in pictures)
