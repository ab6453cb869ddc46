"""Which rows of a request run next: one plan for each kind of attention, both for the same scheduler.

A step of a request is described by the position where its rows start, how many rows follow, how many of them, from the
last, are drafts (canvas from the active block's first position on), and what the step decides.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from vllm_osdt.engine.cache_modes import BlockState, CacheMode, cache_mode_of
from vllm_osdt.geometry import CAUSAL_CACHE, Canvas
from vllm_osdt.messages import Decides, RequestSpec, Span
from vllm_osdt.models.traits import Traits
from vllm_osdt.policies.base import Branch


class Rows(NamedTuple):
    """One step of one request."""

    start: int
    num_rows: int
    num_drafts: int
    decides: Decides = Decides.BLOCK
    verified: Span | None = None  # where it decides those alone
    branches: tuple[Branch, ...] = ()  # further ones, besides these rows

    @property
    def num_all_rows(self) -> int:
        """Rows, those of all branches among them."""
        return self.num_rows + sum(branch.num_rows for branch in self.branches)

    @property
    def end(self) -> int:
        """The position behind the last row."""
        return self.start + self.num_rows


class CanvasPlan(Protocol):
    """What the scheduler knows of a request's canvas.

    ``num_tokens`` is always prompt plus committed tokens; the active block begins there.
    """

    block_length: int  # positions denoised together
    pages_end: int  # the position up to which the request has KV pages
    drafted: Span | None  # positions of the active block that the next step verifies

    def admit(self, num_cached: int) -> None:
        """The request starts, or resumes, with the keys and values of that many positions."""

    def next_rows(self, num_tokens: int, budget: int) -> Rows | None:
        """The next step in at most ``budget`` rows; None when it must wait for more."""

    def schedule(self, num_tokens: int, rows: Rows) -> None:
        """These rows run."""

    def active_length(self, num_tokens: int) -> int:
        """Positions of the active block that are not prompt."""

    def pages_needed(self, rows: Rows) -> int:
        """The position up to which KV pages are to be had before these rows run."""

    def hear(self, mean_confidence: float) -> None:
        """The mean confidence of the last step's masked positions, where the cache mode asks for it."""

    @property
    def num_final(self) -> int:
        """Positions, from the first, whose keys and values depend on nothing that may still change."""


class FullAttentionPlan:
    """Every position sees the whole canvas (LLaDA, Dream), so keys and values are approximations to be refreshed.

    A step is planned whole or not at all.

    Args:
        canvas: Prompt end, canvas end and block length.
        mode: When to refresh, and which rows the other steps compute.
        decides_first_alone: Whether a block's first step decides its first position alone: with shifted logits and a
            cache, later steps do not compute the row before the block.
        suffix_window: Blocks behind the active one that take part; None for all that are there. A refresh ends with
            the last of them. What is behind has no pages, and no step sees it.

    Attributes:
        block_length: Positions denoised together.
        pages_end: See ``CanvasPlan``.
        drafted: See ``CanvasPlan``; None, since a canvas that sees itself whole has no order from left to right.
    """

    __slots__ = ("_block", "_entry", "_mode", "_planned", "_reach", "block_length", "drafted", "pages_end")

    def __init__(
        self, canvas: Canvas, mode: CacheMode, decides_first_alone: bool = False, suffix_window: int | None = None
    ) -> None:
        self.block_length = canvas.block_length
        self.pages_end = 0
        self.drafted: Span | None = None
        self._mode = mode
        self._entry = Decides.FIRST_POSITION if decides_first_alone else Decides.BLOCK
        self._block = BlockState(canvas)
        self._reach = canvas.length if suffix_window is None else (1 + suffix_window) * canvas.block_length
        self._planned = -1  # first position of the block that had the last step, -1 before the first step

    def admit(self, num_cached: int) -> None:
        """Pages of other requests are of no use."""
        assert num_cached == 0
        self._planned = self._block.refreshed_block = -1
        self.pages_end = 0

    def next_rows(self, num_tokens: int, budget: int) -> Rows | None:
        """See ``CanvasPlan``."""
        block = self._block
        block.start, block.is_entry = num_tokens, self._planned != num_tokens
        block.canvas_end = min(block.canvas.end_at(num_tokens), num_tokens + self._reach)
        start, end = self._mode.next_rows(block)
        if end - start > budget:
            return None
        return Rows(start, end - start, end - num_tokens, self._entry if block.is_entry else Decides.BLOCK)

    def schedule(self, num_tokens: int, rows: Rows) -> None:
        """See ``CanvasPlan``."""
        block = self._block
        self._planned = num_tokens
        block.was_refresh, block.mean_confidence = rows.start == 0, 1.0
        if rows.start == 0:
            block.refreshed_block = block.canvas.block_index(num_tokens)

    def active_length(self, num_tokens: int) -> int:
        """See ``CanvasPlan``; the last block may be shorter."""
        return min(self.block_length, self._block.canvas_end - num_tokens)

    def pages_needed(self, rows: Rows) -> int:
        """All of the canvas that takes part: a refresh writes them all."""
        return self._block.canvas_end

    def hear(self, mean_confidence: float) -> None:
        """See ``CanvasPlan``."""
        self._block.mean_confidence = mean_confidence

    @property
    def num_final(self) -> int:
        """None: a prompt's keys and values depend on the canvas."""
        return 0


