"""Drafts of blocks from n-grams: text repeats what was there before.

Source: prompt look-up as in vLLM's own ``ngram`` method of speculative decoding, whose search this is.
"""

from collections.abc import Sequence

import numpy as np
from vllm.v1.spec_decode.ngram_proposer import _find_longest_matched_ngram_and_propose_tokens

NO_TOKEN = -1


def draft_block(tokens: Sequence[int], n: int, length: int) -> list[int]:
    """The tokens behind the first earlier occurrence of the last n tokens.

    Args:
        tokens: Prompt and output so far.
        n: Tokens that must be the same.
        length: Of the block.

    Returns:
        ``length`` token ids, ``NO_TOKEN`` behind what was found.
    """
    known = np.array(tokens, dtype=np.int64)
    found = _find_longest_matched_ngram_and_propose_tokens(known, n, n, known.size + length, length)
    return [*found.tolist(), *[NO_TOKEN] * (length - found.size)]
