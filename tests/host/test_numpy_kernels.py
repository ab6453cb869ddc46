"""Each NumPy kernel against the interpreted kernel that it replaces, over random states with poisoned outputs."""

import copy
import importlib
import importlib.util
import inspect
import sys
import time

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")
pytest.importorskip("triton")

from vllm_osdt.host.cpu.triton_backend.interpreter import is_interpreting

if not is_interpreting():
    pytest.skip("kernels are not interpreted here", allow_module_level=True)

# First of vLLM's worker modules, as in its CPU worker: it takes pinned memory and streams out of the others.
import vllm.v1.worker.cpu.shm  # noqa: F401 # isort: skip
from vllm.triton_utils import HAS_TRITON
from vllm.v1.worker.gpu.buffer_utils import StagedWriteTensor

from vllm_osdt.host.cpu import numpy_kernels

CPU = torch.device("cpu")
POISON = -77
MAX_NUM_REQS = 9
MAX_MODEL_LEN = 96
MAX_NUM_TOKENS = 320
CANVAS_LENGTH = 16
VOCAB_SIZE = 40
SEEDS = range(8)


def load_stock(name: str):
    """Load a second copy of a module of vLLM, which no patch has reached."""
    origin = importlib.util.find_spec(f"vllm.v1.worker.gpu.{name}").origin
    spec = importlib.util.spec_from_file_location(f"stock_{name}", origin)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


stock_buffer_utils = load_stock("buffer_utils")
stock_block_table = load_stock("block_table")
stock_input_batch = load_stock("input_batch")


class State:
    """Requests scattered over the slots: prefilling, prefilled in part, denoising, or scheduled with no token."""

    def __init__(self, seed: int):
        rng = self.rng = np.random.default_rng(seed)
        num_reqs = self.num_reqs = int(rng.integers(1, MAX_NUM_REQS))
        self.idx_mapping = torch.from_numpy(rng.permutation(MAX_NUM_REQS)[:num_reqs].astype(np.int64))
        self.prefill_len = torch.from_numpy(rng.integers(1, 40, MAX_NUM_REQS).astype(np.int32))
        prefilled = rng.integers(0, 2, MAX_NUM_REQS) * rng.integers(0, 12, MAX_NUM_REQS)
        computed = np.where(rng.random(MAX_NUM_REQS) < 0.5, self.prefill_len.numpy() + prefilled, prefilled)
        self.num_computed_tokens = torch.from_numpy(computed.astype(np.int32))
        query_len = rng.integers(0, CANVAS_LENGTH + 1, num_reqs) * (rng.random(num_reqs) < 0.8)
        self.query_len = query_len
        bounds = np.concatenate([[0], np.cumsum(query_len)])
        # Padded as the runner pads it: the rows past the last request repeat the number of tokens.
        padded = np.full(MAX_NUM_REQS + 1, bounds[-1])
        padded[: num_reqs + 1] = bounds
        self.query_start_loc = torch.from_numpy(padded.astype(np.int32))
        self.num_tokens = int(bounds[-1])
        self.all_token_ids = self.tokens(MAX_NUM_REQS, MAX_MODEL_LEN).to(torch.int32)
        self.total_len = torch.from_numpy(rng.integers(1, MAX_MODEL_LEN - CANVAS_LENGTH, MAX_NUM_REQS).astype(np.int32))

    def tokens(self, *shape: int) -> torch.Tensor:
        return torch.from_numpy(self.rng.integers(0, VOCAB_SIZE, shape))


def poisoned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full(shape, POISON, dtype=dtype)


def assert_same_effect(stock, ours_np, *args, **kwargs) -> None:
    """Both leave every argument in the same state and return the same."""
    theirs, ours = copy.deepcopy((args, kwargs)), copy.deepcopy((args, kwargs))
    expected, result = stock(*theirs[0], **theirs[1]), ours_np(*ours[0], **ours[1])
    torch.testing.assert_close((ours, result), (theirs, expected), rtol=0, atol=0)


