"""One-Shot Dynamic Thresholding: the cutoff of a (block, step) comes from the task's calibration profile.

Source: OSDT (arXiv 2511.02077), section 3: tau = min(T, kappa) (1 - epsilon), positions with confidence > tau are
unmasked, at least the best one. Ours: a floor under tau, off by default, and the margin of a conformal T.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from csrc_triton.types import Rule
from vllm_osdt.calibration.thresholds import CONFORMAL, DEFAULT_RISK, Fallback, Thresholds, num_requests_needed
from vllm_osdt.declaration import Flag, count, number, option
from vllm_osdt.errors import InvalidOptionError
from vllm_osdt.geometry import DecodeShape
from vllm_osdt.policies.base import Policy, Schedule
from vllm_osdt.policies.static_threshold import ThresholdOptions, static_schedule

Granularity = Literal["block", "step_block"]
Statistic = Literal["conformal", "mean", "q1", "q2", "q3", "min_whisker"]
Record = Literal["masked", "committed"]
_OF_A_TASK = {"needs_task": True, "with_any_policy": True}


@dataclass(frozen=True)
class OSDTOptions(ThresholdOptions):
    """How a task is calibrated and what is made of its profile."""

    granularity: str = option(
        "block",
        Granularity,
        "Thresholds per `block`, or per block and denoising step: `step_block`.",
        formerly="mode",
        **_OF_A_TASK,
    )
    statistic: str = option(
        "conformal",
        Statistic,
        "What turns recorded confidences into a threshold: `conformal`, or a statistic of the paper.",
        formerly="metric",
        **_OF_A_TASK,
    )
    risk: float = option(
        DEFAULT_RISK,
        number(gt=0, lt=1),
        "Of `conformal`: the share of requests that may see a wrong proposal pass in a block.",
        **_OF_A_TASK,
    )
    margin: float = option(
        0.1,
        number(ge=0, lt=1),
        "Of `conformal`: T becomes 1 − (1 − T)(1 − `margin`), for wrong proposals that are a little surer than any "
        "that was seen.",
        **_OF_A_TASK,
    )
    num_calibration_requests: int = option(
        64,
        count(1, 1024),
        "Requests that calibrate a task. `conformal` needs at least 1 / `risk` − 1.",
        unit="requests",
        formerly="calibrations",
        **_OF_A_TASK,
    )
    early: bool = option(
        True,
        Flag,
        "Of `conformal`: while a task calibrates, every other request is decoded with thresholds from what is recorded "
        "so far, which start near `threshold` and fall with every recording; the others calibrate.",
        **_OF_A_TASK,
    )
    threshold_cap: float = option(
        0.9,
        number(gt=0, le=1),
        "Upper bound κ of a calibrated threshold.",
        formerly="cap",
        **_OF_A_TASK,
    )
    slack: float = option(
        0.0,
        number(ge=0, lt=1),
        "Relative slack ε: the threshold used is min(T, `threshold_cap`)(1 − `slack`), but at least `floor`.",
        **_OF_A_TASK,
    )
    floor: float = option(
        0.0,
        number(ge=0, le=1),
        "Lower bound of the threshold used; guards against a calibrating request that was unsure.",
        **_OF_A_TASK,
    )
    record: str = option(
        "masked",
        Record,
        "Which confidences make thresholds: those of all `masked` positions, or only of the `committed` ones.",
        **_OF_A_TASK,
    )
    recalibrate: bool = option(
        False,
        Flag,
        "Calibrate again with this request; `num_calibration_requests` such requests replace the task's profile.",
        needs_task=True,
    )
    profile: str | None = option(
        None,
        Annotated[str, Field(pattern="^[0-9a-f]{16}$")] | None,
        "Id of the profile to use, whatever the task has now.",
        expected="a profile's id, 16 hexadecimal digits",
        **_OF_A_TASK,
    )


class OSDT(Policy):
    """max(min(T, threshold_cap) * (1 - slack), floor); without a profile, the static threshold.

    A conformal T is raised by the margin first. Blocks beyond the table take its last block; where the table knows
    nothing (NaN) the static threshold holds. The strict comparison of the paper becomes ``>=`` the next larger float32.
    """

    name = "osdt"
    Options = OSDTOptions
    with_profile = "its thresholds are the profile's, with no other option than `task`"

    def calibrates(self, options: OSDTOptions) -> bool:
        """Always."""
        return True

    def check(self, options: OSDTOptions) -> None:
        """The conformal statistic needs enough requests for its risk, and the wrong proposals."""
        if options.statistic != CONFORMAL:
            return
        if options.record != "masked":
            raise InvalidOptionError(
                f'record is {options.record!r}; statistic "conformal" looks at masked positions that were not '
                'committed: leave record at "masked", or choose another statistic.',
                refusal="conformal-record",
                parameter="record",
                value=options.record,
            )
        needed = num_requests_needed(options.risk)
        if options.num_calibration_requests < needed:
            raise InvalidOptionError(
                f'num_calibration_requests is {options.num_calibration_requests}; statistic "conformal" with risk '
                f"{options.risk:g} needs at least {needed}: raise num_calibration_requests or risk, or choose another "
                'statistic, such as "q1".',
                refusal="conformal-requests",
                parameter="num_calibration_requests",
                value=options.num_calibration_requests,
            )

    def schedule(self, options: OSDTOptions, shape: DecodeShape, thresholds: Thresholds | None = None) -> Schedule:
        """See the class."""
        return calibrated_schedule(options, shape, thresholds)


@dataclass(frozen=True)
class CalibratedOptions:
    """Of a policy whose threshold may be that of a profile."""

    calibrated: bool = option(
        False,
        Flag,
        "The policy's threshold comes from the task's profile, as with `osdt` and its options. Without a task, and "
        "where the request calibrates it, the static threshold alone decodes it; with `early`, other requests have "
        "thresholds from what is recorded so far.",
        needs_task=True,
    )


class CalibratedPolicy(Policy):
    """A policy with a threshold that is the profile's where a request says ``calibrated``.

    Its options inherit :class:`CalibratedOptions`.
    """

    def calibrates(self, options: Any) -> bool:
        """If the request says so."""
        return options.calibrated


def calibrated_schedule(options: Any, shape: DecodeShape, thresholds: Thresholds | None) -> Schedule:
    """The schedule of a profile's thresholds.

    Args:
        options: With those of :class:`OSDTOptions`.
        shape: The request's blocks.
        thresholds: The profile's; None for the static threshold.
    """
    static = static_schedule(options, shape)
    if thresholds is None:
        return static
    num_blocks, block_length = shape.num_blocks, shape.block_length
    known_blocks, known_steps = thresholds.values.shape
    blocks = np.minimum(np.arange(num_blocks), known_blocks - 1)
    steps = np.minimum(np.arange(block_length), known_steps - 1)
    cells = np.ix_(blocks, steps)
    values, fallback = thresholds.values[cells].astype(np.float64), thresholds.fallback[cells]
    if options.granularity == "step_block":
        fallback[:, known_steps:] = Fallback.STEP
    fallback[known_blocks:] = Fallback.BLOCK
    if options.statistic == CONFORMAL:
        values = 1.0 - (1.0 - values) * (1.0 - options.margin)
    table = np.maximum(np.minimum(values, options.threshold_cap) * (1.0 - options.slack), options.floor)
    # "confidence > x" is "confidence >= the next float32"; the static threshold is passed by equality.
    parameters = np.nextafter(table.astype(np.float32), np.float32(np.inf))
    parameters = np.where(np.isnan(values), static.parameters, parameters)
    return Schedule(Rule.THRESHOLD, parameters.astype(np.float32), fallback=fallback)
