"""vLLM's GPU worker with the canvas runner, whose steps run as CUDA graphs (``worker.graphs``)."""

from itertools import chain
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.logger import init_logger
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from vllm_osdt.geometry import max_logit_rows
from vllm_osdt.host.attention import graph_mode
from vllm_osdt.host.compat.engine import patch_scheduler_metadata
from vllm_osdt.messages import CanvasStep
from vllm_osdt.options.operator import server_options
from vllm_osdt.worker.branch_pages import make_room_in_tables
from vllm_osdt.worker.graphs import LOGIT_ARRAYS, CanvasGraphManager, Ends, GraphNeeds, StepDescriptor
from vllm_osdt.worker.model_runner import CanvasRunnerMixin, CanvasWorkerMixin, canvas_step_of
from vllm_osdt.worker.recorder import Decision
from vllm_osdt.worker.step.batch import CanvasInputBatch
from vllm_osdt.worker.step.plan import DenoisePlan
from vllm_osdt.worker.step.queries import Queries

logger = init_logger("vllm.vllm_osdt.worker.gpu_worker")


class CanvasModelRunner(CanvasRunnerMixin, GPUModelRunner):
    """Canvas runner on the GPU."""

    cudagraph_manager: CanvasGraphManager | None

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        self._options = server_options(vllm_config)
        # Of a step with another one behind it: blocks that were not ready, and those for which the second was of use.
        self._is_open, self._is_used = torch.zeros(2, self.max_num_reqs, dtype=torch.bool, device=device)

    def initialize_kv_cache(self, *args: Any, **kwargs: Any) -> None:
        """As vLLM does, with graphs of whole steps."""
        super().initialize_kv_cache(*args, **kwargs)
        names = {group.backend.get_name() for group in chain.from_iterable(self.attn_groups)}
        mode = graph_mode(self.compilation_config.cudagraph_mode, names)
        if self.dp_size > 1:
            mode = CUDAGraphMode.NONE
        if mode != self.compilation_config.cudagraph_mode:
            logger.info_once("vllm-osdt runs without CUDA graphs (attention: %s).", ", ".join(sorted(names)))
            self.compilation_config.cudagraph_mode = mode
        for group in chain.from_iterable(self.attn_groups):
            patch_scheduler_metadata(group.get_metadata_builder(), self.max_num_tokens)
        self.cudagraph_manager = CanvasGraphManager(
            self.vllm_config,
            self.device,
            mode,
            self.decode_query_len,
            model_state=self.model_state,
            sampler=self.sampler,
            head=self.head,
        )
        make_room_in_tables(self.block_tables, self.cudagraph_manager.max_entries)

    def gather_batch_req_state(self, scheduler_output: SchedulerOutput, dummy_run: bool) -> Any:
        """As vLLM does, right before it looks for a graph: whether the step may run as one."""
        state, uniform_token_count = super().gather_batch_req_state(scheduler_output, dummy_run)
        if self.cudagraph_manager is not None:
            is_graph = state is not None and self.replays_graphs
            self.cudagraph_manager.needs = self._needs(state, canvas_step_of(scheduler_output)) if is_graph else None
        return state, uniform_token_count

    def _needs(self, state: Any, step: CanvasStep) -> GraphNeeds | None:
        """What a step needs of its graph at most; None where its blocks or queries are like no graph's."""
        manager = self.cudagraph_manager
        assert manager is not None
        longest, rows = self.decode_query_len, state.num_scheduled_tokens
        length = self.model_state.canvas_states.host.block_length[state.idx_mapping_np]
        if not length.all():  # 0: vLLM's own requests
            return None
        if manager.shapes.is_block_causal and length.max() > longest:
            return None  # longer queries than those that were captured
        if manager.is_uniform and self.model_state.canvas_states.host.cuts[state.idx_mapping_np].any():
            return None  # rows behind a cut are left out
        if step.verified and manager.is_uniform:
            return None  # its rows are no whole blocks
        # Where attention has no flag for causal queries, each of their rows is one.
        is_cut = np.array([req_id in step.verified for req_id in state.req_ids])
        if step.branches:
            further = [step.branches[req_id].branches if req_id in step.branches else () for req_id in state.req_ids]
            number, branches = [len(own) for own in further], [branch for own in further for branch in own]
            own_rows = rows - [sum(branch.num_rows for branch in own) for own in further]
            rows = np.concatenate([own_rows, np.array([branch.num_rows for branch in branches], dtype=rows.dtype)])
            length = np.concatenate([length, np.repeat(length, number)])
            is_cut = np.concatenate([is_cut, np.array([branch.is_causal for branch in branches], dtype=bool)])
        if manager.is_uniform and ((length != longest).any() or not manager.takes_whole_blocks(rows)):
            return None
        num_queries = rows.size
        if manager.shapes.commits_causally:
            num_queries = rows.size if manager.is_uniform else 2 * rows.size
        elif manager.shapes.is_block_causal:
            num_queries = int(np.where(is_cut, rows, -(-rows // length)).sum())
        return GraphNeeds(rows.size, num_queries, bool(is_cut.any()) and not manager.shapes.commits_causally)

    def _put_into_graph(
        self, size: BatchExecutionDescriptor, denoise: DenoisePlan, arrays: dict[str, np.ndarray]
    ) -> tuple[StepDescriptor, dict[str, torch.Tensor], Queries]:
        """The graph of a step, its arrays on the device, and its queries."""
        manager, ends = self.cudagraph_manager, Ends.DECIDED
        assert manager is not None
        # Branches that are of no use have been left out.
        assert manager.needs is not None
        is_verified, num_queries = manager.needs.is_verified, arrays.get("block_seq_lens", arrays["seq_lens"]).size
        needs = GraphNeeds(arrays["mask_rows"].size, num_queries, is_verified)
        size = manager.smallest(arrays["positions"].size, needs, size.num_active_loras) or size
        is_longer = arrays["canvas_index"].shape[1] > manager.shapes.block_length
        has_draft = denoise.drafting.size or "draft_threshold" in arrays
        if denoise.needs_logits or is_verified:
            ends = Ends.MODEL
        elif denoise.policies or denoise.cutters or has_draft or is_longer:
            ends = Ends.PROPOSED
        elif "edit_threshold" in arrays:
            ends = Ends.EDITED
        graph = manager.choose(size, arrays["position"].size, ends)
        sent = manager.fill(graph, arrays)
        for name in ("edit_threshold", "draft_threshold"):
            if name not in arrays:
                sent.pop(name, None)
        if ends == Ends.MODEL:  # without the padding
            sent |= {name: sent[name][: arrays[name].shape[0]] for name in LOGIT_ARRAYS if name in arrays}
        return graph, sent, manager.queries(graph, sent)

    def _decide(
        self, hidden_states: torch.Tensor, input_batch: CanvasInputBatch
    ) -> tuple[Decision, torch.Tensor | None]:
        """As its base does; a graph has decided already, or has gone part of the way."""
        graph: StepDescriptor | None = input_batch.graph
        manager = self.cudagraph_manager
        if graph is None:
            return super()._decide(hidden_states, input_batch)
        assert manager is not None and input_batch.denoise is not None
        if graph.ends == Ends.MODEL:
            return self._decide_by_rows(manager.hidden_of[graph], input_batch), None
        if graph.ends == Ends.PROPOSED:
            return self.sampler.decide(input_batch.denoise, manager.proposals[graph], keeps_masks=True), None
        return manager.decisions[graph], self._run_ahead(input_batch, graph)

    def _run_ahead(self, input_batch: CanvasInputBatch, graph: StepDescriptor) -> torch.Tensor | None:
        """Launch the next step of the same rows behind this one, if most of its blocks should not be finished by it.

        Nothing of it depends on this step's outcome but what is on the device: the masks. Logits are read where this
        step had masks; a block that this step has finished has none left, and nothing happens to it.

        Returns:
            bool ``[R]``, whether it was of use: it found masks in a block that was not ready. None if it was not
            launched.
        """
        states, rows, manager = self.model_state.canvas_states, input_batch.rows, self.cudagraph_manager
        assert rows is not None and manager is not None
        if not self._options.run_ahead or graph.ends != Ends.DECIDED or not states.goes_on(rows.slots, rows.num_active):
            return None
        if self.lora_config is not None and np.unique(self.lora_state.lora_ids[rows.slots]).size > 1:
            return None  # rows of logits are fewer there, and vLLM would wait for the device to give each its adapter
        num_reqs = rows.slots.size
        is_open, is_used = self._is_open[:num_reqs], self._is_used[:num_reqs]
        torch.eq(manager.decisions[graph].num_ready[:num_reqs], 0, out=is_open)
        states.host.step[rows.slots] += 1
        num_fallbacks = states.host.num_fallbacks.copy()
        *_, arrays = self._plan(rows, is_graph=True)
        states.host.num_fallbacks[:] = num_fallbacks  # the step may be of no use
        manager.fill(graph, arrays)
        manager.replay()
        before = manager.decisions[graph].before
        assert before is not None
        torch.any(before[:num_reqs], dim=1, out=is_used)
        return is_used.logical_and_(is_open)

    def _dummy_sampler_run(self, hidden_states: torch.Tensor) -> None:
        """What vLLM measures before it gives the rest of the memory to KV pages.

        Proposals for as many positions as a step can read, where vLLM has one row a request.
        """
        num_rows = max_logit_rows(self.max_num_reqs, self.max_num_tokens)
        rows = torch.arange(num_rows, device=hidden_states.device) % hidden_states.shape[0]
        self.head.measure(hidden_states[rows])


class CanvasWorker(CanvasWorkerMixin, Worker):
    """Chooses the runner."""

    def _make_model_runner(self) -> CanvasModelRunner:
        """vLLM's hook for another runner."""
        return CanvasModelRunner(self.vllm_config, self.device)
