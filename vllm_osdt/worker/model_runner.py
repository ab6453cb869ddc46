"""The thin runner: vLLM's Model Runner V2 with inputs that come from canvas tables."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from vllm.config import LoRAConfig, VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.states import RequestState
from vllm.v1.worker.utils import AttentionGroup
from vllm.v1.worker.worker_base import CompilationTimes

from csrc_triton import implementations
from vllm_osdt.host.attention import BACKENDS_WITH_BUFFERS, check_attention, check_causal_attention
from vllm_osdt.messages import CANVAS_STEP, CanvasStep
from vllm_osdt.options.operator import server_options
from vllm_osdt.worker.branch_pages import branch_tables, copy_pages, plan_pages
from vllm_osdt.worker.grammar import grammar_rows
from vllm_osdt.worker.head import Head, choose_head
from vllm_osdt.worker.model_state import CanvasModelState
from vllm_osdt.worker.recorder import Decision
from vllm_osdt.worker.sampler import CanvasSampler
from vllm_osdt.worker.step.batch import CanvasInputBatch, denoise_batch
from vllm_osdt.worker.step.layout import StepPlan, plan_step
from vllm_osdt.worker.step.plan import DenoisePlan, plan_denoise
from vllm_osdt.worker.step.queries import (
    BlockQueries,
    Queries,
    split_queries_at_canvas,
    split_queries_by_block,
    split_queries_of_branches,
)
from vllm_osdt.worker.step.rows import StepRows, step_rows
from vllm_osdt.worker.transfer import send
from vllm_osdt.worker.warmup import warm_up, warm_up_lengths
from vllm_osdt.worker.weights import WatchedRunnerMixin, WatchedWorkerMixin


class CanvasRunnerMixin(WatchedRunnerMixin):
    """Overrides of ``GPUModelRunner``, shared by the CPU and the GPU runner.

    Stock ``prepare_inputs`` takes rows from prompt and draft tables and reads logits of every draft row; here rows come
    from the canvas table at any position, and logits are read where a position of the active block is masked.
    """

    model_state: CanvasModelState
    req_states: RequestState
    input_buffers: InputBuffers
    lora_config: LoRAConfig | None
    device: torch.device
    max_num_reqs: int
    decode_query_len: int
    sampler: CanvasSampler
    attn_groups: list[list[AttentionGroup]]
    kv_cache_config: KVCacheConfig
    vllm_config: VllmConfig
    block_tables: BlockTables
    kv_caches: list[torch.Tensor]
    model: Any
    head: Head
    replays_graphs = True
    # Of each request of the step that is being prepared, and of its further branches.
    _num_logits: np.ndarray | None = None
    _further: tuple[np.ndarray, np.ndarray]  # requests and rows of those
    _padded_to: tuple[int, int] | None = None  # rows, and rows of logits, where a graph computes it
    _num_logit_rows = 0  # of the step that is being decided

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """As vLLM does, and choose what makes proposals of hidden states."""
        super().load_model(*args, **kwargs)
        operator = server_options(self.vllm_config)
        self.head = choose_head(
            self.model, self.sampler, is_fused=operator.fused_lm_head, max_rows=operator.fused_lm_head_max_rows
        )

    def initialize_kv_cache(self, *args: Any, **kwargs: Any) -> None:
        """As vLLM does, unless it has chosen attention that cannot take a canvas."""
        super().initialize_kv_cache(*args, **kwargs)  # type: ignore[misc]
        states = self.model_state.canvas_states
        for name in {group.backend.get_name() for group in chain.from_iterable(self.attn_groups)}:
            check_attention(name, is_block_causal=states.is_block_causal)
            if states.commits_causally:
                check_causal_attention(name)
            if name in BACKENDS_WITH_BUFFERS:
                states.has_branches = False

    def add_requests(self, scheduler_output: SchedulerOutput) -> None:
        """As vLLM does; the model state finds what the engine core assigned to each request."""
        self.model_state.assignments = canvas_step_of(scheduler_output).assignments
        super().add_requests(scheduler_output)  # type: ignore[misc]

    def finish_requests(self, scheduler_output: SchedulerOutput) -> None:
        """As vLLM does; what is kept of requests that may come back is kept of no others."""
        super().finish_requests(scheduler_output)  # type: ignore[misc]
        self.model_state.canvas_states.forget(scheduler_output.finished_req_ids)

    def execute_model(self, *args: Any, **kwargs: Any) -> Any:
        """As vLLM does; a step without rows has an output of its own, which takes our report."""
        return self._report(super().execute_model(*args, **kwargs))  # type: ignore[misc]

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        """As vLLM does, and report."""
        return self._report(super().sample_tokens(*args, **kwargs))  # type: ignore[misc]

    def _report(self, output: Any) -> Any:
        return self.model_state.recorder.attach_to(output, self.held_weights())

    def _set_active_loras(
        self, prompt_lora_mapping: tuple[int, ...], token_lora_mapping: tuple[int, ...], *args: Any, **kwargs: Any
    ) -> None:
        """As vLLM does, with an adapter for every row of logits, where vLLM has one of each request.

        Where all rows of a graph's step have the same one, its padding has that, too: vLLM writes what its kernels
        read, and waits for the device, only where something changes, and rows of logits become fewer at each step.
        """
        if self._num_logits is not None:
            further, num_rows = self._further
            of_branches = np.array(prompt_lora_mapping, dtype=np.int64)[further]
            token_lora_mapping = (*token_lora_mapping, *np.repeat(of_branches, num_rows).tolist())
            prompt_lora_mapping = tuple(np.repeat([*prompt_lora_mapping, *of_branches], self._num_logits))
            if self._padded_to is not None and len(set(token_lora_mapping)) == 1:
                token_lora_mapping, prompt_lora_mapping = (
                    token_lora_mapping[:1] * number for number in self._padded_to
                )
            self._num_logits = None
        super()._set_active_loras(prompt_lora_mapping, token_lora_mapping, *args, **kwargs)  # type: ignore[misc]

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
        num_reqs = len(slots)
        num_drafts = batch_req_state.num_draft_tokens_np
        if num_drafts is None:
            num_drafts = np.zeros(num_reqs, dtype=np.int32)
        num_computed = self.req_states.num_computed_tokens_np[slots]
        canvas_step = canvas_step_of(scheduler_output)
        first_position = canvas_step.first_position
        decides_first = np.zeros(num_reqs, dtype=bool)
        if first_position:
            decides_first[:] = [req_id in first_position for req_id in batch_req_state.req_ids]
        for slot, req_id in zip(slots.tolist(), batch_req_state.req_ids, strict=True) if canvas_step.drafts else ():
            if req_id in canvas_step.drafts:
                states.write_draft(slot, *canvas_step.drafts[req_id])
        pages = [canvas_step.branches.get(req_id) for req_id in batch_req_state.req_ids] if canvas_step.branches else []
        branches = [() if one is None else one.branches for one in pages]
        if branches:
            num_rows -= [sum(branch.num_rows for branch in own) for own in branches]
        start = num_computed.astype(np.int64)
        span = np.zeros((num_reqs if canvas_step.verified else 0, 2), dtype=np.int64)
        for index, req_id in enumerate(batch_req_state.req_ids if canvas_step.verified else ()):
            span[index] = canvas_step.verified.get(req_id, (0, 0))
        rows = step_rows(states, slots, start, num_rows, num_drafts, decides_first, branches, span)
        runs_as_graph = batch_desc.cg_mode == CUDAGraphMode.FULL
        plan, denoise, pieces, arrays = self._plan(rows, is_graph=runs_as_graph)
        arrays |= states.arrays_of_entered_blocks()
        if rows.branch.size:
            arrays |= plan_pages(rows, plan.seq_lens, pages, self.block_tables.block_sizes[0])
        num_tokens = int(rows.num_rows.sum())
        graph = None
        if runs_as_graph:
            graph, sent, queries = self._put_into_graph(batch_desc, denoise, arrays)
        else:
            if not plan.logit_rows.size:
                # Some kernels, and a gather over ranks, fail on no row at all; the sampler leaves a row too many out.
                arrays["logit_rows"] = np.zeros(1, dtype=np.int64)
            sent = send(arrays, self.device)
            queries = _queries(sent, plan, pieces)
            torch.index_select(states.cells, 0, sent["source"], out=buffers.input_ids[:num_tokens])
        states.enter_blocks(sent)
        logit_rows = sent["logit_rows"]
        # Adapters know rows by their place in the whole batch.
        is_narrowed = self.lora_config is None
        if not is_narrowed:
            self._num_logits = np.diff(plan.cu_num_logits)
            self._num_logits[0] += not plan.logit_rows.size
            self._further = rows.request[num_reqs:], rows.num_rows[num_reqs:]
            self._padded_to = None if graph is None else (graph.num_tokens, logit_rows.shape[0] or 1)
        num_tokens_padded = sent["positions"].shape[0]
        num_reqs_padded = num_reqs if graph is None else sent["seq_lens"].shape[0]
        if graph is None:
            buffers.is_padding[:num_tokens].fill_(False)  # a dummy step leaves it set; experts skip padding
            is_padding = buffers.is_padding[:num_tokens]
        else:
            is_padding = sent["is_padding"]
        idx_mapping = sent["slots"][:num_reqs]
        return CanvasInputBatch(
            req_ids=batch_req_state.req_ids,
            num_reqs=num_reqs,
            num_reqs_after_padding=num_reqs_padded,
            idx_mapping=idx_mapping,
            idx_mapping_np=batch_req_state.idx_mapping_np,
            expanded_idx_mapping=sent["logit_slots"],
            expanded_local_pos=idx_mapping,
            num_scheduled_tokens=rows.num_rows[:num_reqs].astype(batch_req_state.num_scheduled_tokens.dtype),
            num_tokens=num_tokens,
            num_tokens_after_padding=num_tokens_padded,
            num_draft_tokens=int(num_drafts.sum()),
            num_draft_tokens_per_req=num_drafts,
            query_start_loc=sent["query_start_loc"],
            query_start_loc_np=plan.query_start_loc,
            seq_lens=sent["seq_lens"],
            seq_lens_cpu_upper_bound=torch.from_numpy(plan.seq_lens),
            dcp_local_seq_lens=None,
            num_computed_tokens_np=num_computed,
            prefill_len_np=batch_req_state.prefill_len_np,
            num_computed_prefill_tokens_np=batch_req_state.num_computed_prefill_tokens_np,
            is_prefilling_np=batch_req_state.is_prefilling_np,
            has_prefill=batch_req_state.has_prefill,
            decode_graph_eligible=batch_req_state.decode_graph_eligible,
            input_ids=buffers.input_ids[:num_tokens_padded],
            positions=sent["positions"],
            is_padding=is_padding,
            logits_indices=logit_rows,
            cu_num_logits=sent["cu_num_logits"],
            cu_num_logits_np=plan.cu_num_logits,
            has_structured_output_reqs=False,
            prompt_lens=None,
            denoise=denoise_batch(states, denoise, sent),
            logit_rows=logit_rows if is_narrowed else None,
            queries=queries,
            graph=graph,
            rows=rows,
            plan=plan,
            pages=sent if rows.branch.size else None,
        )

    def prepare_attn(self, input_batch: InputBatch) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """As vLLM does; a step with further branches has page tables of its own, and copies pages."""
        sent = getattr(input_batch, "pages", None)
        if sent is None:
            return super().prepare_attn(input_batch)  # type: ignore[misc]
        assert isinstance(input_batch, CanvasInputBatch)
        num_entries = None if input_batch.graph is None else input_batch.num_reqs_after_padding
        table, slot_mappings, copied = branch_tables(self.block_tables, sent, input_batch.positions, num_entries)
        copy_pages(self.kv_caches, self.kv_cache_config.num_blocks, copied, sent["copy_page"])
        return (table,), slot_mappings

    def _plan(
        self, rows: StepRows, *, is_graph: bool
    ) -> tuple[StepPlan, DenoisePlan, BlockQueries | None, dict[str, np.ndarray]]:
        """Plan a step on the host: its layout, its denoising, the pieces of its blocks, and its arrays by name.

        Args:
            rows: What runs.
            is_graph: Blocks are then as wide as those of the graphs, unless one is longer.
        """
        states = self.model_state.canvas_states
        width = max(self.decode_query_len, int(states.host.block_length[rows.slots].max())) if is_graph else None
        plan = plan_step(states, rows, width)
        denoise = plan_denoise(states, rows, plan)
        pieces = None
        if states.commits_causally:
            pieces = split_queries_at_canvas(rows)
        elif states.is_block_causal:
            pieces = split_queries_by_block(states, rows)
        elif rows.is_causal.any():
            pieces = split_queries_of_branches(rows, plan.seq_lens)
        arrays = {
            "positions": plan.positions,
            "source": plan.source,
            "query_start_loc": plan.query_start_loc,
            "seq_lens": plan.seq_lens,
            "logit_rows": plan.logit_rows,
            "logit_slots": plan.logit_slots,
            "cu_num_logits": plan.cu_num_logits,
            **denoise.arrays,
            **({} if pieces is None else pieces.arrays()),
        }
        return plan, denoise, pieces, arrays

    def _put_into_graph(
        self, size: BatchExecutionDescriptor, denoise: DenoisePlan, arrays: dict[str, np.ndarray]
    ) -> tuple[Any, dict[str, torch.Tensor], Queries]:
        """The graph of a step, its arrays on the device, and its queries; only a GPU's runner has graphs."""
        raise NotImplementedError

    def sample(
        self, hidden_states: torch.Tensor, input_batch: InputBatch, grammar_output: Any
    ) -> tuple[SamplerOutput, torch.Tensor, torch.Tensor]:
        """In place of vLLM's, which has one row of logits for each token that it samples."""
        assert isinstance(input_batch, CanvasInputBatch)
        if grammar_output is not None:
            assert input_batch.denoise is not None
            width = input_batch.denoise.blocks.canvas_index.shape[1]
            rows = grammar_rows(grammar_output, input_batch.req_ids, input_batch.cu_num_logits_np, width, self.device)
            input_batch.denoise = replace(input_batch.denoise, grammar=rows)
        decision, ran_ahead = self._decide(hidden_states, input_batch)
        output = self.sampler.finish(input_batch, decision, ran_ahead)
        return output, output.num_sampled, output.num_rejected

    def _decide(
        self, hidden_states: torch.Tensor, input_batch: CanvasInputBatch
    ) -> tuple[Decision, torch.Tensor | None]:
        """What a step decides, and how many behind it were of use (see ``CanvasSampler.finish``)."""
        if input_batch.logit_rows is None:
            hidden_states = hidden_states[input_batch.logits_indices]
        return self._decide_by_rows(hidden_states, input_batch), None

    def _decide_by_rows(self, hidden_states: torch.Tensor, input_batch: CanvasInputBatch) -> Decision:
        """What a step decides.

        Args:
            hidden_states: ``[at least M, hidden_size]``, of the rows whose logits are read.
            input_batch: The step.
        """
        batch = input_batch.denoise
        assert batch is not None
        if batch.needs_logits:
            # Requests that want no logits have the proposals that they have without the others.
            rows = hidden_states[: batch.position.shape[0]]
            self._num_logit_rows = rows.shape[0]
            own = None if self.head.writes_logits(rows.shape[0]) else self.head.propose(hidden_states, batch)
            logits = self.model.compute_logits(rows)
            return self.sampler.decide_by_logits(logits, batch, own, rows, self._compute_some_logits)
        proposals = self.head.propose(hidden_states, batch)
        return self.sampler.decide(batch, proposals, keeps_masks=batch.recorded is not None)

    def _compute_some_logits(self, hidden_states: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Logits of other hidden states in place of some of a step's rows.

        Args:
            hidden_states: ``[S, hidden_size]``.
            rows: int64 ``[S]``, which of the step's rows whose logits are read; adapters know a row by that.
        """
        if self.lora_config is None:
            return self.model.compute_logits(hidden_states)
        all_rows = hidden_states.new_zeros(self._num_logit_rows, hidden_states.shape[1])
        all_rows[rows] = hidden_states
        return self.model.compute_logits(all_rows)[rows]

    def postprocess_sampled(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the sampler has written the canvas, and the scheduler says where each step starts."""


class CanvasWorkerMixin(WatchedWorkerMixin):
    """What the CPU and the GPU worker have in common: a warm-up of our own, and a watch on their weights."""

    model_runner: CanvasRunnerMixin
    vllm_config: VllmConfig

    def compile_or_warm_up_model(self) -> CompilationTimes:
        """Warm up as vLLM does, and the steps of a canvas."""
        times = super().compile_or_warm_up_model()  # type: ignore[misc]
        runner = self.model_runner
        runner.replays_graphs = False  # capturing them has warmed up theirs
        head = runner.head
        for way in head.ways:
            runner.head = way
            warm_up(self.vllm_config, runner.kv_cache_config, self.execute_model, self.sample_tokens)  # type: ignore[attr-defined]
        runner.head = head
        if runner.device.type != "cpu":
            warm_up_lengths(runner.model_state.canvas_states, implementations(runner.device).unmask)
        runner.replays_graphs = True
        return times


def _queries(sent: Mapping[str, torch.Tensor], plan: StepPlan, pieces: BlockQueries | None) -> Queries:
    """The queries of attention of a step that is no graph's: requests, or pieces of blocks.

    Args:
        sent: The step's arrays on the device.
        plan, pieces: The same on the host.
    """
    if pieces is None:
        start_loc, seq_lens, prefix = plan.query_start_loc, plan.seq_lens, ""
    else:
        start_loc, seq_lens, prefix = pieces.query_start_loc, pieces.seq_lens, "block_"
    return Queries(
        sent[prefix + "query_start_loc"],
        sent[prefix + "seq_lens"],
        sent.get("block_request"),
        int(np.diff(start_loc).max()),
        int(seq_lens.max()),
        start_loc,
        seq_lens,
        sent.get("block_causal"),
    )


def canvas_step_of(scheduler_output: SchedulerOutput) -> CanvasStep:
    """What the scheduler says of a step; nothing of vLLM's own dummy steps."""
    return getattr(scheduler_output, CANVAS_STEP, None) or CanvasStep()
