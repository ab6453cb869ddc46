"""Model Runner V2's bookkeeping kernels in NumPy and Numba, for processes that would interpret the Triton ones.

Interpreted, they cost about 7 ms a request and engine step, several times a small model's forward pass. Each has
its host function's arguments, result and in-place effects (NumPy views share the memory of CPU tensors); arguments that
vLLM 0.33 added are optional. `REPLACEMENTS` says which host function each one stands for; putting them there is left to
`vllm_osdt.host.compat`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.v1.attention.backends.utils import PAD_SLOT_ID
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.buffer_utils import StagedWriteTensor

from csrc_triton.cpu import compiled

_stock_gather_block_tables = BlockTables.gather_block_tables
_stock_compute_slot_mappings = BlockTables.compute_slot_mappings


def _ragged(lens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lay ranges of these lengths end to end: for each element, which range it is of and its offset in there."""
    owner = np.repeat(np.arange(len(lens)), lens)  # [sum(lens)]
    offset = np.arange(len(owner)) - (np.cumsum(lens) - lens)[owner]
    return owner, offset


def _flat(tensor: torch.Tensor) -> np.ndarray:
    """View a contiguous CPU tensor as one row. Kernels address it so, and may run past the end of a row."""
    return tensor.view(-1).numpy()


def apply_write_np(self: StagedWriteTensor) -> None:
    """Write the staged pieces into their rows, in the order of staging, and clear the stage."""
    if not self._staged_write_indices:
        return
    starts = np.array(self._staged_write_indices) * self.gpu.stride(0) + self._staged_write_starts  # [num_writes]
    owner, offset = _ragged(np.diff(self._staged_write_cu_lens, prepend=0))
    _flat(self.gpu)[starts[owner] + offset] = self._staged_write_contents
    self.clear_staged_writes()


