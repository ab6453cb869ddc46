"""Semi-autoregressive decoding of one request, written from the papers with plain lists and tensors.

Source: LLaDA (arXiv 2502.09992) for blocks and fixed steps; Fast-dLLM v1 (arXiv 2505.22618) for the threshold and
factor rules and the caches; OSDT (arXiv 2511.02077) for calibrated thresholds; Vovk, Gammerman and Shafer (2005) for
conformal ones.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch

from tests.reference.llada import ReferenceLLaDA

# (block, step in the block, masked positions with their confidences) -> positions to unmask
Rule = Callable[[int, int, dict[int, float]], list[int]]
# (logits of a position, decided tokens of prompt and canvas, index of the position in the output) -> other logits
Shape = Callable[[torch.Tensor, list[int], int], torch.Tensor]


@dataclass
class Decoded:
    """What a decoding did.

    Attributes:
        tokens: Output tokens.
        nfe: Forward passes.
        record: ``record[block][step]``: (confidence, unmasked) of every position masked before the step.
        proposal_margin: Smallest distance between the best and second best logit on the way.
        rule_margin: Smallest distance of a confidence from the rule's cutoff, where the rule tells.
        edit_margin: Smallest distance of a confidence from the editing threshold.
        num_edits: Tokens that were replaced.
        chosen_from: The model's logits of each output token in the step that unmasked it, float32 ``[vocabulary]``.
        steps: That step of each output token's block, from 0; the same among all forwards, from 1; the confidence then.
    """

    tokens: list[int] = field(default_factory=list)
    nfe: int = 0
    record: list[list[list[tuple[float, bool]]]] = field(default_factory=list)
    proposal_margin: float = float("inf")
    rule_margin: float = float("inf")
    edit_margin: float = float("inf")
    num_edits: int = 0
    refresh_margin: float = float("inf")
    num_refreshes: int = 0
    chosen_from: list[torch.Tensor] = field(default_factory=list)
    steps: list[tuple[int, int, float]] = field(default_factory=list)


class ThresholdRule:
    """Every position above a cutoff, at least the best; ``cutoff(block, step)`` and whether equality passes."""

    def __init__(self, cutoff: Callable[[int, int], float], strict: bool) -> None:
        self.cutoff, self.strict, self.margin = cutoff, strict, float("inf")

    def __call__(self, block: int, step: int, masked: dict[int, float]) -> list[int]:
        """See the class."""
        tau = self.cutoff(block, step)
        self.margin = min([self.margin, *(abs(c - tau) for c in masked.values())])
        chosen = [i for i, c in masked.items() if (c > tau if self.strict else c >= tau)]
        return chosen or [best_first(masked)[0]]


def static_threshold(tau: float) -> ThresholdRule:
    """Fast-dLLM's static threshold."""
    return ThresholdRule(lambda block, step: tau, strict=False)


def factor(f: float) -> Rule:
    """Fast-dLLM's factor rule, as published."""

    def rule(block: int, step: int, masked: dict[int, float]) -> list[int]:
        ranking = best_first(masked)
        count = 1
        for n in range(1, len(ranking) + 1):
            if (n + 1) * (1.0 - masked[ranking[n - 1]]) < f:
                count = n
        return ranking[:count]

    return rule


def joint_bound(delta: float) -> Rule:
    """Fast-dLLM++ as published: lower bound of the joint probability above the next best choice by delta."""

    def rule(block: int, step: int, masked: dict[int, float]) -> list[int]:
        ranking = best_first(masked)
        count = 1
        for n in range(1, len(ranking) + 1):
            lower = sum(masked[position] for position in ranking[:n]) - (n - 1)
            if lower - (1.0 - masked[ranking[n - 1]]) > delta:
                count = n
        return ranking[:count]

    return rule


class EntropyBound:
    """Rising entropies while their sum stays below the bound; works on negative entropies instead of confidences."""

    by_entropy = True

    def __init__(self, bound: float) -> None:
        self.bound, self.margin = bound, float("inf")

    def __call__(self, block: int, step: int, masked: dict[int, float]) -> list[int]:
        ranking = best_first(masked)
        total, count = 0.0, 1
        for n, position in enumerate(ranking, start=1):
            total -= masked[position]
            self._note(total - self.bound)
            if total < self.bound:
                count = n
        if count < len(ranking):
            self._note(masked[ranking[count - 1]] - masked[ranking[count]])
        return ranking[:count]

    def _note(self, difference: float) -> None:
        # The engine holds an entropy in steps of 2e-6, up to 128 of them in a sum.
        self.margin = min(self.margin, abs(difference) / 30)