def test_triton_is_on_and_interpreted():
    assert HAS_TRITON
    assert type(stock_input_batch._post_update_kernel).__name__ == "InterpretedFunction"


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32])
@pytest.mark.parametrize("size", [7, (7, 30)], ids=["elements", "rows"])
@pytest.mark.parametrize("seed", SEEDS)
def test_apply_write(seed: int, size, dtype: torch.dtype):
    rng = np.random.default_rng(seed)
    tensor = StagedWriteTensor(size, dtype, CPU, uva_instead_of_gpu=bool(seed % 2))
    tensor.gpu.fill_(POISON)
    for _ in range(rng.integers(0, 12)):
        row = int(rng.integers(0, 7))
        if size == 7 or rng.random() < 0.3:
            tensor.stage_write_elem(row, int(rng.integers(0, 99)))
        else:
            start = int(rng.integers(0, 30))
            tensor.stage_write(row, start, rng.integers(0, 99, rng.integers(0, 31 - start)).tolist())
    other = copy.deepcopy(tensor)
    stock_buffer_utils.StagedWriteTensor.apply_write(tensor)
    numpy_kernels.apply_write_np(other)
    torch.testing.assert_close(other.gpu, tensor.gpu, rtol=0, atol=0)
    for stage in ("indices", "starts", "contents", "cu_lens"):
        assert getattr(other, f"_staged_write_{stage}") == []


