"""The thin runner: vLLM's Model Runner V2 with inputs that come from canvas tables."""

from typing import Any

import numpy as np
import torch
from vllm.config import ParallelConfig
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers
from vllm.v1.worker.gpu.states import RequestState

from vllm_osdt.worker.denoise_batch import CanvasInputBatch, plan_denoise
from vllm_osdt.worker.model_state import CanvasModelState


class CanvasRunnerMixin:
    """Overrides of ``GPUModelRunner``, shared by the CPU and the GPU runner.

    Stock ``prepare_inputs`` takes rows from prompt and draft tables and reads logits of every draft row; here rows come
    from the canvas table at any position, and logits are read where a position of the active block is masked.
    """

    model_state: CanvasModelState
    req_states: RequestState
    input_buffers: InputBuffers
    parallel_config: ParallelConfig
    device: torch.device
    max_num_reqs: int

    def finish_requests(self, scheduler_output: SchedulerOutput) -> None:
        """Free slots as vLLM does, and end the requests that are done (not those preempted)."""
        super().finish_requests(scheduler_output)  # type: ignore[misc]
        if scheduler_output.finished_req_ids:
            failed = getattr(scheduler_output, "failed_req_ids", ())
            for req_id in sorted(scheduler_output.finished_req_ids):
                self.model_state.canvas_states.end(req_id, failed=req_id in failed)

    def prepare_inputs(
        self,
        scheduler_output: SchedulerOutput,
        batch_req_state: Any,
        batch_desc: BatchExecutionDescriptor,
        num_active_loras: int,
    ) -> InputBatch:
        """Rows, positions and logit rows of one step.

        The scheduler gives each request a start, a number of rows and a number of placeholders; the placeholders are
        its last rows and begin at its first uncommitted position.
        """
        states, buffers = self.model_state.canvas_states, self.input_buffers
        slots = batch_req_state.idx_mapping_np.astype(np.int64)
        num_rows = batch_req_state.num_scheduled_tokens.astype(np.int64)
        num_reqs, num_tokens = len(slots), batch_req_state.num_tokens
        num_drafts = batch_req_state.num_draft_tokens_np
        if num_drafts is None:
            num_drafts = np.zeros(num_reqs, dtype=np.int32)
        start = self.req_states.num_computed_tokens_np[slots].astype(np.int64)
        block_start = start + num_rows - num_drafts
        states.begin_step(slots, block_start)

        row_ends = np.cumsum(num_rows)
        first_row = row_ends - num_rows
        positions = np.arange(num_tokens) + np.repeat(start - first_row, num_rows)
        source = positions + np.repeat(slots * states.max_model_len, num_rows)
        async_tensor_h2d(positions, out=buffers.positions[:num_tokens])
        torch.index_select(
            states.cells, 0, async_tensor_h2d(source, device=self.device), out=buffers.input_ids[:num_tokens]
        )
        query_start_loc_np = np.full(self.max_num_reqs + 1, num_tokens, dtype=np.int32)
        query_start_loc_np[0] = 0
        query_start_loc_np[1 : num_reqs + 1] = row_ends
        async_tensor_h2d(query_start_loc_np, out=buffers.query_start_loc)
        seq_lens_np = np.maximum(states.canvas_end_np[slots], start + num_rows).astype(np.int32)
        async_tensor_h2d(seq_lens_np, out=buffers.seq_lens[:num_reqs])

        denoise, logit_rows, num_logits = plan_denoise(states, slots, first_row + block_start - start, block_start)
        if not logit_rows.size and self.parallel_config.tensor_parallel_size > 1:
            logit_rows = np.zeros(1, dtype=np.int64)  # a gather over ranks of no row at all fails
        cu_num_logits_np = np.zeros(num_reqs + 1, dtype=np.int32)
        np.cumsum(num_logits, out=cu_num_logits_np[1:])
        num_tokens_padded = max(num_tokens, batch_desc.num_tokens)
        idx_mapping = denoise.slots
        return CanvasInputBatch(
            req_ids=batch_req_state.req_ids,
            num_reqs=num_reqs,
            num_reqs_after_padding=num_reqs,
            idx_mapping=idx_mapping,
            idx_mapping_np=batch_req_state.idx_mapping_np,
            expanded_idx_mapping=idx_mapping,
            expanded_local_pos=idx_mapping,
            num_scheduled_tokens=batch_req_state.num_scheduled_tokens,
            num_tokens=num_tokens,
            num_tokens_after_padding=num_tokens_padded,
            num_draft_tokens=int(num_drafts.sum()),
            num_draft_tokens_per_req=num_drafts,
            query_start_loc=buffers.query_start_loc[: num_reqs + 1],
            query_start_loc_np=query_start_loc_np[: num_reqs + 1],
            seq_lens=buffers.seq_lens[:num_reqs],
            seq_lens_cpu_upper_bound=torch.from_numpy(seq_lens_np),
            dcp_local_seq_lens=None,
            num_computed_tokens_np=self.req_states.num_computed_tokens_np[slots],
            prefill_len_np=batch_req_state.prefill_len_np,
            num_computed_prefill_tokens_np=batch_req_state.num_computed_prefill_tokens_np,
            is_prefilling_np=batch_req_state.is_prefilling_np,
            has_prefill=batch_req_state.has_prefill,
            decode_graph_eligible=batch_req_state.decode_graph_eligible,
            input_ids=buffers.input_ids[:num_tokens_padded],
            positions=buffers.positions[:num_tokens_padded],
            is_padding=buffers.is_padding[:num_tokens_padded],
            logits_indices=async_tensor_h2d(logit_rows, device=self.device),
            cu_num_logits=async_tensor_h2d(cu_num_logits_np, device=self.device),
            cu_num_logits_np=cu_num_logits_np,
            has_structured_output_reqs=False,
            prompt_lens=None,
            denoise=denoise,
        )

    def calibration_profiles(self) -> list[dict[str, Any]]:
        """The profiles in memory as plain values, oldest first (see :func:`vllm_osdt.profiles`)."""
        return [profile.as_dict() for profile in self.model_state.canvas_states.registry.profiles.values()]

    def postprocess_sampled(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the sampler has written the canvas, and the scheduler says where each step starts."""


class CanvasWorkerMixin:
    """What the CPU and the GPU worker offer to ``LLM.collective_rpc``."""

    model_runner: CanvasRunnerMixin

    def calibration_profiles(self) -> list[dict[str, Any]]:
        """The profiles in this worker's memory."""
        return self.model_runner.calibration_profiles()
