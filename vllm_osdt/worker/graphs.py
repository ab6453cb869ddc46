"""Steps of a canvas as CUDA graphs: everything behind the plan is one launch.

A graph takes tokens out of the tables, runs the model, reads logits, and decides: it writes masks and tokens and counts
what is ready. It is captured for a number of rows, and for several numbers of logit rows; a smaller step is padded
with rows, requests and logits that change nothing. Any mix of requests fits: what a request computes is its own
query of attention, and a block-causal model's queries are cut at blocks. Steps that are larger than the largest graph
are bound by the GPU, not by launches, and run without one. Blocks that are longer than the served ones are decided
behind a graph that ends with the proposals: these do not depend on the length of a block.

Where rows may have adapters (LoRA), the kernels of vLLM's adapters are in the graph, and what they read of a step is
written before it. An engine with adapters has each graph twice, without these kernels where no row has one.

The plan is copied into one buffer, in which every array of a graph has its place.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn as nn
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import set_forward_context
from vllm.v1.worker.gpu.attn_utils import build_slot_mappings_by_layer
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager, ModelCudaGraphManager
from vllm.v1.worker.gpu.input_batch import InputBuffers

from csrc_triton import Proposals
from vllm_osdt.geometry import MAX_BLOCK_LENGTH
from vllm_osdt.options.operator import default_decoding_options
from vllm_osdt.policies import POLICIES
from vllm_osdt.worker.head import Head
from vllm_osdt.worker.sampler import Decision
from vllm_osdt.worker.step.batch import denoise_batch
from vllm_osdt.worker.step.plan import idle_plan
from vllm_osdt.worker.step.queries import Queries
from vllm_osdt.worker.transfer import StagedBuffer, align

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.worker.utils import AttentionGroup

    from vllm_osdt.worker.model_state import CanvasModelState
    from vllm_osdt.worker.sampler import CanvasSampler

LOGIT_SHARES = (4, 2, 1)  # logit rows of a graph: its rows, divided by each
BYTES_PER_REQUEST = 2048 + 8 * MAX_BLOCK_LENGTH  # of arrays that only some steps have
BYTES_PER_LOGIT_ROW = 352  # likewise
ROWS_PER_VERIFIED = 2  # rows of a branch that verifies a position, at least, on average
LOGIT_ARRAYS = ("position", "temperature", "noise_key", "by_entropy", "logit_slots", "logit_rows")  # one entry a row


class Ends(Enum):
    """Where a graph ends."""

    DECIDED = "decided"
    """Masks and tokens are written."""
    EDITED = "edited"
    """Likewise, after tokens have been edited: logits are read in whole blocks."""
    PROPOSED = "proposed"
    """Tokens are proposed; policies that adjust the step decide outside, as do drafts and longer blocks."""
    MODEL = "model"
    """The model has run; what follows reads more of the logits than their best token."""


@dataclass(frozen=True)
class StepDescriptor(BatchExecutionDescriptor):
    """What a graph was captured for: ``num_tokens`` rows, ``num_reqs`` requests and branches, and what follows.

    Attributes:
        num_queries: Queries of attention, for a block-causal model pieces of blocks.
        num_logits: Rows whose logits are read.
        ends: Where it ends.
        num_active_loras: 0, or the greatest number of adapters and one more: rows without one.
    """

    num_active_loras: int = 0
    num_queries: int = 0
    num_logits: int = 0
    ends: Ends = Ends.DECIDED


class Field(NamedTuple):
    """An array of a graph's input."""

    dtype: type
    shape: tuple[int, ...]
    padding: float  # of what a step does not fill

    @property
    def num_bytes(self) -> int:
        """Its place, up to the next array."""
        return align(int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize)


class Layout:
    """The places of a graph's input in a buffer of bytes."""

    def __init__(self, fields: Mapping[str, Field]) -> None:
        self.fields = dict(fields)
        self.offsets: dict[str, int] = {}
        self.num_bytes = 0
        for name, field in self.fields.items():
            self.offsets[name] = self.num_bytes
            self.num_bytes += field.num_bytes


class GraphShapes(NamedTuple):
    """What all graphs of an engine have in common."""

    block_length: int
    num_end_tokens: int
    padding_cell: int  # of CanvasStates.cells
    padding_slot: int  # of CanvasStates.masked
    is_block_causal: bool
    can_edit: bool
    commits_causally: bool = False


