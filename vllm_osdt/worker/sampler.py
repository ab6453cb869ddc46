"""Logits -> proposal and confidence -> unmask -> canvas -> vLLM's ``SamplerOutput``.

Source: LLaDA (arXiv 2502.09992) for proposals and confidence; Fast-dLLM (arXiv 2505.22618) and OSDT (arXiv
2511.02077) for the rules, which ``vllm_osdt.policies`` turns into parameters.
"""

from types import SimpleNamespace
from typing import Any

import torch
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from csrc_triton import Proposals, implementations
from csrc_triton.edit import edit
from csrc_triton.types import NO_CONFIDENCE
from vllm_osdt.policies import Step
from vllm_osdt.worker.recorder import StepRecorder, grids_to_record
from vllm_osdt.worker.slots import CanvasStates
from vllm_osdt.worker.step_plan import AdjustedRows, DenoiseBatch


class CanvasSampler:
    """Takes one denoising step of every request in the batch.

    Emits nothing for a block that is not finished, and the block's tokens in the step that finishes it. Works on
    whole tensors: no host synchronization and no loop over requests.
    """

    # The runner reads this to keep penalty counts; there are none.
    penalties_state = SimpleNamespace(output_bin_counts=None)
    compute_nans = False

    def __init__(self, states: CanvasStates, recorder: StepRecorder) -> None:
        self.states = states
        self.recorder = recorder
        self._confidence, self._unmask, *_ = implementations(states.device)
        self._no_rejected = torch.zeros(states.host.block_length.size, dtype=torch.int32, device=states.device)

    def add_request(self, req_idx: int, sampling_params: Any) -> None:
        """Nothing: ``CanvasStates.add_request`` has read the parameters."""

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

        states, blocks = self.states, batch.blocks
        proposals = Proposals(
            batch.position,
            *self._confidence(
                logits[: batch.num_rows], states.mask_token_id, batch.temperature, batch.noise_key, batch.by_entropy
            ),
        )
        is_open = is_masked = None
        if batch.edit_threshold is not None:
            is_open, is_masked = edit(blocks, proposals, states.num_post_steps, batch.edit_threshold)
        before = None
        if batch.recorded is not None:  # the masked positions whose logits were read
            before = torch.zeros_like(blocks.canvas_index, dtype=torch.bool)
            before.view(-1)[batch.position] = True if is_masked is None else is_masked
        if batch.adjusted:
            canvas, confidence, result = self._unmask_adjusted(batch, proposals)
        else:
            canvas, confidence, result = self._unmask(blocks, proposals, batch.rules)
        states.copy_masks_to_host(batch.slots_np, batch.slots, canvas.shape[1])
        recorded = None
        if before is not None:
            recorded = grids_to_record(states, batch, proposals, confidence, before, canvas)
        self.recorder.see(input_batch.req_ids, batch, proposals, is_masked, recorded)
        return SamplerOutput(
            sampled_token_ids=canvas,
            logprobs_tensors=None,
            num_nans=None,
            num_sampled=result.num_ready if is_open is None else result.num_ready.masked_fill(is_open, 0),
            num_rejected=self._no_rejected[: canvas.shape[0]],
        )

    def _unmask_adjusted(self, batch: DenoiseBatch, proposals: Proposals) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """Unmask where some requests' policies change the step first; tensor operations on the rows of each policy."""
        width = batch.blocks.canvas_index.shape[1]
        _, score = proposals.to_grids(*batch.blocks.canvas_index.shape)
        parameter = batch.rules.parameter.clone()
        masked = self.states.masked[batch.blocks.slots, :width]
        score.masked_fill_(~masked, NO_CONFIDENCE)  # a request that edits has logits of written positions too
        steps: list[tuple[AdjustedRows, Step, torch.Tensor]] = []
        for adjusted in batch.adjusted:
            rows, slots = adjusted.rows, adjusted.slots
            step = Step(
                score[rows],
                parameter[rows],
                self.states.constants[slots],
                self.states.policy_state[slots],
                adjusted.step_index,
            )
            adjusted.policy.adjust(step)
            score[rows], parameter[rows] = step.score, step.parameter
            steps.append((adjusted, step, masked[rows]))
        changed = proposals._replace(confidence=score.view(-1)[proposals.position])
        found = self._unmask(batch.blocks, changed, batch.rules._replace(parameter=parameter))
        for adjusted, step, before in steps:
            after = self.states.masked[adjusted.slots, :width]
            adjusted.policy.observe(step, before & ~after)
            self.states.policy_state[adjusted.slots] = step.state
        return found
