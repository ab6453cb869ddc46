"""LLaDA's low-confidence schedule: a fixed number of denoising steps per block, the most confident positions first.

Source: LLaDA (arXiv 2502.09992), appendix B.4; ``get_num_transfer_tokens`` of the authors' code.
"""

import numpy as np

from vllm_osdt.calibration.calibrate import Thresholds
from vllm_osdt.config import DecodingOptions
from vllm_osdt.policies.base import Rule, Schedule


def fixed_steps(options: DecodingOptions, thresholds: Thresholds | None = None) -> Schedule:
    """Schedule of block_length // s positions a step, one more in the first block_length mod s of the s steps."""
    assert options.gen_length is not None and options.steps is not None
    num_blocks = options.gen_length // options.block_length
    steps_per_block = options.steps // num_blocks
    quota, remainder = divmod(options.block_length, steps_per_block)
    row = np.zeros(options.block_length, dtype=np.float32)
    row[:steps_per_block] = quota
    row[:remainder] += 1
    return Schedule(Rule.TOP_K, np.tile(row, (num_blocks, 1)))
