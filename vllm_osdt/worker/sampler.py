"""Logits -> proposal and confidence -> unmask -> canvas -> vLLM's ``SamplerOutput``.

Source: LLaDA (arXiv 2502.09992) for proposals and confidence; Fast-dLLM (arXiv 2505.22618) and OSDT (arXiv
2511.02077) for the rules, which ``vllm_osdt.policies`` turns into parameters.
"""

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from csrc_triton import implementations
from vllm_osdt.config import MAX_BLOCK_LENGTH
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
        num_cells = states.masked.shape[0] * MAX_BLOCK_LENGTH
        # Read only where a position is masked, and written there in the same step: never cleared.
        self._proposal = torch.zeros(num_cells, dtype=torch.int64, device=states.device)
        self._best = torch.zeros(num_cells, dtype=torch.float32, device=states.device)
        self._no_rejected = torch.zeros(states.masked.shape[0], dtype=torch.int32, device=states.device)

    def add_request(self, req_idx: int, sampling_params: Any) -> None:
        """Nothing: ``CanvasStates.add`` has read the parameters."""

    def apply_staged_writes(self) -> None:
        """Nothing is staged."""

    def __call__(self, logits: torch.Tensor, input_batch: Any, draft_logits: Any = None) -> SamplerOutput:
        """Sample one step.

        Args:
            logits: ``[M, vocabulary]``, one row per masked position of the active blocks.
            input_batch: A ``CanvasInputBatch``; vLLM's dummy batch while memory is measured.
            draft_logits: Unused, part of vLLM's interface.
        """
        batch: DenoiseBatch | None = getattr(input_batch, "denoise", None)
        if batch is None:
            token, _ = self._confidence(logits, self.states.mask_token_id, None, None)
            none = torch.zeros(logits.shape[0], dtype=torch.int32, device=logits.device)
            return SamplerOutput(token[:, None], None, None, num_sampled=none, num_rejected=none)

        states = self.states
        num_reqs, width = batch.canvas_index.shape
        token, row_confidence = self._confidence(
            logits[: batch.num_rows], states.mask_token_id, batch.temperature, batch.noise_key
        )
        self._proposal[batch.cells] = token
        self._best[batch.cells] = row_confidence
        proposal = self._proposal[: num_reqs * width].view(num_reqs, width)
        best = self._best[: num_reqs * width].view(num_reqs, width)

        canvas = states.cells[batch.canvas_index]
        masked = states.masked[batch.slots, :width]
        calibrating = np.flatnonzero(states.recorder_np[batch.slots_np])
        before = masked.clone() if calibrating.size else masked
        result = self._unmask(
            canvas, masked, proposal, best, batch.rule, batch.parameter, batch.eos_token_id, batch.num_needed
        )
        states.cells[batch.canvas_index] = canvas
        states.masked[batch.slots, :width] = masked
        states.copy_masks_to_host(batch.slots_np, masked)
        if calibrating.size:
            self._record(calibrating, batch, input_batch.req_ids, best, before, masked)
        return SamplerOutput(
            sampled_token_ids=canvas,
            logprobs_tensors=None,
            num_nans=None,
            num_sampled=result.num_ready,
            num_rejected=self._no_rejected[:num_reqs],
        )

    def _record(
        self,
        calibrating: np.ndarray,
        batch: DenoiseBatch,
        req_ids: list[str],
        best: torch.Tensor,
        before: torch.Tensor,
        after: torch.Tensor,
    ) -> None:
        states = self.states
        for row in calibrating.tolist():
            slot = batch.slots_np[row]
            length = int(states.block_length_np[slot])
            block = int(states.block_start_np[slot] - states.prompt_len_np[slot]) // length
            recorder = states.records[req_ids[row]].recorder
            assert recorder is not None
            step = int(states.step_np[slot])
            recorder.add(block, step, best[row, :length], before[row, :length], after[row, :length])
