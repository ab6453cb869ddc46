"""Log probabilities of a block's tokens: taken in the step that unmasks a token, sent when its block is finished.

A step has logits of masked positions only, so what a position's token was chosen from is known in that step alone. It
is kept on the device until the block is emitted. Whole tensors; the host waits for nothing.
"""

import numpy as np
import torch
from vllm.v1.outputs import LogprobsTensors

from vllm_osdt.geometry import MAX_BLOCK_LENGTH

Kept = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # token ids, log probabilities and ranks


class LogprobStore:
    """Log probabilities of every slot's active block, by position in it.

    Memory is taken with the first request that asks, for as many as the largest request so far asked for.

    Args:
        num_slots: Requests that can run.
        device: Of the logits.
        is_normalized: Whether log probabilities are returned; else plain logits.
    """

    def __init__(self, num_slots: int, device: torch.device, *, is_normalized: bool) -> None:
        self._num_slots = num_slots
        self._device = device
        self._is_normalized = is_normalized
        self._take(-1)

    def _take(self, num_logprobs: int) -> None:
        shape = (self._num_slots if num_logprobs >= 0 else 0, MAX_BLOCK_LENGTH)
        self._token_ids = torch.zeros(*shape, num_logprobs + 1, dtype=torch.int32, device=self._device)
        self._logprobs = torch.zeros(*shape, num_logprobs + 1, device=self._device)
        self._ranks = torch.zeros(shape, dtype=torch.int32, device=self._device)

    def make_room(self, num_logprobs: int) -> None:
        """Have room for so many log probabilities of a token, besides its own; what is kept is kept."""
        before = self._token_ids, self._logprobs, self._ranks
        width = before[0].shape[2]
        if num_logprobs + 1 <= width:
            return
        self._take(num_logprobs)
        if width:
            self._token_ids[..., :width], self._logprobs[..., :width], self._ranks[:] = before

    def keep(
        self, logits: torch.Tensor, slots: torch.Tensor, offset: torch.Tensor, token: torch.Tensor, num_logprobs: int
    ) -> None:
        """Take in what tokens are chosen from.

        Args:
            logits: fp32 ``[S, vocabulary]``, not modified.
            slots: ``[S]``.
            offset: int64 ``[S]``, position in the active block.
            token: int64 ``[S]``, the token that is, or would be, written there.
            num_logprobs: How many of the likeliest tokens are kept, besides that one.
        """
        scores = logits.log_softmax(dim=-1) if self._is_normalized else logits
        own = scores.gather(1, token[:, None])
        best, best_ids = scores.topk(num_logprobs, dim=-1)
        slots, width = slots.long(), num_logprobs + 1
        self._token_ids[..., :width][slots, offset] = torch.cat([token[:, None], best_ids], dim=1).int()
        self._logprobs[..., :width][slots, offset] = torch.cat([own, best], dim=1)
        self._ranks[slots, offset] = (scores >= own).sum(dim=-1).to(torch.int32)

    def read(self, slots: torch.Tensor, offset: torch.Tensor) -> Kept:
        """What is kept of positions; arguments of :meth:`keep`."""
        slots = slots.long()
        return self._token_ids[slots, offset], self._logprobs[slots, offset], self._ranks[slots, offset]

    def restore(self, before: Kept, slots: torch.Tensor, offset: torch.Tensor, is_new: torch.Tensor) -> None:
        """Put back what :meth:`read` gave, but at new tokens.

        Args:
            before, slots, offset: Of that call.
            is_new: bool ``[S]``.
        """
        slots = slots.long()
        for table, old in zip((self._token_ids, self._logprobs, self._ranks), before, strict=True):
            now = table[slots, offset]
            table[slots, offset] = torch.where(is_new.view(-1, *[1] * (now.dim() - 1)), now, old)

    def take(self, asking: torch.Tensor, asks: np.ndarray, width: int, num_logprobs: int) -> LogprobsTensors:
        """What is kept of the blocks of a batch, for the output of a step; vLLM reads of it what has been emitted.

        Args:
            asking: int64 ``[A]``, slots of the requests that ask.
            asks: bool ``[R]``, on the host: which of the batch's requests they are.
            width: W, positions of the longest block.
            num_logprobs: Of each token, besides its own.
        """
        first, size = np.cumsum(asks) - asks, num_logprobs + 1
        return LogprobsTensors(
            self._token_ids[asking, :width, :size].reshape(-1, size),
            self._logprobs[asking, :width, :size].reshape(-1, size),
            self._ranks[asking, :width].reshape(-1),
            cu_num_generated_tokens=(first * width).tolist(),
        )
