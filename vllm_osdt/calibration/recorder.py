"""Confidences of one calibration sequence, by block and denoising step."""

import numpy as np
import torch


class Recorder:
    """Collects what the denoising steps of one request see.

    The buffers live on the device, so recording copies nothing to the host; :meth:`to_arrays` does, once, at the
    end. A block that starts again (the request was preempted) overwrites its earlier record.
    """

    def __init__(self, num_blocks: int, block_length: int, device: torch.device) -> None:
        shape = (num_blocks, block_length, block_length)  # [block, step, position]
        self.confidence = torch.full(shape, torch.nan, dtype=torch.float32, device=device)
        self.committed = torch.zeros(shape, dtype=torch.bool, device=device)

    def add(self, block: int, step: int, confidence: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> None:
        """Record one denoising step.

        Args:
            block: Block index in the canvas.
            step: Denoising step in the block, from 0.
            confidence: float32 ``[block_length]``; read where ``before`` is set.
            before: bool ``[block_length]``, masked positions before the step.
            after: bool ``[block_length]``, masked positions after it.
        """
        if step == 0:
            self.confidence[block] = torch.nan
            self.committed[block] = False
        self.confidence[block, step] = torch.where(before, confidence, torch.nan)
        self.committed[block, step] = before & ~after

    def to_arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Host copies: confidence (NaN where not masked) and committed, each ``[blocks, steps, positions]``."""
        return self.confidence.cpu().numpy(), self.committed.cpu().numpy()
