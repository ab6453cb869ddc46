"""CreditDecoding: a token that keeps being the most likely one gathers credit, which raises its logit.

Source: CreditDecoding (arXiv 2510.06133). Of each masked position C[v] is the credit of token v, 0 when the block is
entered. A step takes C <- beta C, adds p ** gamma to the most likely token's, with p its probability, and decides by
the logits l[v] + alpha log(1 + C[v]), so that confidence and even the proposal may be others. Defaults: the authors'
code (inclusionAI/dInfer).

The authors' code keeps a number for each token of the vocabulary and position. At most one token gets credit in a step
for the first time, so that as many numbers as the block has steps are enough; the result is the same. Who gets credit
is a matter of the model's own logits, whatever sampling parameters leave out; the mask token gets none.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_osdt.declaration import Flag, number, option
from vllm_osdt.policies.modifier import ModifiedRows, Modifier

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class CreditOptions:
    """Credits and their three numbers."""

    credit: bool = option(
        False,
        Flag,
        "CreditDecoding: tokens that stay the most likely ones over the steps of a block gather credit, which raises "
        "their confidence. With every policy but those that compare the logits of two steps; a task calibrates with "
        "it on, and has a profile of its own.",
    )
    credit_alpha: float = option(
        0.7, number(gt=0, le=100), "Of `credit`: a logit is raised by this times ln(1 + credit).", needs="credit"
    )
    credit_gamma: float = option(
        0.2,
        number(ge=0, le=100),
        "Of `credit`: a step's most likely token gets its probability to this power.",
        needs="credit",
    )
    credit_beta: float = option(
        0.8,
        number(ge=0, le=1),
        "Of `credit`: share of its credit that a token keeps from step to step.",
        needs="credit",
    )


class Credit(Modifier):
    """Memory: pairs of a token, plus 1, and its credit; a pair for every step of the block."""

    name = "credit"
    Options = CreditOptions

    def key(self, options: CreditOptions) -> str:
        """See the base."""
        return f"credit{options.credit_alpha:g},{options.credit_gamma:g},{options.credit_beta:g}"

    def constants(self, options: CreditOptions) -> Sequence[float]:
        """See the base."""
        return options.credit_alpha, options.credit_gamma, options.credit_beta

    def memory_size(self, block_length: int) -> int:
        """See the class."""
        return 2 * block_length

    def additions(self, rows: ModifiedRows) -> "tuple[torch.Tensor, torch.Tensor]":
        """See the module."""
        import torch  # late: options are read without it

        alpha, gamma, beta = (rows.constants[:, column, None] for column in range(3))
        num_rows, size = rows.memory.shape
        pairs = rows.memory.view(num_rows, size // 2, 2)  # there may be no row: a block may be given whole
        name, credit = pairs[:, :, 0], pairs[:, :, 1]  # [S, N]; a name is exact in float32
        own = (rows.token + 1).to(name.dtype)[:, None]
        is_own = name == own
        column = torch.where(is_own.any(dim=1), is_own.to(torch.uint8).argmax(dim=1), rows.step_index)[:, None]
        credit.mul_(beta)
        credit.scatter_add_(1, column, rows.probability[:, None].pow(gamma))
        name.scatter_(1, column, own)
        return (name - 1).clamp(min=0).long(), alpha * torch.log1p(credit)
