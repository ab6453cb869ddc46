"""AdaBlock: a block ends behind a delimiter that the model is sure of.

Source: AdaBlock-dLLM (arXiv 2509.26432). When a block is entered, of the positions in a window whose proposal is a
delimiter, such as a line's end, the most confident one counts: if its confidence reaches a threshold, the block ends
behind it, else it has the usual length. The authors' window is a quarter of the canvas, or what is left of it; here it
is ``block_length``. With that a quarter of ``gen_length``, and ``adablock_length`` their usual length, this is their
rule, up to a canvas of 512 tokens, since a block has at most 128. Works beside every policy, for models whose positions
see the whole canvas.

A task's thresholds go with it, from a profile that was calibrated with ``adablock`` and the same numbers. A block then
has the index of the ``block_length`` positions in which it begins, when it is recorded and when it is decoded. Several
blocks may begin there, which share a threshold. One does at least, since no block is longer.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from csrc_triton.types import ENTROPY_SCALE
from vllm_osdt.calibration.profile import CUT_KEY
from vllm_osdt.declaration import Flag, count, number, option
from vllm_osdt.geometry import MAX_BLOCK_LENGTH
from vllm_osdt.policies.base import Step

if TYPE_CHECKING:
    import torch

MAX_NUMBERS = 32  # that it is given with each request
MAX_DELIMITERS = MAX_NUMBERS - 3
LINE_END = "\n"


@dataclass(frozen=True)
class AdaBlockOptions:
    """How long blocks are."""

    adablock: bool = option(
        False,
        Flag,
        "AdaBlock (arXiv 2509.26432): a block ends behind the delimiter among its proposals that the model is surest "
        "of. `block_length` is then the longest block, and the window in which it looks for one. The authors' window "
        "is a quarter of the canvas: `block_length` 64 with `gen_length` 256, and `adablock_length` 32. Blocks have at "
        "most 128 tokens, so that their window is out of reach with `gen_length` above 512.",
    )
    adablock_threshold: float = option(
        0.3,
        number(ge=0, le=1),
        "Of `adablock`: confidence that the delimiter needs; with a policy that looks at entropies, exp(−H) instead. "
        "The authors take 0.3 for LLaDA and 0.5 for Dream.",
    )
    adablock_length: int = option(
        32,
        count(1, MAX_BLOCK_LENGTH),
        "Of `adablock`: length of a block without such a delimiter; `block_length` where that is shorter.",
        unit="tokens",
    )
    adablock_delimiters: Sequence[int] | None = option(
        None,
        Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=MAX_DELIMITERS)] | None,
        "Of `adablock`: token ids of delimiters. The authors have 24 for Dream.",
        expected=f"1 to {MAX_DELIMITERS} token ids",
        default_text="the tokenizer's line end",
    )


class AdaBlock:
    """The cutter of requests that ask for it."""

    def key(self, options: Any) -> str:
        """What its profiles have in their key (``calibration.profile.CACHE_KEY``), on which their blocks depend."""
        lengths = min(options.adablock_length, options.block_length), *(options.adablock_delimiters or ())
        return f"{CUT_KEY}{options.adablock_threshold:g}," + ",".join(map(str, lengths))

    def constants(self, options: Any, *, by_entropy: bool = False) -> Sequence[float]:
        """What :meth:`cut` reads of a request's resolved options.

        Args:
            options: Resolved.
            by_entropy: Whether its confidences are 1 - H / 32. An entropy H then counts as a confidence exp(-H).
        """
        ids, threshold = options.adablock_delimiters, options.adablock_threshold
        if by_entropy and threshold > 0:
            threshold = max(1.0 + math.log(threshold) / ENTROPY_SCALE, 0.0)
        return (threshold, min(options.adablock_length, options.block_length), len(ids), *ids)

    def cut(self, step: Step) -> "torch.Tensor":
        """See ``Cutter``."""
        import torch  # late: options are read without it

        ids, place = step.constants[:, 3:], torch.arange(step.score.shape[1], device=step.score.device)
        is_given = torch.arange(ids.shape[1], device=ids.device) < step.constants[:, 2:3]  # [R, ids]
        is_id = (step.token.unsqueeze(-1) == ids.long().unsqueeze(1)) & is_given.unsqueeze(1)
        score = step.confidence.masked_fill(~(is_id.any(dim=-1) & step.is_open), -1.0)
        highest = score.amax(dim=1, keepdim=True)
        first = place.where(score == highest, score.shape[1]).amin(dim=1)
        is_sure = (highest.squeeze(1) >= step.constants[:, 0]) & (highest.squeeze(1) >= 0)
        return torch.where(is_sure, first + 1, step.constants[:, 1].long())


ADABLOCK = AdaBlock()
