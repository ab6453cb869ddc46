"""``tools/gpu_check.py`` runs through, and a part that fails ends nothing but itself."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY


def run(out, *stages, options=("--budget", "10000", "--only"), **variables):
    """Exit status and lines of some stages in tiny sizes."""
    command = [sys.executable, "tools/gpu_check.py", "--stand-in", *options, *stages]
    environment = {**os.environ, "OUT": str(out), **variables}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    return done.returncode, [json.loads(line) for line in (out / "gpu.jsonl").read_text().splitlines()]


def test_its_stages_run_through(tmp_path):
    stages = (
        "environment", "libraries", "kernels", "lm-head", "defaults:llada-mini", "shape:llada-8b", "graphs:llada-8b",
        "recorded:llada_random", "shape:sdar-4b",
    )  # fmt: skip
    status, lines = run(tmp_path, *stages)
    assert status == 0, [line for line in lines if not line["ok"]]
    assert [line["stage"] for line in lines if line["what"] == "ended"] == [*stages]
    assert all(line["seconds"] >= 0 and "stand-in" in (line["gpu"] or "stand-in") for line in lines)
    batches = [line for line in lines if line["what"] == "one batch"]
    assert [line["attention"] for line in batches] == [["TRITON_ATTN"], ["FLEX_ATTENTION"]]
    assert all(line["num_cases"] == 1 and line["differ"] == [] for line in batches)
    of_shape = [line for line in lines if line["stage"] == "shape:llada-8b"]
    [start] = [line for line in of_shape if line["what"] == "start"]
    assert start["num_graphs"] > 0
    loads = {(line["what"], line["requests"]): line for line in of_shape if "num_replays" in line}
    engines = {line["what"]: line for line in lines if line["stage"] == "graphs:llada-8b" and "ahead" in line}
    assert engines["graphs"]["ahead"] and not engines["no run-ahead"]["ahead"]
    burst = loads["burst", 1]
    assert burst["num_replays"] == burst["num_forwards"] > burst["num_steps"]
    assert loads["staggered", 2]["num_forwards"] > loads["burst", 2]["num_forwards"]
    assert loads["burst without graphs", 2]["num_replays"] == 0
    assert all(line["waits_per_step"] == 0 for line in of_shape if line["what"] == "calls")
    assert not (tmp_path / "tracebacks.txt").exists()


def test_graphs_and_run_ahead_change_no_token(tmp_path):
    status, lines = run(tmp_path, "graphs:llada-mini")
    assert status == 0, [line for line in lines if not line["ok"]]
    engines = {line["what"]: line for line in lines if "share_equal" in line}
    assert list(engines) == ["graphs", "no run-ahead", "no graphs"]
    assert all(line["share_equal"] == 1 for line in engines.values())
    assert engines["graphs"]["ahead"]["used"] > 0 and engines["graphs"]["nfe"] == engines["no graphs"]["nfe"]


def test_a_part_that_fails_is_recorded_and_the_next_stage_begins(tmp_path):
    status, lines = run(tmp_path, "kernel-tests", "environment", PYTEST_ADDOPTS="--no-such-option")
    assert status == 1
    failed = [line for line in lines if not line["ok"]]
    assert {line["stage"] for line in failed} == {"kernel-tests"}
    assert all("error" in line for line in failed if line["what"] != "ended")
    assert "Traceback" in (tmp_path / "tracebacks.txt").read_text()
    assert any(line["stage"] == "environment" and line["ok"] for line in lines)


def test_stages_from_one_on_are_not_started_without_time(tmp_path):
    status, lines = run(tmp_path, "shape:dream-7b", options=("--budget", "1", "--from"))
    assert status == 1
    expected = ["shape:dream-7b", "shape:sdar-4b", "compiled:sdar-8b", "kernel-tests"]
    assert [line["stage"] for line in lines] == expected
    assert all(line["what"].startswith("not started") for line in lines)


@pytest.mark.parametrize("stage", ["nothing", "shape"])
def test_a_stage_that_is_not_there_is_refused(stage):
    command = [sys.executable, "tools/gpu_check.py", "--only", stage]
    assert subprocess.run(command, cwd=REPOSITORY, capture_output=True).returncode == 2
