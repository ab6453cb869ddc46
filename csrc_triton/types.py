"""What the ops take and return: the rules, the tuples of tensors and their constants."""

from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

NO_CONFIDENCE = -2.0  # of a position without logits: below every other, and below NaN, which counts as -1
CHOSEN = 2.0  # score of a position that a policy has chosen: above every confidence
ENTROPY_SCALE = 32.0  # above the entropy of any vocabulary, in nats
UNCERTAINTY_UNITS = 1 << 24  # in 1; an uncertainty 1 - c in fp32 is a whole number of them


class Rule(IntEnum):
    """How a block chooses the positions to unmask; each rule has one parameter p.

    With the masked confidences sorted, c_(1) >= c_(2) >= ...; the uncertainty of a position is 1 - c.
    """

    THRESHOLD = 0
    """Every position with confidence >= p."""
    TOP_K = 1
    """The floor(p) most confident positions."""
    FACTOR = 2
    """The n most confident, n the largest with (n + 1) * (1 - c_(n)) < p, evaluated in fp32."""
    JOINT_BOUND = 3
    """The n most confident, n the largest with (1 - c_(1)) + ... + (1 - c_(n)) + (1 - c_(n)) < p. Each uncertainty is
    taken in fp32, where it is a multiple of 2**-24; the sum is exact."""
    ENTROPY_BOUND = 4
    """The n most confident, n the largest with (1 - c_(1)) + ... + (1 - c_(n)) < p, summed likewise."""


class Partial(IntEnum):
    """Numbers of a partial: what is known of a row after some of its ids, the chunk. All are fp32.

    Partials of several chunks are ``[num_chunks, len(Partial), num_rows]``, or ``[num_chunks, WITHOUT_MARGIN,
    num_rows]``, so those of the shards of a vocabulary are joined along the first dimension.
    """

    LARGEST = 0
    """The largest logit; -inf of no ids."""
    TOTAL = 1
    """Sum of exp(x), where x = logit - largest. NaN if a logit is NaN: the other numbers then mean nothing."""
    WEIGHTED = 2
    """Sum of x exp(x); anything in a row whose confidence is not by entropy."""
    BEST_SCORE = 3
    """The largest score, which is a logit with its noise, of an allowed id; -inf if there is none."""
    BEST_LOGIT = 4
    """The logit of that id."""
    BEST_ID = 5
    """That id, the lowest among equals; fp32 holds integers to 2**24."""
    FIRST_LOGIT = 6
    """The largest logit of an allowed id, -inf if there is none; anything where no margin is asked for."""
    SECOND_LOGIT = 7
    """The largest of the other allowed ids, likewise. Partials without margins lack this and the one before."""


WITHOUT_MARGIN = int(Partial.FIRST_LOGIT)  # numbers of a partial that no margin is made of


class Blocks(NamedTuple):
    """The active blocks of a batch, as rows of the tables in which an engine keeps all canvases.

    A block that is shorter than ``block_length`` has padding behind it. Padding is never masked, and its
    ``canvas_index`` is a cell that belongs to no canvas; all padding may share it, since no op changes its token.
    """

    cells: "torch.Tensor"
    """[num_cells] int32, written in place: the token ids of all canvases."""
    masked: "torch.Tensor"
    """[num_slots, at least block_length] bool, written in place: True where a position is undecided."""
    slots: "torch.Tensor"
    """[num_blocks] int64: the row of ``masked`` of each block. Only blocks without a mask may share a row."""
    canvas_index: "torch.Tensor"
    """[num_blocks, block_length] int64: the place of each position in ``cells``. Block length 1 to 128."""
    end_token_ids: "torch.Tensor"
    """[num_blocks, num_end_tokens] int64: tokens that end the output, -1 for none."""
    num_output_positions: "torch.Tensor"
    """[num_blocks] int32, 0 to block_length: leading positions that the request still has to output."""


class Proposals(NamedTuple):
    """What the model proposes at M positions: those whose logits were computed."""

    position: "torch.Tensor"
    """[M] int64, ascending, each at most once: flat index into [num_blocks, block_length]. Behind them may be padding,
    whose index is num_blocks * block_length."""
    token: "torch.Tensor"
    """[M] int64: the proposed token."""
    confidence: "torch.Tensor"
    """[M] fp32 in [0, 1] or NaN: how sure the model is of it."""

    def to_grids(self, num_blocks: int, block_length: int) -> "tuple[torch.Tensor, torch.Tensor]":
        """Token and confidence of every position.

        [num_blocks, block_length] int64, 0 without logits, and fp32, ``NO_CONFIDENCE`` without logits.
        """
        size, shape = num_blocks * block_length, (num_blocks, block_length)
        token = self.token.new_zeros(size + 1)  # the last: of padding
        confidence = self.confidence.new_full((size + 1,), NO_CONFIDENCE)
        token.scatter_(0, self.position, self.token)
        confidence.scatter_(0, self.position, self.confidence)
        return token[:-1].view(shape), confidence[:-1].view(shape)

    def of_grid(self, grid: "torch.Tensor") -> "torch.Tensor":
        """[M]: what a grid [num_blocks, block_length] holds at the proposals' positions; anything for padding."""
        return grid.reshape(-1).index_select(0, self.position.clamp(max=grid.numel() - 1))


class Grids(NamedTuple):
    """A step's proposals by position, [num_blocks, block_length] each, all tensors of their own."""

    token: "torch.Tensor"
    """int64, 0 without logits."""
    confidence: "torch.Tensor"
    """fp32, of masked positions that have logits, -1 for NaN; ``NO_CONFIDENCE`` elsewhere."""
    score: "torch.Tensor"
    """The same."""
    is_open: "torch.Tensor"
    """bool, masked positions that have logits."""
    masked: "torch.Tensor"
    """bool, masked positions."""


class KeptLogits(NamedTuple):
    """Logits of an earlier step, as rows of the table that they are kept in, so that they need not be copied."""

    table: "torch.Tensor"
    """[N, vocabulary], of any floating dtype."""
    row: "torch.Tensor"
    """[S] int64, less than N."""

    def gather(self) -> "torch.Tensor":
        """A copy of them, [S, vocabulary] fp32."""
        return self.table.index_select(0, self.row).float()


class Rules(NamedTuple):
    """By which rule each block is unmasked."""

    rule: "torch.Tensor"
    """[num_blocks] int8, values of ``Rule``."""
    parameter: "torch.Tensor"
    """[num_blocks] fp32, read as the rule says. Equality passes a threshold: for a strict one pass the next larger
    float."""
    min_unmask: "torch.Tensor"
    """[num_blocks] int32: so many positions, the most confident ones, are unmasked whatever the rule says; 0 and 1 ask
    for no more than the one that every rule unmasks."""


class UnmaskResult(NamedTuple):
    """Counts of one ``unmask`` call, all [num_blocks] int32."""

    num_unmasked: "torch.Tensor"
    """Positions decided by this call."""
    num_masked: "torch.Tensor"
    """Positions of the block that are still undecided."""
    num_ready: "torch.Tensor"
    """Leading tokens that can be emitted now: through the first end token among the output positions if all before it
    are decided, else all output positions if those are decided, else 0."""
