"""A policy of a package of its own: careful in a block's first steps, with the static threshold from then on.

Installed (``pip install ./examples/custom_policy``), it is one more value of the option ``policy``, and its options are
options like all others: checked, explained by ``vllm-osdt options`` and refused with other policies.
"""

from dataclasses import dataclass

import numpy as np

from csrc_triton.types import Rule
from vllm_osdt.declaration import count, number, option
from vllm_osdt.geometry import DecodeShape
from vllm_osdt.policies import Policy, Schedule


@dataclass(frozen=True)
class WarmStartOptions:
    """What the policy's users may set."""

    careful_steps: int = option(1, count(0, 128), "Of `warm_start`: steps of a block that unmask one position each.")
    later_threshold: float = option(0.8, number(gt=0, le=1), "Of `warm_start`: threshold of the block's other steps.")


class WarmStart(Policy):
    """A threshold that nothing passes for the first steps of a block: each then unmasks its most confident position."""

    name = "warm_start"
    Options = WarmStartOptions

    def schedule(self, options: WarmStartOptions, shape: DecodeShape, thresholds: object = None) -> Schedule:
        """The table of thresholds by block and denoising step."""
        table = np.full((shape.num_blocks, shape.block_length), options.later_threshold, dtype=np.float32)
        table[:, : options.careful_steps] = 2.0
        return Schedule(Rule.THRESHOLD, table)
