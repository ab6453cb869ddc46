"""One-Shot Dynamic Thresholding: the cutoff of a (block, step) comes from the task's calibration profile.

Source: OSDT (arXiv 2511.02077), section 3: tau = min(T, kappa) (1 - epsilon), positions with confidence > tau are
unmasked, at least the best one. Ours: a floor under tau, off by default.
"""

import numpy as np

from vllm_osdt.config import DecodingOptions
from vllm_osdt.policies.base import Rule, Schedule
from vllm_osdt.policies.static_threshold import static_threshold


def osdt(options: DecodingOptions, thresholds: np.ndarray | None = None) -> Schedule:
    """Schedule of max(min(T, cap) * (1 - slack), floor); without a profile, of the static threshold.

    Blocks beyond the table take its last block, steps beyond it the last step (``algorithms`` of calibration see to
    the rest). The strict comparison of the paper becomes ``>=`` the next larger float32.
    """
    if thresholds is None:
        return static_threshold(options)
    assert options.gen_length is not None
    num_blocks, block_length = options.gen_length // options.block_length, options.block_length
    blocks = np.minimum(np.arange(num_blocks), thresholds.shape[0] - 1)
    steps = np.minimum(np.arange(block_length), thresholds.shape[1] - 1)
    table = np.minimum(thresholds[np.ix_(blocks, steps)].astype(np.float64), options.cap) * (1.0 - options.slack)
    table = np.maximum(table, options.floor)
    return Schedule(Rule.THRESHOLD, np.nextafter(table.astype(np.float32), np.float32(np.inf)))
