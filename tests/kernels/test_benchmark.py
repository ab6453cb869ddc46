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
    assert cases == ["greedy", "sampled", "entropy", "margin"]
    cases = [record["case"] for record in bench_kernels.bench_lm_head("cpu", [3], 40, 16)]
    assert cases == ["greedy", "sampled"]


def test_floor_is_the_longer_of_bytes_and_operations(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert bench_kernels.floor_of("cuda", 335 * 10**10, 10)["floor_us"] == pytest.approx(1e6)
    assert bench_kernels.floor_of("cuda", 10, 989 * 10**12)["floor_us"] == pytest.approx(1e6)
    assert "floor_us" not in bench_kernels.floor_of("cpu", 10, 10)


@pytest.mark.parametrize(("slower_from", "rows"), [(1, 0), (64, 32), (1000, 64)])
def test_crossover_is_the_last_size_before_the_op_gets_slower(slower_from, rows):
    records = [
        {"case": "greedy", "num_rows": n, "op_us": (2.0 if n >= slower_from else 1.0, 0, 0), "with_logits_us": (1.5,)}
        for n in (64, 1, 32)
    ]
    assert bench_kernels.crossover(records, "greedy") == rows


def test_a_wrong_kernel_has_no_figures(monkeypatch):
    monkeypatch.setattr(cpu, "_unmask", lambda *arguments: arguments[-1].fill(0))
    with pytest.raises(AssertionError, match="differs from the twin's"):
        list(bench_kernels.bench_unmask("cpu", [(7, 4)]))
