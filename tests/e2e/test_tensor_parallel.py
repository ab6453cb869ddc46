"""Two ranks decode as one and hold the same profiles."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

pytestmark = pytest.mark.e2e


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two ranks on the CPU need two cores")
def test_two_ranks_take_the_stock_decisions_and_calibrate_alike(golden_random, tmp_path):
    command = [
        sys.executable,
        "-m",
        "tests.e2e.tensor_parallel_program",
        str(golden_random.folder),
        str(tmp_path / "outcome"),
    ]
    environment = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    run = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr[-4000:]
    result = json.loads((tmp_path / "outcome").read_text())
    assert result["decided"] == [case["output_token_ids"] for case in golden_random.cases]
    assert [[profile["task"] for profile in held] for held in result["held"]] == [["shared"], ["other"], ["shared"]]
    assert result["held"][0][0]["id"] == result["held"][2][0]["id"]
    assert result["ranks"] == [result["held"][2]] * 2
    assert len(list(tmp_path.rglob("*.json"))) == 2
