"""``tools/gpu_report.py`` writes what was measured on a GPU, and nothing without it."""

import json
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

CARD = "NVIDIA H100 80GB HBM3"
PAGE = "before\n\n<!-- gpu: tools/gpu_report.py -->\n<!-- end -->\n\nbehind\n"


def load(requests, tokens_per_s, what="burst", tokens_per_forward=4, **fields):
    """A line of a large shape's load."""
    measured = {
        "forwards_per_s": 90.0,
        "ms_per_forward": 11.0,
        "between_forwards_ms": {"median": 0.3},
        "peak_gib": 17.5,
    }
    about = {"requests": requests, "tokens_per_forward": tokens_per_forward, "tokens_per_s": tokens_per_s}
    return {"stage": "shape:llada-8b", "what": what, "gpu": CARD, "ok": True, **about, **measured, **fields}


def line(stage, what, **fields):
    """Another line."""
    return {"stage": stage, "what": what, "gpu": CARD, "ok": True, **fields}


LINES = [
    line("environment", "machine", commit="0123456789abcdef", versions={"torch": "2.13.0"}),
    line("environment", "rates", copy_GB_per_s=2900, matmul_TFLOP_per_s=700),
    load(1, 100.0),
    load(1, 360.5, floor_ms_per_forward=5.5, times_the_floor=2.0),
    load(8, 2400.0, floor_ms_per_forward=6.0, times_the_floor=1.5),
    load(8, 900.0, tokens_per_forward=1),
    load(8, 1700.0, what="staggered"),
    line("shape:llada-8b", "start", capture_s=12.5, capture_gib=0.75, num_graphs=40),
    line(
        "shape:llada-8b", "calls", requests=8, graphs=True, waits_per_step=1.0, launches_per_step=9,
        kernels_per_step=400,
    ),
    line(
        "shape:llada-8b", "memory", weights_gib=15.0, pages_gib=48.0, peak_of_steps_gib=2.5, profiled_gib=4.5,
        used_gib=70.0,
    ),
    line(
        "graphs:llada-mini", "graphs", dtype="bfloat16", replays_per_step=1.5, ahead={"used": 9}, share_equal=1.0,
        decode_s=0.5, replayed_rows=[64],
    ),
    line(
        "lm-head", "lm_head_confidence", case="greedy", rows=32, us=400.0, with_logits_us=420.0, product_us=390.0,
        shard_us=101.0, combine_us=4.0,
    ),
    line("lm-head", "crossover", case="greedy", up_to_rows=256),
    line("compiled:sdar-8b", "plain", requests=8, ms_per_forward=9.5),
    line("compiled:sdar-8b", "compiled", requests=8, ms_per_forward=9.25),
    line("compiled:sdar-8b", "plain", requests=32, ms_per_forward=11.5),
    {"stage": "libraries", "what": "norm", "gpu": CARD, "ok": False, "error": "AssertionError"},
    {"stage": "libraries", "what": "ended", "gpu": None, "ok": False, "status": 1, "seconds": 9.0},
]  # fmt: skip


@pytest.fixture
def report(tmp_path):
    """Runs the tool on lines; returns the page and the folder of pictures."""

    def run(lines):
        (tmp_path / "benchmarks.md").write_text(PAGE)
        results = tmp_path / "gpu.jsonl"
        results.write_text("".join(json.dumps(one) + "\n" for one in lines))
        command = [sys.executable, "tools/gpu_report.py", str(results), "--docs", str(tmp_path)]
        subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
        return (tmp_path / "benchmarks.md").read_text(), tmp_path / "assets"

    return run


def test_without_results_nothing_is_written(report):
    for lines in ([], [{**load(1, 10.0), "gpu": "NVIDIA H100 (stand-in)"}]):
        page, assets = report(lines)
        assert page == PAGE and not assets.exists()


def test_the_page_has_every_figure_and_its_plot(report):
    page, assets = report(LINES)
    assert page.startswith("before\n") and page.endswith("<!-- end -->\n\nbehind\n")
    assert f"### {CARD}" in page and "Commit 0123456789ab; torch 2.13.0." in page and "Copy 2900 GB/s" in page
    assert "| llada-8b | 1 | burst | 4 | 360.5 | 90.0 | 11.0 | 5.5 | 2.0 | 0.3 | 17.5 |" in page
    assert "| llada-8b | 8 | burst | 1 / 4 | 900.0 / 2400.0 |" in page
    assert "| llada-8b | 8 | staggered | 4 | 1700.0 |" in page
    assert "| llada-8b | 8 | yes | 1.0 | 9 | 400 |" in page
    assert "| llada-8b | 15.0 | 48.0 | 2.5 | 4.5 | 70.0 | 40 | 0.75 | 12.5 |" in page
    assert "| llada-mini | bfloat16 | graphs | 1.5 | 9 | 0 | 100.0% |" in page
    assert "| greedy | 32 | 400.0 | 420.0 | 390.0 | 101.0 | 4.0 |" in page and "greedy: up to 256 rows" in page
    assert "| sdar-8b | 8 | 9.5 | 9.25 |" in page and "| sdar-8b | 32 | 11.5 | - |" in page
    assert "| `libraries` | 0 | norm, 1 | 9.0 |" in page
    [picture] = assets.iterdir()
    assert f"(assets/{picture.name})" in page and picture.read_bytes().startswith(b"\x89PNG")


def test_a_part_that_was_measured_again_counts_once(report):
    page, _ = report(LINES)
    assert "100.0 |" not in page.split("llada-8b | 1 | burst")[1].split("\n")[0]
    again, _ = report([*LINES, *LINES])
    assert again == page


def test_every_card_has_tables_of_its_own(report):
    other = "NVIDIA H200"
    page, assets = report([*LINES, {**load(1, 500.0), "gpu": other}])
    assert f"### {CARD}" in page and f"### {other}" in page
    assert len(list(assets.iterdir())) == 2


def test_the_documentation_has_a_place_for_it():
    text = (REPOSITORY / "docs" / "benchmarks.md").read_text()
    assert text.count("<!-- gpu: tools/gpu_report.py -->") == 1 and text.count("<!-- end -->") == 1
