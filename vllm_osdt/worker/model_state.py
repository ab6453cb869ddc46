"""Attention metadata of a canvas forward and the tables behind it (vLLM's model state of Model Runner V2)."""

from typing import Any

import numpy as np
import torch
import torch.nn as nn
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.interface import ModelState
from vllm.v1.worker.gpu.states import RequestState
from vllm.v1.worker.utils import AttentionGroup

from vllm_osdt.geometry import MAX_BLOCK_LENGTH
from vllm_osdt.messages import Assignment, RequestSpec
from vllm_osdt.models.traits import Traits
from vllm_osdt.worker.recorder import StepRecorder
from vllm_osdt.worker.sampler import CanvasSampler
from vllm_osdt.worker.slots import CanvasStates


class CanvasModelState(ModelState):
    """State of a model that denoises a canvas.

    A step's queries are any rows of prompt and canvas, without a causal mask. Where every position sees the whole
    canvas, they attend to all pages of the request; keys and values of rows that do not run stay as the last refresh
    left them. Those of a block-causal model are cut at block boundaries, and each block is to attention a request of
    its own that ends with it; keys and values of all rows are written before any is read, so a block sees the ones
    before it that run in the same step.
    """

    num_new_sampled_tokens_per_step = 0

    def __init__(self, vllm_config: VllmConfig, model: nn.Module, encoder_cache: Any, device: torch.device) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        traits: Traits = vllm_config.model_config.hf_config.traits
        row_length = self.model_config.max_model_len + MAX_BLOCK_LENGTH - 1
        self.canvas_states = CanvasStates(self.max_num_reqs, row_length, traits, device)
        self.recorder = StepRecorder(self.canvas_states)
        self.assignments: dict[str, Assignment] = {}  # of the step that is being prepared, from the scheduler

    def custom_sampler(self, sampler: Any) -> tuple[Any, Any]:
        """The sampler of canvas models; there is no rejection sampler."""
        return CanvasSampler(self.canvas_states, self.recorder), None

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        """Fill the request's slot; vLLM's own warm-up requests have no canvas and get none."""
        spec = RequestSpec.of(new_req_data.sampling_params)
        if spec is not None:
            self.canvas_states.add_request(req_index, new_req_data, spec, self.assignments[new_req_data.req_id])

    def remove_request(self, req_id: str) -> None:
        """The request loses its slot."""
        self.canvas_states.remove_request(req_id)

    def prepare_inputs_embeds(
        self, scheduled_encoder_inputs: dict[str, list[int]], input_batch: InputBatch, req_states: RequestState
    ) -> None:
        """Text only."""

    def prepare_inputs(self, input_batch: InputBatch, req_states: RequestState) -> dict[str, Any]:
        """The rows whose logits are read, where the batch has them."""
        return {"logit_rows": getattr(input_batch, "logit_rows", None)}

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        """No model inputs beyond the standard ones."""
        return {}

    def prepare_attn(
        self,
        input_batch: InputBatch,
        cudagraph_mode: CUDAGraphMode,
        block_tables: tuple[torch.Tensor, ...],
        slot_mappings: torch.Tensor,
        attn_groups: list[list[AttentionGroup]],
        kv_cache_config: KVCacheConfig,
        for_capture: bool = False,
        ubatch_idx: int = 0,
    ) -> dict[str, Any]:
        """Metadata for attention over the whole canvas, or over the blocks so far (see the class)."""
        blocks = getattr(input_batch, "block_queries", None)
        if blocks is None:
            query_start_loc, query_start_loc_np = input_batch.query_start_loc, input_batch.query_start_loc_np
            seq_lens, seq_lens_cpu = input_batch.seq_lens, input_batch.seq_lens_cpu_upper_bound
            num_queries, max_query_len = input_batch.num_reqs, input_batch.num_scheduled_tokens.max()
            is_known = seq_lens_cpu is not None and not for_capture
        else:
            on_device = input_batch.block_tensors
            query_start_loc_np, seq_lens_cpu = blocks.query_start_loc, torch.from_numpy(blocks.seq_lens)
            query_start_loc, seq_lens = on_device["block_query_start_loc"], on_device["block_seq_lens"]
            block_tables = tuple(table[on_device["block_request"]] for table in block_tables)
            num_queries, max_query_len = blocks.request.size, np.diff(query_start_loc_np).max()
            is_known = True
        return build_attn_metadata(
            attn_groups=attn_groups,
            num_reqs=num_queries,
            num_tokens=input_batch.num_tokens,
            query_start_loc_gpu=query_start_loc,
            query_start_loc_cpu=torch.from_numpy(query_start_loc_np),
            max_query_len=int(max_query_len),
            seq_lens=seq_lens,
            # Attention plans its work by it.
            max_seq_len=int(seq_lens_cpu[:num_queries].max()) if is_known else self.max_model_len,
            block_tables=block_tables,
            slot_mappings=slot_mappings,
            kv_cache_config=kv_cache_config,
            seq_lens_cpu_upper_bound=seq_lens_cpu,
            for_cudagraph_capture=for_capture,
            causal=False,
        )
