"""The KV pages of further branches: which page each row is written to, and what must be copied there before.

To attention a branch is a request of its own, whose row of the page table is that of its request with other pages where
its rows lie. What such a page holds before and behind the rows is copied from the request's page before the step runs.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from vllm.v1.attention.backends.utils import PAD_SLOT_ID
from vllm.v1.worker.gpu.block_table import BlockTables

from vllm_osdt.messages import BranchPages
from vllm_osdt.worker.step.rows import StepRows


def plan_pages(
    rows: StepRows, seq_lens: np.ndarray, pages: Sequence[BranchPages | None], page_size: int
) -> dict[str, np.ndarray]:
    """The pages of a step with branches, for the device.

    Args:
        rows: Of the step.
        seq_lens: int32 ``[Q]``, positions that attention sees at most.
        pages: What the scheduler has for the branches of each of the R requests.
        page_size: Positions of a page.

    Returns:
        ``page_slots``: int64 ``[Q]``, whose row of vLLM's tables each begins with. ``page_row_of``: int64 ``[T]``,
        which of the Q every row is of. ``own_row``, ``own_column``, ``own_page``: int64 ``[N]``, what is replaced in
        the tables. ``copy_row``, ``copy_column``, ``copy_page``: int64 ``[C]``, which pages are copied, where to.
    """
    own: list[tuple[int, int, int]] = []
    copied: list[tuple[int, int, int]] = []
    for entry in np.flatnonzero(rows.branch).tolist():
        found = pages[int(rows.request[entry])]
        assert found is not None
        number, first = int(rows.branch[entry]), 0
        for branch in found.branches[: number - 1]:
            first += len(_columns(branch.start, branch.num_rows, page_size))
        start, end = int(rows.start[entry]), int(rows.start[entry] + rows.num_rows[entry])
        branch = found.branches[number - 1]
        for index, column in enumerate(_columns(branch.start, branch.num_rows, page_size)):
            page = found.pages[first + index]
            own.append((entry, column, page))
            begin, seen = column * page_size, min((column + 1) * page_size, int(seq_lens[entry]))
            if start > begin or end < seen:
                copied.append((entry, column, page))
    arrays = {"page_slots": rows.slots, "page_row_of": np.repeat(np.arange(rows.slots.size), rows.num_rows)}
    for name, triples in (("own", own), ("copy", copied)):
        table = np.array(triples, dtype=np.int64).reshape(-1, 3)
        arrays |= {f"{name}_{part}": table[:, place].copy() for place, part in enumerate(("row", "column", "page"))}
    return arrays


def _columns(start: int, num_rows: int, page_size: int) -> range:
    """Which pages of a request these rows lie in."""
    return range(start // page_size, (start + num_rows - 1) // page_size + 1) if num_rows else range(0)


def branch_tables(
    tables: BlockTables, sent: dict[str, torch.Tensor], positions: torch.Tensor, num_entries: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Page tables and slots of a step with branches.

    Args:
        tables: vLLM's, of one KV group.
        sent: :func:`plan_pages` on the device.
        positions: int64 ``[at least T]`` of the step's rows, padding behind them.
        num_entries: Of a graph, which reads the tables where vLLM has those of a step; None without one.

    Returns:
        The tables, int32 ``[Q, pages]``, or as many rows as a graph has entries; the KV slot of every row, ``[1, at
        least T]``, none for padding; and the pages that are copied, int64 ``[C]``.
    """
    own, num_own = sent["page_slots"], sent["page_slots"].shape[0]
    if num_entries is None:
        table = tables.block_tables[0].gpu.index_select(0, own)
    else:
        table = tables.input_block_tables[0][:num_entries]
        torch.index_select(tables.block_tables[0].gpu, 0, own, out=table[:num_own])
    copied = table[sent["copy_row"], sent["copy_column"]].long()
    table[sent["own_row"], sent["own_column"]] = sent["own_page"].to(table.dtype)
    size, num_rows = tables.block_sizes[0], sent["page_row_of"].shape[0]
    page = table[sent["page_row_of"], positions[:num_rows] // size].long()
    slots = tables.slot_mappings
    slots[:, num_rows:] = PAD_SLOT_ID
    slots[0, :num_rows] = page * size + positions[:num_rows] % size
    return table, slots[:, : positions.shape[0]], copied


def make_room_in_tables(tables: BlockTables, num_entries: int) -> None:
    """Have room for the branches of a graph where vLLM has the page tables of a step; before anything reads them.

    Args:
        tables: vLLM's, with a row for each of ``max_num_seqs`` requests.
        num_entries: Requests and branches of a graph at most.
    """
    if all(one.shape[0] >= num_entries for one in tables.input_block_tables):
        return
    tables.input_block_tables = [
        one.new_zeros(max(num_entries, one.shape[0]), one.shape[1]) for one in tables.input_block_tables
    ]
    tables.init_block_table_layout_tensors()


def copy_pages(kv_caches: Iterable[torch.Tensor], num_pages: int, source: torch.Tensor, target: torch.Tensor) -> None:
    """Copy whole pages of all layers, whatever their layout.

    Args:
        kv_caches: vLLM's, pages (or equal parts of them) along the first dimension.
        num_pages: Of the engine.
        source, target: int64 ``[C]``, page ids; no page is in both.
    """
    if not source.shape[0]:
        return
    seen: set[int] = set()
    for cache in kv_caches:
        if cache.data_ptr() in seen:  # layers may share theirs
            continue
        seen.add(cache.data_ptr())
        pages = cache.unflatten(0, (num_pages, -1))
        pages[target] = pages[source]
