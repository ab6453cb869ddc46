"""Slow, readable twins of every op. The other implementations are tested against this file.

Arguments are those of ``csrc_triton.ops``; they are taken as valid.
"""

import torch

from csrc_triton.noise import gumbel_noise
from csrc_triton.types import (
    CHOSEN,
    ENTROPY_SCALE,
    NO_CONFIDENCE,
    UNCERTAINTY_UNITS,
    WITHOUT_MARGIN,
    Blocks,
    Grids,
    Partial,
    Proposals,
    Rule,
    Rules,
    UnmaskResult,
)


def confidence(
    logits: torch.Tensor,
    *,
    excluded_token_id: int | None = None,
    temperature: torch.Tensor | None = None,
    noise_key: torch.Tensor | None = None,
    by_entropy: torch.Tensor | None = None,
    margin: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The twin of ``ops.confidence``; its softmax runs in fp64, so that it is the more exact side of a comparison."""
    vocabulary = logits.shape[1]
    logits = logits.float()  # [num_rows, vocabulary]
    probability = logits.double().softmax(dim=-1).float()
    ids = torch.arange(vocabulary, device=logits.device)
    score = logits.clone()
    if temperature is not None and noise_key is not None:
        score += temperature.unsqueeze(-1) * gumbel_noise(noise_key, ids)
    if excluded_token_id is not None:
        score[:, excluded_token_id] = -torch.inf
    best = score.amax(dim=-1, keepdim=True)
    token = ids.where(score == best, vocabulary).amin(dim=-1)  # argmax may return any of several equals
    hopeless = logits.isnan().any(dim=-1) | (best.squeeze(-1) == -torch.inf)
    token = token.masked_fill(hopeless, 1 if excluded_token_id == 0 else 0)
    chosen = probability.gather(-1, token.unsqueeze(-1)).squeeze(-1)
    if by_entropy is not None:
        exact = logits.double().softmax(dim=-1)
        entropy = -torch.special.xlogy(exact, exact).sum(dim=-1)
        chosen = torch.where(by_entropy, (1.0 - entropy / ENTROPY_SCALE).float(), chosen)
    if margin is not None:
        allowed = [k for k in range(vocabulary) if k != excluded_token_id]
        margin.copy_(_margin(logits[:, allowed]))
    return token, chosen.masked_fill(hopeless, 0.0)


def lm_head_confidence(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    *,
    excluded_token_id: int | None = None,
    temperature: torch.Tensor | None = None,
    noise_key: torch.Tensor | None = None,
    by_entropy: torch.Tensor | None = None,
    margin: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The twin of ``ops.lm_head_confidence``: writes the logits."""
    return confidence(
        _logits(hidden, weight),
        excluded_token_id=excluded_token_id,
        temperature=temperature,
        noise_key=noise_key,
        by_entropy=by_entropy,
        margin=margin,
    )


def lm_head_partials(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    *,
    first_id: int = 0,
    vocabulary: int | None = None,
    excluded_token_id: int | None = None,
    temperature: torch.Tensor | None = None,
    noise_key: torch.Tensor | None = None,
    by_entropy: torch.Tensor | None = None,
    with_margin: bool = False,
) -> torch.Tensor:
    """The twin of ``ops.lm_head_partials``: the whole weight is one chunk, and every row has its entropy's sum."""
    logit = _logits(hidden, weight).float()  # [num_rows, num_weight_rows]
    ids = first_id + torch.arange(weight.shape[0], device=weight.device)
    if vocabulary is not None:
        logit[:, ids >= vocabulary] = -torch.inf
    largest = logit.amax(dim=-1)
    exact = logit.double() - largest.masked_fill(largest == -torch.inf, 0.0).unsqueeze(-1)
    likely = exact.where(exact > -torch.inf, -1000.0)  # exp(-1000) is 0 in fp64, and 0 times it is no NaN
    if temperature is not None and noise_key is not None:
        score = logit + temperature.unsqueeze(-1) * gumbel_noise(noise_key, ids)
    else:
        score = logit.clone()
    if excluded_token_id is not None:
        score[:, ids == excluded_token_id] = -torch.inf
    best_score = score.amax(dim=-1)
    index = torch.arange(ids.shape[0], device=ids.device)
    index = index.where(score == best_score.unsqueeze(-1), ids.shape[0] - 1).amin(dim=-1)
    allowed = logit if excluded_token_id is None else logit.masked_fill(ids == excluded_token_id, -torch.inf)
    first, second = _two_largest(allowed)
    fields = {
        Partial.LARGEST: largest,
        Partial.TOTAL: exact.exp().sum(dim=-1),
        Partial.WEIGHTED: (likely * likely.exp()).sum(dim=-1),
        Partial.BEST_SCORE: best_score,
        Partial.BEST_LOGIT: logit.gather(-1, index.unsqueeze(-1)).squeeze(-1),
        Partial.BEST_ID: ids[index],
        Partial.FIRST_LOGIT: first,
        Partial.SECOND_LOGIT: second,
    }
    number = len(Partial) if with_margin else WITHOUT_MARGIN
    return torch.stack([fields[field].float() for field in list(Partial)[:number]]).unsqueeze(0)


def combine_partials(
    partials: torch.Tensor,
    *,
    excluded_token_id: int | None = None,
    by_entropy: torch.Tensor | None = None,
    margin: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The twin of ``ops.combine_partials``."""
    chunk_largest, chunk_total, chunk_weighted, score, logit, ids = partials[:, :WITHOUT_MARGIN].double().unbind(dim=1)
    largest = chunk_largest.amax(dim=0)  # [num_rows]
    x = chunk_largest - largest.masked_fill(largest == -torch.inf, 0.0)
    total = (chunk_total * x.exp()).sum(dim=0)
    best_score = score.amax(dim=0)
    token = ids.where(score == best_score, torch.inf).amin(dim=0)
    best_logit = logit.where(ids == token, -torch.inf).amax(dim=0)
    hopeless = total.isnan() | (best_score == -torch.inf)
    value = (best_logit - largest).exp() / total
    if by_entropy is not None:
        x = x.clamp_min(-1000.0)  # 0 times -inf would be NaN
        entropy = total.log() - (x.exp() * (chunk_weighted + x * chunk_total)).sum(dim=0) / total
        value = torch.where(by_entropy, (1.0 - entropy / ENTROPY_SCALE).clamp_max(1.0), value)
    token = token.masked_fill(hopeless, 1.0 if excluded_token_id == 0 else 0.0).long()
    if margin is not None:
        two_of_each = partials[:, [Partial.FIRST_LOGIT, Partial.SECOND_LOGIT]].flatten(0, 1).T
        margin.copy_(_margin(two_of_each).masked_fill(total.isnan(), torch.inf))
    return token, value.float().masked_fill(hopeless, 0.0)


def _two_largest(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[num_rows] each; -inf of logits that are not there."""
    padded = torch.nn.functional.pad(logits, (0, 2), value=-torch.inf)
    first, second = padded.topk(2, dim=-1).values.unbind(dim=-1)
    return first, second


def _margin(logits: torch.Tensor) -> torch.Tensor:
    """The difference of the two largest of each row [num_rows, any]; see ``ops.confidence``."""
    first, second = _two_largest(logits)
    has_two = (second > -torch.inf) & ~logits.isnan().any(dim=-1)
    return torch.where(has_two, first - second, torch.inf)


def _logits(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[num_rows, num_weight_rows], the dtype of both: rounded once, from fp64."""
    return (hidden.double() @ weight.double().T).to(hidden.dtype)


def unmask(blocks: Blocks, proposals: Proposals, rules: Rules) -> tuple[torch.Tensor, torch.Tensor, UnmaskResult]:
    """The twin of ``ops.unmask``: one block after the other, in place."""
    num_blocks, block_length = blocks.canvas_index.shape
    token, confidence = proposals.to_grids(num_blocks, block_length)
    counts = []
    for row in range(num_blocks):
        masked, cell = blocks.masked[int(blocks.slots[row])], blocks.canvas_index[row]
        undecided = [k for k in range(block_length) if masked[k]]
        score = confidence[row].nan_to_num(nan=-1.0)
        ranking = sorted(undecided, key=lambda k: (-score[k].item(), k))
        num_unmasked = _num_accepted(score[ranking], rules, row)
        for k in ranking[:num_unmasked]:
            blocks.cells[cell[k]] = token[row, k].int()
            masked[k] = False
        num_ready = _num_ready(
            blocks.cells[cell].tolist(),
            masked.tolist(),
            blocks.end_token_ids[row].tolist(),
            int(blocks.num_output_positions[row]),
        )
        counts.append((num_unmasked, len(undecided) - num_unmasked, num_ready))
    table = torch.tensor(counts, dtype=torch.int32, device=token.device).reshape(-1, 3)
    return blocks.cells[blocks.canvas_index], confidence, UnmaskResult(*table.unbind(dim=1))


def _num_accepted(ranked: torch.Tensor, rules: Rules, row: int) -> int:
    """How many of the masked positions to unmask; ``ranked`` has their confidences, descending."""
    rule, parameter, min_unmask = int(rules.rule[row]), rules.parameter[row], int(rules.min_unmask[row])
    num_masked = ranked.shape[0]
    if rule == Rule.THRESHOLD:
        passing = [n for n in range(1, num_masked + 1) if ranked[n - 1] >= parameter]
    elif rule == Rule.TOP_K:
        passing = [n for n in range(1, num_masked + 1) if n <= parameter]
    elif rule == Rule.FACTOR:
        passing = [n for n in range(1, num_masked + 1) if (n + 1) * (1 - ranked[n - 1]) < parameter]
    else:
        again = int(rule == Rule.JOINT_BOUND)
        uncertainty = [int((1 - c).double() * UNCERTAINTY_UNITS) for c in ranked]
        limit = parameter.double() * UNCERTAINTY_UNITS
        passing = [n for n in range(1, num_masked + 1) if sum(uncertainty[:n]) + again * uncertainty[n - 1] < limit]
    passing += range(1, min(min_unmask, num_masked) + 1)
    passing = [n for n in passing if ranked[n - 1] > NO_CONFIDENCE]
    return max(passing, default=min(1, num_masked))


def _num_ready(canvas: list[int], masked: list[bool], end_token_ids: list[int], num_output_positions: int) -> int:
    for k in range(num_output_positions):
        if masked[k]:
            return 0
        if canvas[k] >= 0 and canvas[k] in end_token_ids:
            return k + 1
    return num_output_positions


def grids(proposals: Proposals, masked: torch.Tensor, slots: torch.Tensor, block_length: int) -> Grids:
    """The twin of ``adjusting.grids``."""
    token, found = proposals.to_grids(slots.shape[0], block_length)
    own = masked.index_select(0, slots)[:, :block_length]
    confidence = torch.where(own, found.nan_to_num_(nan=-1.0), NO_CONFIDENCE)
    return Grids(token, confidence, confidence.clone(), confidence != NO_CONFIDENCE, own)


def _order(score: torch.Tensor) -> torch.Tensor:
    """Positions, the best first."""
    return score.nan_to_num(nan=-1.0).argsort(dim=1, descending=True, stable=True)


def best(score: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    """The twin of ``adjusting.best``."""
    is_first = torch.arange(score.shape[1], device=score.device) < number.unsqueeze(1)
    return torch.empty_like(is_first).scatter_(1, _order(score), is_first)


def ranks(score: torch.Tensor) -> torch.Tensor:
    """The twin of ``adjusting.ranks``."""
    order = _order(score)
    place = torch.arange(score.shape[1], device=score.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, place)


def choose(
    score: torch.Tensor, parameter: torch.Tensor, rank: torch.Tensor, chosen: torch.Tensor, is_open: torch.Tensor
) -> None:
    """The twin of ``adjusting.choose``."""
    torch.clamp(rank, -1.0, 1.0, out=score)
    score.masked_fill_(chosen, CHOSEN).masked_fill_(~is_open, NO_CONFIDENCE)
    parameter.fill_(CHOSEN)


def quota(numbers: torch.Tensor, step_index: torch.Tensor) -> torch.Tensor:
    """The twin of ``adjusting.quota``."""
    share, num_larger, num_alone, num_steps = numbers.long().unbind(dim=1)
    is_shared = (step_index >= num_alone) & (step_index < num_steps)
    return (share + (step_index < num_alone + num_larger)).where(is_shared, 1)


def take_rows(
    numbers: torch.Tensor, memory: torch.Tensor, slot: torch.Tensor, offset: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The twin of ``adjusting.take_rows``."""
    return numbers.index_select(0, slot), memory[slot, offset]


def put_rows(table: torch.Tensor, index: torch.Tensor, offset: torch.Tensor, own: torch.Tensor) -> None:
    """The twin of ``adjusting.put_rows``."""
    table[index, offset] = own
