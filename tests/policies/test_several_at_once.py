"""Policies that decide several places of a long block at once: ETE and multi-block decoding, against plain twins."""

import math

import pytest
import torch

from tests.e2e.engine import generate, nfe, sampling
from tests.policies.adjusted import chosen, make_step
from tests.policies.test_policies import schedule_of
from tests.reference.decode import best_first, decode
from tests.reference.llada import ReferenceLLaDA
from vllm_osdt.errors import InvalidOptionError
from vllm_osdt.options import DecodingOptions
from vllm_osdt.options.parsing import parse_options
from vllm_osdt.policies import POLICIES

WIDTH = 24


class PlainETE:
    """What passes, at least the best; if it is little, one of the others by its rank among them."""

    def __init__(self, tau=0.9, below=2, rank=0.0):
        self.tau, self.below, self.rank, self.margin = tau, below, rank, math.inf

    def __call__(self, block, step, masked):
        self.margin = min([self.margin, *(abs(c - self.tau) for c in masked.values())])
        order = best_first(masked)
        is_little = sum(c >= self.tau for c in masked.values()) < self.below
        passing = [k for k in order if masked[k] >= self.tau] or order[:1]
        rest = order[len(passing) :]
        if rest and is_little:
            passing.append(rest[math.floor(self.rank * (len(rest) - 1) + 0.5)])
        return passing


class PlainMultiBlock:
    """Parts that are entered one after the other; confidences are negative entropies."""

    by_entropy = True

    def __init__(self, length, part=8, tau=0.5, enter=0.5, full=0.95, rule="parts"):
        self.length, self.part, self.tau, self.enter, self.full = length, part, tau, enter, full
        self.is_release = rule == "release"
        self.margin = math.inf

    def __call__(self, block, step, masked):
        # The engine holds an entropy in steps of 2e-6.
        self.margin = min([self.margin, *(abs(-c - self.tau) / 30 for c in masked.values())])
        found, reached, share, is_full, is_owed = [], {}, 1.0, True, True
        for start in range(0, self.length, self.part):
            is_full = is_full and share >= self.full
            if share < self.enter:
                break
            own = {k: c for k, c in masked.items() if start <= k < start + self.part}
            passing = [k for k, c in own.items() if -c <= self.tau]
            found += passing or (best_first(own)[:1] if is_full and is_owed else [])
            if self.is_release and is_full and own:
                is_owed = False
            reached |= own
            size = min(self.part, self.length - start)
            share = (size - len(own)) / size
        if self.is_release:
            found += best_first(reached)[:1]
        return sorted(set(found)) or best_first({k: c for k, c in masked.items() if k < self.reach(masked)})[:1]

    def reach(self, masked):
        """The position behind the parts that take part."""
        for start in range(0, self.length, self.part):
            own, size = sum(start <= k < start + self.part for k in masked), min(self.part, self.length - start)
            if (size - own) / size < self.enter:
                return start + self.part
        return self.length


