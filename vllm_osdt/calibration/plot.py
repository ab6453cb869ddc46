"""Pictures of calibration profiles; needs matplotlib."""

import textwrap
from pathlib import Path
from typing import Any

from vllm_osdt.calibration.profile import setting_in_words

_GRANULARITY = {"block": "by block", "step_block": "by block and step (the first step's)"}
_METRIC = {
    "mean": "mean", "q1": "lower quartile", "q2": "median", "q3": "upper quartile", "min_whisker": "lower whisker",
}  # fmt: skip


def in_words(setting: str) -> str:
    """A setting of thresholds, such as ``block/q1/masked``, as a legend says it."""
    mode, metric, record, *risk = setting.split("/")
    if metric == "conformal":
        return f"calibrated {_GRANULARITY[mode]}: conformal, risk {risk[0]}"
    return f"calibrated {_GRANULARITY[mode]}: {_METRIC[metric]} of {record} confidences"


def draw_signatures(profiles: list[dict[str, Any]], path: Path) -> None:
    """One heat map per task, mean confidence by block and step, and the thresholds made from it.

    A block without a calibrated threshold is marked.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    width = 5.4 * len(profiles)
    figure, axes = plt.subplots(2, len(profiles), figsize=(width, 7), squeeze=False, height_ratios=(3, 2))
    for column, profile in enumerate(profiles):
        signature = np.array(profile["mean_confidence"], dtype=float)
        used = ~np.isnan(signature)
        signature = signature[used.any(axis=1)][:, used.any(axis=0)]
        top, bottom = axes[:, column]
        image = top.imshow(signature, vmin=0, vmax=1, aspect="auto", cmap="viridis")
        name = profile["task"] + (f" of {profile['model']}" if profile.get("model") else "")
        title = "\n".join(textwrap.wrap(name, 44)) or name
        top.set(title=title, xlabel="denoising step", ylabel="block", yticks=range(len(signature)))
        top.xaxis.get_major_locator().set_params(integer=True)
        figure.colorbar(image, ax=top, label="mean confidence")
        for setting, table in profile["thresholds"].items():
            first = [np.nan if row[0] is None else row[0] for row in table]
            [line] = bottom.step(range(len(table)), first, where="mid", marker="o", label=in_words(setting))
            for block in np.flatnonzero(np.isnan(first)).tolist():
                place, color = (block, profile["threshold"]), line.get_color()
                bottom.annotate("static", place, ha="center", va="bottom", fontsize=7, color=color)
        bottom.axhline(profile["threshold"], color="gray", linestyle=":", label="static threshold")
        limits = (-0.5, len(signature) - 0.5)
        bottom.set(xlabel="block", ylabel="threshold", ylim=(0, 1.12), xlim=limits, xticks=range(len(signature)))
        bottom.legend(fontsize=7, loc="lower left")
    about = "Mean confidence of the calibrating requests, and the thresholds made from it"
    figure.suptitle("\n".join(textwrap.wrap(about, int(11 * width))))
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_candidates(report: dict[str, Any], path: Path) -> None:
    """What ``vllm-osdt tune`` tried: forward passes, and the share of requests that lost, with its upper bound.

    Args:
        report: As the command makes it.
        path: Of the picture.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tested = [row for row in report["candidates"] if row["nfe"] is not None]
    figure, axes = plt.subplots(figsize=(8, 5.5))
    colors = {policy: f"C{place % 10}" for place, policy in enumerate(dict.fromkeys(row["policy"] for row in tested))}
    for policy, color in colors.items():
        rows = [row for row in tested if row["policy"] == policy]
        x = [row["nfe"] for row in rows]
        y = [row["lost"] / row["prompts"] for row in rows]
        axes.plot(x, y, color=color, linewidth=0.8, label=policy.replace("_", " "))
        for place, row in enumerate(rows):
            is_accepted = row["status"] in ("reference", "accepted")
            axes.plot(x[place], y[place], "o", color=color, markerfacecolor=color if is_accepted else "white")
            if row["upper_bound"]:
                axes.plot([x[place]] * 2, [y[place], row["upper_bound"]], color=color, alpha=0.4)
    axes.axhline(report["risk"], color="gray", linestyle=":", label="risk")
    chosen = report["choice"]
    setting = setting_in_words({"policy": chosen["policy"], **chosen["options"]})
    title = f"{report['task']}: {setting} chosen, confidence {report['confidence']:g}"
    axes.set(xlabel="forward passes a request", ylabel="share of requests that lose", ylim=(-0.005, None))
    axes.set_title("\n".join(textwrap.wrap(title, 80)), fontsize=10)
    axes.legend(fontsize=8, loc="upper right", title="filled: accepted; line: upper bound", title_fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
