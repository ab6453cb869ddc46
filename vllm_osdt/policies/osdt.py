"""One-Shot Dynamic Thresholding: the cutoff of a (block, step) comes from the task's calibration profile.

Source: OSDT (arXiv 2511.02077), section 3: tau = min(T, kappa) (1 - epsilon), positions with confidence > tau are
unmasked, at least the best one. Ours: a floor under tau, off by default, and the margin of a conformal T.
"""

import numpy as np

from vllm_osdt.calibration.calibrate import Fallback, Thresholds
from vllm_osdt.config import DecodingOptions
from vllm_osdt.policies.base import Rule, Schedule
from vllm_osdt.policies.static_threshold import static_threshold


def osdt(options: DecodingOptions, thresholds: Thresholds | None = None) -> Schedule:
    """Schedule of max(min(T, cap) * (1 - slack), floor); without a profile, of the static threshold.

    A conformal T is raised by the margin first.
    Blocks beyond the table take its last block; where the table knows nothing (NaN) the static threshold holds. The
    strict comparison of the paper becomes ``>=`` the next larger float32.
    """
    if thresholds is None:
        return static_threshold(options)
    num_blocks, block_length = options.num_blocks, options.block_length
    known_blocks, known_steps = thresholds.values.shape
    blocks = np.minimum(np.arange(num_blocks), known_blocks - 1)
    steps = np.minimum(np.arange(block_length), known_steps - 1)
    cells = np.ix_(blocks, steps)
    values, fallback = thresholds.values[cells].astype(np.float64), thresholds.fallback[cells]
    if options.mode == "step_block":
        fallback[:, known_steps:] = Fallback.STEP
    fallback[known_blocks:] = Fallback.BLOCK
    if options.metric == "conformal":
        values = 1.0 - (1.0 - values) * (1.0 - options.margin)
    table = np.maximum(np.minimum(values, options.cap) * (1.0 - options.slack), options.floor)
    # "confidence > x" is "confidence >= the next float32"; the static threshold is passed by equality.
    parameters = np.nextafter(table.astype(np.float32), np.float32(np.inf))
    parameters = np.where(np.isnan(values), np.float32(options.threshold), parameters)
    return Schedule(Rule.THRESHOLD, parameters.astype(np.float32), fallback=fallback)
