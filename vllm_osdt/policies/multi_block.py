"""Several blocks in flight: a block is entered when the one before it is half decided.

Source: d3LLM (arXiv 2601.07568), multi-block decoding, and the authors' code (hao-ai-lab/d3LLM). A position passes by
its entropy. A block takes part when a share of the block before it is decided. It is fully active when another, larger
share is. Here the blocks in flight are parts of ``part_length`` positions of one block of ``block_length``, which is
computed and finished together. The paper gives 0.5 as the first share. The authors' scripts have 0.1 and 0.95.

- ``parts``: a step decides at least the surest position of every fully active part.
- ``release``, the authors' code: a step decides at least the surest position of all parts that take part, and that of
  the first fully active part. Later ones may stay as they are.

For models whose positions see the whole canvas it is what the authors have, apart from their refreshes of keys and
values. In a block-causal model the parts see each other, as positions of a block do.
"""

from dataclasses import dataclass
from typing import Any, Literal

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
    multi_block_rule: str = option(
        "parts",
        Literal["parts", "release"],
        "Of `multi_block`: what a step decides at least. `parts`: the surest position of every part that `full_share` "
        "allows one. `release`, as in the authors' code: that of the first such part, and the surest of all parts.",
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
        is_release = float(options.multi_block_rule == "release")
        constants = (options.part_length, options.enter_share, options.full_share, is_release)
        return constant(shape, Rule.THRESHOLD, least, constants)

    def adjust(self, step: Step) -> None:
        """Choose what passes in the parts that take part, and the surest positions that a step decides at least."""
        if step.score.device.type == "cpu":
            from vllm_osdt.policies.loops import multi_block  # late: options are read without torch

            multi_block(step)
        else:
            self.adjust_by_tensors(step)

    def adjust_by_tensors(self, step: Step) -> None:
        """See :meth:`adjust`."""
        import torch  # late: options are read without it

        place = places(step.score.shape[1], step.score.device)
        part = place // step.constants[:, :1].long()  # [R, W]
        is_in = part.unsqueeze(1) == place.view(1, -1, 1)  # [R, parts, W], of more parts than there are
        size = is_in.sum(dim=2)
        num_open = (is_in & step.is_open.unsqueeze(1)).sum(dim=2)  # [R, parts]
        decided = (size - num_open) / size.clamp(min=1)  # one rounding, so that a share of 0.2 is 1 of 5
        before = torch.nn.functional.pad(decided[:, :-1], (1, 0), value=1.0)
        # A part takes part only if all before it do.
        enters = (before >= step.constants[:, 1:2]).cummin(dim=1).values
        is_full = (before >= step.constants[:, 2:3]).cummin(dim=1).values
        score = step.confidence
        takes_part = enters.gather(1, part) & step.is_open
        of_part = torch.where(is_in & takes_part.unsqueeze(1), score.unsqueeze(1), -torch.inf)  # [R, parts, W]
        best, surest = of_part.max(dim=2)  # [R, parts], the first among equals
        is_due = is_full & (best > -torch.inf)
        is_release = step.constants[:, 3:4] > 0
        is_first = is_due & (is_due.cumsum(dim=1) == 1)
        is_best = torch.zeros_like(is_due).scatter_(1, best.argmax(dim=1, keepdim=True), True) & (best > -torch.inf)
        is_due = torch.where(is_release, is_first | is_best, is_due)
        is_forced = torch.zeros_like(step.is_open)
        is_forced.scatter_reduce_(1, surest, is_due, reduce="amax")
        passes = takes_part & (score >= step.parameter.unsqueeze(1))
        step.choose(passes | is_forced, rank=score.masked_fill(~takes_part, 0.0))