def layout_of(graph: StepDescriptor, shapes: GraphShapes) -> Layout:
    """The input of a graph; a step without rows that a graph could see is one whose every array is padding."""
    rows, reqs, logits = graph.num_tokens, graph.num_reqs or 0, graph.num_logits
    fields = {
        "positions": Field(np.int64, (rows,), 0),
        "source": Field(np.int64, (rows,), shapes.padding_cell),
        "is_padding": Field(np.bool_, (rows,), True),
        "query_start_loc": Field(np.int32, (reqs + 1,), -1),  # the step's number of rows
        "seq_lens": Field(np.int32, (reqs,), 0),
        "cu_num_logits": Field(np.int32, (reqs + 1,), -1),  # the step's number of logit rows
        "logit_rows": Field(np.int64, (logits,), 0),
        "logit_slots": Field(np.int32, (logits,), 0),
        "position": Field(np.int64, (logits,), reqs * shapes.block_length),  # behind every position
        "temperature": Field(np.float32, (logits,), 0),
        "noise_key": Field(np.int64, (logits,), 0),
        "by_entropy": Field(np.bool_, (logits,), False),
        "slots": Field(np.int64, (reqs,), shapes.padding_slot),
        "mask_rows": Field(np.int64, (reqs,), shapes.padding_slot),
        "canvas_index": Field(np.int64, (reqs, shapes.block_length), shapes.padding_cell),
        "end_token_ids": Field(np.int64, (reqs, shapes.num_end_tokens), -1),
        "num_output_positions": Field(np.int32, (reqs,), 0),
        "rule": Field(np.int8, (reqs,), 0),
        "parameter": Field(np.float32, (reqs,), 2),
        "min_unmask": Field(np.int32, (reqs,), 0),
    }
    if graph.ends == Ends.EDITED or (graph.ends in (Ends.PROPOSED, Ends.MODEL) and shapes.can_edit):
        fields["edit_threshold"] = Field(np.float32, (reqs,), np.inf)
    if graph.ends in (Ends.PROPOSED, Ends.MODEL):
        fields["draft_threshold"] = Field(np.float32, (reqs,), np.inf)
    if shapes.is_block_causal:
        fields["block_query_start_loc"] = Field(np.int32, (graph.num_queries + 1,), -1)
        fields["block_seq_lens"] = Field(np.int32, (graph.num_queries,), 0)
        fields["block_request"] = Field(np.int64, (graph.num_queries,), 0)
    if shapes.commits_causally:
        fields["block_causal"] = Field(np.int32, (graph.num_queries,), 0)
    return Layout(fields)


class GraphNeeds(NamedTuple):
    """What a step needs of its graph besides rows."""

    num_entries: int  # requests and further branches
    num_queries: int  # of attention
    is_verified: bool = False  # each row of some of them may be a query