def make_block_tables(rng: np.random.Generator, cls, num_groups: int):
    """Tables of random content whose outputs are poisoned. The kernels read the tables through recorded addresses."""
    block_sizes = [32, 16, 8][:num_groups]
    widths = [-(-MAX_MODEL_LEN // size) for size in block_sizes]
    enabled = [True, False, True][:num_groups]
    tables = cls(block_sizes, MAX_NUM_REQS, MAX_NUM_TOKENS, widths, CPU, slot_mapping_enabled=enabled)
    for group, table in enumerate(tables.block_tables):
        table.gpu.copy_(torch.from_numpy(rng.integers(1, 999, tuple(table.gpu.shape))))
        tables.input_block_tables[group].fill_(POISON)
        tables.num_blocks.np[group] = rng.integers(0, widths[group] + 1, MAX_NUM_REQS)
    tables.num_blocks.copy_to_uva()
    tables.slot_mappings.fill_(POISON)
    return tables


@pytest.mark.parametrize("num_groups", [1, 3])
@pytest.mark.parametrize("seed", SEEDS)
def test_gather_block_tables(seed: int, num_groups: int):
    state = State(seed)
    cls = stock_block_table.BlockTables
    theirs, ours = (make_block_tables(np.random.default_rng(seed), cls, num_groups) for _ in range(2))
    for num_reqs in (state.num_reqs, state.num_reqs // 2):  # a smaller batch after a larger one
        idx_mapping = state.idx_mapping[:num_reqs]
        num_padded = int(state.rng.integers(num_reqs, MAX_NUM_REQS + 1)) if seed % 2 else num_reqs
        expected = cls.gather_block_tables(theirs, idx_mapping, num_padded)
        result = numpy_kernels.gather_block_tables_np(ours, idx_mapping, num_padded)
        torch.testing.assert_close(result, expected, rtol=0, atol=0)
        torch.testing.assert_close(ours.input_block_tables, theirs.input_block_tables, rtol=0, atol=0)


@pytest.mark.parametrize("num_groups", [1, 3])
@pytest.mark.parametrize("ownerless", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_compute_slot_mappings(seed: int, num_groups: int, ownerless: bool):
    state = State(seed)
    cls = stock_block_table.BlockTables
    theirs, ours = (make_block_tables(np.random.default_rng(seed), cls, num_groups) for _ in range(2))
    positions = torch.from_numpy(state.rng.integers(0, MAX_MODEL_LEN, MAX_NUM_TOKENS))
    if ownerless:
        state.idx_mapping[0] = -1
        positions[: state.query_len[0]] = 10**6
    args = state.idx_mapping, state.query_start_loc, positions, state.num_tokens + 3
    expected = cls.compute_slot_mappings(theirs, *args)
    result = numpy_kernels.compute_slot_mappings_np(ours, *args)
    torch.testing.assert_close(result, expected, rtol=0, atol=0)
    torch.testing.assert_close(ours.slot_mappings, theirs.slot_mappings, rtol=0, atol=0)


def test_sliding_windows_are_left_to_vllm(monkeypatch):
    monkeypatch.setattr(numpy_kernels, "_stock_gather_block_tables", lambda *args: args)
    tables = make_block_tables(np.random.default_rng(0), stock_block_table.BlockTables, 1)
    tables.has_sliding_window_groups = True
    num_computed_tokens = torch.zeros(MAX_NUM_REQS)
    result = numpy_kernels.gather_block_tables_np(tables, 1, 2, num_computed_tokens=num_computed_tokens)
    assert result == (tables, 1, 2, None, None, num_computed_tokens)


def test_context_parallel_slot_mappings_are_left_to_vllm(monkeypatch):
    monkeypatch.setattr(numpy_kernels, "_stock_compute_slot_mappings", lambda *args: args)
    tables = make_block_tables(np.random.default_rng(0), stock_block_table.BlockTables, 1)
    tables.cp_size = 2
    assert numpy_kernels.compute_slot_mappings_np(tables, 1, 2, 3, 4) == (tables, 1, 2, 3, 4, None)


@pytest.mark.parametrize("num_lookahead", [1, 3])
@pytest.mark.parametrize("seed", SEEDS)
def test_prepare_prefill_inputs(seed: int, num_lookahead: int):
    state = State(seed)
    assert_same_effect(
        stock_input_batch.prepare_prefill_inputs,
        numpy_kernels.prepare_prefill_inputs_np,
        poisoned(MAX_NUM_TOKENS, dtype=torch.int32),
        poisoned(num_lookahead, MAX_NUM_REQS, dtype=torch.int32),
        state.idx_mapping,
        state.query_start_loc,
        state.all_token_ids,
        state.prefill_len,
        state.num_computed_tokens,
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_prepare_pos_seq_lens(seed: int):
    state = State(seed)
    assert_same_effect(
        stock_input_batch.prepare_pos_seq_lens,
        numpy_kernels.prepare_pos_seq_lens_np,
        state.idx_mapping,
        state.query_start_loc,
        state.num_computed_tokens,
        poisoned(MAX_NUM_TOKENS, dtype=torch.int64),
        poisoned(MAX_NUM_REQS, dtype=torch.int32),
    )


@pytest.mark.parametrize("num_new", [0, 1], ids=["diffusion", "autoregressive"])
@pytest.mark.parametrize("seed", SEEDS)
def test_combine_sampled_and_draft_tokens(seed: int, num_new: int):
    state = State(seed)
    # Every request has its bonus rows and at most as many logit rows as it has rows.
    query_len = np.maximum(state.query_len, num_new)
    num_logits = state.rng.integers(num_new, query_len + 1)
    bounds = [torch.from_numpy(np.concatenate([[0], np.cumsum(x)]).astype(np.int32)) for x in (query_len, num_logits)]
    seq_lens = state.num_computed_tokens[state.idx_mapping] + torch.from_numpy(query_len.astype(np.int32))
    state.prefill_len[state.idx_mapping[0]] = seq_lens[0]  # just reaches the end of its prompt: not decoding yet
    assert_same_effect(
        stock_input_batch.combine_sampled_and_draft_tokens,
        numpy_kernels.combine_sampled_and_draft_tokens_np,
        poisoned(MAX_NUM_TOKENS, dtype=torch.int32),
        state.idx_mapping,
        state.tokens(MAX_NUM_REQS, 1),
        bounds[0],
        seq_lens,
        state.prefill_len,
        state.tokens(MAX_NUM_REQS, CANVAS_LENGTH),
        bounds[1],
        int(bounds[1][-1]),
        num_new,
    )


@pytest.mark.parametrize("with_queries", [True, False])
@pytest.mark.parametrize("with_bin_counts", [True, False])
@pytest.mark.parametrize("seed", SEEDS)
def test_post_update(seed: int, with_bin_counts: bool, with_queries: bool):
    state = State(seed)
    num_sampled = state.rng.integers(0, CANVAS_LENGTH + 1, state.num_reqs) * state.rng.integers(0, 2, state.num_reqs)
    state.idx_mapping[state.rng.random(state.num_reqs) < 0.2] = -1
    drafts = ()
    if "draft_tokens" in inspect.signature(stock_input_batch.post_update).parameters:  # vLLM 0.33
        new = state.tokens(state.num_reqs, CANVAS_LENGTH) if seed % 2 else None
        drafts = new, poisoned(MAX_NUM_REQS, CANVAS_LENGTH, dtype=torch.int64)
    assert_same_effect(
        stock_input_batch.post_update,
        numpy_kernels.post_update_np,
        state.idx_mapping,
        state.num_computed_tokens,
        poisoned(MAX_NUM_REQS, 1, dtype=torch.int64),
        torch.zeros(MAX_NUM_REQS, VOCAB_SIZE, dtype=torch.int32) if with_bin_counts else None,
        state.tokens(state.num_reqs, CANVAS_LENGTH),
        torch.from_numpy(num_sampled.astype(np.int32)),
        torch.from_numpy(state.rng.integers(0, 30, state.num_reqs).astype(np.int32)),
        state.query_start_loc if with_queries else None,
        state.all_token_ids,
        state.total_len,
        *drafts,
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_expand_idx_mapping(seed: int):
    state = State(seed)
    assert_same_effect(
        stock_input_batch.expand_idx_mapping,
        numpy_kernels.expand_idx_mapping_np,
        state.idx_mapping,
        state.num_tokens,
        state.query_start_loc,
        CANVAS_LENGTH,
    )


def test_every_replacement_names_something_in_vllm():
    for replacement in numpy_kernels.REPLACEMENTS:
        target = importlib.import_module(replacement.module)
        for name in replacement.attribute.split("."):
            target = getattr(target, name)
        assert callable(target)


# Twice what two idle cores need, so that a busy machine passes; interpreted, the same work takes over 100 ms.
GATHER_AND_SLOTS_BUDGET_S = 300e-6
APPLY_WRITE_BUDGET_S = 200e-6


def fastest(call, num_calls: int = 200) -> float:
    def timed() -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return min(timed() for _ in range(num_calls))


def test_a_step_of_32_requests_costs_microseconds():
    rng = np.random.default_rng(0)
    tables = stock_block_table.BlockTables([32], 32, 8192, [128], CPU)
    tables.num_blocks.np[:] = 20
    tables.num_blocks.copy_to_uva()
    idx_mapping = torch.from_numpy(rng.permutation(32))
    query_start_loc = torch.arange(33, dtype=torch.int32) * 32
    positions = torch.arange(32).repeat(32)

    def gather_and_map() -> None:
        numpy_kernels.gather_block_tables_np(tables, idx_mapping, 32)
        numpy_kernels.compute_slot_mappings_np(tables, idx_mapping, query_start_loc, positions, 32 * 32)

    tensor = StagedWriteTensor((32, 128), torch.int32, CPU)

    def write() -> None:
        for row in range(32):
            tensor.stage_write(row, 5, [row])
        numpy_kernels.apply_write_np(tensor)

    assert fastest(gather_and_map) < GATHER_AND_SLOTS_BUDGET_S
    assert fastest(write) < APPLY_WRITE_BUDGET_S