def sureness(rule: Rule, probability: torch.Tensor, token: int) -> float:
    """What a rule ranks by: the token's probability, or the distribution's negative entropy."""
    if getattr(rule, "by_entropy", False):
        return torch.special.xlogy(probability, probability).sum().item()
    return probability[token].item()


@dataclass
class Draft:
    """Drafted tokens of an output, by their index, and the confidence that the model has at least in one it takes."""

    tokens: dict[int, int]
    threshold: float
    margin: float = float("inf")

    def confirmed(self, rule: Rule, first: int, proposals: dict[int, int], masked: dict[int, float]) -> list[int]:
        """Positions whose proposal is the drafted token.

        Args:
            rule: Of the request; says what confidence is.
            first: Index in the output of position 0.
            proposals, masked: Token and confidence by masked position.
        """
        found = []
        for position, confidence in masked.items():
            if proposals[position] == self.tokens.get(first + position):
                sure = math.exp(confidence) if getattr(rule, "by_entropy", False) else confidence
                self.margin = min(self.margin, abs(sure - self.threshold))
                if sure >= self.threshold:
                    found.append(position)
        return found


def enter(rule: Rule, first: int = 0) -> None:
    """Tell a rule that a block begins.

    Args:
        rule: Of the request; one that keeps something of a block has a method ``begin_block``.
        first: What it will call the block's first undecided position.
    """
    if hasattr(rule, "begin_block"):
        rule.begin_block(first)
    decide_alone(rule, 0)


def decide_alone(rule: Rule, number: int) -> None:
    """Tell a rule how many positions of a block its first step decides without it, where there is such a step.

    Args:
        rule: Of the request. One that counts them has a ``num_alone``; one around another has it as ``rule``.
        number: 1 for the first position, 0 where that is given.
    """
    within: Any = rule
    while within is not None:
        if hasattr(within, "num_alone"):
            within.num_alone = number
        within = getattr(within, "rule", None)


def look(
    rule: Rule,
    step: int,
    rows: dict[int, torch.Tensor],
    written: dict[int, torch.Tensor],
    proposals: dict[int, int],
    masked: dict[int, float],
    left: int,
) -> None:
    """Let a rule see what a step knows of its masked positions; one that wants to has a method ``see``.

    Args:
        rule: Of the request.
        step: In the block.
        rows: Logits of each, -inf for what may not be proposed.
        written: The same as the model wrote them.
        proposals, masked: Token and confidence of each; changed in place where the rule has others.
        left: Undecided positions of the canvas.
    """
    if not hasattr(rule, "see"):
        return
    if hasattr(rule, "written"):
        rule.written = written
    for place, (token, confidence) in (rule.see(step, rows, dict(proposals), dict(masked), left) or {}).items():
        proposals[place], masked[place] = token, confidence


def fixed_steps(steps_per_block: int, block_length: int) -> Rule:
    """LLaDA's quota: equal shares, the first steps one more where they do not come out even."""

    def rule(block: int, step: int, masked: dict[int, float]) -> list[int]:
        share = block_length // steps_per_block
        if step < block_length - share * steps_per_block:
            share += 1
        return best_first(masked)[:share]

    return rule


def dynamic(tau: float, steps_per_block: int, block_length: int, *, strict: bool = True) -> Rule:
    """SDAR's and LLaDA2's dynamic rule.

    All above the threshold, if those are as many as the step's share; else the share.
    """
    share = fixed_steps(steps_per_block, block_length)
    passes = ThresholdRule(lambda block, step: tau, strict=strict)

    def rule(block: int, step: int, masked: dict[int, float]) -> list[int]:
        return max(passes(block, step, masked), share(block, step, masked), key=len)

    return rule


