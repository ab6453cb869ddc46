"""CAD, confidence-adaptive decoding: as many of the best positions as are confident, but at most so many.

Source: CD4LM (yihao-liang/CDLM), confidence-adaptive decoding. With n the number of masked positions with confidence >=
threshold, a step unmasks the clip(n, 1, ``max_unmask``) most confident ones. In the entropy form n counts the positions
with entropy <= ``adaptive_entropy``, and the least entropies go first. Two guards: before a share ``end_after`` of the
canvas is decided, a proposal that ends the output neither counts nor is unmasked; the ``max_block_steps``-th step of a
block unmasks all that is left.

The authors: threshold 0.95 (README) or 0.8 (code), 4 positions, entropy 0.3, half of the canvas, no limit on steps.

Deviations:
- Tokens that end the output are the request's own (EOS and its stop tokens; none with ``ignore_eos`` or in a template);
  the authors' are a list of ids. One that ends thinking (``tccf``) may be unmasked at any time: output follows it.
- Where all proposals end the output, the best of them is unmasked; the authors take any.
- Their last step of a block leaves mask tokens where it proposes an end too early; here it unmasks those too, and it is
  the ``max_block_steps``-th, not the one behind it.
- Half of the canvas is half of what is there, where it grows (``Step.num_positions``).
- With ``calibrated`` the threshold of confidences is that of OSDT.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from csrc_triton.types import ENTROPY_SCALE, Rule
from vllm_osdt.calibration.thresholds import Thresholds
from vllm_osdt.declaration import count, number, option
from vllm_osdt.errors import InvalidOptionError
from vllm_osdt.geometry import MAX_BLOCK_LENGTH, DecodeShape
from vllm_osdt.policies.base import Schedule, Step, best, constant
from vllm_osdt.policies.osdt import CalibratedOptions, CalibratedPolicy, calibrated_schedule
from vllm_osdt.policies.static_threshold import ThresholdOptions


@dataclass(frozen=True)
class ConfidenceAdaptiveOptions(ThresholdOptions, CalibratedOptions):
    """What counts as confident, how many positions may be taken, and two guards."""

    max_unmask: int = option(
        4, count(1, MAX_BLOCK_LENGTH), "Of `confidence_adaptive`: most positions that a step unmasks.", unit="positions"
    )
    adaptive_entropy: float | None = option(
        None,
        number(gt=0, lt=ENTROPY_SCALE) | None,
        "Of `confidence_adaptive`: positions with at most this entropy count, and the least entropies go first; the "
        "authors' is 0.3. `null`: `threshold` and confidences.",
        unit="nats",
        excludes="threshold",
    )
    max_block_steps: int | None = option(
        None,
        count(1, MAX_BLOCK_LENGTH) | None,
        "Of `confidence_adaptive`: the block's step of this number unmasks all that is left; `null` for no such step.",
        unit="denoising steps",
    )
    end_after: float = option(
        0.5,
        number(ge=0, le=1),
        "Of `confidence_adaptive`: share of the canvas that is decided before a token that ends the output may be "
        "unmasked; 0 for any time.",
    )


class ConfidenceAdaptive(CalibratedPolicy):
    """``max_unmask`` positions at most, as many as reach the threshold."""

    name = "confidence_adaptive"
    Options = ConfidenceAdaptiveOptions
    with_profile = "`threshold`; the `max_block_steps`-th step unmasks what is below it. Not with `adaptive_entropy`"
    adjusts = True

    def check(self, options: Any) -> None:
        """Entropies have no calibrated threshold."""
        if options.policy == self.name and options.calibrated and options.adaptive_entropy is not None:
            raise InvalidOptionError(
                f"calibrated is true and adaptive_entropy {options.adaptive_entropy:g}, but a profile's thresholds are "
                "confidences, not entropies: send adaptive_entropy = null, or leave calibrated out.",
                refusal="calibrated-entropy",
                parameter="calibrated",
                value=True,
            )

    def looks_at_entropy(self, options: ConfidenceAdaptiveOptions) -> bool:
        """In the entropy form."""
        return options.adaptive_entropy is not None

    def schedule(
        self, options: ConfidenceAdaptiveOptions, shape: DecodeShape, thresholds: Thresholds | None = None
    ) -> Schedule:
        """See the class; ``adjust`` chooses."""
        schedule, min_unmask = calibrated_schedule(options, shape, thresholds if options.calibrated else None), None
        if options.adaptive_entropy is not None:
            schedule = constant(shape, Rule.THRESHOLD, 1.0 - options.adaptive_entropy / ENTROPY_SCALE)
        if options.max_block_steps is not None:
            step = np.arange(1, shape.block_length + 1)
            min_unmask = np.where(step < options.max_block_steps, 0, shape.block_length).astype(np.int32)
        return replace(schedule, min_unmask=min_unmask, constants=(options.max_unmask, options.end_after))

    def adjust(self, step: Step) -> None:
        """Choose as many of the best positions as are confident, early ends behind all others."""
        most, end_after = step.constants[:, :2].unbind(dim=1)
        decided = (step.num_positions - step.num_left) / step.num_positions.clamp(min=1)
        is_end = (step.token.unsqueeze(-1) == step.end_token_ids.unsqueeze(1)).any(dim=-1)  # [R, W]
        is_early = is_end & (decided < end_after).unsqueeze(-1) & step.is_open
        is_confident = (step.score >= step.parameter.unsqueeze(-1)) & step.is_open & ~is_early
        number = is_confident.sum(dim=1).to(most.dtype).minimum(most).clamp(min=1)
        score = step.score
        step.choose(best(score.where(~is_early, score / 2 - 1), number))  # below 0, in the same order
