"""LLaDA's low-confidence schedule: a fixed number of denoising steps per block, the most confident positions first.

Source: LLaDA (arXiv 2502.09992), appendix B.4; ``get_num_transfer_tokens`` of the authors' code.
"""

import numpy as np

from vllm_osdt.calibration.calibrate import Thresholds
from vllm_osdt.config import DecodingOptions
from vllm_osdt.policies.base import Rule, Schedule


def fixed_steps(
    options: DecodingOptions, thresholds: Thresholds | None = None, *, first_alone: bool = False
) -> Schedule:
    """Schedule of block_length // s positions a step, one more in the first block_length mod s of the s steps.

    With ``first_alone`` a block's first step decides one position, and the other s - 1 share the rest likewise; a block
    of one step then takes two.
    """
    assert options.gen_length is not None and options.steps is not None
    num_blocks = options.gen_length // options.block_length
    steps_per_block = options.steps // num_blocks
    row = np.zeros(options.block_length, dtype=np.float32)
    num_alone = int(first_alone)
    shared = row[num_alone : max(steps_per_block, num_alone + 1)]
    quota, remainder = divmod(options.block_length - num_alone, max(shared.size, 1))
    row[:num_alone] = 1
    shared[:] = quota
    shared[:remainder] += 1
    return Schedule(Rule.TOP_K, np.tile(row, (num_blocks, 1)))
