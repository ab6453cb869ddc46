"""Several blocks in flight: a block is entered when the one before it is half decided.

Source: d3LLM (arXiv 2601.07568), multi-block decoding. A position passes by its entropy. A block takes part when a
share of the block before it is decided. It is fully active when another, larger share is: then a step decides at least
its surest position, as of the first block. Here the blocks in flight are parts of ``part_length`` positions of one
block of ``block_length``, which is computed and finished together. The paper gives 0.5 as the first share; the second
is ours. For models whose positions see the whole canvas it is what the paper has, apart from its refreshes of keys and
values. In a block-causal model the parts see each other, as positions of a block do.
"""

from dataclasses import dataclass
from typing import Any

from csrc_triton.types import ENTROPY_SCALE, Rule
from vllm_osdt.calibration.thresholds import Thresholds
from vllm_osdt.declaration import count, number, option
from vllm_osdt.errors import InvalidOptionError
from vllm_osdt.geometry import MAX_BLOCK_LENGTH, Canvas, CanvasRequest, DecodeShape
from vllm_osdt.policies.base import Policy, Schedule, Step, constant, places
from vllm_osdt.policies.entropy_threshold import EntropyThresholdOptions


@dataclass(frozen=True)
class MultiBlockOptions(EntropyThresholdOptions):
    """The parts of a block."""

    part_length: int = option(
        32,
        count(1, MAX_BLOCK_LENGTH),
        "Of `multi_block`: positions of each part of a block; `block_length` where that is shorter.",
        unit="tokens",
    )
    enter_share: float = option(
        0.5,
        number(ge=0, le=1),
        "Of `multi_block`: decided share of a part with which the next one takes part.",
    )
    full_share: float = option(
        0.95,
        number(ge=0, le=1),
        "Of `multi_block`: decided share of a part with which the next one decides a position in every step.",
    )


class MultiBlock(Policy):
    """An entropy threshold in parts that are entered one after the other."""

    name = "multi_block"
    Options = MultiBlockOptions
    with_profile = "it looks at entropies, and calibrated thresholds are confidences"
    adjusts = True
    ranks_by_entropy = True

    def check(self, options: Any) -> None:
        """A part takes part before it is fully active."""
        if options.full_share < options.enter_share:
            raise InvalidOptionError(
                f"full_share is {options.full_share:g}, below enter_share {options.enter_share:g}; raise it.",
                refusal="multi-block-shares",
                parameter="full_share",
                value=options.full_share,
            )

    def resolve(self, options: Any, asked: CanvasRequest, canvas: Canvas) -> dict[str, Any]:
        """No part is longer than a block."""
        return {"part_length": min(options.part_length, canvas.block_length)}

    def schedule(self, options: Any, shape: DecodeShape, thresholds: Thresholds | None = None) -> Schedule:
        """See the class."""
        least = 1.0 - options.max_entropy / ENTROPY_SCALE
        return constant(shape, Rule.THRESHOLD, least, (options.part_length, options.enter_share, options.full_share))

    def adjust(self, step: Step) -> None:
        """Choose what passes in the parts that take part, and the surest position of those that are fully active."""
        import torch  # late: options are read without it

        place = places(step.score.shape[1], step.score.device)
        part = place // step.constants[:, :1].long()  # [R, W]
        is_in = part.unsqueeze(1) == place.view(1, -1, 1)  # [R, parts, W], of more parts than there are
        size = is_in.sum(dim=2)
        num_open = (is_in & step.is_open.unsqueeze(1)).sum(dim=2)  # [R, parts]
        decided = 1.0 - num_open / size.clamp(min=1)
        before = torch.nn.functional.pad(decided[:, :-1], (1, 0), value=1.0)
        # A part takes part only if all before it do.
        enters = (before >= step.constants[:, 1:2]).cummin(dim=1).values
        is_full = (before >= step.constants[:, 2:3]).cummin(dim=1).values
        score = step.confidence
        takes_part = enters.gather(1, part) & step.is_open
        of_part = torch.where(is_in & takes_part.unsqueeze(1), score.unsqueeze(1), -torch.inf)  # [R, parts, W]
        surest = of_part.argmax(dim=2)  # [R, parts], the first among equals
        has_any = of_part.amax(dim=2) > -torch.inf
        is_forced = torch.zeros_like(step.is_open)
        is_forced.scatter_reduce_(1, surest, is_full & has_any, reduce="amax")
        passes = takes_part & (score >= step.parameter.unsqueeze(1))
        step.choose(passes | is_forced, rank=score.masked_fill(~takes_part, 0.0))
