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
    of one step then takes two. Sub-blocks have equal parts of the s steps and are shared out one by one.
    """
    shares = positions_per_step(options, first_alone=first_alone)
    return Schedule(Rule.TOP_K, np.tile(shares.astype(np.float32), (options.num_blocks, 1)))


def positions_per_step(options: DecodingOptions, *, first_alone: bool) -> np.ndarray:
    """The schedule of one block, int32 ``[block_length]`` by step, 0 behind the last."""
    assert options.steps is not None
    num_blocks = options.num_blocks
    sub_block = options.sub_block_length or options.block_length
    num_parts = options.block_length // sub_block
    steps_per_part = options.steps // num_blocks // num_parts
    first, other = _shares(sub_block, steps_per_part, int(first_alone)), _shares(sub_block, steps_per_part, 0)
    shares = [*first, *other * (num_parts - 1)]
    row = np.zeros(options.block_length, dtype=np.int32)
    row[: len(shares)] = shares[: row.size]
    return row


def _shares(num_positions: int, num_steps: int, num_alone: int) -> list[int]:
    """Positions of each step; with ``num_alone`` the first is of one position."""
    num_shared = num_positions - num_alone
    shared_steps = max(num_steps - num_alone, int(num_shared > 0))
    quota, remainder = divmod(num_shared, max(shared_steps, 1))
    return [1] * num_alone + [quota + (step < remainder) for step in range(shared_steps)]
