"""Recorded confidences -> thresholds; pure functions of NumPy arrays.

Source: OSDT (arXiv 2511.02077), CALIBRATE. The paper's text does not settle what is recorded, the quantile method or
what holds beyond the recorded steps; ours: all masked positions by default, linear quantiles, and the fallbacks of
:func:`calibrate`.
"""

from collections.abc import Callable

import numpy as np


def min_whisker(samples: np.ndarray) -> float:
    """Lower whisker of the box plot: the smallest sample that is >= Q1 - 1.5 (Q3 - Q1)."""
    q1, q3 = np.quantile(samples, (0.25, 0.75))
    return float(samples[samples >= q1 - 1.5 * (q3 - q1)].min())


METRICS: dict[str, Callable[[np.ndarray], float]] = {
    "mean": lambda samples: float(samples.mean()),
    "q1": lambda samples: float(np.quantile(samples, 0.25)),
    "q2": lambda samples: float(np.quantile(samples, 0.5)),
    "q3": lambda samples: float(np.quantile(samples, 0.75)),
    "min_whisker": min_whisker,
}


def calibrate(confidence: np.ndarray, mode: str, metric: str) -> np.ndarray:
    """Thresholds T of a recorded sequence.

    Args:
        confidence: float ``[num_blocks, num_steps, block_length]``, NaN where nothing was recorded. A block's
            steps are recorded from the first on; a block without a record ends the sequence.
        mode: ``block`` (one T per block, over all its steps) or ``step_block``.
        metric: Name in :data:`METRICS`.

    Returns:
        float32 ``[recorded blocks, num_steps]``. In ``step_block`` mode, steps beyond the last recorded one of a
        block repeat it; a recorded step without a sample has the block's value.

    Raises:
        ValueError: The first block holds no sample.
    """
    statistic = METRICS[metric]
    num_steps = confidence.shape[1]
    rows = []
    for block in confidence.astype(np.float64):
        samples = block[~np.isnan(block)]
        if samples.size == 0:
            break
        row = np.full(num_steps, statistic(samples), dtype=np.float32)
        if mode == "step_block":
            by_step = [step[~np.isnan(step)] for step in block]
            last = max(index for index, step in enumerate(by_step) if step.size)
            for index, step in enumerate(by_step[: last + 1]):
                if step.size:
                    row[index] = statistic(step)
            row[last + 1 :] = row[last]
        rows.append(row)
    if not rows:
        raise ValueError("Nothing was recorded in the first block; a profile needs at least one denoising step.")
    return np.stack(rows)
