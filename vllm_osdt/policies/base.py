"""What a decoding policy is: its options, and a rule with a parameter for every (block, denoising step) of a request.

A request's schedule is a small table that is made once, when the request is first planned. Each step then is one lookup
for the whole batch and one call of :func:`csrc_triton.unmask`. A policy whose parameters depend on what the steps see
also has :meth:`Policy.adjust`, which runs on the batch's requests of that policy before each decision, and
:meth:`Policy.observe`, which runs after it.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from csrc_triton.types import Rule
from vllm_osdt.calibration.thresholds import Thresholds
from vllm_osdt.geometry import Canvas, CanvasRequest, DecodeShape

if TYPE_CHECKING:
    import torch

MAX_CONSTANTS = 8  # numbers that a policy may keep for each request
MAX_STATE = 4  # numbers that a policy may keep for each request's active block


@dataclass(frozen=True)
class Schedule:
    """The decisions of one request ahead of time.

    Attributes:
        rule: How ``parameters`` are read.
        parameters: float32 ``[num_blocks, block_length]``: confidence threshold (equality passes), number of positions,
            factor, or limit on the sum of uncertainties, by block and denoising step in the block. A block never needs
            more steps than positions, since every step unmasks at least one.
        min_unmask: int32 ``[block_length]``, by step in the block: so many positions are unmasked whatever the rule
            says; None for the one that every rule promises.
        fallback: int8, shape of ``parameters``, where a calibrated threshold comes from
            (``calibration.thresholds.Fallback``); None where nothing was calibrated.
        constants: At most 8 numbers that ``Policy.adjust`` reads.
    """

    rule: Rule
    parameters: np.ndarray
    min_unmask: np.ndarray | None = None
    fallback: np.ndarray | None = None
    constants: Sequence[float] = ()


class Step(NamedTuple):
    """One denoising step of the batch's requests of one policy; R requests, W the longest block.

    Attributes:
        score: float32 ``[R, W]``, confidence of each masked position that has logits, -2 elsewhere. May be overwritten:
            the rule reads it.
        parameter: float32 ``[R]``, of the rule. May be overwritten.
        constants: float32 ``[R, 8]``, from the request's schedule.
        state: float32 ``[R, 4]``, zero when a block is entered. May be overwritten, and is kept until the next block.
        step_index: int64 ``[R]``, denoising steps that the block has seen before this one.
    """

    score: "torch.Tensor"
    parameter: "torch.Tensor"
    constants: "torch.Tensor"
    state: "torch.Tensor"
    step_index: "torch.Tensor"


class Policy(ABC):
    """Turns a request's options into its schedule. One instance serves all requests, so it holds no state of theirs.

    Attributes:
        name: What a user calls it.
        Options: A frozen dataclass of the options that it reads (``vllm_osdt.declaration.option``).
        calibrates: Whether requests of a task share a calibration profile, whose thresholds ``schedule`` is given.
        ranks_by_entropy: Whether confidence is 1 - H / 32, with H the entropy of the position in nats, in place of the
            probability of the proposal. Token editing, which compares probabilities, is then refused.
        adjusts: Whether :meth:`adjust` and :meth:`observe` run.
    """

    name: ClassVar[str]
    Options: ClassVar[type]
    calibrates: ClassVar[bool] = False
    ranks_by_entropy: ClassVar[bool] = False
    adjusts: ClassVar[bool] = False

    def check(self, options: Any) -> None:
        """Refuse options that contradict each other.

        Raises:
            InvalidOptionError: They do.
        """

    def resolve(self, options: Any, asked: CanvasRequest, canvas: Canvas) -> dict[str, Any]:
        """Options of its own that follow from the canvas, by name.

        Raises:
            InvalidOptionError: An option does not fit the canvas.
        """
        return {}

    @abstractmethod
    def schedule(self, options: Any, shape: DecodeShape, thresholds: Thresholds | None = None) -> Schedule:
        """The schedule of a request.

        Args:
            options: Resolved options, of which it reads its own.
            shape: The request's blocks and how its model decides.
            thresholds: Calibrated T, where a profile applies; else None.
        """

    def adjust(self, step: Step) -> None:
        """Change scores and parameters of a step before the rule decides."""

    def observe(self, step: Step, unmasked: "torch.Tensor") -> None:
        """Keep in ``step.state`` what the next step needs.

        Args:
            step: As :meth:`adjust` left it.
            unmasked: bool ``[R, W]``, positions that the step decided.
        """


def constant(shape: DecodeShape, rule: Rule, parameter: float, constants: Sequence[float] = ()) -> Schedule:
    """The same parameter at every block and step."""
    table = np.full((shape.num_blocks, shape.block_length), parameter, dtype=np.float32)
    return Schedule(rule, table, constants=constants)