@dataclass(slots=True)
class BlockCausalPlan:
    """A position sees the blocks up to its own (SDAR, LLaDA2, Fast-dLLM v2, Stable-DiffCoder).

    So a finished block's keys and values are exact and stay.

    Blocks lie on a grid from position 0; the prompt's last, incomplete block is part of the first active one, and is
    computed with it. A prompt is computed in whole blocks, as many as fit. With ``is_fused`` the step that writes the
    final keys and values of a finished block is also the first denoising step of the next one. Where logits are shifted
    (Fast-dLLM v2), that step gives the next block's first token instead.

    Attributes:
        block_length: Positions denoised together.
        is_fused: See above; otherwise a finished block has a step of its own.
        is_shifted: Whether a position is predicted from the logits at the one before it.
        num_final: See ``CanvasPlan``; a multiple of ``block_length``.
        pages_end: See ``CanvasPlan``.
        drafted: See ``CanvasPlan``.
    """

    block_length: int
    is_fused: bool
    is_shifted: bool = False
    num_final: int = 0
    pages_end: int = 0
    drafted: Span | None = None

    def admit(self, num_cached: int) -> None:
        """See ``CanvasPlan``; hits end at block boundaries."""
        assert num_cached % self.block_length == 0
        self.num_final, self.pages_end, self.drafted = num_cached, 0, None

    def next_rows(self, num_tokens: int, budget: int) -> Rows | None:
        """See ``CanvasPlan``."""
        start, block = self.num_final, self._block_of(num_tokens)
        end = block + self.block_length
        asks_first = self.is_shifted and num_tokens == block
        if self.drafted is not None:
            rows = Rows(start, end - start, end - num_tokens, Decides.VERIFIED, self.drafted)
            return rows if rows.num_rows <= budget else None
        if end - start <= budget and (start == block or (self.is_fused and not asks_first)):
            return Rows(start, end - start, end - num_tokens)
        num_rows = min(budget, block - start) // self.block_length * self.block_length
        if not num_rows:
            return None
        is_first = asks_first and start + num_rows == block
        return Rows(start, num_rows, 0, Decides.FIRST_POSITION if is_first else Decides.NOTHING)

    def schedule(self, num_tokens: int, rows: Rows) -> None:
        """See ``CanvasPlan``."""
        self.num_final, self.drafted = min(rows.end, self._block_of(num_tokens)), None

    def active_length(self, num_tokens: int) -> int:
        """See ``CanvasPlan``."""
        return self._block_of(num_tokens) + self.block_length - num_tokens

    def pages_needed(self, rows: Rows) -> int:
        """Pages are taken as the request grows."""
        return rows.end

    def hear(self, mean_confidence: float) -> None:
        """Nothing: finished blocks need no refresh."""

    def _block_of(self, position: int) -> int:
        return position // self.block_length * self.block_length


@dataclass(slots=True)
class CausalCommitPlan:
    """Prompt and finished blocks are computed causally, the active block bidirectionally (Nemotron-Labs-Diffusion).

    Blocks begin behind the prompt. A finished block is computed once more, causally, for its final keys and values.
    With ``is_seeded`` that pass, and the last one of the prompt, gives the next block's first token and denoises
    nothing. Otherwise it is also the first denoising step of the next block. A causal pass may be cut anywhere.

    Attributes:
        block_length: Positions denoised together.
        is_seeded: See above.
        num_final: See ``CanvasPlan``.
        pages_end: See ``CanvasPlan``.
        drafted: See ``CanvasPlan``.
    """

    block_length: int
    is_seeded: bool
    num_final: int = 0
    pages_end: int = 0
    drafted: Span | None = None

    def admit(self, num_cached: int) -> None:
        """See ``CanvasPlan``; hits end anywhere before the last token."""
        self.num_final, self.pages_end, self.drafted = num_cached, 0, None

    def next_rows(self, num_tokens: int, budget: int) -> Rows | None:
        """See ``CanvasPlan``."""
        start, end = self.num_final, num_tokens + self.block_length
        if self.drafted is not None:
            rows = Rows(start, end - start, self.block_length, Decides.VERIFIED, self.drafted)
            return rows if rows.num_rows <= budget else None
        if end - start <= budget and (start == num_tokens or not self.is_seeded):
            return Rows(start, end - start, self.block_length)
        num_rows = min(budget, num_tokens - start)
        if not num_rows:
            return None
        is_first = self.is_seeded and start + num_rows == num_tokens
        return Rows(start, num_rows, 0, Decides.FIRST_POSITION if is_first else Decides.NOTHING)

    def schedule(self, num_tokens: int, rows: Rows) -> None:
        """See ``CanvasPlan``."""
        self.num_final, self.drafted = min(rows.end, num_tokens), None

    def active_length(self, num_tokens: int) -> int:
        """See ``CanvasPlan``."""
        return self.block_length

    def pages_needed(self, rows: Rows) -> int:
        """Pages are taken as the request grows."""
        return rows.end

    def hear(self, mean_confidence: float) -> None:
        """Nothing: finished blocks need no refresh."""


def make_plan(spec: RequestSpec, traits: Traits, *, is_fused: bool) -> CanvasPlan:
    """The plan of a request.

    Args:
        spec: As admission made it.
        traits: Of the model.
        is_fused: The operator's ``fused_commit``.
    """
    if traits.commits_causally:
        return CausalCommitPlan(spec.canvas.block_length, decides_first_alone(spec, traits))
    if traits.is_block_causal:
        return BlockCausalPlan(spec.canvas.block_length, is_fused, traits.logits_shift > 0)
    options = spec.options
    return FullAttentionPlan(
        spec.canvas, cache_mode_of(options), decides_first_alone(spec, traits), options.suffix_window
    )


def decides_first_alone(spec: RequestSpec, traits: Traits) -> bool:
    """Whether a block's first step decides its first position alone (see the plans)."""
    if traits.commits_causally:
        return spec.options.cache_mode == CAUSAL_CACHE
    return traits.logits_shift > 0 and spec.options.cache_mode != "none"
