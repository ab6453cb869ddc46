"""Attention metadata of a canvas forward and the tables behind it (vLLM's model state of Model Runner V2)."""

from typing import Any

import numpy as np
import torch
import torch.nn as nn
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.distributed.parallel_state import get_tp_group
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.interface import ModelState
from vllm.v1.worker.gpu.states import RequestState
from vllm.v1.worker.utils import AttentionGroup

from vllm_osdt.calibration.guard import DriftGuard
from vllm_osdt.calibration.profile import CalibrationProfile
from vllm_osdt.calibration.registry import ProfileRegistry
from vllm_osdt.config import MAX_BLOCK_LENGTH, RESOLVED_KEY
from vllm_osdt.engine_config import open_store, server_options
from vllm_osdt.worker.request_states import CanvasStates, to_device
from vllm_osdt.worker.sampler import CanvasSampler


def make_registry(vllm_config: VllmConfig) -> ProfileRegistry:
    """The profiles of this worker; the first rank of its tensor-parallel group reads and writes them."""
    options = server_options(vllm_config)
    group = get_tp_group()

    def share(found: CalibrationProfile | None) -> CalibrationProfile | None:
        return group.broadcast_object(found, src=0)

    return ProfileRegistry(options.max_profiles, open_store(vllm_config), is_writer=group.is_first_rank, share=share)


def make_guard(vllm_config: VllmConfig) -> DriftGuard | None:
    """The guard that the operator asks for."""
    options = server_options(vllm_config)
    if options.drift == "off":
        return None
    return DriftGuard(
        options.drift, options.drift_window, options.drift_gap, options.drift_cosine, options.max_profiles
    )


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
        hf_config = vllm_config.model_config.hf_config
        self.canvas_states = CanvasStates(
            self.max_num_reqs,
            self.model_config.max_model_len + MAX_BLOCK_LENGTH - 1,
            hf_config.mask_token_id,
            device,
            make_registry(vllm_config),
            make_guard(vllm_config),
            logits_shift=getattr(hf_config, "logits_shift", 0),
            is_block_causal=getattr(hf_config, "is_block_causal", False),
            is_strict=getattr(hf_config, "is_threshold_strict", False),
        )

    def custom_sampler(self, sampler: Any) -> tuple[Any, Any]:
        """The sampler of canvas models; there is no rejection sampler."""
        return CanvasSampler(self.canvas_states), None

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        """Fill the request's slot; vLLM's own warm-up requests have no canvas and get none."""
        params = new_req_data.sampling_params
        if params is not None and RESOLVED_KEY in (params.extra_args or {}):
            self.canvas_states.add(req_index, new_req_data)

    def remove_request(self, req_id: str) -> None:
        """The request loses its slot; ``CanvasStates.end`` is told separately when it has ended."""
        self.canvas_states.free_slot(req_id)

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
            query_start_loc_np, seq_lens_cpu = blocks.query_start_loc, torch.from_numpy(blocks.seq_lens)
            query_start_loc = to_device(query_start_loc_np, self.device)
            seq_lens, request = to_device(blocks.seq_lens, self.device), to_device(blocks.request, self.device)
            block_tables = tuple(table[request] for table in block_tables)
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
