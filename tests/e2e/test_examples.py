"""The scripts in examples/ run as a user runs them, and print what they promise."""

import os
import re
from ast import literal_eval
from pathlib import Path

import pytest

from tests import forked
from tests.conftest import REPOSITORY
from tests.e2e.serving import free_port, serving
from vllm_osdt.mini import model_path

pytestmark = pytest.mark.e2e

EXAMPLES = REPOSITORY / "examples"
ANSWER = "so the answer is"


def run(tmp_path: Path, name: str, *arguments: str) -> str:
    """What an example prints, with a profile folder of its own."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "XDG_DATA_HOME": str(tmp_path),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    }
    done = forked.run([str(EXAMPLES / f"{name}.py"), *arguments], cwd=tmp_path, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_offline_calibrates_a_task_and_then_uses_its_profile(tmp_path):
    printed = run(tmp_path, "offline")
    found = re.findall(r"^(\w+): (\d+) requests, (\d+) of them calibrate, ([0-9.]+) forward", printed, re.MULTILINE)
    assert [row[:3] for row in found] == [("first", "64", "64"), ("later", "4", "0")]
    assert float(found[1][3]) < float(found[0][3])
    told = literal_eval(next(line for line in printed.splitlines() if line.startswith("{")))
    assert re.fullmatch("[0-9a-f]{16}", told["profile"]) and told["task"] == "quiz" and not told["calibrating"]
    assert printed.count(ANSWER) == 1


def test_server_and_client_answer_a_completion_and_a_chat(tmp_path):
    printed = run(tmp_path, "server_and_client", "--port", str(free_port()))
    completion, chat = printed.index("completion:"), printed.index("chat:")
    assert ANSWER in printed[completion:chat] and ANSWER in printed[chat:]
    told = literal_eval(re.search(r"^decoded: (.*)$", printed, re.MULTILINE)[1])
    assert told["policy"] == "osdt" and told["task"] == "quiz" and told["calibrating"]


def test_a_stream_has_a_piece_for_each_block(tmp_path):
    with serving(model_path("llada-mini"), "mini", tmp_path / "log") as server:
        printed = run(tmp_path, "streaming", "--url", f"{server.url}/v1")
    pieces = [literal_eval(piece) for piece in re.findall(r"^piece: (.*)$", printed, re.MULTILINE)]
    assert len(pieces) >= 2 and ANSWER in "".join(pieces)
    told = literal_eval(re.search(r"^decoded: (.*)$", printed, re.MULTILINE)[1])
    assert told["nfe"] >= len(pieces)


def test_an_adapter_has_a_task_of_its_own(tmp_path):
    printed = run(tmp_path, "lora")
    assert re.findall(r"^task: (.*)$", printed, re.MULTILINE) == ["quiz", "quiz@random"]
    base, adapted = re.findall(r"^text: (.*)$", printed, re.MULTILINE)
    assert ANSWER in base and adapted != base


def test_a_pinned_profile_decodes_as_before(tmp_path):
    printed = run(tmp_path, "pinned_profile")
    profiles = dict(re.findall(r"^(\w+): profile ([0-9a-f]{16}), \d+ forward passes$", printed, re.MULTILINE))
    assert profiles["pinned"] == profiles["first"] != profiles["newer"]
    assert "the task has a newer profile: True" in printed
    assert "the pinned request decodes as before: True" in printed


def test_rollouts_say_which_weights_they_came_from(tmp_path):
    printed = run(tmp_path, "rollouts")
    batches = re.findall(r"^batch (\d): 16 answers of weights \{(\d)\}, reward ([01]\.\d\d)$", printed, re.MULTILINE)
    assert [(step, version) for step, version, _ in batches] == [("0", "0"), ("1", "1"), ("2", "2")]
    first = literal_eval(re.search(r"^first answer: (.*)$", printed, re.MULTILINE)[1])
    assert set(first) == {"token_ids", "logprobs", "step_map"} and all(value <= 0 for value in first["logprobs"])
