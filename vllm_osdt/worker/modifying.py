"""What modifiers add to the logits of a step, before anything but log probabilities looks at them."""

from typing import NamedTuple

import torch

from csrc_triton import Proposals, implementations
from vllm_osdt.policies import MODIFIERS
from vllm_osdt.policies.modifier import ModifiedRows
from vllm_osdt.worker.slots import CanvasStates
from vllm_osdt.worker.step.batch import DenoiseBatch, ModifiedRequests

CHUNK_ELEMENTS = 1 << 23  # logits that are changed at once: 32 MiB of fp32


class StepLogits(NamedTuple):
    """The logits of a step, and what is added to some of them.

    Attributes:
        written: ``[M, vocabulary]``, as the model wrote them.
        token: int64 ``[M, N]``, ids of the logits that are added to; None where nothing is.
        addition: float32 ``[M, N]``, 0 for none.
    """

    written: torch.Tensor
    token: torch.Tensor | None = None
    addition: torch.Tensor | None = None

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """A copy of some rows, float32 ``[S, vocabulary]``, with what is added.

        Args:
            index: int64 ``[S]``.
        """
        own = self.written.index_select(0, index).float()
        if self.token is not None and self.addition is not None:
            own.scatter_add_(1, self.token.index_select(0, index), self.addition.index_select(0, index))
        return own


class LogitModifying:
    """Runs the modifiers of a step's requests.

    Args:
        states: Tables of the canvases.
    """

    def __init__(self, states: CanvasStates) -> None:
        self._states = states
        self._confidence = implementations(states.device).confidence

    def modify(self, logits: torch.Tensor, batch: DenoiseBatch, proposals: Proposals, *, are_read: bool) -> StepLogits:
        """The logits of a step with what modifiers add, and the proposals of the rows that they change.

        Args:
            logits: ``[M, vocabulary]``, not modified.
            batch: The step.
            proposals: The model's own; tokens and confidences are changed in place.
            are_read: Whether these were read off the logits; a kernel without logits may differ in the last bits.
        """
        changed = StepLogits(logits)
        for one in batch.modified:
            token, addition = self._add(one, logits, batch, proposals, are_read=are_read)
            num_rows, width = logits.shape[0], token.shape[1]
            tokens, additions = token, addition
            if one.rows.shape[0] < num_rows:  # else they are all of them, in order
                tokens = token.new_zeros(num_rows, width).index_copy_(0, one.rows, token)
                additions = addition.new_zeros(num_rows, width).index_copy_(0, one.rows, addition)
            if changed.token is not None and changed.addition is not None:
                tokens = torch.cat([changed.token, tokens], dim=1)
                additions = torch.cat([changed.addition, additions], dim=1)
            changed = StepLogits(logits, tokens, additions)
        for one in batch.modified:
            self._propose(one, changed, batch, proposals)
        return changed

    def _add(
        self, one: ModifiedRequests, logits: torch.Tensor, batch: DenoiseBatch, proposals: Proposals, *, are_read: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What a modifier adds to each of its rows, see ``Modifier.additions``."""
        states = self._states
        memory = states.modifier_memory[one.number]
        cell = torch.add(one.offset, one.slots, alpha=memory.shape[1])
        memory = memory.flatten(0, 1)
        if are_read and batch.temperature is None and batch.by_entropy is None:
            token, probability = proposals.token[one.rows], proposals.confidence[one.rows]
        else:
            token = torch.empty_like(one.rows)
            probability = torch.empty(one.rows.shape[0], device=logits.device)
            for part in _chunks(one.rows.shape[0], logits.shape[1]):
                own = logits.index_select(0, one.rows[part])
                token[part], probability[part] = self._confidence(own, states.mask_token_id, None, None)
        rows = ModifiedRows(
            token,
            probability,
            states.modifier_constants[one.number].index_select(0, one.slots),
            memory.index_select(0, cell),
            one.step_index,
        )
        found = MODIFIERS[one.number].additions(rows)
        memory.index_copy_(0, cell, rows.memory)
        return found

    def _propose(self, one: ModifiedRequests, changed: StepLogits, batch: DenoiseBatch, proposals: Proposals) -> None:
        """Propose anew in the rows of a modifier."""
        for part in _chunks(one.rows.shape[0], changed.written.shape[1]):
            rows = one.rows[part]
            of_part = [None if of is None else of[rows] for of in (batch.temperature, batch.noise_key)]
            by_entropy = None if batch.by_entropy is None else batch.by_entropy[rows]
            found = self._confidence(changed.rows(rows), self._states.mask_token_id, *of_part, by_entropy)
            proposals.token[rows], proposals.confidence[rows] = found


def _chunks(num_rows: int, vocabulary: int) -> list[slice]:
    """Parts of rows whose logits are changed at once."""
    size = max(1, CHUNK_ELEMENTS // vocabulary)
    return [slice(start, start + size) for start in range(0, num_rows, size)]
