"""What a step computes where every position sees the whole canvas: one class for each cache mode.

Keys and values of prompt and later blocks depend on the canvas, so those that stay in the cache are approximations
which a *refresh*, a step that computes prompt and canvas together, makes exact again. A cache mode says when a block's
steps refresh, and which rows the others compute.

Source: Fast-dLLM (arXiv 2505.22618), section 3, for ``none``, ``prefix`` and ``dual``. The interval between refreshes
and the refresh of unsure steps are ours. A suffix window (Streaming-dLLM, arXiv 2601.17917) bounds the canvas of any
mode.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

from vllm_osdt.geometry import Canvas
from vllm_osdt.options import DecodingOptions


@dataclass(slots=True)
class BlockState:
    """What a cache mode knows of a request's active block.

    Attributes:
        canvas: The request's positions.
        start: First position of the active block.
        canvas_end: Position behind the part of the canvas that is there, and within the suffix window.
        is_entry: Whether the block has had no step yet.
        refreshed_block: Index of the block in which the last refresh was; -1 before the first one.
        was_refresh: Whether the last step was a refresh.
        mean_confidence: Of the last step's masked positions; 1.0 where it was not reported.
    """

    canvas: Canvas
    start: int = -1
    canvas_end: int = -1
    is_entry: bool = True
    refreshed_block: int = -1
    was_refresh: bool = False
    mean_confidence: float = 1.0

    @property
    def end(self) -> int:
        """Position behind the active block."""
        return min(self.start + self.canvas.block_length, self.canvas_end)


class Span(NamedTuple):
    """Rows of a step: from ``start`` up to ``end``; a refresh has all of them."""

    start: int
    end: int

    @property
    def is_refresh(self) -> bool:
        """Whether prompt and canvas are computed together."""
        return self.start == 0


class CacheMode(Protocol):
    """Chooses the rows of a step."""

    def next_rows(self, block: BlockState) -> Span:
        """The rows of the block's next step."""
        ...


class NoCache:
    """``none``: every step is a refresh."""

    def next_rows(self, block: BlockState) -> Span:
        """See ``CacheMode``."""
        return Span(0, block.canvas_end)


class PrefixCache:
    """``prefix``: keys and values before the active block stay; the block and everything behind it are computed."""

    def next_rows(self, block: BlockState) -> Span:
        """See ``CacheMode``."""
        return Span(0 if block.is_entry else block.start, block.canvas_end)


class DualCache:
    """``dual``: keys and values before and behind the active block stay; the block alone is computed."""

    def next_rows(self, block: BlockState) -> Span:
        """See ``CacheMode``."""
        return Span(0, block.canvas_end) if block.is_entry else Span(block.start, block.end)


class RefreshInterval:
    """Refreshes when every ``interval``-th block is entered.

    The other blocks begin with a step that computes the finished block before them once more, with all of its tokens,
    and then go on like ``base``.

    Args:
        base: The mode between refreshes.
        interval: Blocks, at least 1.
    """

    def __init__(self, base: CacheMode, interval: int) -> None:
        self._base = base
        self._interval = interval

    def next_rows(self, block: BlockState) -> Span:
        """See ``CacheMode``."""
        rows = self._base.next_rows(block)
        index = block.canvas.block_index(block.start)
        is_due = block.refreshed_block < 0 or index - block.refreshed_block >= self._interval
        if not block.is_entry or is_due:
            return rows
        later = self._base.next_rows(replace(block, is_entry=False))
        return Span(block.start - block.canvas.block_length, later.end)


class RefreshUnsure:
    """Refreshes after a step whose mean confidence is below ``confidence``, unless that was a refresh itself.

    Args:
        base: The mode of all other steps.
        confidence: In (0, 1).
    """

    def __init__(self, base: CacheMode, confidence: float) -> None:
        self._base = base
        self._confidence = confidence

    def next_rows(self, block: BlockState) -> Span:
        """See ``CacheMode``."""
        is_unsure = not block.is_entry and block.mean_confidence < self._confidence
        if is_unsure and not block.was_refresh:
            return Span(0, block.canvas_end)
        return self._base.next_rows(block)


BASE_MODES: dict[str, CacheMode] = {"none": NoCache(), "prefix": PrefixCache(), "dual": DualCache()}


def cache_mode_of(options: DecodingOptions) -> CacheMode:
    """The cache mode that a request's options ask for."""
    mode = BASE_MODES[options.cache_mode]
    if options.refresh_interval > 1:
        mode = RefreshInterval(mode, options.refresh_interval)
    if options.refresh_confidence > 0:
        mode = RefreshUnsure(mode, options.refresh_confidence)
    return mode
