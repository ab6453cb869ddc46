"""Logits -> proposal and confidence -> unmask -> canvas -> vLLM's ``SamplerOutput``.

Source: LLaDA (arXiv 2502.09992) for proposals and confidence; Fast-dLLM (arXiv 2505.22618) and OSDT (arXiv
2511.02077) for the rules, which ``vllm_osdt.policies`` turns into parameters.
"""

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from csrc_triton import Blocks, Proposals, Rules, implementations
from csrc_triton.edit import edit
from vllm_osdt.worker.denoise_batch import DenoiseBatch
from vllm_osdt.worker.request_states import CanvasStates


class CanvasSampler:
    """Takes one denoising step of every request in the batch.

    Emits nothing for a block that is not finished, and the block's tokens in the step that finishes it. Works on
    whole tensors: no host synchronisation and no loop over requests, but for those that calibrate.
    """

    # The runner reads this to keep penalty counts; there are none.
    penalties_state = SimpleNamespace(output_bin_counts=None)
    compute_nans = False

    def __init__(self, states: CanvasStates) -> None:
        self.states = states
        self._confidence, self._unmask = implementations(states.device)
        self._no_rejected = torch.zeros(states.host.block_length.size, dtype=torch.int32, device=states.device)

    def add_request(self, req_idx: int, sampling_params: Any) -> None:
        """Nothing: ``CanvasStates.add`` has read the parameters."""

    def apply_staged_writes(self) -> None:
        """Nothing is staged."""

    def __call__(self, logits: torch.Tensor, input_batch: Any, draft_logits: Any = None) -> SamplerOutput:
        """Sample one step.

        Args:
            logits: ``[M, vocabulary]``, one row per position of the active blocks that is masked or may be edited.
            input_batch: A ``CanvasInputBatch``; vLLM's dummy batch while memory is measured.
            draft_logits: Unused, part of vLLM's interface.
        """
        batch: DenoiseBatch | None = getattr(input_batch, "denoise", None)
        if batch is None:
            token, _ = self._confidence(logits, self.states.mask_token_id, None, None)
            none = torch.zeros(logits.shape[0], dtype=torch.int32, device=logits.device)
            return SamplerOutput(token[:, None], None, None, num_sampled=none, num_rejected=none)

        states = self.states
        token, row_confidence = self._confidence(
            logits[: batch.num_rows], states.mask_token_id, batch.temperature, batch.noise_key, batch.by_entropy
        )
        blocks = Blocks(
            states.cells,
            states.masked,
            batch.mask_rows,
            batch.canvas_index,
            batch.end_token_ids,
            batch.num_needed,
        )
        proposals = Proposals(batch.cells, token, row_confidence)
        is_open = is_masked = None
        if batch.edit_threshold is not None:
            is_open, is_masked = edit(blocks, proposals, states.num_post_steps, batch.edit_threshold)
        states.note_confidence(batch.step_cell, batch.cells, batch.canvas_index.shape[1], row_confidence, is_masked)
        calibrating = np.flatnonzero(states.host.recording[batch.slots_np] & batch.is_active)
        width = batch.canvas_index.shape[1]
        before = None
        if calibrating.size:  # the masked positions whose logits were read
            before = torch.zeros_like(batch.canvas_index, dtype=torch.bool)
            before.view(-1)[batch.cells] = True if is_masked is None else is_masked
        canvas, best, result = self._unmask(blocks, proposals, Rules(batch.rule, batch.parameter, batch.quota))
        states.copy_masks_to_host(batch.slots_np, batch.slots, width)
        if before is not None:
            after = states.masked[batch.mask_rows, :width]
            proposal = torch.full_like(batch.canvas_index, -1)
            proposal.view(-1)[batch.cells] = token.to(proposal.dtype)
            self._record(calibrating, batch, input_batch.req_ids, best, proposal, before, after, canvas)
        return SamplerOutput(
            sampled_token_ids=canvas,
            logprobs_tensors=None,
            num_nans=None,
            num_sampled=result.num_ready if is_open is None else result.num_ready.masked_fill(is_open, 0),
            num_rejected=self._no_rejected[: canvas.shape[0]],
        )

    def _record(
        self,
        calibrating: np.ndarray,
        batch: DenoiseBatch,
        req_ids: list[str],
        best: torch.Tensor,
        proposal: torch.Tensor,
        before: torch.Tensor,
        after: torch.Tensor,
        canvas: torch.Tensor,
    ) -> None:
        states = self.states
        for row in calibrating.tolist():
            slot = batch.slots_np[row]
            length = int(states.host.block_length[slot])
            block = int(states.host.block_start[slot] - states.host.origin[slot]) // length
            recorder = states.records[req_ids[row]].recorder
            assert recorder is not None
            step = int(states.host.step[slot])
            recorder.add(block, step, *(grid[row, :length] for grid in (best, proposal, before, after, canvas)))