def scores(seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    score = torch.rand(5, WIDTH, generator=generator) * scale + (1 - scale)
    is_masked = torch.rand(5, WIDTH, generator=generator) < torch.tensor([1.0, 0.8, 0.5, 0.3, 0.9])[:, None]
    is_masked[:, -1] = True
    return score.masked_fill(~is_masked, -2.0)


def confidences(row):
    return {k: c for k, c in enumerate(row.tolist()) if c >= 0}


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(("below", "rank"), [(1, 0.0), (2, 0.0), (4, 0.5), (25, 1.0)])
def test_ete_explores_where_little_passes(seed, below, rank):
    score = scores(seed)
    options = DecodingOptions(
        explore_below=below, explore_rank=rank, threshold=0.75, block_length=WIDTH, gen_length=WIDTH
    )
    step = make_step(score.clone(), schedule_of("ete", options), 5)
    POLICIES["ete"].adjust(step)
    assert chosen(step) == [set(PlainETE(0.75, below, rank)(0, 0, confidences(row))) for row in score]


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(
    ("part", "enter", "full"), [(8, 0.5, 0.95), (5, 0.0, 1.0), (24, 0.5, 0.9), (1, 0.5, 0.5), (8, 0.1, 0.25)]
)
@pytest.mark.parametrize("rule", ["parts", "release"])
def test_parts_are_entered_one_after_the_other(seed, part, enter, full, rule):
    score = scores(seed, scale=1 / 16)
    options = DecodingOptions(
        part_length=part,
        enter_share=enter,
        full_share=full,
        multi_block_rule=rule,
        block_length=WIDTH,
        gen_length=WIDTH,
    )
    step = make_step(score.clone(), schedule_of("multi_block", options), 5)
    POLICIES["multi_block"].adjust(step)
    expected = []
    for row in score:
        entropies = {k: -32 * (1 - c) for k, c in confidences(row).items()}
        expected.append(set(PlainMultiBlock(WIDTH, part, 0.5, enter, full, rule)(0, 0, entropies)))
    assert chosen(step) == expected


@pytest.mark.parametrize(("part", "decided", "share"), [(5, 1, 0.2), (10, 1, 0.1), (20, 19, 0.95), (12, 3, 0.25)])
def test_a_part_takes_part_with_exactly_the_share(part, decided, share):
    score = torch.full((1, 2 * part), 1 - 0.4 / 32)  # everything passes
    score[0, :decided] = -2.0  # written
    chosen_of = {}
    for enter in (share, share + 0.01):
        options = DecodingOptions(
            part_length=part, enter_share=enter, full_share=1.0, block_length=2 * part, gen_length=2 * part
        )
        step = make_step(score.clone(), schedule_of("multi_block", options), 1)
        POLICIES["multi_block"].adjust(step)
        chosen_of[enter == share] = chosen(step)[0]
    assert chosen_of == {True: set(range(decided, 2 * part)), False: set(range(decided, part))}


def test_shares_out_of_order_are_refused():
    values = {"osdt_policy": "multi_block", "osdt_full_share": 0.2}
    with pytest.raises(InvalidOptionError, match=r"full_share is 0.2, below enter_share 0.5; raise it"):
        parse_options(values, base=DecodingOptions(), prefix="osdt_")


@pytest.mark.e2e
def test_an_engine_decodes_as_the_plain_loops(tasks_llm, golden_tasks):
    network = ReferenceLLaDA.load(golden_tasks.folder)
    prompts = [case["prompt_token_ids"] for case in golden_tasks.cases[:12]]
    canvas = {"gen_length": 48, "block_length": 24, "cache_mode": "dual"}
    kinds = {
        "ete": (lambda: PlainETE(0.6, 3, 0.5), {"threshold": 0.6, "explore_below": 3, "explore_rank": 0.5}),
        "multi_block": (lambda: PlainMultiBlock(24), {"part_length": 8}),
        "multi_block by the code": (
            lambda: PlainMultiBlock(24, rule="release"),
            {"part_length": 8, "multi_block_rule": "release"},
        ),
    }
    requests, expected = [], []
    for name, (make_rule, options) in kinds.items():
        policy = name.split()[0]
        found = [decode(network, prompt, make_rule(), **canvas) for prompt in prompts]
        clear = [i for i, one in enumerate(found) if min(one.rule_margin, one.proposal_margin) > 1e-5]
        assert len(clear) >= 6
        requests += [(prompts[i], sampling(48, policy=policy, **options, **canvas)) for i in clear]
        expected += [found[i] for i in clear]
    got = generate(tasks_llm, [prompt for prompt, _ in requests], [params for _, params in requests])
    assert [list(one.token_ids) for one in got] == [one.tokens for one in expected]
    assert [nfe(one) for one in got] == [one.nfe for one in expected]