def gather_block_tables_np(
    self: BlockTables,
    idx_mapping: torch.Tensor,
    num_reqs_padded: int,
    out: tuple[torch.Tensor, ...] | None = None,
    out_ptrs: torch.Tensor | None = None,
    num_computed_tokens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """Copy the block ids of the batch's requests to its first rows and zero the padding rows.

    Past its request's last block a row keeps what it held. Masking what a sliding window has left behind, new in vLLM
    0.33, is left to vLLM's own function.
    """
    if num_computed_tokens is not None and self.has_sliding_window_groups:
        return _stock_gather_block_tables(self, idx_mapping, num_reqs_padded, out, out_ptrs, num_computed_tokens)
    slots = idx_mapping.numpy()
    num_reqs = num_rows = len(slots)
    if out is None:
        out = tuple(self.input_block_tables)
        if hasattr(self, "_num_dirty_rows"):  # vLLM 0.33 also zeroes what a larger batch left in its own tables
            num_rows, self._num_dirty_rows = self._num_dirty_rows, num_reqs
    for table, num_blocks, target in zip(self.block_tables, self.num_blocks.gpu.numpy(), out, strict=True):
        rows = target.numpy()
        _gather_rows(table.gpu.numpy(), slots, num_blocks, rows)
        rows[num_reqs : max(num_rows, num_reqs_padded)] = 0
    return tuple(table[:num_reqs_padded] for table in out)


@compiled()
def _gather_rows(table: np.ndarray, slots: np.ndarray, lens: np.ndarray, rows: np.ndarray) -> None:
    for row in range(slots.size):
        for k in range(lens[slots[row]]):
            rows[row, k] = table[slots[row], k]


def compute_slot_mappings_np(
    self: BlockTables,
    idx_mapping: torch.Tensor,
    query_start_loc: torch.Tensor,
    positions: torch.Tensor,
    num_tokens_padded: int,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Find the KV slot of every token, and fill the tail past the last token with the padding slot.

    Tokens of a request that owns no blocks (`idx_mapping` -1) and of groups without slot mapping get the padding slot.
    Context parallelism is left to vLLM's own function.
    """
    if self.cp_size != 1:
        return _stock_compute_slot_mappings(self, idx_mapping, query_start_loc, positions, num_tokens_padded, out)
    slot_mappings = self.slot_mappings if out is None else out
    slots = idx_mapping.numpy()
    bounds = query_start_loc.numpy()[: len(slots) + 1]
    start, end = bounds[0], bounds[-1]
    groups = zip(slot_mappings.numpy(), self.block_tables, self.block_sizes, self.slot_mapping_enabled, strict=True)
    for mapping, table, block_size, enabled in groups:
        mapping[end:] = PAD_SLOT_ID
        if enabled:
            _map_slots(table.gpu.numpy(), slots, bounds, positions.numpy(), block_size, mapping)
        else:
            mapping[start:end] = PAD_SLOT_ID
    return slot_mappings[:, :num_tokens_padded]


@compiled()
def _map_slots(
    table: np.ndarray,
    slots: np.ndarray,
    bounds: np.ndarray,
    positions: np.ndarray,
    block_size: int,
    mapping: np.ndarray,
) -> None:
    for req in range(slots.size):
        for row in range(bounds[req], bounds[req + 1]):
            if slots[req] < 0:
                mapping[row] = PAD_SLOT_ID
            else:
                page, offset = divmod(positions[row], block_size)
                mapping[row] = np.int64(table[slots[req], page]) * block_size + offset


def prepare_prefill_inputs_np(
    input_ids: torch.Tensor,
    next_prefill_tokens: torch.Tensor,
    idx_mapping: torch.Tensor,
    query_start_loc: torch.Tensor,
    all_token_ids: torch.Tensor,
    prefill_len: torch.Tensor,
    num_computed_tokens: torch.Tensor,
) -> None:
    """Copy the scheduled prompt tokens of prefilling requests to `input_ids`, and those after to the lookahead."""
    slots = idx_mapping.numpy()
    bounds = query_start_loc.numpy()[: len(slots) + 1]
    is_prefill = num_computed_tokens.numpy()[slots] < prefill_len.numpy()[slots]
    slots, query_start, query_len = slots[is_prefill], bounds[:-1][is_prefill], np.diff(bounds)[is_prefill]
    num_computed = num_computed_tokens.numpy()[slots].astype(np.int64)
    source = slots * all_token_ids.stride(0) + num_computed  # [num_prefills], into the flat token table
    token_ids = _flat(all_token_ids)

    owner, offset = _ragged(query_len)
    input_ids.numpy()[query_start[owner] + offset] = token_ids.take(source[owner] + offset, mode="clip")

    ahead = query_len + np.arange(next_prefill_tokens.shape[0])[:, np.newaxis]  # [num_lookahead, num_prefills]
    in_prompt = num_computed + ahead < prefill_len.numpy()[slots]
    next_prefill_tokens.numpy()[:, slots] = np.where(in_prompt, token_ids.take(source + ahead, mode="clip"), 0)


def prepare_pos_seq_lens_np(
    idx_mapping: torch.Tensor,
    query_start_loc: torch.Tensor,
    num_computed_tokens: torch.Tensor,
    pos: torch.Tensor,
    seq_lens: torch.Tensor,
) -> None:
    """Write the position of every token and the sequence length of every request; padding requests have length 0."""
    slots = idx_mapping.numpy()
    bounds = query_start_loc.numpy()[: len(slots) + 1]
    query_len = np.diff(bounds)
    num_computed = num_computed_tokens.numpy()[slots]
    owner, offset = _ragged(query_len)
    pos.numpy()[bounds[0] : bounds[-1]] = num_computed[owner] + offset
    seq_lens.numpy()[: len(slots)] = num_computed + query_len
    seq_lens.numpy()[len(slots) :] = 0


def combine_sampled_and_draft_tokens_np(
    input_ids: torch.Tensor,
    idx_mapping: torch.Tensor,
    last_sampled_tokens: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    prefill_len: torch.Tensor,
    draft_tokens: torch.Tensor,
    cu_num_logits: torch.Tensor,
    num_logits: int,
    num_new_sampled_tokens: int = 1,
) -> torch.Tensor:
    """Put last sampled and draft tokens of decoding requests into `input_ids`.

    Returns:
        The rows whose logits are wanted, the last rows of each request. [num_logits], int64
    """
    assert num_new_sampled_tokens in (0, 1), f"num_new_sampled_tokens must be 0 or 1, got {num_new_sampled_tokens}"
    slots = idx_mapping.numpy()
    query_end = query_start_loc.numpy()[1 : len(slots) + 1]
    logit_bounds = cu_num_logits.numpy()[: len(slots) + 1]
    num_req_logits = np.diff(logit_bounds)
    logits_start = query_end - num_req_logits
    ids = input_ids.numpy()

    logits_indices = torch.empty(num_logits, dtype=torch.int64)
    owner, offset = _ragged(num_req_logits)
    logits_indices.numpy()[logit_bounds[0] : logit_bounds[-1]] = logits_start[owner] + offset

    seq_len, prompt_end = seq_lens.numpy()[: len(slots)], prefill_len.numpy()[slots]
    is_decode = seq_len > prompt_end
    if num_new_sampled_tokens:
        # A first logit row inside the prompt keeps its prompt token.
        has_sampled = is_decode & (seq_len - num_req_logits >= prompt_end)
        ids[logits_start[has_sampled]] = _flat(last_sampled_tokens)[slots[has_sampled]]
    num_drafts = np.where(is_decode, np.maximum(num_req_logits - num_new_sampled_tokens, 0), 0)
    owner, offset = _ragged(num_drafts)
    ids[(query_end - num_drafts)[owner] + offset] = draft_tokens.numpy()[slots[owner], offset]
    return logits_indices


def post_update_np(
    idx_mapping: torch.Tensor,
    num_computed_tokens: torch.Tensor,
    last_sampled_tokens: torch.Tensor,
    output_bin_counts: torch.Tensor | None,
    sampled_tokens: torch.Tensor,
    num_sampled: torch.Tensor,
    num_rejected: torch.Tensor,
    query_start_loc: torch.Tensor | None,
    all_token_ids: torch.Tensor,
    total_len: torch.Tensor,
    draft_tokens: torch.Tensor | None = None,
    draft_tokens_out: torch.Tensor | None = None,
) -> None:
    """Append the sampled tokens to their requests' state and move `num_computed_tokens` on, less the rejected rows.

    Rows with a negative `idx_mapping` are skipped. New drafts, if any, go to their requests' rows.
    """
    rows = np.flatnonzero(idx_mapping.numpy() >= 0)
    slots = idx_mapping.numpy()[rows]
    sampled, num_new = sampled_tokens.numpy(), num_sampled.numpy()[rows]
    old_len = total_len.numpy()[slots].astype(np.int64)

    has_new = num_new > 0
    _flat(last_sampled_tokens)[slots[has_new]] = sampled[rows[has_new], num_new[has_new] - 1]
    total_len.numpy()[slots] += num_new
    owner, offset = _ragged(num_new)
    tokens = sampled[rows[owner], offset]
    _flat(all_token_ids)[slots[owner] * all_token_ids.stride(0) + old_len[owner] + offset] = tokens
    if output_bin_counts is not None:
        np.add.at(output_bin_counts.numpy(), (slots[owner], tokens), 1)

    query_len = 0 if query_start_loc is None else np.diff(query_start_loc.numpy())[rows]
    num_computed_tokens.numpy()[slots] += query_len - num_rejected.numpy()[rows]
    if draft_tokens is not None:
        assert draft_tokens_out is not None
        draft_tokens_out.numpy()[slots] = draft_tokens.numpy()[rows]


def expand_idx_mapping_np(
    idx_mapping: torch.Tensor, total_num_logits: int, cu_num_logits: torch.Tensor, max_expand_len: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Repeat each request's state index once per logit row, and number the rows within the request."""
    bounds = cu_num_logits.numpy()[: len(idx_mapping) + 1]
    owner, offset = _ragged(np.diff(bounds))
    expanded_idx_mapping = idx_mapping.new_empty(total_num_logits)
    expanded_local_pos = torch.empty(total_num_logits, dtype=torch.int32)
    expanded_idx_mapping.numpy()[bounds[0] : bounds[-1]] = idx_mapping.numpy()[owner]
    expanded_local_pos.numpy()[bounds[0] : bounds[-1]] = offset
    return expanded_idx_mapping, expanded_local_pos


def apply_logit_bias_np(
    logits: torch.Tensor,
    expanded_idx_mapping: torch.Tensor,
    pos: torch.Tensor,
    num_allowed_token_ids: torch.Tensor,
    allowed_token_ids: torch.Tensor,
    num_logit_bias: torch.Tensor,
    logit_bias_token_ids: torch.Tensor,
    logit_bias: torch.Tensor,
    min_lens: torch.Tensor,
    num_stop_token_ids: torch.Tensor,
    restore_when_all_masked: torch.Tensor,
    stop_token_ids: torch.Tensor,
    check_all_masked_rows: bool = False,
) -> None:
    """Leave the allowed tokens of every row, add its biases, and take its stop tokens out below its least length."""
    _bias_rows(
        logits.numpy(),
        *(
            one.numpy()
            for one in (
                expanded_idx_mapping,
                pos,
                num_allowed_token_ids,
                allowed_token_ids,
                num_logit_bias,
                logit_bias_token_ids,
                logit_bias,
                min_lens,
                num_stop_token_ids,
                restore_when_all_masked,
                stop_token_ids,
            )
        ),
        check_all_masked_rows,
    )


@compiled()
def _bias_rows(
    logits: np.ndarray,
    slots: np.ndarray,
    pos: np.ndarray,
    num_allowed: np.ndarray,
    allowed: np.ndarray,
    num_biases: np.ndarray,
    bias_ids: np.ndarray,
    biases: np.ndarray,
    min_lens: np.ndarray,
    num_stops: np.ndarray,
    restores: np.ndarray,
    stop_ids: np.ndarray,
    checks: bool,
) -> None:
    for row in range(logits.shape[0]):
        slot, line = slots[row], logits[row]
        if num_allowed[slot] > 0:
            ids = allowed[slot, : num_allowed[slot]]
            kept = line[ids]
            line[:] = -np.inf
            line[ids] = kept
        for k in range(num_biases[slot]):
            line[bias_ids[slot, k]] += biases[slot, k]
        if num_stops[slot] > 0 and pos[row] + 1 < min_lens[slot]:
            ids = stop_ids[slot, : num_stops[slot]]
            kept = line[ids]
            line[ids] = -np.inf
            if checks and restores[slot] and line.max() == -np.inf:
                line[ids] = kept


def apply_min_p_np(logits: torch.Tensor, expanded_idx_mapping: torch.Tensor, min_p: torch.Tensor) -> None:
    """Take out the tokens of every row whose probability is below its share of the most probable one's."""
    share = min_p[expanded_idx_mapping]
    cutoff = torch.where(share > 0, logits.amax(dim=-1) + share.log(), -torch.inf)
    logits.masked_fill_(logits < cutoff[:, None], -torch.inf)


@dataclass(frozen=True)
class Replacement:
    """A name in vLLM and the function that takes its place."""

    module: str
    attribute: str
    """The name in the module, dotted where it is a method."""
    function: Callable[..., Any]


_GPU = "vllm.v1.worker.gpu"
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "prepare_prefill_inputs": prepare_prefill_inputs_np,
    "prepare_pos_seq_lens": prepare_pos_seq_lens_np,
    "combine_sampled_and_draft_tokens": combine_sampled_and_draft_tokens_np,
    "post_update": post_update_np,
    "expand_idx_mapping": expand_idx_mapping_np,
}

REPLACEMENTS: tuple[Replacement, ...] = (
    Replacement(f"{_GPU}.buffer_utils", "StagedWriteTensor.apply_write", apply_write_np),
    Replacement(f"{_GPU}.block_table", "BlockTables.gather_block_tables", gather_block_tables_np),
    Replacement(f"{_GPU}.block_table", "BlockTables.compute_slot_mappings", compute_slot_mappings_np),
    Replacement(f"{_GPU}.sample.logit_bias", "apply_logit_bias", apply_logit_bias_np),
    Replacement(f"{_GPU}.sample.states", "apply_min_p", apply_min_p_np),
    # The model runner has imported the functions by name.
    *(
        Replacement(f"{_GPU}.{module}", name, function)
        for module in ("input_batch", "model_runner")
        for name, function in _FUNCTIONS.items()
    ),
)
"""What to replace where `triton_backend.interpreter.is_interpreting()`; replacing twice does no harm."""
