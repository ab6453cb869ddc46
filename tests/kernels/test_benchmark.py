"""The kernel benchmark runs every rule and case, and refuses figures of a kernel that is wrong."""

import pytest
import torch

from benchmarks import bench_kernels
from csrc_triton import Rule, cpu


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(bench_kernels, "time_us", lambda call, device: (call(), (1.0, 1.0, 1.0))[1])


def test_every_rule_and_case_is_there():
    cases = [record["case"] for record in bench_kernels.bench_unmask("cpu", [(7, 4)])]
    assert cases == [*(rule.name.lower() for rule in Rule), "mixed"]
    cases = [record["case"] for record in bench_kernels.bench_confidence("cpu", [(3, 40)], [torch.float32])]
    assert cases == ["greedy", "sampled", "entropy"]


def test_a_wrong_kernel_has_no_figures(monkeypatch):
    monkeypatch.setattr(cpu, "_unmask", lambda *arguments: arguments[-1].fill(0))
    with pytest.raises(AssertionError, match="differs from the twin's"):
        list(bench_kernels.bench_unmask("cpu", [(7, 4)]))