class CanvasGraphManager(ModelCudaGraphManager):
    """vLLM's manager of graphs, with the whole of a step in each.

    ``needs`` are those of the step that is being prepared, at most; None where it fits no graph, whatever its size. The
    runner sets them.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        device: torch.device,
        cudagraph_mode: CUDAGraphMode,
        decode_query_len: int,
        *,
        model_state: "CanvasModelState",
        sampler: "CanvasSampler",
        head: Head,
    ) -> None:
        states = model_state.canvas_states
        self.shapes = GraphShapes(
            decode_query_len,
            states.host.end_token_ids.shape[1],
            states.padding_cell,
            states.idle_row,
            states.is_block_causal,
            vllm_config.model_config.hf_config.traits.can_edit,
            states.commits_causally,
        )
        # Attention that captures batches of equal queries only has whole blocks as queries.
        self.is_uniform = cudagraph_mode.mixed_mode() != CUDAGraphMode.FULL
        self.needs: GraphNeeds | None = None
        self.chosen: StepDescriptor | None = None  # the graph of the step that is being prepared
        self.decisions: dict[StepDescriptor, Decision] = {}  # what each graph writes
        self.proposals: dict[StepDescriptor, Proposals] = {}  # likewise, where it ends with them
        self.hidden_of: dict[StepDescriptor, torch.Tensor] = {}  # likewise
        self._sizes: list[StepDescriptor] = []  # one of each number of rows, ascending
        self._verifying: list[StepDescriptor] = []  # likewise, those of verifications
        self._layouts: dict[StepDescriptor, Layout] = {}
        self._views: dict[StepDescriptor, dict[str, torch.Tensor]] = {}
        self._sampler = sampler
        self._head = head
        super().__init__(vllm_config, device, cudagraph_mode, decode_query_len, _lora_cases(vllm_config))
        num_bytes = max((layout.num_bytes for layout in self._layouts.values()), default=0)
        most = max((graph.num_reqs or 0 for graph in self._layouts), default=0)
        most_rows = max((graph.num_logits for graph in self._layouts), default=0)
        self._buffer = StagedBuffer(num_bytes + most * BYTES_PER_REQUEST + most_rows * BYTES_PER_LOGIT_ROW, device)
        for graph, layout in self._layouts.items():
            self._views[graph] = self._buffer.views(
                {name: (layout.offsets[name], field.dtype, field.shape) for name, field in layout.fields.items()}
            )

    def _init_candidates(self) -> None:
        """The graphs to capture, the largest first; :meth:`dispatch` needs none of vLLM's own tables."""
        sizes = self.compilation_config.cudagraph_capture_sizes
        if not (self.cudagraph_mode.has_full_cudagraphs() and sizes):
            return
        length = self.shapes.block_length
        graphs = []
        for num_tokens in sizes:
            if self.is_uniform and num_tokens > self.max_num_reqs * length:
                continue
            num_reqs = max(1, num_tokens // self._rows_per_request())  # more than run where they have branches
            num_queries, longest = num_reqs, length if self.is_uniform else num_tokens
            if self.shapes.commits_causally:  # what is decided, and the active block
                num_queries = num_reqs if self.is_uniform else 2 * num_reqs
            elif self.shapes.is_block_causal:
                num_queries, longest = num_tokens // length + (0 if self.is_uniform else num_reqs), length
            whole = StepDescriptor(
                cg_mode=CUDAGraphMode.FULL,
                num_tokens=num_tokens,
                num_reqs=num_reqs,
                max_query_len=longest,
                num_queries=num_queries,
                num_logits=num_tokens,
            )
            numbers = sorted({max(1, num_tokens // share) for share in LOGIT_SHARES})
            every_end = (Ends.PROPOSED, Ends.MODEL, *([Ends.EDITED] if self.shapes.can_edit else []))
            for num_loras in self.lora_capture_cases:
                own = replace(whole, num_active_loras=num_loras)
                self._sizes.append(own)
                graphs += [replace(own, num_logits=number) for number in numbers]
                graphs += [replace(own, ends=ends) for ends in every_end]
                if self._captures_verifications():
                    verifying = StepDescriptor(
                        cg_mode=CUDAGraphMode.FULL,
                        num_tokens=num_tokens,
                        num_reqs=max(1, num_tokens // ROWS_PER_VERIFIED),
                        max_query_len=longest,
                        num_active_loras=num_loras,
                        num_queries=num_tokens,
                        num_logits=num_tokens,
                        ends=Ends.MODEL,
                    )
                    self._verifying.append(verifying)
                    if verifying not in graphs:  # with blocks of two positions it is the one for the model alone
                        graphs.append(verifying)
        # Page tables of queries keep their address only where no later graph has more.
        graphs.sort(key=lambda graph: (graph.num_tokens, graph.num_queries, graph.num_logits), reverse=True)
        self._layouts = {graph: layout_of(graph, self.shapes) for graph in graphs}
        self._capture_descs[CUDAGraphMode.FULL] = list(graphs)

    def _captures_verifications(self) -> bool:
        """Whether there are graphs of as many queries as rows: where the operator's policy has steps of such."""
        is_by_row = self.shapes.is_block_causal and not (self.shapes.commits_causally or self.is_uniform)
        return is_by_row and POLICIES[default_decoding_options(self.vllm_config).policy].verifies

    def _rows_per_request(self) -> int:
        """So few rows a request of a usual step has."""
        sub_block: int | None = self.vllm_config.model_config.hf_config.traits.sub_block_length
        return self.shapes.block_length if self.is_uniform or not sub_block else sub_block

    def takes_whole_blocks(self, rows: np.ndarray) -> bool:
        """Whether attention's queries are whole blocks if the requests of a step have so many rows each, ``[R]``."""
        length, shapes = self.shapes.block_length, self.shapes
        may_be_several = shapes.is_block_causal and not shapes.commits_causally
        return not (rows % length if may_be_several else rows - length).any()

    def dispatch(
        self,
        num_reqs: int,
        num_tokens: int,
        uniform_token_count: int | None,
        num_active_loras: int = 0,
        *args: Any,
        **kwargs: Any,
    ) -> BatchExecutionDescriptor:
        """The smallest graph that a step fits, without one otherwise."""
        if self._graphs_captured and self.needs is not None:
            found = self.smallest(num_tokens, self.needs, num_active_loras)
            if found is not None:
                return found
        return BatchExecutionDescriptor(cg_mode=CUDAGraphMode.NONE, num_tokens=num_tokens, num_reqs=num_reqs)

    def smallest(self, num_tokens: int, needs: GraphNeeds, num_active_loras: int) -> StepDescriptor | None:
        """The smallest graph with room for so many rows and what goes with them; None without any."""
        for graph in self._verifying if needs.is_verified else self._sizes:
            has_room = graph.num_tokens >= num_tokens and (graph.num_reqs or 0) >= needs.num_entries
            has_adapters = graph.num_active_loras > 0 or num_active_loras == 0
            if has_room and has_adapters and graph.num_queries >= needs.num_queries:
                return graph
        return None

    @property
    def max_entries(self) -> int:
        """Requests and branches of the graph that has most."""
        return max((graph.num_reqs or 0 for graph in (*self._sizes, *self._verifying)), default=0)

    def choose(self, whole: BatchExecutionDescriptor, num_logits: int, ends: Ends) -> StepDescriptor:
        """The graph of a step of this size.

        Args:
            whole: Of :meth:`dispatch`.
            num_logits: Rows whose logits the step reads.
            ends: Where its graph has to end.
        """
        assert isinstance(whole, StepDescriptor)
        number = whole.num_tokens
        if ends == Ends.DECIDED:
            shares = (max(1, whole.num_tokens // share) for share in LOGIT_SHARES)
            number = min(share for share in shares if share >= num_logits)
        self.chosen = replace(whole, num_logits=number, ends=ends)
        return self.chosen

    def fill(self, graph: StepDescriptor, arrays: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
        """Copy a step's arrays to where its graph reads them.

        Args:
            graph: Of :meth:`choose`.
            arrays: Of the step, by name; those that are no input of the graph lie behind its own, as does
                ``canvas_index`` of longer blocks than its own, padded to its requests.

        Returns:
            Tensors on the device, those of the graph with their padding.
        """
        layout, width = self._layouts[graph], arrays["canvas_index"].shape[1]
        counts = {
            "query_start_loc": arrays["positions"].size,
            "block_query_start_loc": arrays["positions"].size,
            "cu_num_logits": arrays["position"].size,
        }
        behind = {
            name: Field(one.dtype.type, one.shape, 0) for name, one in arrays.items() if name not in layout.fields
        }
        if width > self.shapes.block_length:
            assert graph.ends in (Ends.PROPOSED, Ends.MODEL)
            num_reqs = graph.num_reqs or 0
            behind["canvas_index"] = Field(np.int64, (num_reqs, width), self.shapes.padding_cell)
            counts["position"] = num_reqs * width
        place, staged = layout.num_bytes, self._buffer.begin()
        for name, field in layout.fields.items():
            array = None if name in behind else arrays.get(name)
            _write(staged, layout.offsets[name], field, array, counts.get(name, field.padding))
        others = {}
        for name, field in behind.items():
            _write(staged, place, field, arrays[name], field.padding)
            others[name] = (place, field.dtype, field.shape)
            place += field.num_bytes
        self._buffer.send(place)
        return self._views[graph] | self._buffer.views(others)

    def capture(
        self,
        model: nn.Module,
        model_state: "CanvasModelState",
        input_buffers: InputBuffers,
        intermediate_tensors: Any,
        block_tables: BlockTables,
        attn_groups: "list[list[AttentionGroup]]",
        kv_cache_config: "KVCacheConfig",
        *args: Any,
        lora_capture_hook: Callable[[int, int, int], None] | None = None,
        progress_bar_desc: str = "Capturing CUDA graphs",
        **kwargs: Any,
    ) -> None:
        """Capture every graph, as vLLM captures those of other models."""
        has_adapters = self.vllm_config.lora_config is not None

        def make_step(graph: BatchExecutionDescriptor, warmup: bool) -> Callable[[CUDAGraphMode], None]:
            assert isinstance(graph, StepDescriptor)
            if lora_capture_hook is not None:
                lora_capture_hook(graph.num_active_loras, graph.num_reqs or 1, graph.num_tokens)
            views = self._fill_idle(graph)
            batch = denoise_batch(model_state.canvas_states, idle_plan(), views)
            slot_mappings = block_tables.get_dummy_slot_mappings(graph.num_tokens)
            attention = model_state.metadata(
                self.queries(graph, views),
                graph.num_tokens,
                block_tables.get_dummy_block_tables(graph.num_reqs or 0),
                slot_mappings,
                attn_groups,
                kv_cache_config,
                for_capture=True,
            )
            by_layer = build_slot_mappings_by_layer(slot_mappings, kv_cache_config)
            input_ids = input_buffers.input_ids[: graph.num_tokens]

            def step(_: CUDAGraphMode) -> None:
                torch.index_select(batch.blocks.cells, 0, views["source"], out=input_ids)
                with set_forward_context(
                    attention,
                    self.vllm_config,
                    num_tokens=graph.num_tokens,
                    cudagraph_runtime_mode=CUDAGraphMode.NONE,
                    slot_mapping=by_layer,
                    is_padding=views["is_padding"],
                ):
                    read = None if has_adapters else views["logit_rows"]
                    hidden_states = model(input_ids, views["positions"], None, None, logit_rows=read)
                if has_adapters:  # these know rows by their place in the whole batch
                    hidden_states = hidden_states.index_select(0, views["logit_rows"])
                if graph.ends == Ends.MODEL:
                    self.hidden_of[graph] = hidden_states
                    return
                proposals = self._head.propose(hidden_states, batch)
                if graph.ends == Ends.PROPOSED:
                    self.proposals[graph] = proposals
                else:
                    self.decisions[graph] = self._sampler.decide(batch, proposals, keeps_masks=True)

            return step

        CudaGraphManager.capture(self, make_step, progress_bar_desc)

    def _fill_idle(self, graph: StepDescriptor) -> dict[str, torch.Tensor]:
        """A step of the graph's full size that decides nothing; its rows are shared out among its queries."""
        arrays: dict[str, np.ndarray] = {
            name: np.empty((0, *field.shape[1:]), field.dtype) for name, field in self._layouts[graph].fields.items()
        }
        shared = [("query_start_loc", "seq_lens", graph.num_reqs or 0)]
        if self.shapes.is_block_causal:
            shared.append(("block_query_start_loc", "block_seq_lens", graph.num_queries))
        for starts, lengths, number in shared:
            arrays[starts] = np.linspace(0, graph.num_tokens, number + 1).astype(np.int32)
            arrays[lengths] = np.diff(arrays[starts])
        arrays["positions"] = np.zeros(graph.num_tokens, np.int64)
        return self.fill(graph, arrays)

    def queries(self, graph: StepDescriptor, views: Mapping[str, torch.Tensor]) -> Queries:
        """The queries of attention of a graph's step."""
        prefix = "block_" if self.shapes.is_block_causal else ""
        assert graph.max_query_len is not None
        return Queries(
            views[prefix + "query_start_loc"],
            views[prefix + "seq_lens"],
            views.get("block_request"),
            graph.max_query_len,
            max_seq_len=None,
            causal=views.get("block_causal"),
        )

    def run_fullgraph(self, desc: BatchExecutionDescriptor) -> torch.Tensor:
        """Replay the graph that was chosen; its decision is in ``decisions``, so the hidden states are of no use."""
        self.replay()
        return self._buffer.on_device

    def replay(self) -> None:
        """Replay the graph that was chosen last."""
        assert self.chosen is not None
        CudaGraphManager.run_fullgraph(self, self.chosen)

    def release_graphs(self) -> None:
        """As vLLM does."""
        super().release_graphs()
        self.decisions.clear()
        self.proposals.clear()
        self.hidden_of.clear()


def _lora_cases(vllm_config: VllmConfig) -> list[int]:
    """With how many adapters steps are captured: with none, and with any number, which vLLM says by the greatest."""
    lora = vllm_config.lora_config
    if lora is None:
        return [0]
    is_twice = vllm_config.compilation_config.cudagraph_specialize_lora
    return [0, lora.max_loras + 1] if is_twice else [lora.max_loras + 1]


def _write(staged: np.ndarray, offset: int, field: Field, array: np.ndarray | None, padding: float) -> None:
    """Put an array into a buffer of bytes ``[N]``, and padding behind it."""
    num_bytes = int(np.prod(field.shape)) * np.dtype(field.dtype).itemsize
    target: np.ndarray = staged[offset : offset + num_bytes].view(field.dtype).reshape(field.shape)
    size = 0 if array is None else array.shape[0]
    if array is not None:
        target[:size] = array
    target[size:] = padding
