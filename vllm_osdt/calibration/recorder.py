"""Confidences of one calibration sequence, by block and denoising step."""

import numpy as np
import torch

from vllm_osdt.calibration.recording import Recording


class Recorder:
    """Collects what the denoising steps of one request see.

    The buffers live on the device, so recording copies nothing to the host; :meth:`to_arrays` does, once, at the
    end. A block that starts again (the request was preempted) overwrites its earlier record. Blocks beyond MAX_BLOCKS
    are not recorded: a request without a limit may have thousands, and its thresholds fall back to the last one.
    """

    MAX_BLOCKS = 128

    def __init__(self, num_blocks: int, block_length: int, device: torch.device) -> None:
        shape = (min(num_blocks, self.MAX_BLOCKS), block_length, block_length)  # [block, step, position]
        self.confidence = torch.full(shape, torch.nan, dtype=torch.float32, device=device)
        self.committed = torch.zeros(shape, dtype=torch.bool, device=device)
        self.proposal = torch.full(shape, -1, dtype=torch.int64, device=device)
        self.final = torch.full((shape[0], 1, block_length), -1, dtype=torch.int64, device=device)

    def add(
        self,
        block: int,
        step: int,
        confidence: torch.Tensor,
        proposal: torch.Tensor,
        before: torch.Tensor,
        after: torch.Tensor,
        tokens: torch.Tensor,
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
        """
        if block >= self.confidence.shape[0]:
            return
        if step == 0:
            self.confidence[block] = torch.nan
            self.committed[block] = False
            self.final[block] = -1
        known = self.final[block, 0] >= 0
        self.final[block, 0] = torch.where(known | before & ~after, tokens.long(), -1)
        if step >= self.confidence.shape[1]:  # a full block, which is only edited
            return
        self.confidence[block, step] = torch.where(before, confidence, torch.nan)
        self.committed[block, step] = before & ~after
        self.proposal[block, step] = proposal

    def to_arrays(self) -> Recording:
        """Host copies of what was recorded."""
        confidence, committed = self.confidence.cpu().numpy(), self.committed.cpu().numpy()
        proposal = self.proposal.cpu().numpy()
        final = self.final.cpu().numpy()
        wrong = ~np.isnan(confidence) & (proposal != final) & (final >= 0)
        return Recording(confidence, committed, wrong)
