"""Pictures of calibration profiles; needs matplotlib."""

import textwrap
from pathlib import Path
from typing import Any

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
