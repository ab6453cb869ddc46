"""What policies read off logits: more of a position than its best token and that token's probability.

A policy that compares steps gets the logits of the steps before. They are kept as the model wrote them, where the
operator's ``kept_logits_gib`` has room for those of every request at once. Of requests with longer blocks hidden states
are kept, which are smaller by the vocabulary over the hidden size, and the output layer computes their logits again.
Which it is depends on a request's ``block_length`` alone, so that other requests change nothing of it.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
import torch

from csrc_triton import Proposals
from csrc_triton.adjusting import put_rows, take_rows
from csrc_triton.types import KeptLogits
from vllm_osdt.policies import PositionLogits
from vllm_osdt.policies.base import MAX_CARRY, MAX_CONSTANTS, MAX_READINGS
from vllm_osdt.worker.modifying import CHUNK_ELEMENTS, StepLogits
from vllm_osdt.worker.shaping import LogitShaping
from vllm_osdt.worker.slots import ADJUSTING, CanvasStates
from vllm_osdt.worker.step.batch import AdjustedRows, DenoiseBatch, ReadRows

# Hidden states [S, hidden_size] in place of some of a step's M rows, and int64 [S], which: logits [S, vocabulary].
ComputeLogits = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
MAX_STEPS = max(policy.num_steps_before for policy in ADJUSTING)  # that are kept of a block


class StepTable:
    """What is kept of the last steps of each slot's block, by position; empty until there is room for something."""

    def __init__(self, device: torch.device) -> None:
        self._rows = torch.zeros(0, 0, 0, 0, device=device)  # [slots, positions, steps, size]

    def make_room(self, like: torch.Tensor, num_slots: int, width: int, num_steps: int) -> None:
        """Have room for blocks so long and so many steps; what is there is kept.

        Args:
            like: ``[any, size]``, of its dtype.
            num_slots: Always the same.
            width, num_steps: At least.
        """
        known = self._rows
        if known.shape[1] >= width and known.shape[2] >= num_steps:
            return
        size = max(width, known.shape[1]), max(num_steps, known.shape[2])
        if not known.numel():
            self._rows = like.new_zeros(num_slots, *size, like.shape[1])
            return
        # By way of the host, which waits, so that a GPU never has both: a server grows it a few times.
        known = known.cpu()
        self._rows = known.new_zeros(0)
        self._rows = like.new_zeros(num_slots, *size, like.shape[1])
        self._rows[:, : known.shape[1], : known.shape[2]] = known

    def find(self, slot: torch.Tensor, offset: torch.Tensor, step: torch.Tensor, num_steps: int) -> KeptLogits:
        """Where a step of a block is, or is to be: that of the step ``num_steps`` before, which it overwrites.

        Args:
            slot, offset, step: int64 ``[S]``; steps count from the block's first.
            num_steps: That the slot's policy has kept.
        """
        row = torch.add(offset, slot, alpha=self._rows.shape[1])
        if self._rows.shape[2] > 1:
            row = torch.add(step % num_steps, row, alpha=self._rows.shape[2])  # all at 0 where one is kept
        return KeptLogits(self._rows.flatten(0, 2), row)


def every_row(logits: torch.Tensor) -> KeptLogits:
    """Logits that are a table by themselves."""
    return KeptLogits(logits, torch.arange(logits.shape[0], device=logits.device))


