"""Pictures of calibration profiles; needs matplotlib."""

from pathlib import Path
from typing import Any


def draw_signatures(profiles: list[dict[str, Any]], path: Path) -> None:
    """One heat map per task, mean confidence by block and step, and the thresholds made from it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    figure, axes = plt.subplots(2, len(profiles), figsize=(4.2 * len(profiles), 6), squeeze=False, height_ratios=(3, 2))
    for column, profile in enumerate(profiles):
        signature = np.array(profile["mean_confidence"], dtype=float)
        used = ~np.isnan(signature)
        signature = signature[used.any(axis=1)][:, used.any(axis=0)]
        top, bottom = axes[:, column]
        image = top.imshow(signature, vmin=0, vmax=1, aspect="auto", cmap="viridis")
        top.set(title=profile["task"], xlabel="denoising step", ylabel="block", yticks=range(len(signature)))
        figure.colorbar(image, ax=top, label="mean confidence")
        for setting, table in profile["thresholds"].items():
            first = [np.nan if row[0] is None else row[0] for row in table]
            bottom.step(range(len(table)), first, where="mid", marker="o", label=f"T, {setting}")
        bottom.axhline(profile["threshold"], color="gray", linestyle=":", label="static threshold")
        bottom.set(xlabel="block", ylabel="threshold", ylim=(0, 1.02), xticks=range(len(signature)))
        bottom.legend(fontsize=7)
    figure.suptitle("Confidence signature of the calibrating requests and the thresholds made from it")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
