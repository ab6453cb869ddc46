"""Turns the lines of ``tools/gpu_check.py`` into tables and plots of the documentation.

    python tools/gpu_report.py                  # benchmarks/results/gpu.jsonl -> docs/benchmarks.md, docs/assets
    python tools/gpu_report.py build/gpu.jsonl  # of another file

The section between the two comments of ``docs/benchmarks.md`` is replaced. Of parts that were measured again the last
counts; each card has tables of its own. Without results nothing is written.
"""

import argparse
import json
import re
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SECTION = re.compile(r"(<!-- gpu: tools/gpu_report.py -->\n).*?(<!-- end -->)", re.DOTALL)
STAND_IN = "stand-in"
# What tells one measurement of a part from another.
KEYS = (
    "attention", "block_length", "cache_mode", "case", "dtype", "engine", "graphs", "model", "num_blocks", "policy",
    "requests", "rows", "task", "tokens_per_forward", "version", "vocabulary",
)  # fmt: skip
NOT_MEASURED = "-"
ABOUT = """Shapes have random weights in bfloat16. The floor of a forward is the time for its weights at the rate of a
large copy, or for its products at the rate of a large product, whichever is longer, both measured on the card.
"""

Line = dict[str, Any]


def read(path: Path) -> list[Line]:
    """The last line of every part on every card, in order; not those of the stand-in."""
    if not path.exists():
        return []
    lines: dict[tuple[Any, ...], Line] = {}
    cards: dict[str, str] = {}
    for text in path.read_text().splitlines():
        line = json.loads(text)
        card = line.get("gpu") or cards.get(line["stage"])  # the driver of the stages has no card
        if card is None or STAND_IN in card:
            continue
        cards[line["stage"]] = card
        key = (card, line["stage"], line["what"], *(str(line.get(name)) for name in KEYS))
        lines.pop(key, None)
        lines[key] = line | {"gpu": card}
    return list(lines.values())


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; what was not measured is a dash."""
    texts = [[NOT_MEASURED if cell is None else str(cell) for cell in row] for row in rows]
    lines = [head, ["---"] * len(head), *texts]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def of(lines: Iterable[Line], stage: str, *whats: str) -> list[Line]:
    """Parts that succeeded, of the stages whose name begins so."""
    return [line for line in lines if line["stage"].startswith(stage) and line["what"] in whats and line["ok"]]


def stages(lines: list[Line]) -> str:
    """Parts that succeeded and failed, by stage."""
    rows = []
    for stage in dict.fromkeys(line["stage"] for line in lines):
        parts = [line for line in lines if line["stage"] == stage and line["what"] not in ("stage", "ended")]
        ended = [line for line in lines if line["stage"] == stage and line["what"] == "ended"]
        failed = [line["what"] for line in parts if not line["ok"]]
        failed += [str(line["status"]) for line in ended if line.get("status") not in (0, None)]
        seconds = ended[0].get("seconds") if ended else None
        rows.append((f"`{stage}`", sum(line["ok"] for line in parts), ", ".join(failed) or "none", seconds))
    return table(("Stage", "Parts that succeeded", "Failed", "Seconds"), rows)


def speed(lines: list[Line]) -> str:
    """Every load of every large shape; figures of several numbers of tokens per forward stand side by side."""
    found = of(lines, "shape:", "burst", "burst without graphs", "staggered")
    rows = []
    for stage, number, arrivals in dict.fromkeys((one["stage"], one["requests"], one["what"]) for one in found):
        ours = [one for one in found if (one["stage"], one["requests"], one["what"]) == (stage, number, arrivals)]
        ours.sort(key=lambda line: line["tokens_per_forward"])
        measured = ("tokens_per_forward", "tokens_per_s", "forwards_per_s", "ms_per_forward", "floor_ms_per_forward")
        columns = [[line.get(name) for line in ours] for name in (*measured, "times_the_floor")]
        columns.append([line["between_forwards_ms"].get("median") for line in ours])
        texts = [" / ".join(NOT_MEASURED if one is None else str(one) for one in column) for column in columns]
        rows.append((stage.split(":")[1], number, arrivals, *texts, max(line["peak_gib"] for line in ours)))
    head = ("Shape", "Requests", "Arrivals", "Tokens per forward", "Tokens/s", "Forwards/s", "ms per forward")
    head += ("Floor, ms", "Times the floor", "ms between forwards", "Peak, GiB")
    return table(head, rows) if rows else ""


def calls(lines: list[Line]) -> str:
    """What a step calls, replayed and not."""
    rows = [
        (
            line["stage"].split(":")[1],
            line["requests"],
            "yes" if line["graphs"] else "no",
            line["waits_per_step"],
            line["launches_per_step"],
            line["kernels_per_step"],
        )
        for line in of(lines, "shape:", "calls")
    ]
    head = ("Shape", "Requests", "Graphs", "Waits per step", "Launches per step", "Kernels per step")
    return table(head, rows) if rows else ""


def memory(lines: list[Line]) -> str:
    """Memory of every large shape, with what its graphs took."""
    starts = {line["stage"]: line for line in of(lines, "shape:", "start")}
    rows = [
        (
            line["stage"].split(":")[1],
            *(line[name] for name in ("weights_gib", "pages_gib", "peak_of_steps_gib", "profiled_gib", "used_gib")),
            *(starts.get(line["stage"], {}).get(name) for name in ("num_graphs", "capture_gib", "capture_s")),
        )
        for line in of(lines, "shape:", "memory")
    ]
    head = ("Shape", "Weights, GiB", "Pages", "Peak of steps", "Profiled for them", "Used in all", "Graphs")
    return table((*head, "GiB of graphs", "Seconds to capture"), rows) if rows else ""


def graphs(lines: list[Line]) -> str:
    """Whether graphs and run-ahead change tokens."""
    rows = [
        (
            line["stage"].split(":")[1],
            line["dtype"],
            line["what"],
            line["replays_per_step"],
            line["ahead"].get("used", 0),
            line["ahead"].get("wasted", 0),
            f"{line['share_equal']:.1%}",
        )
        for line in of(lines, "graphs:", "graphs", "no run-ahead", "no graphs")
    ]
    head = ("Model", "dtype", "Engine", "Replays per step", "Steps ahead, used", "Wasted", "Requests with equal tokens")
    return table(head, rows) if rows else ""


def compiled(lines: list[Line]) -> str:
    """An engine that has vLLM compile the model beside one that does not."""
    found = of(lines, "compiled:", "plain", "compiled")
    rows = []
    for stage, number in dict.fromkeys((one["stage"], one["requests"]) for one in found):
        by_engine = {one["what"]: one for one in found if (one["stage"], one["requests"]) == (stage, number)}
        ms = [by_engine.get(what, {}).get("ms_per_forward") for what in ("plain", "compiled")]
        rows.append((stage.split(":")[1], number, *ms))
    return table(("Shape", "Requests", "ms per forward", "Compiled"), rows) if rows else ""


def lm_head(lines: list[Line]) -> str:
    """The fused op against written logits, by number of rows."""
    measured = [line for line in of(lines, "lm-head", "lm_head_confidence") if line["us"] is not None]
    names = ("us", "with_logits_us", "product_us", "shard_us", "combine_us")
    rows = [(line["case"], line["rows"], *(line[name] for name in names)) for line in measured]
    head = ("Rows are", "Rows", "`lm_head_confidence`, µs", "Product and `confidence`", "Product alone")
    text = table((*head, "A shard of four", "Combining"), rows) if rows else ""
    for line in of(lines, "lm-head", "crossover"):
        if line["up_to_rows"] is not None:
            text += f"\nAs fast as written logits, {line['case']}: up to {line['up_to_rows']} rows.\n"
    return text


def draw(lines: list[Line], path: Path) -> bool:
    """Tokens per second, and time over the floor, by number of requests; False without such lines."""
    found = of(lines, "shape:", "burst")
    if not found:
        return False
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2))
    styles = dict(zip(sorted({line["tokens_per_forward"] for line in found}), (":", "--", "-", "-."), strict=False))
    colors = {name: f"C{index}" for index, name in enumerate(dict.fromkeys(line["stage"] for line in found))}
    for stage, color in colors.items():
        for tokens, style in styles.items():
            ours = [line for line in found if line["stage"] == stage and line["tokens_per_forward"] == tokens]
            ours.sort(key=lambda line: line["requests"])
            for axis, name in zip(axes, ("tokens_per_s", "times_the_floor"), strict=True):
                points = [(line["requests"], line[name]) for line in ours if line.get(name) is not None]
                if points:
                    label = f"{stage.split(':')[1]}, {tokens} per forward"
                    axis.plot(*zip(*points, strict=True), style, color=color, marker="o", markersize=3, label=label)
    axes[0].set(xlabel="requests at a time", ylabel="tokens/s", xscale="log", yscale="log")
    axes[1].set(xlabel="requests at a time", ylabel="time over the floor", xscale="log")
    axes[1].set_ylim(bottom=0)
    axes[0].legend(fontsize=6)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


TABLES = {
    "Speed": speed,
    "What a step calls": calls,
    "Memory": memory,
    "Tokens with and without graphs and run-ahead": graphs,
    "With `torch.compile`": compiled,
    "The output weight of LLaDA-8B": lm_head,
    "All stages": stages,
}


def section(lines: list[Line], assets: Path) -> str:
    """The text of all cards; draws their pictures."""
    texts = ["\n" + ABOUT]
    for card in dict.fromkeys(line["gpu"] for line in lines):
        ours = [line for line in lines if line["gpu"] == card]
        texts.append(f"### {card}\n")
        for line in of(ours, "environment", "machine"):
            versions = ", ".join(f"{name} {version}" for name, version in line["versions"].items())
            texts.append(textwrap.fill(f"Commit {line['commit'][:12]}; {versions}.", 119) + "\n")
        for line in of(ours, "environment", "rates"):
            if "copy_GB_per_s" in line:
                texts.append(f"Copy {line['copy_GB_per_s']} GB/s, product {line['matmul_TFLOP_per_s']} TFLOP/s.\n")
        picture = assets / f"gpu-{re.sub('[^a-z0-9]+', '-', card.lower()).strip('-')}.png"
        if draw(ours, picture):
            texts.append(f"![Tokens per second and time over the floor](assets/{picture.name})\n")
        texts += [f"{title}:\n\n{text}" for title, make in TABLES.items() if (text := make(ours))]
    return "\n".join(texts) + "\n"


def main() -> int:
    """Write the section and the pictures; returns 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="?", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.jsonl")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder with benchmarks.md")
    options = parser.parse_args()
    lines = read(options.results)
    if not lines:
        print(f"no results of a GPU in {options.results}: nothing is written")
        return 0
    page = options.docs / "benchmarks.md"
    text = section(lines, options.docs / "assets")
    page.write_text(SECTION.sub(lambda found: found[1] + text + found[2], page.read_text()))
    print(f"{len(lines)} parts -> {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
