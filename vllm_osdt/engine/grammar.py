"""Which tokens a request's grammar allows in its active block (structured output).

The grammar is vLLM's own, which advances it when a block's tokens are emitted. Between two steps it is therefore behind
the last finished block; what the worker has decided since then is known from the worker's reports. For each step it is
led through those tokens, then along drafts, which are what the worker proposed last, and back again.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from vllm.v1.core.sched.output import GrammarOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.structured_output.backend_types import StructuredOutputGrammar

from vllm_osdt.messages import ANY_TOKEN, GRAMMAR_CHAINS, NO_MASK, ONE_TOKEN, GrammarChain, RecordedStep

MAX_CHOICES = 8  # positions of a chain that leave more than one token; each sends a bit for every token id


class _Block(NamedTuple):
    """What is known of a request's active block."""

    num_tokens: int  # prompt and committed tokens: the block begins behind them
    decided: list[int]  # its leading tokens; the others are masked
    proposals: list[int]  # of its last step for every position, -1 for none


class Grammars:
    """The grammars of an engine's requests.

    Invariant: :meth:`allow` leaves every grammar where it was.

    Args:
        manager: vLLM's own.
        vocabulary: Token ids of the model.
        mask_token_id: Never allowed.
    """

    def __init__(self, manager: StructuredOutputManager, vocabulary: int, mask_token_id: int) -> None:
        self._manager = manager
        self._vocabulary = vocabulary
        self._mask_token_id = mask_token_id
        self._blocks: dict[str, _Block] = {}
        self._chains: dict[str, GrammarChain] = {}  # of the last step
        self._lengths: dict[str, int] = {}  # of its blocks
        self._bitmask = torch.empty(0, 0, dtype=torch.int32)  # likewise

    def hear(self, recorded: RecordedStep, requests: dict[str, Request]) -> list[str]:
        """Take in what the last step decided and proposed, before its tokens are committed.

        Args:
            recorded: The worker's report.
            requests: The engine's, by id.

        Returns:
            Ids of requests that cannot go on: a token is decided that the grammar does not allow, since it allowed none
            that the request's other parameters do.
        """
        failed = []
        for row, req_id in enumerate(recorded.req_ids):
            request, chain = requests.get(req_id), self._chains.get(req_id)
            if request is None or chain is None:
                continue
            masked = recorded.after[row, : self._lengths[req_id]]
            num_decided = int(masked.argmax()) if masked.any() else masked.size
            decided = recorded.tokens[row, :num_decided].tolist()
            self._blocks[req_id] = _Block(request.num_tokens, decided, recorded.proposal[row].tolist())
            if not self._follows(chain, decided[chain.start :], ends=_ends(request)):
                failed.append(req_id)
        return failed

    def _follows(self, chain: GrammarChain, tokens: list[int], ends: set[int]) -> bool:
        """Whether the tokens that a step decided are allowed by its chain, up to an end token."""
        for place, token in enumerate(tokens):
            if place == len(chain.masks):
                return False
            mask = chain.masks[place]
            if mask == ONE_TOKEN:
                is_allowed = token == chain.tokens[place]
            else:
                is_allowed = mask == NO_MASK or _has(self._bitmask[mask].numpy(), token)
            if not is_allowed:
                return False
            if token in ends:
                break
        return True

    def forget(self, req_id: str) -> None:
        """The request has ended, or its block starts again."""
        self._blocks.pop(req_id, None)

    def allow(self, active: Iterable[tuple[Request, int]]) -> GrammarOutput | None:
        """What the grammars of a step's requests allow; None without a request.

        Args:
            active: The step's requests that have a grammar and denoise a block, and the length of that.
        """
        active = list(active)
        self._lengths = {request.request_id: length for request, length in active}
        self._chains = {}
        if not active:
            return None
        num_rows = len(active) * MAX_CHOICES + 1
        if self._bitmask.shape[0] < num_rows:
            assert self._manager.backend is not None
            self._bitmask = self._manager.backend.allocate_token_bitmask(num_rows)
        row = 0
        for request, length in active:
            self._chains[request.request_id], row = self._chain(request, length, row)
        output = GrammarOutput(list(self._chains), self._bitmask[: max(row, 1)].numpy())
        setattr(output, GRAMMAR_CHAINS, self._chains)  # travels with it
        return output

    def _chain(self, request: Request, length: int, row: int) -> tuple[GrammarChain, int]:
        """The chain of a request's block, and the first row of the bitmask behind its own, which begin with ``row``."""
        assert request.structured_output_request is not None
        grammar, req_id = request.structured_output_request.grammar, request.request_id
        assert isinstance(grammar, StructuredOutputGrammar)
        block = self._blocks.get(req_id)
        if block is None or block.num_tokens != request.num_tokens:
            block = _Block(request.num_tokens, [], [-1] * length)
        start, num_accepted = len(block.decided), 0
        for token in block.decided:
            if grammar.is_terminated():
                break
            num_accepted += grammar.accept_tokens(req_id, [token])
        if grammar.is_terminated():  # behind an end token that does not end the request: as vLLM, all is allowed
            chain = GrammarChain(start, [ANY_TOKEN] * (length - start), [NO_MASK] * (length - start))
        else:
            chain, last = GrammarChain(start, [], []), row + MAX_CHOICES
            while start + len(chain.masks) < length and row < last and not grammar.is_terminated():
                allowed = self._fill(grammar, row)
                draft = _only(allowed)
                if draft is None:
                    break
                if draft >= 0:
                    chain.masks.append(ONE_TOKEN)
                else:
                    draft = block.proposals[start + len(chain.masks)]
                    chain.masks.append(row)
                    row += 1
                    if not _has(allowed, draft):
                        chain.tokens.append(ANY_TOKEN)
                        break
                chain.tokens.append(draft)
                num_accepted += grammar.accept_tokens(req_id, [draft])
        if num_accepted:
            grammar.rollback(num_accepted)
        return chain, row

    def _fill(self, grammar: StructuredOutputGrammar, row: int) -> np.ndarray:
        """A row of the bitmask with the tokens that may be next, int32 as vLLM's, a bit for each id."""
        grammar.fill_bitmask(self._bitmask, row)
        allowed = self._bitmask[row].numpy()
        words = allowed.view(np.uint32)
        words[self._mask_token_id >> 5] &= ~np.uint32(1 << (self._mask_token_id & 31))
        words[-(-self._vocabulary // 32) :] = 0
        if self._vocabulary % 32:
            words[self._vocabulary >> 5] &= np.uint32((1 << self._vocabulary % 32) - 1)
        return allowed


def _ends(request: Request) -> set[int]:
    """The tokens that end a request's output."""
    params = request.sampling_params
    assert params is not None
    ends = set(params.stop_token_ids or ())
    if params.eos_token_id is not None and not params.ignore_eos:
        ends.add(params.eos_token_id)
    return ends


def _has(allowed: np.ndarray, token: int) -> bool:
    """Whether a row of the bitmask has a token."""
    return token >= 0 and bool(allowed[token >> 5] >> (token & 31) & 1)


def _only(allowed: np.ndarray) -> int | None:
    """The token of a row of the bitmask, -1 where it has several, None where it has none."""
    words = np.flatnonzero(allowed)
    if not words.size:
        return None
    bits = int(allowed.view(np.uint32)[words[0]])
    if words.size > 1 or bits & (bits - 1):
        return -1
    return int(words[0]) * 32 + bits.bit_length() - 1
