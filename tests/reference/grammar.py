"""Decoding under a grammar with plain lists: every position asks the grammar that has read all the text before it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Structured:
    """What a decoding did.

    Attributes:
        tokens: Output tokens.
        nfe: Forward passes.
        margin: Smallest distance between two best logits, or of a confidence from the threshold.
        num_drafted: Tokens that were unmasked in one step with the one before them, though the grammar left a choice.
    """

    tokens: list[int] = field(default_factory=list)
    nfe: int = 0
    margin: float = float("inf")
    num_drafted: int = 0


def allowed_after(
    make_grammar: Callable[[], Any], text: list[int], bitmask: torch.Tensor, vocabulary: int
) -> list[int]:
    """The tokens that may follow a text, of a grammar that reads it from its first token on."""
    grammar = make_grammar()
    for token in text:
        assert grammar.accept_tokens("reference", [token])
    grammar.fill_bitmask(bitmask, 0)
    words = bitmask[0].tolist()
    return [token for token in range(vocabulary) if words[token // 32] >> (token % 32) & 1]


def decode_with_grammar(
    forward: Callable[[list[int]], torch.Tensor],
    prompt: list[int],
    make_grammar: Callable[[], Any],
    bitmask: torch.Tensor,
    *,
    threshold: float,
    block_length: int,
    is_causal: bool,
    max_tokens: int,
    mask: int,
    end: int,
    max_choices: int,
) -> Structured:
    """Decode a request greedily by a static threshold.

    Args:
        forward: Logits of every position of a canvas.
        prompt: Token ids.
        make_grammar: A grammar that has read nothing.
        bitmask: A row for what it allows.
        threshold: Of confidence.
        block_length: Positions denoised together.
        is_causal: Whether the canvas ends with the active block, and blocks lie on a grid from position 0.
        max_tokens: Output tokens, whole blocks of the canvas.
        mask, end: Token ids.
        max_choices: Positions that a step asks about, of those at which the grammar leaves a choice.
    """
    result, text = Structured(), list(prompt)
    canvas_end = len(prompt) + max_tokens
    while len(text) < canvas_end:
        first = len(text)
        last = first - first % block_length + block_length if is_causal else min(first + block_length, canvas_end)
        drafts = [-1] * (last - first)
        while len(text) < min(last, canvas_end):  # not what is beyond the output
            num_masked = (last if is_causal else canvas_end) - len(text)
            logits = forward([*text, *[mask] * num_masked])[len(text) : last]
            own = logits.double().softmax(dim=-1)
            logits[:, mask] = -torch.inf
            result.nfe += 1
            drafts = drafts[-len(logits) :]
            _step(result, text, logits, own, drafts, make_grammar, bitmask, threshold, len(prompt), max_choices)
            if end in text[first:]:
                text = text[: text.index(end, first) + 1]
                result.tokens = text[len(prompt) :][:max_tokens]
                return result
    result.tokens = text[len(prompt) :][:max_tokens]
    return result


def _step(
    result: Structured,
    text: list[int],
    logits: torch.Tensor,
    own: torch.Tensor,
    drafts: list[int],
    make_grammar: Callable[[], Any],
    bitmask: torch.Tensor,
    threshold: float,
    prompt_length: int,
    max_choices: int,
) -> None:
    """One step: appends to the text what it unmasks, and puts its proposals in place of the drafts of the last one."""
    guessed = text[prompt_length:]  # the text as the drafts continue it
    is_open, is_asked, num_choices, leads, least = True, True, 0, True, 1.0
    for place, row in enumerate(logits):
        if not is_asked:
            _note(result, row)
            drafts[place] = int(row.argmax())
            continue
        allowed = allowed_after(make_grammar, guessed, bitmask, row.shape[0])
        kept = torch.full_like(row, -torch.inf)
        kept[allowed] = row[allowed]
        if len(allowed) > 1:
            _note(result, kept)
        token = int(kept.argmax())
        confidence = 1.0 if len(allowed) == 1 else float(own[place, token])
        result.margin = min(result.margin, abs(confidence - threshold))
        draft, num_choices = drafts[place], num_choices + (len(allowed) > 1)
        least, leads = min(least, confidence), leads and (place == 0 or len(allowed) == 1)
        is_open = is_open and (leads or least >= threshold)
        if is_open:
            result.num_drafted += place > 0 and len(allowed) > 1
            text.append(token)
        expected = allowed[0] if len(allowed) == 1 else draft
        is_open = is_open and token == expected  # the next position was asked about as if this were the draft
        guessed = [*guessed, expected]
        is_asked = expected in allowed and num_choices < max_choices and not _is_end(make_grammar, guessed)
        is_open = is_open and is_asked
        drafts[place] = token


def _is_end(make_grammar: Callable[[], Any], text: Iterable[int]) -> bool:
    grammar = make_grammar()
    for token in text:
        grammar.accept_tokens("reference", [token])
    return grammar.is_terminated()


def _note(result: Structured, row: torch.Tensor) -> None:
    best, second = row.topk(2).values.tolist()
    result.margin = min(result.margin, best - second)
