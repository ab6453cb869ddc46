"""What is recorded of a calibrating request; imports no torch, as everything that reads profiles."""

from typing import NamedTuple

import numpy as np

MAX_BLOCKS = 128  # a request without a limit may have thousands; its thresholds fall back to the last one


class Recording(NamedTuple):
    """What the denoising steps of one request saw; all ``[blocks, steps, positions]``.

    Attributes:
        confidence: float32, NaN where a position was not masked.
        committed: bool, the positions that the step unmasked.
        wrong: bool, masked positions whose proposal was not the token that stood there in the end. Positions that
            never got a token, behind the end of the answer, are not counted as wrong.
    """

    confidence: np.ndarray
    committed: np.ndarray
    wrong: np.ndarray

    @property
    def is_empty(self) -> bool:
        """Whether the first step of the first block was not recorded: such a request says nothing."""
        return bool(np.isnan(self.confidence[0, 0]).all())


class Recorder:
    """Collects the denoising steps of one request.

    A block that starts again (the request was preempted) overwrites its earlier record. Blocks beyond MAX_BLOCKS are
    not recorded. Blocks of many lengths are recorded with the ``block_length`` positions in which they begin; there may
    be several, side by side.

    Args:
        num_blocks: Of the canvas.
        block_length: The most positions of a block, and an upper bound of its steps.
        num_positions: Of a record (``ProfileKey.num_positions``); None for those of a block.
    """

    def __init__(self, num_blocks: int, block_length: int, num_positions: int | None = None) -> None:
        shape = (min(num_blocks, MAX_BLOCKS), block_length, num_positions or block_length)  # [block, step, position]
        self.confidence = np.full(shape, np.nan, dtype=np.float32)
        self.committed = np.zeros(shape, dtype=bool)
        self.proposal = np.full(shape, -1, dtype=np.int64)
        self.final = np.full((shape[0], 1, shape[2]), -1, dtype=np.int64)

    def add(
        self,
        block: int,
        step: int,
        confidence: np.ndarray,
        proposal: np.ndarray,
        before: np.ndarray,
        after: np.ndarray,
        tokens: np.ndarray,
        offset: int = 0,
    ) -> None:
        """Record one denoising step.

        Args:
            block: Block index in the canvas.
            step: Denoising step in the block, from 0.
            confidence: float32 ``[block_length]``; read where ``before`` is set.
            proposal: int64 ``[block_length]``, the best token of each position; read likewise.
            before: bool ``[block_length]``, masked positions before the step.
            after: bool ``[block_length]``, masked positions after it.
            tokens: int32 ``[block_length]``, the block after the step; read where a position has been unmasked, in this
                step or before, and may have been edited since.
            offset: Place of its first position in the record.
        """
        if block >= self.confidence.shape[0]:
            return
        if step == 0:
            self.confidence[block, :, offset:] = np.nan
            self.committed[block, :, offset:] = False
            self.final[block, :, offset:] = -1
        own = slice(offset, offset + before.size)
        final = self.final[block, 0, own]
        final[:] = np.where((final >= 0) | before & ~after, tokens, -1)
        if step >= self.confidence.shape[1]:  # a full block, which is only edited
            return
        self.confidence[block, step, own] = np.where(before, confidence, np.nan)
        self.committed[block, step, own] = before & ~after
        self.proposal[block, step, own] = proposal

    def recording(self) -> Recording:
        """What was recorded, up to the last block that was reached."""
        reached = np.flatnonzero(~np.isnan(self.confidence).all(axis=(1, 2)))
        end = int(reached.max(initial=0)) + 1
        confidence, final = self.confidence[:end].copy(), self.final[:end]
        wrong = ~np.isnan(confidence) & (self.proposal[:end] != final) & (final >= 0)
        return Recording(confidence, self.committed[:end].copy(), wrong)
