"""From hidden states to proposals: by logits, or by a kernel that writes none; chosen when a model is loaded.

The kernel takes the place of vLLM's ``LogitsProcessor`` and its matrix product, so it is for models whose logits are
that product and nothing else.
"""

from copy import copy
from typing import TYPE_CHECKING, Any, Protocol

import torch
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding

from csrc_triton import Proposals, implementations
from vllm_osdt.errors import OSDTError

if TYPE_CHECKING:
    from vllm_osdt.worker.sampler import CanvasSampler
    from vllm_osdt.worker.step.batch import DenoiseBatch

PLAIN_WEIGHTS = (UnquantizedEmbeddingMethod, UnquantizedLinearMethod)


class Head(Protocol):
    """What stands between a model and the decision.

    Attributes:
        ways: The heads that one step or another takes in its place; what warms up takes each.
    """

    def writes_logits(self, num_rows: int) -> bool:
        """Whether proposals of so many rows are read off logits."""

    @property
    def ways(self) -> "tuple[Head, ...]":
        """See the class."""

    def propose(self, hidden_states: torch.Tensor, batch: "DenoiseBatch") -> Proposals:
        """What the model proposes where logits are read.

        Args:
            hidden_states: ``[at least M, hidden_size]``; rows behind the batch's M are left out.
            batch: The step.
        """

    def measure(self, hidden_states: torch.Tensor) -> None:
        """Take the memory that proposals of so many greedy rows take."""


class LogitHead:
    """The model writes logits, the sampler reads them."""

    def __init__(self, model: Any, sampler: "CanvasSampler") -> None:
        self._model = model
        self._sampler = sampler

    def writes_logits(self, num_rows: int) -> bool:
        """Always."""
        return True

    @property
    def ways(self) -> tuple[Head, ...]:
        """See ``Head``."""
        return (self,)

    def propose(self, hidden_states: torch.Tensor, batch: "DenoiseBatch") -> Proposals:
        """See ``Head``."""
        return self._sampler.propose(self._model.compute_logits(hidden_states), batch)

    def measure(self, hidden_states: torch.Tensor) -> None:
        """See ``Head``."""
        self._sampler(self._model.compute_logits(hidden_states), None)


class FusedHead:
    """One kernel multiplies with the output weight and keeps of each row's logits what a decision needs.

    With tensor parallelism each rank has a shard of the weight, whose last rows may be padding; ranks exchange what
    they keep, and all of them combine it.

    Args:
        lm_head: The output weight.
        vocabulary: Token ids of the model.
        mask_token_id: Never proposed.
        device: Of both.
        logits: What a step takes whose requests change logits or ask for them, or that reads many rows.
        max_rows: Rows from which on it is not used; None: any number.
    """

    def __init__(
        self,
        lm_head: VocabParallelEmbedding,
        vocabulary: int,
        mask_token_id: int,
        device: torch.device,
        logits: LogitHead,
        max_rows: int | None = None,
    ) -> None:
        ops = implementations(device)
        self._lm_head_partials, self._combine_partials = ops.lm_head_partials, ops.combine_partials
        self._lm_head = lm_head
        self._first_id = lm_head.shard_indices.padded_org_vocab_start_index  # also of a shard that is all padding
        self._vocabulary = vocabulary
        self._mask_token_id = mask_token_id
        self._logits = logits
        self._max_rows = max_rows

    def writes_logits(self, num_rows: int) -> bool:
        """See ``Head``."""
        return self._max_rows is not None and num_rows > self._max_rows

    @property
    def ways(self) -> tuple[Head, ...]:
        """See ``Head``."""
        if self._max_rows is None:
            return (self,)
        unlimited = copy(self)
        unlimited._max_rows = None
        return unlimited, self._logits

    def propose(self, hidden_states: torch.Tensor, batch: "DenoiseBatch") -> Proposals:
        """See ``Head``."""
        if self.writes_logits(batch.position.shape[0]):
            return self._logits.propose(hidden_states[: batch.position.shape[0]], batch)
        found = self._find(
            hidden_states[: batch.position.shape[0]], batch.temperature, batch.noise_key, batch.by_entropy
        )
        return Proposals(batch.position, *found)

    def measure(self, hidden_states: torch.Tensor) -> None:
        """See ``Head``."""
        self._find(hidden_states, None, None, None)
        self._logits.measure(hidden_states)

    def _find(
        self,
        hidden_states: torch.Tensor,
        temperature: torch.Tensor | None,
        noise_key: torch.Tensor | None,
        by_entropy: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Token and confidence of each row; see ``csrc_triton.lm_head_confidence``."""
        partials = self._lm_head_partials(
            hidden_states,
            self._lm_head.weight,
            first_id=self._first_id,
            vocabulary=self._vocabulary,
            excluded_token_id=self._mask_token_id,
            temperature=temperature,
            noise_key=noise_key,
            by_entropy=by_entropy,
        )
        if self._lm_head.tp_size > 1 and hidden_states.shape[0]:  # no rank has a row, or all have
            partials = tensor_model_parallel_all_gather(partials, dim=0)
        return self._combine_partials(partials, excluded_token_id=self._mask_token_id, by_entropy=by_entropy)


def choose_head(model: Any, sampler: "CanvasSampler", *, is_fused: bool, max_rows: int | None = None) -> Head:
    """The head of a model.

    Args:
        model: vLLM's, with its weights.
        sampler: The worker's.
        is_fused: The operator's ``fused_lm_head``; what can be told before weights are loaded was refused there.
        max_rows: The operator's ``fused_lm_head_max_rows``.

    Raises:
        OSDTError: The operator asks for the kernel, and the model's logits are more than a matrix product.
    """
    if not is_fused:
        return LogitHead(model, sampler)
    logits = LogitHead(model, sampler)
    lm_head, processor = model.lm_head, model.logits_processor
    reason = _more_than_a_product(lm_head, processor)
    if reason is not None:
        raise OSDTError(f"fused_lm_head is true, but {reason}, which its kernel does not do; leave it out.")
    states = sampler.states
    return FusedHead(lm_head, processor.org_vocab_size, states.mask_token_id, states.device, logits, max_rows)


def _more_than_a_product(lm_head: Any, processor: Any) -> str | None:
    """What makes logits of hidden states besides a product with a plain weight; None: nothing."""
    if not isinstance(lm_head, VocabParallelEmbedding):
        return f"this model's output layer is a {type(lm_head).__name__}"
    if not isinstance(lm_head.quant_method, PLAIN_WEIGHTS):
        return f"this model's output weight is quantized ({type(lm_head.quant_method).__name__})"
    if getattr(lm_head, "bias", None) is not None:
        return "this model's logits have a bias"
    if processor.scale != 1.0:
        return f"this model's logits are scaled by {processor.scale:g}"
    if processor.soft_cap is not None:
        return f"this model's logits are capped at {processor.soft_cap:g}"
    return None
