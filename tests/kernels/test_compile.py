"""The kernels compile for a GPU; no GPU is needed, but a process in which Triton does not interpret."""

import os
import subprocess
import sys
from pathlib import Path


def test_every_kernel_compiles_for_a_gpu():
    folder = Path(__file__).parent
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(folder.parents[1])}
    command = [sys.executable, str(folder / "compile_for_gpu.py")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    kernels = {"_confidence_kernel", "_combine_kernel", "_lm_head_kernel", "_unmask_kernel"}
    assert {line.split()[0] for line in lines} == kernels
