"""What policies read off logits: more of a position than its best token and that token's probability.

A policy that compares steps gets the logits of the step before. They are not kept: their hidden states are, which are
smaller by the vocabulary over the hidden size, and the model's output layer computes them again.
"""

from collections.abc import Callable

import torch

from csrc_triton import Proposals
from vllm_osdt.policies import PositionLogits
from vllm_osdt.policies.base import MAX_READINGS
from vllm_osdt.worker.modifying import CHUNK_ELEMENTS, StepLogits
from vllm_osdt.worker.shaping import LogitShaping
from vllm_osdt.worker.slots import CanvasStates
from vllm_osdt.worker.step_plan import AdjustedRows, DenoiseBatch, ReadRows

ComputeLogits = Callable[[torch.Tensor], torch.Tensor]


class PolicyReader:
    """Runs ``Policy.read`` on the rows of each policy that has it.

    Args:
        states: Tables of the canvases.
        shaping: Changes logits as sampling parameters ask.
    """

    def __init__(self, states: CanvasStates, shaping: LogitShaping) -> None:
        self._states = states
        self._shaping = shaping
        # Of the last step, by slot and position in the block; [0, 0, 0] until a policy asks.
        self._hidden = torch.zeros(0, 0, 0, device=states.device)

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
        num_requests, num_rows = adjusted.rows.shape[0], read.rows.shape[0]
        reading = torch.zeros(num_requests, width, MAX_READINGS, device=states.device)
        slots = adjusted.slots[read.request]
        if policy.reads_step_before:
            self._make_room(hidden)
        size = max(1, CHUNK_ELEMENTS // logits.written.shape[1])
        for start in range(0, num_rows, size):
            part = slice(start, start + size)
            rows, slot, offset = read.rows[part], slots[part], read.offset[part]
            own = self._as_shaped(logits.rows(rows), read, start, batch)
            before = None
            if policy.reads_step_before:
                before = compute_logits(self._hidden[slot, offset]).float()
                before[:, states.mask_token_id] = -torch.inf
            found = PositionLogits(
                own,
                before,
                proposals.token[rows],
                proposals.confidence[rows],
                states.constants[slot],
                states.policy_memory[slot, offset, : policy.memory_size],
                reading[read.request[part], read.offset[part]],
                adjusted.step_index[read.request[part]],
            )
            policy.read(found)
            proposals.token[rows], proposals.confidence[rows] = found.token, found.confidence
            states.policy_memory[slot, offset, : policy.memory_size] = found.memory
            reading[read.request[part], read.offset[part]] = found.reading
        if policy.reads_step_before:
            self._hidden[slots, read.offset] = hidden[read.rows]
        return reading

    def _as_shaped(self, own: torch.Tensor, read: ReadRows, start: int, batch: DenoiseBatch) -> torch.Tensor:
        """Logits of some of a policy's rows, from the one numbered ``start`` on, as sampling parameters leave them."""
        if read.shaped is not None:
            first, last = read.shaped_np.searchsorted([start, start + own.shape[0]])
            if first < last:
                some = read.shaped.part(first, last)
                at = torch.from_numpy(read.shaped_np[first:last] - start).to(own.device, non_blocking=True)
                temperature = None if batch.temperature is None else batch.temperature[some.rows]
                own[at] = self._shaping.shape(own[at], some, temperature, batch.grammar)
        own[:, self._states.mask_token_id] = -torch.inf
        return own

    def _make_room(self, hidden: torch.Tensor) -> None:
        """Have room for hidden states like these, of every slot."""
        num_slots, width = self._states.policy_state.shape[0], self._states.policy_memory.shape[1]
        if not self._hidden.numel():
            self._hidden = hidden.new_zeros(num_slots, width, hidden.shape[1])
