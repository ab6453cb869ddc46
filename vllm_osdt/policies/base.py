"""What a decoding policy is: a rule and its parameter for every (block, denoising step) of a request.

All policies here decide by the confidences of the current step alone, so a request's whole schedule is a small table
that is made once, at admission; each step then is one lookup for the whole batch and one call of
:func:`csrc_triton.unmask`.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from csrc_triton.types import Rule
from vllm_osdt.calibration.calibrate import Thresholds
from vllm_osdt.config import DecodingOptions


@dataclass(frozen=True)
class Schedule:
    """The decisions of one request ahead of time.

    Attributes:
        rule: How ``parameters`` are read.
        parameters: float32 ``[num_blocks, block_length]``: confidence threshold (equality passes), number of
            positions, factor, or limit on the sum of doubts, by block and denoising step in the block; a block never
            needs more steps than positions, since every step unmasks at least one.
        quota: int32 ``[block_length]``, by step in the block: so many positions are unmasked whatever the rule says;
            None for the one that every rule promises.
        fallback: int8, shape of ``parameters``, where a calibrated threshold comes from
            (``calibration.calibrate.Fallback``); None where nothing was calibrated.
    """

    rule: Rule
    parameters: np.ndarray
    quota: np.ndarray | None = None
    fallback: np.ndarray | None = None


class DecodingPolicy(Protocol):
    """Turns a request's options into its schedule."""

    def __call__(self, options: DecodingOptions, thresholds: Thresholds | None) -> Schedule:
        """Make the schedule.

        Args:
            options: Resolved options (``gen_length`` is set).
            thresholds: Calibrated T, when a profile applies; else None.
        """
        ...


def constant(options: DecodingOptions, rule: Rule, parameter: float) -> Schedule:
    """The same parameter at every block and step."""
    return Schedule(rule, np.full((options.num_blocks, options.block_length), parameter, dtype=np.float32))
