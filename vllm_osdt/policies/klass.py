"""KLASS: positions that are sure, and whose distribution has stopped moving.

Source: KLASS (arXiv 2511.05664), section 3 and the authors' code (shkim0116/KLASS): masked positions with confidence >
the threshold and KL(p_t || p_{t-1}) < the bound in each of the last ``kl_steps`` steps; where there are none, the most
confident ones, as many as ``fixed_steps`` would take. The authors' thresholds for LLaDA are 0.9 and 0.01 (code, and
HumanEval), 0.6 and 0.015 (GSM8K), 0.6 and 0.01 (MATH), 0.7 and 0.01 (MBPP); for Dream 0.8 or 0.9 and 0.001 to 0.005.
Ours: with ``calibrated`` the threshold of confidences is that of OSDT.

Deviations: divergences are counted from the block's first step, whereas the authors' code has those of earlier blocks'
steps too, so that later blocks may begin one step sooner. The step before is as the model wrote it, without the tokens
that sampling parameters rule out; biases and penalties are in p_t alone, and such positions pass later or not at all.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from csrc_triton.types import Rule
from vllm_osdt.calibration.thresholds import Thresholds
from vllm_osdt.declaration import count, number, option
from vllm_osdt.geometry import MAX_BLOCK_LENGTH, Canvas, CanvasRequest, DecodeShape
from vllm_osdt.policies.base import PositionLogits, Schedule, Step, best, constant
from vllm_osdt.policies.fixed_steps import StepsOptions, quota_numbers, quota_of, resolve_if_asked
from vllm_osdt.policies.osdt import CalibratedOptions, CalibratedPolicy, calibrated_schedule

DIVERGENCE, NUM_STEPS, QUOTA = range(3)  # constants; from the last on, the quota's


@dataclass(frozen=True)
class KLASSOptions(StepsOptions, CalibratedOptions):
    """Two thresholds and for how long they must hold."""

    kl_confidence: float = option(
        0.9,
        number(ge=0, lt=1),
        "Of `klass`: confidence above which a stable position passes.",
        excludes="calibrated",
    )
    kl_threshold: float = option(
        0.01,
        number(gt=0),
        "Of `klass`: a position is stable while its distribution's divergence KL(pₜ ‖ pₜ₋₁) is below this.",
        unit="nats",
    )
    kl_steps: int = option(
        2,
        count(1, MAX_BLOCK_LENGTH),
        "Of `klass`: for how many steps in a row a position must be stable.",
        unit="denoising steps",
    )


class KLASS(CalibratedPolicy):
    """Confidence above a threshold, and small divergences in a row; else the most confident positions."""

    name = "klass"
    Options = KLASSOptions
    with_profile = "`kl_confidence`; where nothing is stable, `steps` may unmask positions below it"
    adjusts = True
    reads_logits = True
    reads_step_before = True
    memory_size = 2  # steps of the block with logits, and the last of them with a small divergence

    def resolve(self, options: KLASSOptions, asked: CanvasRequest, canvas: Canvas) -> dict[str, Any]:
        """Total steps of the canvas, where the request asks for steps."""
        return resolve_if_asked(options, asked, canvas)

    def schedule(self, options: KLASSOptions, shape: DecodeShape, thresholds: Thresholds | None = None) -> Schedule:
        """See the class; ``adjust`` chooses."""
        above = np.nextafter(np.float32(options.kl_confidence), np.float32(np.inf))  # equality passes
        schedule = (
            calibrated_schedule(options, shape, thresholds)
            if options.calibrated
            else constant(shape, Rule.THRESHOLD, float(above))
        )
        constants = (options.kl_threshold, options.kl_steps, *quota_numbers(options, shape))
        return replace(schedule, constants=constants)

    def read(self, rows: PositionLogits) -> None:
        """Count the steps in a row with a small divergence."""
        from csrc_triton.reading import count_steady  # late: options are read without torch

        assert rows.before is not None
        count_steady(rows.logits, rows.before, rows.constants[:, DIVERGENCE], rows.memory, rows.reading)

    def adjust(self, step: Step) -> None:
        """Choose what is sure and stable, else the quota."""
        if step.score.device.type == "cpu":
            from vllm_osdt.policies.loops import klass  # late: options are read without torch

            klass(step)
        else:
            self.adjust_by_tensors(step)

    def adjust_by_tensors(self, step: Step) -> None:
        """See :meth:`adjust`."""
        import torch  # late: options are read without it

        passes = step.is_open & (step.confidence >= step.parameter.unsqueeze(1))
        passes &= step.reading[..., 0] >= step.constants[:, NUM_STEPS, None]
        first = best(step.confidence, quota_of(step, QUOTA))
        step.choose(torch.where(passes.any(dim=1, keepdim=True), passes, first))
