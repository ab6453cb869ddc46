"""How soon does a task profit from its calibration? A part of ``bench_osdt.py``.

Sends a task's requests one after another, in several orders at once, each order a task name of its own: what a new
server sees. Prints, by the number of requests recorded so far, the forwards of the requests that used early thresholds
against static 0.9 on the same problems, as a share of the saving once the calibration is finished; and the answers lost
and won against static 0.9 over all requests before that, calibrating ones included.

- Forward passes are counted by the engine; the comparison is paired, problem by problem.
- Every other request records, so n recordings are there after about 2 n requests.
- The final saving is that of the last ``after`` requests of every order.
"""

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from decoding import Bench, mcnemar
from problems import Problem

MARKS = (1, 2, 4, 8, 16, 32, 48)


def run_orders(bench: Bench, task: str, orders: list[list[Problem]]) -> list[dict[str, Any]]:
    """Every request of every order, one at a time: order, number, forwards, right, recorded, requests recorded before.

    All orders advance together.
    """
    import vllm_osdt

    rows: list[dict[str, Any]] = []
    recorded = [0] * len(orders)
    for number in range(len(orders[0])):
        problems = [order[number] for order in orders]
        outputs = bench.generate(
            problems, [{"policy": "osdt", "task": f"{task} {index}"} for index in range(len(orders))]
        )
        for index, (problem, completion) in enumerate(zip(problems, outputs, strict=True)):
            about = vllm_osdt.describe(completion)
            assert about is not None
            row = {"order": index, "number": number, "recorded_before": recorded[index], "nfe": about["nfe"]}
            rows.append(row | {"right": problem.is_right(completion.text), "records": about["calibrating"]})
            recorded[index] += about["calibrating"]
    return rows


def measure(bench: Bench, task: str, orders: list[list[Problem]], num_calibrating: int, after: int) -> dict[str, Any]:
    """One task; prints its table."""
    rows = run_orders(bench, task, orders)
    flat = [order[number] for number in range(len(orders[0])) for order in orders]
    right, nfe, _, _ = bench.decode(flat, policy="static_threshold", threshold=0.9)
    for row, is_right, forwards in zip(rows, right, nfe, strict=True):
        row |= {"static_nfe": forwards, "static_right": is_right}
    last = len(orders[0]) - after
    final = saving([row for row in rows if row["number"] >= last])
    on_the_way = [row for row in rows if row["number"] < last]
    lost = sum(row["static_right"] and not row["right"] for row in on_the_way)
    won = sum(row["right"] and not row["static_right"] for row in on_the_way)
    p = mcnemar([row["static_right"] for row in on_the_way], [row["right"] for row in on_the_way])
    by_count = defaultdict(list)
    for row in on_the_way:
        if not row["records"] and 0 < row["recorded_before"] < num_calibrating:
            by_count[row["recorded_before"]].append(row)
    curve = {count: saving(found) for count, found in sorted(by_count.items())}
    shares = "  ".join(f"{count}: {curve[count] / final:.0%}" for count in MARKS if count in curve and final > 0)
    print(
        f"{task}: static 0.9 {np.mean([row['static_nfe'] for row in rows]):.2f} forwards, finally {final:.0%} fewer; "
        f"share of that by requests recorded: {shares}; on the way {lost} lost, {won} won of {len(on_the_way)} "
        f"(p {p:.3f}), finally {accuracy(rows, last, 'static_right'):.1%} -> {accuracy(rows, last, 'right'):.1%}",
        flush=True,
    )
    return {"task": task, "final_saving": final, "curve": curve, "lost": lost, "won": won, "p": p, "n": len(on_the_way)}


def saving(rows: list[dict[str, Any]]) -> float:
    """The share of static 0.9's forwards that these requests saved."""
    return 1 - sum(row["nfe"] for row in rows) / sum(row["static_nfe"] for row in rows)


def accuracy(rows: list[dict[str, Any]], first: int, field: str) -> float:
    """Share of right answers from a request number on."""
    return float(np.mean([row[field] for row in rows if row["number"] >= first]))


def draw(path: Path, results: list[dict[str, Any]]) -> None:
    """Saving over the number of requests recorded."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.2))
    for result in results:
        counts = sorted(result["curve"])
        line = axis.plot(counts, [result["curve"][count] for count in counts], label=result["task"])[0]
        axis.axhline(result["final_saving"], color=line.get_color(), linestyle=":", linewidth=1)
    axis.set(xlabel="requests recorded", ylabel="forwards saved against static 0.9")
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axis.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close("all")
