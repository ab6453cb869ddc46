"""Verifies drafted states of a block by the model's own steps from them, and drafts the next ones (``freedave``).

Every branch of a step is a state of the active block: the block itself, and guesses at what its next denoising steps
leave. The step's rule is applied to all of them, and gives of each its target, the state behind one more step. Where a
guess is the target of a branch that is right, it is right, too, and its own target counts. So one forward pass takes as
many denoising steps as guesses in a row are right, and one more.

Source: FreeDave (arXiv 2510.00294), algorithm of verification; ``freedave`` says what of it is where.
"""

from typing import NamedTuple

import torch

from csrc_triton import Blocks, Proposals, UnmaskResult
from csrc_triton.types import NO_CONFIDENCE
from vllm_osdt.worker.slots import CanvasStates
from vllm_osdt.worker.step.batch import DraftRows


class States(NamedTuple):
    """The branches of G requests, K of each; some of them may be none."""

    blocks: torch.Tensor  # int64 [G, K], which of the step's blocks each is; 0 for none
    is_there: torch.Tensor  # bool [G, K]
    tokens: torch.Tensor  # int32 [G, K, W]
    masked: torch.Tensor  # bool [G, K, W]


def read_states(drafting: DraftRows, blocks: Blocks) -> States:
    """The branches as they are now.

    Args:
        drafting: Whose.
        blocks: Of the step.
    """
    width, is_there = blocks.canvas_index.shape[1], drafting.entries >= 0
    entries = drafting.entries.clamp(min=0)
    tokens = blocks.cells[blocks.canvas_index[entries]]
    return States(entries, is_there, tokens, blocks.masked[blocks.slots[entries], :width])


