"""FreeDave: drafts of the next denoising steps, verified by the model itself, several of them in one forward pass.

Source: FreeDave (arXiv 2510.00294), and the authors' code (cychomatica/FreeDave). A step's proposals say what the next
steps should leave: draft k has as many more positions as k steps unmask, the most confident ones. The next forward pass
computes the block itself and its drafts beside it, each against the same cached keys and values. A step of the base
decoder from each of them gives its target. A draft that is the target of a state that is right is what the base decoder
would have come to, so its own target counts (``worker.drafting``). NFE counts a forward pass over all of them once.

- ``steps``: the base decoder is ``fixed_steps``. Tokens are its own, whatever is drafted: at any temperature, since
  noise belongs to the denoising step that a draft stands for.
- ``threshold``, the authors' FreeDave++: the base decoder is ``static_threshold``, and a draft is right where the
  target has all of it. So a block may go on from fewer tokens than the base decoder would have. What is promised: of
  two states that follow each other in the chain, a step of ``static_threshold`` from the first decides all that the
  second has and the first has not, with the same tokens. The path, and therefore tokens, may be others than those of
  ``static_threshold``. With one draft they are the same.
- ``threshold`` and ``freedave_accept`` ``equal``: a draft is right where it is the target. The authors' code for
  block-causal models has this test, their code for the others the one above. Tokens are those of ``static_threshold``
  at temperature 0 and without ``steps``. A draft counts as one denoising step for each draft before it, and a larger
  one may be the target of a single step. So noise, and what ``steps`` ask for, may be those of another step.

Ours: with ``calibrated`` the threshold of the base decoder is that of OSDT, in the block and step of each state. With
thresholds by block, ``equal`` has the tokens of ``osdt``.

``freedave_drafts`` is the authors' number of drafts, 8 in their scripts. Their first draft is the certain one, here the
block itself. The base decoders are ours: where the authors' code takes one position a step, or, above a threshold, one
where none passes, ``steps`` says how many.

Left out: the authors' eager mode, in which drafts run into the next block. There a block's first step writes the final
keys and values of the block before (block-causal), or those of the whole canvas (``dual``, ``prefix``). Drafts of both
blocks would need a step of their own for them, so that tokens would depend on where the last draft ended.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from vllm_osdt.calibration.thresholds import Thresholds
from vllm_osdt.declaration import count, option
from vllm_osdt.geometry import Canvas, CanvasRequest, DecodeShape
from vllm_osdt.policies.base import MAX_BRANCHES, BlockStep, Branch, Drafts, Policy, Schedule
from vllm_osdt.policies.fixed_steps import FixedSteps, positions_per_step
from vllm_osdt.policies.osdt import CalibratedOptions, CalibratedPolicy, calibrated_schedule
from vllm_osdt.policies.static_threshold import StaticThreshold, StaticThresholdOptions


@dataclass(frozen=True)
class FreeDaveOptions(StaticThresholdOptions, CalibratedOptions):
    """The base decoder, and how much is drafted."""

    freedave_drafts: int = option(
        8,
        count(1, MAX_BRANCHES),
        "Of `freedave`: states of a block that one forward pass computes at most, the certain one among them.",
    )
    freedave_base: str = option(
        "steps",
        Literal["steps", "threshold"],
        "Of `freedave`: the decoder whose steps are drafted. `steps`: `fixed_steps`, with the same tokens. "
        "`threshold`: `static_threshold`, where a draft need only be a part of what a step decides (FreeDave++).",
    )
    freedave_accept: str = option(
        "subset",
        Literal["subset", "equal"],
        "Of `freedave`: whether a draft need only be a part of what a step decides, or all of it. `equal`: greedy "
        "tokens are those of `static_threshold`.",
        needs="freedave_base=threshold",
    )


class FreeDave(CalibratedPolicy):
    """The steps of ``fixed_steps``, ``static_threshold`` or ``osdt``, several in one forward pass."""

    name = "freedave"
    Options = FreeDaveOptions
    has_branches = True
    with_profile = "`threshold` of its base decoder, with `freedave_base` = `threshold`"

    def without_use(self, options: FreeDaveOptions) -> frozenset[str]:
        """Thresholds, where the base decoder takes a number of positions a step."""
        return frozenset(["threshold", "calibrated"] if options.freedave_base == "steps" else [])

    def calibrates(self, options: FreeDaveOptions) -> bool:
        """If the request says so, and its base decoder has a threshold."""
        return options.calibrated and options.freedave_base == "threshold"

    def resolve(self, options: FreeDaveOptions, asked: CanvasRequest, canvas: Canvas) -> dict[str, Any]:
        """As the base decoder does."""
        return self._base(options).resolve(options, asked, canvas)

    def schedule(self, options: FreeDaveOptions, shape: DecodeShape, thresholds: Thresholds | None = None) -> Schedule:
        """That of the base decoder."""
        sizes = np.ones(shape.block_length, dtype=np.int32)
        if options.steps is not None:
            sizes = np.maximum(sizes, positions_per_step(options.steps, shape))
        is_subset = options.freedave_base == "threshold" and options.freedave_accept == "subset"
        drafts = Drafts(options.freedave_drafts, sizes, is_subset=is_subset)
        schedule = replace(self._base(options).schedule(options, shape), drafts=drafts)
        if self.calibrates(options):
            own = calibrated_schedule(options, shape, thresholds)
            schedule = replace(schedule, parameters=own.parameters, fallback=own.fallback)
        return schedule

    def branches(self, options: FreeDaveOptions, step: BlockStep) -> list[Branch]:
        """As many as are drafted, with the rows of the block."""
        return [Branch(step.start, step.num_rows)] * (options.freedave_drafts - 1)

    def needs_branches(self, options: FreeDaveOptions) -> bool:
        """Where a draft need not be the base decoder's state of its own step, tokens depend on what is drafted."""
        return options.freedave_base == "threshold"

    def _base(self, options: FreeDaveOptions) -> Policy:
        return StaticThreshold() if options.freedave_base == "threshold" else FixedSteps()
