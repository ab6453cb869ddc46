"""What a chain does to the scores and rules of its block."""

import itertools

import numpy as np
import torch
from vllm.v1.core.sched.output import GrammarOutput

from csrc_triton import Rules
from csrc_triton.types import NO_CONFIDENCE
from vllm_osdt.messages import ANY_TOKEN, GRAMMAR_CHAINS, NO_MASK, ONE_TOKEN, GrammarChain
from vllm_osdt.worker.grammar import GrammarRows, grammar_rows

WIDTH, VOCABULARY = 6, 40


def rows_of(*chains: GrammarChain | None, num_logits: int = WIDTH, bitmask: np.ndarray | None = None) -> GrammarRows:
    """Of a batch of requests, some with a chain, all with that many rows of logits."""
    ids = [str(index) for index in range(len(chains))]
    if bitmask is None:
        bitmask = np.full((4, 2), -1, dtype=np.int32)
    output = GrammarOutput(ids, bitmask)
    setattr(output, GRAMMAR_CHAINS, {one: chain for one, chain in zip(ids, chains, strict=True) if chain is not None})
    first_rows = np.arange(len(chains) + 1, dtype=np.int32) * num_logits
    return grammar_rows(output, ids, first_rows, WIDTH, torch.device("cpu"))


def rules(num_blocks: int) -> Rules:
    return Rules(torch.zeros(num_blocks, dtype=torch.int8), torch.ones(num_blocks), torch.ones(num_blocks).int())


def restricted(chain: GrammarChain, token: list[int], score: list[float]) -> tuple[list[float], int]:
    """Scores of a block, and how many are unmasked whatever the rule."""
    tokens, scores = torch.tensor([token]), torch.tensor([score])
    found, changed = rows_of(chain).restrict(tokens, scores, rules(1))
    assert scores.allclose(torch.tensor([score]), rtol=0, atol=0, equal_nan=True)  # as it was
    return found[0].tolist(), int(changed.min_unmask[0])


def test_scores_fall_along_a_chain_and_end_where_a_token_is_another_one():
    chain = GrammarChain(1, [5, 6, 7, ANY_TOKEN], [0, 1, 2, 3])
    score = [NO_CONFIDENCE, 0.5, 0.75, 0.25, 0.875, 0.875]
    none = NO_CONFIDENCE
    assert restricted(chain, [0, 5, 6, 7, 8, 9], score) == ([none, 0.5, 0.5, 0.25, 0.25, none], 1)
    assert restricted(chain, [0, 5, 9, 7, 8, 9], score) == ([none, 0.5, 0.5, none, none, none], 1)
    assert restricted(chain, [0, 9, 6, 7, 8, 9], score) == ([none, 0.5, none, none, none, none], 1)


def test_the_first_masked_position_always_has_a_score():
    for score in (float("nan"), NO_CONFIDENCE, 0.0):
        found, _ = restricted(GrammarChain(0, [ANY_TOKEN], [0]), [1] * WIDTH, [score] * WIDTH)
        assert found[0] > NO_CONFIDENCE and set(found[1:]) == {NO_CONFIDENCE}


def test_tokens_without_an_alternative_come_with_the_one_before_them():
    masks = [0, ONE_TOKEN, ONE_TOKEN, 1, ONE_TOKEN]
    chain = GrammarChain(1, [5, 6, 7, 8, 9], masks)
    score = [NO_CONFIDENCE, 0.1, 1.0, 1.0, 0.9, 1.0]
    assert restricted(chain, [0, 5, 6, 7, 8, 9], score)[1] == 3
    assert restricted(chain, [0, 4, 6, 7, 8, 9], score)[1] == 1
    assert restricted(GrammarChain(0, [5, 6], [ONE_TOKEN] * 2), [5, 6, 0, 0, 0, 0], score)[1] == 2


def test_every_combination_unmasks_a_first_part_that_continues_the_chain():
    """Any rule takes the n best scores; whatever n, positions follow each other and have the chain's tokens."""
    for proposed in itertools.product((5, 6), repeat=4):
        score = [0.3, 0.9, 0.9, 0.2, 0.8, 0.7]
        found, _ = restricted(GrammarChain(0, [5, 5, 5, 5], [0, 1, 2, 3]), [*proposed, 0, 0], score)
        order = sorted(range(WIDTH), key=lambda place: (-found[place], place))
        taken = [place for place in order if found[place] > NO_CONFIDENCE]
        assert taken == list(range(len(taken)))
        assert all(proposed[place] == 5 for place in taken[:-1])


def test_masks_of_a_grammar_are_applied_to_its_rows_alone():
    bitmask = np.zeros((2, 2), dtype=np.int32)
    bitmask[0, 0], bitmask[1, 1] = 1 << 3 | -(1 << 31), 1 << 2
    chain = GrammarChain(0, [3, 7, ANY_TOKEN, ANY_TOKEN], [0, ONE_TOKEN, 1, NO_MASK])
    rows = rows_of(None, chain, None, bitmask=bitmask)
    place = np.array([WIDTH, WIDTH + 1, WIDTH + 2, WIDTH + 3, 2 * WIDTH])
    banned = rows.ban(torch.zeros(5, VOCABULARY), place)
    assert [row.isfinite().nonzero().flatten().tolist() for row in banned[:3]] == [[3, 31], [7], [34]]
    assert banned[3:].isfinite().all()


def test_a_chain_ends_with_the_logits_of_its_request():
    rows = rows_of(GrammarChain(0, [5, 5, 5], [0, 1, 2]), GrammarChain(0, [5], [3]), num_logits=1)
    assert rows.rows_np.tolist() == [0, 1] and rows.mask.tolist() == [0, 3]
    found, _ = rows.restrict(torch.full((2, WIDTH), 5), torch.ones(2, WIDTH), rules(2))
    assert (found > NO_CONFIDENCE).sum(dim=1).tolist() == [1, 1]