def accept(
    before: States, after: States, confidence: torch.Tensor, is_subset: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The last branch of each request in a chain of right ones, int64 ``[G]``, and the chain, bool ``[G, K]``.

    The chain begins with the block itself. Its next one is the largest branch behind the last one that is that one's
    target, until there is none. By the test of a subset, a branch is right where each of its decided positions has the
    same token in that target.

    Args:
        before, after: The branches before and after the step's decision, the targets.
        confidence: float32 ``[G, K, W]``, ``NO_CONFIDENCE`` without logits. A branch without masks that have logits has
            no target, and is never right.
        is_subset: bool ``[G]``, which test.
    """
    number = before.tokens.shape[1]
    last = torch.zeros_like(before.blocks[:, 0])
    place = torch.arange(number, device=last.device)
    chain = (place == 0).expand(last.shape[0], -1)
    if number == 1:
        return last, chain
    has_target = (before.masked & (confidence != NO_CONFIDENCE)).any(dim=-1) & before.is_there  # [G, K]
    for _ in range(number - 1):
        index = last[:, None, None].expand(-1, 1, before.tokens.shape[2])
        tokens, masked = after.tokens.gather(1, index), after.masked.gather(1, index)  # [G, 1, W]
        is_same = ~before.masked & ~masked & (before.tokens == tokens)
        is_equal = (is_same | (before.masked & masked)).all(dim=-1)
        is_part = (is_same | before.masked).all(dim=-1)
        is_right = torch.where(is_subset[:, None], is_part, is_equal) & has_target & (place > last[:, None])
        last = torch.maximum(last, (is_right * place).amax(dim=1))
        chain = chain | (place == last[:, None])
    return last, chain


def draft(
    states: CanvasStates,
    drafting: DraftRows,
    tokens: torch.Tensor,
    masked: torch.Tensor,
    proposal: torch.Tensor,
    confidence: torch.Tensor,
    accepted: torch.Tensor,
) -> None:
    """Write what the next denoising steps should leave, if the proposals stay what they are, to the further branches.

    Branch k has as many more positions as k steps should unmask, the most confident ones, the first ones among equals.
    Where that are all, it has no masks.

    Args:
        states: Tables.
        drafting: Whose.
        tokens, masked: int32 and bool ``[G, W]``, the blocks after the step.
        proposal, confidence: int64 and float32 ``[G, W]`` of the step that led there.
        accepted: int64 ``[G]``, how many denoising steps more than one this step was.
    """
    num_further, width = states.branch_ids.shape[1:]
    num_further = min(num_further, drafting.sizes.shape[1] - drafting.entries.shape[1] - 1)
    is_open = masked & (confidence != NO_CONFIDENCE)
    total = drafting.sizes.cumsum(dim=1)
    first = total.gather(1, accepted[:, None])
    ahead = accepted[:, None] + torch.arange(1, num_further + 1, device=accepted.device)
    number = total.gather(1, ahead) - first  # [G, further]
    score = confidence.masked_fill(~is_open, NO_CONFIDENCE)
    order = score.nan_to_num(nan=-1.0).argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(dim=1)
    is_filled = is_open[:, None] & (rank[:, None] < number[:, :, None])  # [G, further, W]
    size = tokens.shape[1]
    own = torch.where(is_filled, proposal[:, None].to(tokens.dtype), tokens[:, None])
    left = masked.new_zeros(own.shape[0], num_further, width)  # whole rows: a block may be shorter than one before it
    is_use = number < is_open.sum(dim=1, keepdim=True)  # others are no drafts: a step from there has nothing to read
    left[:, :, :size] = masked[:, None] & ~is_filled & is_use[:, :, None]
    states.branch_ids[drafting.slots, :num_further, :size] = own
    states.branch_masked[drafting.slots, :num_further] = left


def verify_and_draft(
    states: CanvasStates,
    drafting: DraftRows,
    before: States,
    blocks: Blocks,
    proposals: Proposals,
    outcome: tuple[torch.Tensor, torch.Tensor, UnmaskResult],
) -> tuple[torch.Tensor, torch.Tensor, UnmaskResult, torch.Tensor]:
    """Go on from the target of the last right branch, and write the next drafts.

    Args:
        states: Tables, after the decision.
        drafting: Whose.
        before: The branches before it.
        blocks: Of the step.
        proposals: Of the step.
        outcome: Tokens, confidences and counts of all blocks, of ``unmask``.

    Returns:
        The same, with those of the branches that were right for the blocks themselves; the confidence of a position is
        that of the branch that decided it. And the number of that branch, int64 ``[Q, W]``.
    """
    canvas, confidence, result = outcome
    token, score = proposals.to_grids(*canvas.shape)
    after = read_states(drafting, blocks)
    entries, slots, width = before.blocks, drafting.slots, canvas.shape[1]
    accepted, chain = accept(before, after, score[entries], drafting.is_subset)
    chosen = entries.gather(1, accepted[:, None]).squeeze(1)
    requests = entries[:, 0]
    index = accepted[:, None, None].expand(-1, 1, width)
    tokens = after.tokens.gather(1, index).squeeze(1)
    masked = after.masked.gather(1, index).squeeze(1)
    blocks.cells[blocks.canvas_index[requests]] = tokens
    blocks.masked[slots, :width] = masked
    states.num_accepted[slots] = accepted.to(states.num_accepted.dtype)
    draft(states, drafting, tokens, masked, token[chosen], score[chosen], accepted)
    canvas, confidence = canvas.clone(), confidence.clone()
    canvas[requests] = tokens
    decided = before.masked & ~after.masked & chain[:, :, None]
    number = torch.arange(decided.shape[1], device=decided.device)[:, None]
    decider = (decided * number).amax(dim=1, keepdim=True)  # [G, 1, W]
    confidence[requests] = torch.where(
        decided.any(dim=1), score[entries].gather(1, decider).squeeze(1), score[requests]
    )
    ahead = torch.zeros_like(canvas, dtype=torch.int64)
    ahead[requests] = decider.squeeze(1)
    counts = []
    for count in result:
        count = count.clone()
        count[requests] = count[chosen]
        counts.append(count)
    num_before = before.masked[:, 0].sum(dim=1, dtype=torch.int32)
    counts[0][requests] = num_before - counts[1][requests]
    return canvas, confidence, UnmaskResult(*counts), ahead
