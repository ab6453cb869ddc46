"""Which tokens of a filled template are its answer: the end token of an open hole, and what is behind it, are not."""

from collections.abc import Sequence, Set
from typing import Any

from vllm_osdt.messages import OPEN_HOLE


def kept(template: Sequence[int], tokens: Sequence[int], ends: Set[int]) -> list[bool]:
    """For each token of a template that is being filled, whether the answer has it.

    Args:
        template: See ``RequestSpec.pinned``; open holes side by side are one.
        tokens: The canvas so far, from the prompt's end on.
        ends: Token ids that end an open hole.
    """
    found, is_over = [], False
    for mark, token in zip(template, tokens, strict=False):
        is_over = mark == OPEN_HOLE and (is_over or token in ends)
        found.append(not is_over)
    return found


def num_needed(template: Sequence[int], tokens: Sequence[int], ends: Set[int]) -> int | None:
    """Tokens up to the end token of the hole that a template ends with; None while there is none.

    Nothing of the answer is behind it. Arguments of :func:`kept`.
    """
    first = len(template)
    while first and template[first - 1] == OPEN_HOLE:
        first -= 1
    found = (place for place in range(first, len(tokens)) if tokens[place] in ends)
    return next((place + 1 for place in found), None)


def select(trace: dict[str, Any], are_kept: Sequence[bool]) -> dict[str, Any]:
    """The trace of one block's tokens (see ``engine.trace``), those that are kept."""
    [block] = trace["blocks"]
    entries = {
        name: [one for one, is_kept in zip(values, are_kept, strict=True) if is_kept]
        for name, values in trace.items()
        if name != "blocks"
    }
    return {**entries, "blocks": [{**block, "num_tokens": sum(are_kept)}]}
