"""What attention sees of a step: its rows cut into pieces that each see a prefix of the canvas."""

from typing import NamedTuple

import numpy as np
import torch

from vllm_osdt.worker.slots import CanvasStates
from vllm_osdt.worker.step.rows import StepRows


class BlockQueries(NamedTuple):
    """A step's rows cut into S pieces of requests: each sees all positions up to its own end, and nothing else.

    A row of a causal piece sees those up to its own.
    """

    query_start_loc: np.ndarray  # int32 [S + 1], first row of each piece
    seq_lens: np.ndarray  # int32 [S], position behind each
    request: np.ndarray  # int64 [S], whose it is
    causal: np.ndarray | None = None  # int32 [S], 1: it is causal; None: none is

    def arrays(self) -> dict[str, np.ndarray]:
        """For the device, by names of their own."""
        return {"block_" + name: array for name, array in self._asdict().items() if array is not None}


class Queries(NamedTuple):
    """The queries of attention in a step, S of them: requests, or pieces of blocks."""

    start_loc: torch.Tensor  # int32 [S + 1], first row of each
    seq_lens: torch.Tensor  # int32 [S], positions that each sees, from the first
    request: torch.Tensor | None  # int64 [S], whose it is, where it is a piece
    max_query_len: int
    max_seq_len: int | None  # None: any; attention plans its work by it
    start_loc_np: np.ndarray | None = None  # on the host, where it is no graph's
    seq_lens_np: np.ndarray | None = None
    causal: torch.Tensor | None = None  # int32 [S], 1: a row sees the positions up to its own; None: none is causal


def split_queries_by_block(states: CanvasStates, rows: StepRows) -> BlockQueries:
    """The queries of a block-causal model: a step's rows are whole blocks, or a part of one, or a causal branch's."""
    block_length = states.host.block_length[rows.slots]
    block_length = np.where(block_length > 0, block_length, rows.num_rows)  # vLLM's warm-up requests have no canvas
    num_blocks = -(-rows.num_rows // block_length)
    request = np.repeat(np.arange(rows.slots.size), num_blocks)
    index = np.arange(request.size) - (num_blocks.cumsum() - num_blocks)[request]  # of a block in its request
    length = np.minimum(block_length, rows.num_rows)[request]
    query_start_loc = np.zeros(request.size + 1, dtype=np.int32)
    length.cumsum(out=query_start_loc[1:])
    block = rows.start[request] // block_length[request] + index
    pieces = BlockQueries(query_start_loc, ((block + 1) * block_length[request]).astype(np.int32), request)
    return _with_single_rows(pieces, rows)


def split_queries_of_branches(rows: StepRows, seq_lens: np.ndarray) -> BlockQueries:
    """The queries where every position sees the whole canvas: requests, branches, and the rows of causal ones.

    Args:
        rows: Of the step.
        seq_lens: int32 ``[Q]``, positions that each sees.
    """
    query_start_loc = np.zeros(rows.slots.size + 1, dtype=np.int32)
    rows.num_rows.cumsum(out=query_start_loc[1:])
    return _with_single_rows(BlockQueries(query_start_loc, seq_lens, np.arange(rows.slots.size)), rows)


def split_queries_at_canvas(rows: StepRows) -> BlockQueries:
    """The queries of a model that commits causally: a step's decided rows, which are causal, and its active block.

    The rows of a verification are causal likewise.
    """
    num_causal = np.minimum(rows.block_start - rows.start, rows.num_rows)
    if rows.span.size:
        num_causal = np.where(rows.is_verified, rows.num_rows, num_causal)
    length = np.stack([num_causal, rows.num_rows - num_causal], axis=1).ravel()
    piece = np.flatnonzero(length)
    query_start_loc = np.zeros(piece.size + 1, dtype=np.int32)
    length[piece].cumsum(out=query_start_loc[1:])
    end = np.stack([rows.start + num_causal, rows.start + rows.num_rows], axis=1).ravel()[piece]
    pieces = BlockQueries(query_start_loc, end.astype(np.int32), piece // 2, 1 - (piece % 2).astype(np.int32))
    return _with_single_rows(pieces, rows)


def _with_single_rows(pieces: BlockQueries, rows: StepRows) -> BlockQueries:
    """The pieces of a step with those of causal branches cut into their rows, which any backend takes.

    The keys and values of all rows are written before any is read.
    """
    if not rows.is_causal.any():
        return pieces
    length = np.diff(pieces.query_start_loc)
    is_cut = rows.is_causal[pieces.request]
    piece = np.repeat(np.arange(length.size), np.where(is_cut, length, 1))
    position = np.concatenate([start + np.arange(n) for start, n in zip(rows.start, rows.num_rows, strict=True)])
    first = np.zeros(piece.size + 1, dtype=np.int32)
    np.where(is_cut[piece], 1, length[piece]).cumsum(out=first[1:])
    seq_lens = np.where(is_cut[piece], position[first[:-1]] + 1, pieces.seq_lens[piece]).astype(np.int32)
    causal = None if pieces.causal is None else np.where(is_cut[piece], 0, pieces.causal[piece]).astype(np.int32)
    return BlockQueries(first, seq_lens, pieces.request[piece], causal)
