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
from vllm_osdt.options.operator import server_options
from vllm_osdt.worker.recorder import StepRecorder
from vllm_osdt.worker.sampler import CanvasSampler
from vllm_osdt.worker.slots import CanvasStates
from vllm_osdt.worker.step.queries import Queries


class CanvasModelState(ModelState):
    """State of a model that denoises a canvas.

    A step's queries are any rows of prompt and canvas, without a causal mask. Where every position sees the whole
    canvas, they attend to all pages of the request; keys and values of rows that do not run stay as the last refresh
    left them. Those of a block-causal model are cut at block boundaries, and each block is to attention a request of
    its own that ends with it; keys and values of all rows are written before any is read, so a block sees the ones
    before it that run in the same step. Where the model commits causally, the cut is at the active block, and the rows
    before it are a causal query.
    """

    num_new_sampled_tokens_per_step = 0

    def __init__(self, vllm_config: VllmConfig, model: nn.Module, encoder_cache: Any, device: torch.device) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        traits: Traits = vllm_config.model_config.hf_config.traits
        row_length = self.model_config.max_model_len + MAX_BLOCK_LENGTH - 1
        self.canvas_states = CanvasStates(self.max_num_reqs, row_length, traits, device)
        self.canvas_states.load_policies(server_options(vllm_config))
        self.recorder = StepRecorder(self.canvas_states)
        self._piece_tables: dict[int, torch.Tensor] = {}  # by KV group, of steps that run as graphs
        self.assignments: dict[str, Assignment] = {}  # of the step that is being prepared, from the scheduler

    def custom_sampler(self, sampler: Any) -> tuple[Any, Any]:
        """The sampler of canvas models; there is no rejection sampler."""
        return CanvasSampler(sampler, self.canvas_states, self.recorder), None

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
        queries = getattr(input_batch, "queries", None) or _queries_of_requests(input_batch)
        return self.metadata(
            queries,
            input_batch.num_tokens,
            block_tables,
            slot_mappings,
            attn_groups,
            kv_cache_config,
            for_capture=for_capture,
        )

    def metadata(
        self,
        queries: Queries,
        num_tokens: int,
        block_tables: tuple[torch.Tensor, ...],
        slot_mappings: torch.Tensor,
        attn_groups: list[list[AttentionGroup]],
        kv_cache_config: KVCacheConfig,
        *,
        for_capture: bool,
    ) -> dict[str, Any]:
        """Attention's metadata by layer.

        Args:
            queries: Of the step.
            num_tokens: Its rows.
            block_tables: Pages of each request, by KV group.
            slot_mappings: Where keys and values go.
            attn_groups, kv_cache_config: vLLM's.
            for_capture: A graph is captured with it.
        """
        num_queries = queries.seq_lens.shape[0]
        if queries.request is not None:
            block_tables = tuple(
                self._tables_of_pieces(group, table, queries.request, keeps_address=queries.start_loc_np is None)
                for group, table in enumerate(block_tables)
            )
        seq_lens_cpu = None if queries.seq_lens_np is None else torch.from_numpy(queries.seq_lens_np)
        start_loc_np = queries.start_loc_np
        if start_loc_np is None:  # nothing of ours reads it
            start_loc_np = np.zeros(num_queries + 1, dtype=np.int32)
        return build_attn_metadata(
            attn_groups=attn_groups,
            num_reqs=num_queries,
            num_tokens=num_tokens,
            query_start_loc_gpu=queries.start_loc,
            query_start_loc_cpu=torch.from_numpy(start_loc_np),
            max_query_len=queries.max_query_len,
            seq_lens=queries.seq_lens,
            max_seq_len=self.max_model_len if queries.max_seq_len is None else queries.max_seq_len,
            block_tables=block_tables,
            slot_mappings=slot_mappings,
            kv_cache_config=kv_cache_config,
            seq_lens_cpu_upper_bound=seq_lens_cpu,
            for_cudagraph_capture=for_capture,
            causal=False if queries.causal is None else queries.causal,
        )

    def _tables_of_pieces(
        self, group: int, table: torch.Tensor, request: torch.Tensor, *, keeps_address: bool
    ) -> torch.Tensor:
        """The pages of each query's request, int32 ``[S, pages]``; at one address where a graph reads them."""
        if not keeps_address:
            return table[request]
        found = self._piece_tables.get(group)
        if found is None or found.shape[0] < request.shape[0]:  # graphs are captured from the largest down
            found = self._piece_tables[group] = table.new_zeros(request.shape[0], table.shape[1])
        return torch.index_select(table, 0, request, out=found[: request.shape[0]])


def _queries_of_requests(input_batch: InputBatch) -> Queries:
    """Of vLLM's own batches, where each request is one."""
    seq_lens = input_batch.seq_lens_cpu_upper_bound
    return Queries(
        input_batch.query_start_loc,
        input_batch.seq_lens[: input_batch.num_reqs],
        None,
        int(input_batch.num_scheduled_tokens.max()),
        None if seq_lens is None else int(seq_lens[: input_batch.num_reqs].max()),
        input_batch.query_start_loc_np,
        None if seq_lens is None else seq_lens.numpy(),
    )
