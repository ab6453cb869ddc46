"""What a modifier is: it adds to a few logits of each masked position, before a token is proposed.

A request has one policy, and any of the modifiers. Sampling parameters, proposals, confidences and policies see the
logits that modifiers leave. Confidences depend on them, so that they belong to the key of a calibration profile.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from vllm_osdt.policies.base import Policy

if TYPE_CHECKING:
    import torch


class ModifiedRows(NamedTuple):
    """Masked positions of the batch's requests of one modifier, S of them; a row knows nothing of the others.

    Attributes:
        token: int64 ``[S]``, the most likely token, by the model's own logits.
        probability: float32 ``[S]``, the model's, of that token.
        constants: float32 ``[S, 8]``, what :meth:`Modifier.constants` gave.
        memory: float32 ``[S, at least memory_size]``, zero when the block is entered. May be overwritten, and is kept
            until the next block. Longer where another request needs more.
        step_index: int64 ``[S]``, denoising steps that the block has seen before this one.
    """

    token: "torch.Tensor"
    probability: "torch.Tensor"
    constants: "torch.Tensor"
    memory: "torch.Tensor"
    step_index: "torch.Tensor"


class Modifier(ABC):
    """Adds to a few logits of each position. One instance serves all requests, so it holds no state of theirs.

    Attributes:
        name: What a user calls it: the option of type ``Flag`` that switches it on.
        Options: A frozen dataclass of its options (``vllm_osdt.declaration.option``), ``name`` among them.
    """

    name: ClassVar[str]
    Options: ClassVar[type]

    def is_on(self, options: Any) -> bool:
        """Whether a request has it."""
        return bool(getattr(options, self.name))

    def goes_with(self, policy: Policy) -> bool:
        """Whether it may stand beside a policy: not one that compares a step's logits with the model's of another."""
        return not policy.reads_step_before

    @abstractmethod
    def key(self, options: Any) -> str:
        """How calibration profiles tell its options apart: lower-case letters, then digits and ``.,e-``."""

    @abstractmethod
    def constants(self, options: Any) -> Sequence[float]:
        """At most 8 numbers that :meth:`additions` reads."""

    @abstractmethod
    def memory_size(self, block_length: int) -> int:
        """Numbers that it keeps of each position of the active block, in a request of such blocks."""

    @abstractmethod
    def additions(self, rows: ModifiedRows) -> "tuple[torch.Tensor, torch.Tensor]":
        """What to add to which logits; once in each denoising step.

        Returns:
            Token ids, int64 ``[S, N]``, and what is added to their logits, float32 ``[S, N]``. An id may come more than
            once.
        """
