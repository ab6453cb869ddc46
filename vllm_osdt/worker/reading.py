"""What policies read off logits: more of a position than its best token and that token's probability.

A policy that compares steps gets the logits of the steps before. They are not kept: their hidden states are, which are
smaller by the vocabulary over the hidden size, and the model's output layer computes them again.
"""

from collections.abc import Callable

import torch

from csrc_triton import Proposals
from vllm_osdt.policies import PositionLogits
from vllm_osdt.policies.base import MAX_READINGS
from vllm_osdt.worker.modifying import CHUNK_ELEMENTS, StepLogits
from vllm_osdt.worker.shaping import LogitShaping
from vllm_osdt.worker.slots import NUMBERS, CanvasStates
from vllm_osdt.worker.step.batch import AdjustedRows, DenoiseBatch, ReadRows

# Hidden states [S, hidden_size] in place of some of a step's M rows, and int64 [S], which: logits [S, vocabulary].
ComputeLogits = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class PolicyReader:
    """Runs ``Policy.read`` on the rows of each policy that has it.

    Args:
        states: Tables of the canvases.
        shaping: Changes logits as sampling parameters ask.
    """

    def __init__(self, states: CanvasStates, shaping: LogitShaping) -> None:
        self._states = states
        self._shaping = shaping
        # Of the last steps, by slot and position in the block, the latest first; [0, 0, 0, 0] until a policy asks.
        self._hidden = torch.zeros(0, 0, 0, 0, device=states.device)

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
        reading = torch.zeros(num_requests * width, MAX_READINGS, device=states.device)
        place = torch.add(read.offset, read.request, alpha=width)  # of each row in it
        memory = states.policy_memory.flatten(0, 1)[:, : policy.memory_size]
        cell = torch.add(read.offset, read.slots, alpha=states.policy_memory.shape[1]) if policy.memory_size else place
        num_before = num_kept = policy.num_steps_before if policy.reads_step_before else 0
        if policy.verifies:  # only a sample is compared with what it was drawn from
            num_kept = num_before if batch.temperature is not None else 0
            num_before = num_kept if read.is_verified is not None else 0
        if num_kept:
            self._make_room(hidden, width, num_kept)
        is_every = num_rows == proposals.token.shape[0]  # then they are all of them, in order
        size = max(1, CHUNK_ELEMENTS // logits.written.shape[1])
        for start in range(0, num_rows, size):
            part = slice(start, start + size)
            rows, slot, offset = read.rows[part], read.slots[part], read.offset[part]
            own = self._as_shaped(logits.rows(rows), read, start, batch)
            before = []
            for back in range(num_before):
                before.append(compute_logits(self._hidden[slot, offset, back], rows).float())
                if policy.verifies:
                    before[-1] = self._as_shaped(before[-1], read, start, batch)
                before[-1][:, states.mask_token_id] = -torch.inf
            is_verified = None
            if policy.verifies:
                is_verified = torch.zeros_like(rows, dtype=torch.bool)
                if read.is_verified is not None:
                    is_verified = read.is_verified[part]
            token, confidence = (
                one[part] if is_every else one.index_select(0, rows) for one in (proposals.token, proposals.confidence)
            )
            constants, _, carry = states.policy_numbers.index_select(0, slot).split(NUMBERS, dim=1)
            found = PositionLogits(
                own,
                before[0] if before else None,
                token,
                confidence,
                constants,
                memory.index_select(0, cell[part]) if policy.memory_size else own.new_zeros(rows.shape[0], 0),
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
                memory.index_copy_(0, cell[part], found.memory)
            reading.index_copy_(0, place[part], found.reading)
        if num_kept:
            if self._hidden.shape[2] > 1:
                self._hidden[read.slots, read.offset, 1:] = self._hidden[read.slots, read.offset, :-1]
            self._hidden[read.slots, read.offset, 0] = hidden[read.rows]
        return reading.view(num_requests, width, MAX_READINGS)

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

    def _make_room(self, hidden: torch.Tensor, width: int, num_steps: int) -> None:
        """Have room for hidden states like these, of every slot, so long blocks and steps; what is there is kept."""
        known = self._hidden
        if known.shape[1] >= width and known.shape[2] >= num_steps:
            return
        num_slots = self._states.policy_state.shape[0]
        size = max(width, known.shape[1]), max(num_steps, known.shape[2])
        self._hidden = hidden.new_zeros(num_slots, *size, hidden.shape[1])
        if known.numel():
            self._hidden[:, : known.shape[1], : known.shape[2]] = known