class PolicyReader:
    """Runs ``Policy.read`` on the rows of each policy that has it.

    Args:
        states: Tables of the canvases.
        shaping: Changes logits as sampling parameters ask.
    """

    def __init__(self, states: CanvasStates, shaping: LogitShaping) -> None:
        self._states = states
        self._shaping = shaping
        self._logits, self._hidden = StepTable(states.device), StepTable(states.device)

    def read(
        self,
        logits: StepLogits,
        batch: DenoiseBatch,
        proposals: Proposals,
        hidden: torch.Tensor,
        compute_logits: ComputeLogits,
    ) -> list[torch.Tensor | None]:
        """Have every policy of the batch that reads logits do so.

        Args:
            logits: M rows.
            batch: The step.
            proposals: Of the step; tokens and confidences are changed in place.
            hidden: ``[at least M, hidden_size]``, of which the logits were made.
            compute_logits: The model's output layer.

        Returns:
            For each of ``batch.adjusted`` float32 ``[R, W, 4]``, see ``policies.Step.reading``; None where it has not
            read.
        """
        width = batch.blocks.canvas_index.shape[1]
        return [
            None
            if one.read is None
            else self._read_policy(one, one.read, logits, batch, proposals, hidden, compute_logits, width)
            for one in batch.adjusted
        ]

    def _read_policy(
        self,
        adjusted: AdjustedRows,
        read: ReadRows,
        logits: StepLogits,
        batch: DenoiseBatch,
        proposals: Proposals,
        hidden: torch.Tensor,
        compute_logits: ComputeLogits,
        width: int,
    ) -> torch.Tensor:
        """As :meth:`read`, of one policy."""
        policy, states = adjusted.policy, self._states
        num_requests, num_rows = adjusted.requests.rows.shape[0], read.rows.shape[0]
        reading = torch.zeros(num_requests, width, MAX_READINGS, device=states.device)
        memory = states.policy_memory[:, :, : policy.memory_size]
        num_before = num_kept = policy.num_steps_before if policy.reads_step_before else 0
        if policy.verifies:  # only a sample is compared with what it was drawn from
            num_kept = num_before if batch.temperature is not None else 0
            num_before = num_kept if read.is_verified is not None else 0
        is_every = num_rows == proposals.token.shape[0]  # then they are all of them, in order
        # Nothing that looks at the logits later minds the mask token's, and nothing else of them changes.
        is_own = is_every and logits.token is None and read.shaped is None and batch.scored is None
        for part, width_kept in self._parts(read, logits.written, num_kept):
            rows, slot, offset = read.rows[part], read.slots[part], read.offset[part]
            if is_own and logits.written.dtype == torch.float32:
                own = logits.written[part]
                own[:, states.mask_token_id] = -torch.inf
            else:
                own = self._as_shaped(logits.rows(rows), read, part.start, batch)
            table, kept = (self._logits, logits.written) if width_kept else (self._hidden, hidden)
            before, at = [], None
            if num_kept:
                table.make_room(kept, states.policy_state.shape[0], width_kept or read.longest, num_kept)
                at = table.find(slot, offset, read.step_index[part], num_kept)
            for back in range(1, num_before + 1):
                one = at if num_kept == 1 else table.find(slot, offset, read.step_index[part] - back, num_kept)
                assert one is not None
                if not width_kept:
                    one = every_row(compute_logits(one.table.index_select(0, one.row), rows))
                if policy.verifies:
                    one = every_row(self._as_shaped(one.gather(), read, part.start, batch))
                before.append(one)
            is_verified = None
            if policy.verifies:
                is_verified = torch.zeros_like(rows, dtype=torch.bool)
                if read.is_verified is not None:
                    is_verified = read.is_verified[part]
            token, confidence = (
                one[part] if is_every else one.index_select(0, rows) for one in (proposals.token, proposals.confidence)
            )
            numbers, kept_numbers = take_rows(states.policy_numbers, memory, slot, offset)
            constants, carry = numbers[:, :MAX_CONSTANTS], numbers[:, -MAX_CARRY:]
            found = PositionLogits(
                own,
                before[0] if before else None,
                token,
                confidence,
                constants,
                kept_numbers,
                torch.zeros(rows.shape[0], MAX_READINGS, device=states.device),
                read.step_index[part],
                tuple(before[1:]),
                carry,
                None if batch.temperature is None else batch.temperature[rows],
                None if batch.noise_key is None else batch.noise_key[rows],
                is_verified,
            )
            policy.read(found)
            if not is_every:
                proposals.token.index_copy_(0, rows, found.token)
                proposals.confidence.index_copy_(0, rows, found.confidence)
            if policy.memory_size:
                put_rows(memory, slot, offset, found.memory)
            put_rows(reading, read.request[part], offset, found.reading)
            if at is not None:
                at.table.index_copy_(0, at.row, kept[part] if is_every else kept.index_select(0, rows))
        return reading

    def _parts(self, read: ReadRows, logits: torch.Tensor, num_kept: int) -> Iterator[tuple[slice, int]]:
        """Rows that are read at once, and how long blocks are of which logits are kept; 0: hidden states are.

        Args:
            read: All rows.
            logits: ``[M, vocabulary]``, like those that are kept.
            num_kept: Steps of which either is.
        """
        num_rows, size = read.rows.shape[0], max(1, CHUNK_ELEMENTS // logits.shape[1])
        bounds, lengths, longest = [0, num_rows], read.block_length_np, read.longest
        if num_kept:
            num_bytes = self._states.policy_state.shape[0] * logits.shape[1] * logits.element_size() * MAX_STEPS
            longest = min(longest, self._states.kept_logits_bytes // num_bytes)
            if longest < read.longest:
                bounds[1:1] = (np.flatnonzero(np.diff(lengths <= longest)) + 1).tolist()
        for first, last in pairwise(bounds):
            for start in range(first, last, size):
                yield slice(start, min(start + size, last)), longest if lengths[start] <= longest else 0

    def _as_shaped(self, own: torch.Tensor, read: ReadRows, start: int, batch: DenoiseBatch) -> torch.Tensor:
        """Logits of some of a policy's rows, from the one numbered ``start`` on, as sampling parameters leave them."""
        if read.shaped is not None:
            first, last = read.shaped_np.searchsorted([start, start + own.shape[0]])
            if first < last:
                some = read.shaped.part(first, last)
                at = read.shaped_at[first:last] - start
                temperature = None if batch.temperature is None else batch.temperature[some.rows]
                own[at] = self._shaping.shape(own[at], some, temperature, batch.grammar)
        own[:, self._states.mask_token_id] = -torch.inf
        return own
