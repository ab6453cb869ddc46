"""``tools/gpu_check.py`` runs through, and a part that fails ends nothing but itself."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY


def run(out, *stages):
    """Exit status and lines of some stages in tiny sizes."""
    command = [sys.executable, "tools/gpu_check.py", "--stand-in", "--budget", "400", "--only", *stages]
    environment = {**os.environ, "OUT": str(out)}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    return done.returncode, [json.loads(line) for line in (out / "gpu.jsonl").read_text().splitlines()]


def test_its_stages_run_through(tmp_path):
    stages = ("environment", "kernels", "defaults:llada-mini", "shape:sdar-4b", "recorded:llada2_random")
    status, lines = run(tmp_path, *stages)
    assert status == 0, [line for line in lines if not line["ok"]]
    assert [line["stage"] for line in lines if line["what"] == "ended"] == [*stages]
    assert all(line["seconds"] >= 0 and "stand-in" in (line["gpu"] or "stand-in") for line in lines)
    [batch] = [line for line in lines if line["what"] == "one batch"]
    assert batch["num_cases"] == 1 and batch["differ"] == []
    assert not (tmp_path / "tracebacks.txt").exists()


def test_a_part_that_fails_is_recorded_and_the_next_stage_begins(tmp_path):
    status, lines = run(tmp_path, "libraries", "environment")  # FlashAttention's own kernels need a GPU
    assert status == 1
    failed = [line for line in lines if not line["ok"]]
    assert {line["stage"] for line in failed} == {"libraries"}
    assert all("error" in line for line in failed if line["what"] != "ended")
    assert "Traceback" in (tmp_path / "tracebacks.txt").read_text()
    assert any(line["stage"] == "environment" and line["ok"] for line in lines)


@pytest.mark.parametrize("stage", ["nothing", "shape"])
def test_a_stage_that_is_not_there_is_refused(stage):
    command = [sys.executable, "tools/gpu_check.py", "--only", stage]
    assert subprocess.run(command, cwd=REPOSITORY, capture_output=True).returncode == 2
