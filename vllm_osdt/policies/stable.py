"""A stability filter: positions whose proposal has not changed for some steps.

Source: what Learn2PD (arXiv 2509.25188) trains its filter to tell, whether a proposal is the final token, judged by
whether it has stayed the same; ours, without a paper. Where no proposal is stable, the most confident position is
unmasked alone.

With ``calibrated`` its confidence is the threshold of OSDT.

Defaults are those with which llada-mini (float32, 40 held-out problems of each task) loses no answer: 100 % right in
15.1 forwards. Static 0.9 has 100 % in 12.5, so that stability alone is no gain there; one step and 0.7 have 95 % in
11.5, two steps without a threshold 84 % in 7.7.
"""

from dataclasses import dataclass, replace

from csrc_triton.types import Rule
from vllm_osdt.calibration.thresholds import Thresholds
from vllm_osdt.declaration import count, number, option
from vllm_osdt.geometry import MAX_BLOCK_LENGTH, DecodeShape
from vllm_osdt.policies.base import Schedule, Step, constant
from vllm_osdt.policies.osdt import CalibratedOptions, CalibratedPolicy, calibrated_schedule

TOKEN, RUN = range(2)  # memory: the proposal, and in how many steps in a row it was


@dataclass(frozen=True)
class StableOptions(CalibratedOptions):
    """For how long a proposal must stay, and how sure it must be."""

    stable_steps: int = option(
        1,
        count(1, MAX_BLOCK_LENGTH),
        "Of `stable`: in how many steps before this one a proposal must have been the same.",
        unit="denoising steps",
    )
    stable_confidence: float = option(
        0.8,
        number(ge=0, le=1),
        "Of `stable`: confidence with which a stable position passes.",
        excludes="calibrated",
    )


class Stable(CalibratedPolicy):
    """The same proposal for some steps, and a low threshold."""

    name = "stable"
    Options = StableOptions
    with_profile = "`stable_confidence`"
    adjusts = True
    memory_size = 2

    def schedule(self, options: StableOptions, shape: DecodeShape, thresholds: Thresholds | None = None) -> Schedule:
        """See the class; ``adjust`` chooses."""
        schedule = (
            calibrated_schedule(options, shape, thresholds)
            if options.calibrated
            else constant(shape, Rule.THRESHOLD, options.stable_confidence)
        )
        return replace(schedule, constants=(options.stable_steps,))

    def adjust(self, step: Step) -> None:
        """Count for how many steps each proposal has been the same, and choose by it."""
        import torch  # late: options are read without it

        memory, token = step.memory, step.token.to(step.memory.dtype)
        stays = (memory[..., RUN] > 0) & (memory[..., TOKEN] == token)
        run = torch.where(stays, memory[..., RUN] + 1, 1.0)
        memory[..., RUN] = torch.where(step.is_open, run, 0.0)
        memory[..., TOKEN] = token
        is_sure = step.confidence >= step.parameter.unsqueeze(1)
        step.choose(is_sure & (run > step.constants[:, :1]))