def osdt(table: list[list[float]], cap: float, slack: float, floor: float = 0.0) -> ThresholdRule:
    """OSDT's second phase; ``table[block][step]``, the last entry holds for all that follow."""

    def cutoff(block: int, step: int) -> float:
        row = table[block] if block < len(table) else table[-1]
        value = row[step] if step < len(row) else row[-1]
        return max((cap if value > cap else value) * (1.0 - slack), floor)

    return ThresholdRule(cutoff, strict=True)


def best_first(masked: dict[int, float]) -> list[int]:
    """Positions by falling confidence, the lower position first among equals."""
    return sorted(masked, key=lambda i: (-masked[i], i))


def decode(
    model: ReferenceLLaDA,
    prompt: list[int],
    rule: Rule,
    *,
    gen_length: int,
    block_length: int,
    cache_mode: str,
    max_tokens: int | None = None,
    end_token_ids: tuple[int, ...] = (),
    refresh_interval: int = 1,
    refresh_confidence: float = 0.0,
    suffix_window: int | None = None,
    first_length: int | None = None,
    shape: Shape | None = None,
    pinned: dict[int, int] | None = None,
    draft: Draft | None = None,
) -> Decoded:
    """Decode a request.

    Args:
        model: The network.
        prompt: Token ids.
        rule: Which positions a step unmasks. Before it is asked, its method ``see``, if it has one, gets the step in
            the block, logits (-inf of the mask token), proposals and confidences by masked position, and the number of
            undecided positions; it returns the token and confidence of positions that it changes. Its method ``cut``,
            if it has one, gets proposals and confidences of the first step that has those of a whole block, and
            returns how many positions the block has.
        gen_length: Canvas length; the last block is what is left of it.
        block_length: Positions denoised together.
        cache_mode: ``none``, ``prefix`` or ``dual``.
        max_tokens: Output tokens wanted, the whole canvas when None.
        end_token_ids: Where output ends.
        refresh_interval: With a cache, blocks between two refreshes. A block without one begins with a forward of the
            finished block before it and its own.
        refresh_confidence: With a cache, a step whose masked positions have a lower mean confidence is followed by a
            refresh, unless it was one.
        suffix_window: Blocks behind the active one that a refresh computes; None for all. What is behind them is not
            seen.
        first_length: Positions of the canvas that are there at first, whole blocks; None for all. A block joins when
            all before it are decided.
        shape: Changes the logits from which a token is proposed; its confidence stays the model's.
        pinned: Tokens of the canvas that are given, by their index.
        draft: Tokens that a step unmasks beside what the rule says, where it proposes them.
    """
    end, shift = len(prompt) + gen_length, model.logits_shift
    kept, refreshed, is_unsure = None, -1, False
    wanted = gen_length if max_tokens is None else min(max_tokens, gen_length)
    ids = torch.tensor(prompt + [model.mask_token_id] * gen_length)
    decided = [True] * len(prompt) + [False] * gen_length
    for place, token in (pinned or {}).items():
        ids[len(prompt) + place], decided[len(prompt) + place] = token, True
    chosen_from: dict[int, torch.Tensor] = {}
    steps: dict[int, tuple[int, int, float]] = {}
    result = Decoded()
    done = 0  # positions of finished blocks
    while done < gen_length:
        first, block = len(prompt) + done, done // block_length
        seen = end
        if first_length is not None:
            grown = max(done + 1 - first_length, 0)
            seen = min(end, len(prompt) + first_length + -(-grown // block_length) * block_length)
        there = seen
        if suffix_window is not None:
            seen = min(seen, first + (1 + suffix_window) * block_length)
        last = min(first + block_length, seen)
        length, is_cut = last - first, not hasattr(rule, "cut")
        num_needed = min(length, wanted - done)
        result.record.append([])
        enter(rule)
        ready, step = None, -1
        while ready is None:
            step += 1
            assert step < length
            is_due = step == 0 and (refreshed < 0 or refresh_interval == 1 or block - refreshed >= refresh_interval)
            is_refresh = is_due or cache_mode == "none" or (step > 0 and is_unsure)
            if is_refresh:
                logits, computed = model.forward(ids[:seen])
                logits = logits[first - shift : last - shift]
                if cache_mode != "none":
                    kept, refreshed = computed, block
            elif step == 0:
                assert kept is not None
                start, stop = first - block_length, seen if cache_mode == "prefix" else last
                rest = [(torch.cat([k[:start], k[stop:]]), torch.cat([v[:start], v[stop:]])) for k, v in kept]
                logits, computed = model.forward(ids[start:stop], torch.arange(start, stop), rest)
                logits = logits[block_length - shift : block_length - shift + length]
                kept = [
                    tuple(torch.cat([old[:start], new, old[stop:]]) for old, new in zip(before, now, strict=True))
                    for before, now in zip(kept, computed, strict=True)
                ]
            elif cache_mode == "prefix":
                assert kept is not None
                before = [(k[:first], v[:first]) for k, v in kept]
                logits, _ = model.forward(ids[first:seen], torch.arange(first, seen), before)
                logits = logits[:length].roll(shift, dims=0)
            else:
                assert kept is not None
                # Softmax over keys does not mind their order: the rest of the sequence first, then the block's rows.
                rest = [(torch.cat([k[:first], k[last:]]), torch.cat([v[:first], v[last:]])) for k, v in kept]
                logits, computed = model.forward(ids[first:last], torch.arange(first, last), rest)
                logits = logits.roll(shift, dims=0)
            result.nfe += 1
            probability, own = logits.double().softmax(dim=-1), logits.clone()
            logits[:, model.mask_token_id] = -torch.inf
            if shape is not None:
                before = [token for token, known in zip(ids.tolist(), decided, strict=True) if known]
                logits = torch.stack(
                    [shape(row, before, first + offset - len(prompt)) for offset, row in enumerate(logits)]
                )
            proposal = logits.argmax(dim=-1).tolist()
            top = logits.topk(2, dim=-1).values
            masked = {}
            # With shifted logits and a cache only a block's first step has the row that its first position needs.
            is_alone = shift > 0 and cache_mode != "none" and step == 0
            for offset in range(1 if is_alone else length):
                if not decided[first + offset]:
                    masked[offset] = sureness(rule, probability[offset], int(proposal[offset]))
                    margin = (top[offset, 0] - top[offset, 1]).item()
                    result.proposal_margin = min(result.proposal_margin, margin)
            if masked and not is_alone:  # a position that is decided alone is decided whatever the rule
                rows, written = ({offset: one[offset] for offset in masked} for one in (logits, own))
                found, left = (
                    {offset: int(proposal[offset]) for offset in masked},
                    sum(not one for one in decided[:there]),
                )
                look(rule, step, rows, written, found, masked, left)
                for offset, token in found.items():
                    proposal[offset] = token
            if not is_cut and not is_alone:
                length, is_cut = max(1, min(length, rule.cut(dict(enumerate(proposal)), masked))), True
                if not is_refresh and cache_mode == "dual":  # what was computed behind the block stays
                    assert kept is not None
                    behind = slice(first + length, last)
                    for before, now in zip(kept, computed, strict=True):
                        for old, new in zip(before, now, strict=True):
                            old[behind] = new[length:]
                last, num_needed = first + length, min(length, wanted - done)
                masked = {offset: one for offset, one in masked.items() if offset < length}
            mean = sum(masked.values()) / len(masked) if masked else 1.0
            result.refresh_margin = min(result.refresh_margin, abs(mean - refresh_confidence))
            is_unsure = refresh_confidence > 0 and mean < refresh_confidence and not is_refresh
            result.num_refreshes += is_refresh
            if is_alone:
                decide_alone(rule, len(masked))
            chosen = [0] if is_alone and masked else rule(block, step, masked) if masked else []
            if draft is not None:
                tokens = {offset: int(proposal[offset]) for offset in masked}
                chosen = list({*chosen, *draft.confirmed(rule, done, tokens, masked)})
            result.record[-1].append([(c, offset in chosen) for offset, c in masked.items()])
            for offset in chosen:
                ids[first + offset] = proposal[offset]
                decided[first + offset] = True
                chosen_from[first + offset - len(prompt)] = own[offset]
                steps[first + offset - len(prompt)] = step, result.nfe, masked[offset]
            ready = _ready(ids[first:last].tolist(), decided[first:last], num_needed, end_token_ids)
        result.tokens += ready
        done += length
        if len(result.tokens) >= wanted or result.tokens[-1] in end_token_ids:
            break
    result.rule_margin = min(getattr(rule, "margin", float("inf")), draft.margin if draft else float("inf"))
    if not pinned:
        result.chosen_from = [chosen_from[k] for k in range(len(result.tokens))]
        result.steps = [steps[k] for k in range(len(result.tokens))]
    return result


def _ready(tokens: list[int], decided: list[bool], num_needed: int, end_token_ids: tuple[int, ...]) -> list[int] | None:
    """The block's output once nothing before its end is undecided."""
    for k in range(num_needed):
        if not decided[k]:
            return None
        if tokens[k] in end_token_ids:
            return tokens[: k + 1]
    return tokens[:num_needed]


def calibrate(
    record: list[list[list[tuple[float, bool]]]], mode: str, metric: str, committed_only: bool
) -> list[list[float]]:
    """Thresholds ``[block][step]`` of a recorded decoding, by sorting and interpolating by hand."""
    return calibrate_together([record], mode, metric, committed_only)


def calibrate_together(
    records: list[list[list[list[tuple[float, bool]]]]], mode: str, metric: str, committed_only: bool
) -> list[list[float]]:
    """As :func:`calibrate`, with the samples of several decodings pooled."""
    table = []
    for block in range(max(map(len, records))):
        reached = [record[block] for record in records if len(record) > block]
        cells: list[list[float]] = [[] for _ in range(max(map(len, reached)))]
        for steps in reached:
            for step, samples in enumerate(steps):
                cells[step] += [c for c, unmasked in samples if unmasked or not committed_only]
        pooled = [c for cell in cells for c in cell]
        if not pooled:
            break
        whole = _statistic(pooled, metric)
        if mode == "block":
            table.append([whole])
        else:
            table.append([_statistic(cell, metric) if cell else whole for cell in cells])
    return table


def conformal(
    records: list[list[list[list[tuple[float, bool]]]]], mode: str, risk: Fraction, block_length: int
) -> list[list[float | None]]:
    """Thresholds of split conformal prediction, None where there are too few decodings.

    Args:
        records: ``records[request][block][step]``: (confidence, whether its token is another than the final one) of
            every masked position.
        mode: ``block`` or ``step_block``.
        risk: The share of decodings that may see a wrong proposal pass.
        block_length: Positions of a block. As many blocks as fit 32 share what they have recorded.
    """
    table = []
    for block in range(max(map(len, records))):
        together = max(1, 32 // block_length)
        blocks = range(block - block % together, block - block % together + together)
        groups = [[record[index] for index in blocks if index < len(record)] for record in records]
        whole = _rank([[sample for steps in group for step in steps for sample in step] for group in groups], risk)
        row = [whole]
        if mode == "step_block":
            num_steps = max(len(record[block]) for record in records if len(record) > block)
            own = [
                _rank([[one for steps in group if len(steps) > step for one in steps[step]] for group in groups], risk)
                for step in range(num_steps)
            ]
            row = [whole if value is None else value for value in own]
        table.append(row)
    return table


def _rank(samples_of: list[list[tuple[float, bool]]], risk: Fraction) -> float | None:
    """The lowest score that at least a share 1 - risk of the requests and of one unknown one is known not to exceed."""
    scores = sorted(max([c for c, is_wrong in samples if is_wrong], default=0.0) for samples in samples_of if samples)
    for rank, score in enumerate(scores, 1):
        if Fraction(rank, len(scores) + 1) >= 1 - risk:
            return score
    return None


def _statistic(samples: list[float], metric: str) -> float:
    ordered = sorted(samples)
    if metric == "mean":
        return sum(ordered) / len(ordered)
    if metric in ("q1", "q2", "q3"):
        return _quartile(ordered, int(metric[1]))
    low = _quartile(ordered, 1) - 1.5 * (_quartile(ordered, 3) - _quartile(ordered, 1))
    return next(c for c in ordered if c >= low)


def _quartile(ordered: list[float], which: int) -> float:
    whole, quarters = divmod(which * (len(ordered) - 1), 4)
    if quarters == 0:
        return ordered[whole]
    return ordered[whole] + (ordered[whole + 1] - ordered[whole]) * quarters / 4
