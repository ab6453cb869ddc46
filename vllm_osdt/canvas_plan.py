"""Which rows of a request run next: one plan for each kind of attention, both for the same scheduler.

A step of a request is described by three numbers: the position where its rows start, how many rows follow, and how many
of them, from the last, are drafts, that is canvas from the active block's first position on. A step without drafts
decides nothing, unless its last row is to tell the next position's token.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol


class Rows(NamedTuple):
    """One step of one request."""

    start: int
    num_rows: int
    num_drafts: int
    reads_next: bool = False

    @property
    def end(self) -> int:
        """The position behind the last row."""
        return self.start + self.num_rows


class CanvasPlan(Protocol):
    """What the scheduler knows of a request's canvas.

    ``num_tokens`` is always prompt plus committed tokens; the active block begins there.
    """

    block_length: int
    pages_end: int  # the position up to which the request has KV pages

    def admit(self, num_cached: int) -> None:
        """The request starts, or resumes, with the keys and values of that many positions."""

    def next_rows(self, num_tokens: int, budget: int) -> Rows | None:
        """The next step in at most ``budget`` rows; None when it must wait for more."""

    def schedule(self, num_tokens: int, rows: Rows) -> None:
        """These rows run."""

    def pages_needed(self, rows: Rows) -> int:
        """The position up to which KV pages are to be had before these rows run."""

    @property
    def num_final(self) -> int:
        """Positions, from the first, whose keys and values depend on nothing that may still change."""


@dataclass(slots=True)
class FullAttentionPlan:
    """Every position sees the whole canvas (LLaDA, Dream), so keys and values are approximations to be refreshed.

    A request's first step, and the first of each block, computes prompt and canvas together (a refresh); later steps
    compute the rows its cache mode says. A step is planned whole or not at all.

    Attributes:
        canvas_end: Prompt plus canvas, in tokens; the last block may be cut by it.
        block_length: Positions denoised together.
        cache: ``none``, ``prefix`` or ``dual``.
        refreshed_at: Prompt plus committed tokens at the last refresh, -1 before the first one.
        pages_end: See ``CanvasPlan``.
    """

    canvas_end: int
    block_length: int
    cache: str
    refreshed_at: int = -1
    pages_end: int = 0

    def admit(self, num_cached: int) -> None:
        """Pages of other requests are of no use."""
        assert num_cached == 0
        self.refreshed_at, self.pages_end = -1, 0

    def next_rows(self, num_tokens: int, budget: int) -> Rows | None:
        """See ``CanvasPlan``."""
        rest = self.canvas_end - num_tokens
        if self.cache == "none" or self.refreshed_at != num_tokens:
            rows = Rows(0, self.canvas_end, rest)
        else:
            num_rows = min(self.block_length, rest) if self.cache == "dual" else rest
            rows = Rows(num_tokens, num_rows, num_rows)
        return rows if rows.num_rows <= budget else None

    def schedule(self, num_tokens: int, rows: Rows) -> None:
        """See ``CanvasPlan``."""
        self.refreshed_at = num_tokens

    def pages_needed(self, rows: Rows) -> int:
        """All from the start: the first refresh writes them all."""
        return self.canvas_end

    @property
    def num_final(self) -> int:
        """None: a prompt's keys and values depend on the canvas."""
        return 0


@dataclass(slots=True)
class BlockCausalPlan:
    """A position sees the blocks up to its own (SDAR, LLaDA2, Fast-dLLM v2), so a finished block's keys and values are
    exact and stay.

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
    """

    block_length: int
    is_fused: bool
    is_shifted: bool = False
    num_final: int = 0
    pages_end: int = 0

    def admit(self, num_cached: int) -> None:
        """See ``CanvasPlan``; hits end at block boundaries."""
        assert num_cached % self.block_length == 0
        self.num_final, self.pages_end = num_cached, 0

    def next_rows(self, num_tokens: int, budget: int) -> Rows | None:
        """See ``CanvasPlan``."""
        start, block = self.num_final, self._block_of(num_tokens)
        end = block + self.block_length
        asks_first = self.is_shifted and num_tokens == block
        if end - start <= budget and (start == block or self.is_fused and not asks_first):
            return Rows(start, end - start, end - num_tokens)
        num_rows = min(budget, block - start) // self.block_length * self.block_length
        return Rows(start, num_rows, 0, asks_first and start + num_rows == block) if num_rows else None

    def schedule(self, num_tokens: int, rows: Rows) -> None:
        """See ``CanvasPlan``."""
        self.num_final = min(rows.end, self._block_of(num_tokens))

    def pages_needed(self, rows: Rows) -> int:
        """Pages are taken as the request grows."""
        return rows.end

    def _block_of(self, position: int) -> int:
        return position // self.block_length * self.block_length
