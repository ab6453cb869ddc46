"""What the grammars of a step's requests allow, at their rows of logits (structured output).

A mask of the engine core's ``GrammarChain`` holds behind the tokens that the chain names. So a position may be unmasked
only where those before it are decided, or are unmasked in the same step with these tokens. The rules of the op
``unmask`` take the most confident positions, the lower one among equals: with the least confidence so far in place of
each one's own, they take the first positions of a chain. Where a token is the only one that is allowed behind those
before it, nothing is to be found out about it: it does not take a step of its own.
"""

from typing import NamedTuple

import numpy as np
import torch
from vllm.v1.core.sched.output import GrammarOutput

from csrc_triton import Rules
from csrc_triton.types import NO_CONFIDENCE
from vllm_osdt.messages import ANY_TOKEN, GRAMMAR_CHAINS, ONE_TOKEN, GrammarChain
from vllm_osdt.worker.transfer import send

DECIDED, OUTSIDE = -2, -3  # positions before a chain, and behind it; beside ANY_TOKEN
assert ANY_TOKEN == -1
LOWEST = -1.0  # confidence of NaN, see csrc_triton.types


class GrammarRows(NamedTuple):
    """The chains of a step's Q requests with a grammar; G of the step's logit rows have a mask.

    Attributes:
        rows_np: int64 ``[G]``, ascending, on the host: which of the logit rows.
        bitmask: int32 ``[N, words]``, a bit for each token id.
        mask: int64 ``[G]``, row of the bitmask; any where only one token is allowed.
        only: int64 ``[G]``, that token, -1 for several.
        rows: int64 ``[G]``, the same as ``rows_np``.
        requests: int64 ``[Q]``, which of the batch's requests.
        chain: int64 ``[Q, W]``, by position of the block: the token behind which the next position's mask holds,
            ``ANY_TOKEN``, ``DECIDED`` or ``OUTSIDE``.
        leads: bool ``[Q, W]``, the first masked position, and those of a chain that only one token is allowed at.
    """

    rows_np: np.ndarray
    bitmask: torch.Tensor
    mask: torch.Tensor
    only: torch.Tensor
    rows: torch.Tensor
    requests: torch.Tensor
    chain: torch.Tensor
    leads: torch.Tensor

    def ban(self, logits: torch.Tensor, rows_np: np.ndarray) -> torch.Tensor:
        """Make -inf what is not allowed.

        Args:
            logits: ``[S, vocabulary]``, changed in place.
            rows_np: int64 ``[S]``, which of the step's logit rows they are.
        """
        _, place, entry = np.intersect1d(rows_np, self.rows_np, assume_unique=True, return_indices=True)
        if not place.size:
            return logits
        sent = send({"place": place, "entry": entry}, logits.device)
        only, vocabulary = self.only[sent["entry"], None], logits.shape[1]
        token = torch.arange(vocabulary, device=logits.device)
        words = self.bitmask[self.mask[sent["entry"]]]
        bits = (words[:, :, None] >> torch.arange(32, dtype=torch.int32, device=logits.device)) & 1
        allowed = bits.flatten(1)[:, :vocabulary].bool()
        allowed = torch.where(only >= 0, token == only, allowed)
        logits[sent["place"]] = logits[sent["place"]].masked_fill(~allowed, -torch.inf)
        return logits

    def settle(self, token: torch.Tensor, confidence: torch.Tensor) -> None:
        """A token that is the only one allowed is certain.

        Args:
            token, confidence: int64 and fp32 ``[M]`` proposals; the second is written in place.
        """
        is_only = token[self.rows] == self.only
        confidence[self.rows] = confidence[self.rows].masked_fill(is_only, 1.0)

    def restrict(self, token: torch.Tensor, score: torch.Tensor, rules: Rules) -> tuple[torch.Tensor, Rules]:
        """Scores and rules by which only first positions of a chain are unmasked.

        Those are at least the first masked position, and the ones right behind it at which only one token is allowed.

        Args:
            token, score: int64 and fp32 ``[R, W]`` of the batch's blocks; not modified.
            rules: Theirs; not modified.
        """
        own, chain = score[self.requests], self.chain
        is_other = (chain != token[self.requests]) & (chain != ANY_TOKEN) & (chain != DECIDED)
        is_reached = is_other.cumsum(dim=1) - is_other.int() == 0  # no position before it has another token
        own = own.nan_to_num(nan=LOWEST).clamp(min=LOWEST).masked_fill(chain == DECIDED, torch.inf)
        least = own.cummin(dim=1).values
        is_reached &= chain >= ANY_TOKEN
        restricted, min_unmask = score.clone(), rules.min_unmask.clone()
        restricted[self.requests] = torch.where(is_reached, least, NO_CONFIDENCE)
        num_led = ((is_reached & self.leads) | (chain == DECIDED)).cumprod(dim=1) - (chain == DECIDED).int()
        least_unmask = num_led.sum(dim=1, dtype=min_unmask.dtype)
        min_unmask[self.requests] = torch.maximum(min_unmask[self.requests], least_unmask)
        return restricted, rules._replace(min_unmask=min_unmask)


def grammar_rows(
    output: GrammarOutput, req_ids: list[str], cu_num_logits: np.ndarray, width: int, device: torch.device
) -> GrammarRows:
    """What a step's grammars allow.

    The logit rows of a request are those of its masked positions from the first on; of some only, with sub-blocks or
    where just a block's first position is decided. Its chain ends with them.

    Args:
        output: Of the engine core, with its chains.
        req_ids: ``[R]`` ids of the batch's requests.
        cu_num_logits: int32 ``[R + 1]``, their first logit rows.
        width: Positions of a block, W.
        device: Where the step runs.
    """
    chains: dict[str, GrammarChain] = getattr(output, GRAMMAR_CHAINS)
    requests = [index for index, req_id in enumerate(req_ids) if req_id in chains]
    table = np.full((len(requests), width), OUTSIDE, dtype=np.int64)
    leads = np.zeros(table.shape, dtype=bool)
    rows: list[int] = []
    masks: list[int] = []
    only: list[int] = []
    for line, leading, index in zip(table, leads, requests, strict=True):
        chain, first = chains[req_ids[index]], int(cu_num_logits[index])
        length = min(len(chain.masks), int(cu_num_logits[index + 1]) - first)
        line[: chain.start] = DECIDED
        line[chain.start : chain.start + length] = chain.tokens[:length]
        leading[chain.start : chain.start + length] = np.equal(chain.masks[:length], ONE_TOKEN)
        leading[chain.start : chain.start + 1] = True
        for place, (token, mask) in enumerate(zip(chain.tokens[:length], chain.masks, strict=False)):
            if mask >= ONE_TOKEN:
                rows.append(first + place)
                masks.append(max(mask, 0))
                only.append(token if mask == ONE_TOKEN else -1)
    arrays = {
        "bitmask": output.grammar_bitmask,
        "mask": np.array(masks, dtype=np.int64),
        "only": np.array(only, dtype=np.int64),
        "rows": np.array(rows, dtype=np.int64),
        "requests": np.array(requests, dtype=np.int64),
        "chain": table,
        "leads": leads,
    }
    return GrammarRows(arrays["rows"], **send(arrays, device))
