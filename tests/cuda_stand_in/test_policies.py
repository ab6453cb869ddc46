"""Policies where tables of the host and the device are two: cuts are read back, and steps are compared in graphs."""

import pytest

from tests.cuda_stand_in.cuda import LEDGER
from tests.e2e.engine import generate, nfe, sampling, tokens
from tests.policies.test_block_cuts import PlainCadLLM
from tests.reference.block_causal import ReferenceSDAR
from tests.reference.block_causal_checkpoints import make_sdar_checkpoint
from tests.reference.decode import decode
from tests.reference.dream import ReferenceDream, make_dream_checkpoint
from tests.reference.self_speculation import SDARView, Settings, decode_s2d2

MIN_MARGIN = 1e-5
CANVAS = {"gen_length": 24, "block_length": 8, "cache_mode": "dual"}
OTHERS = (
    {"policy": "klass", "kl_confidence": 0.1, "kl_threshold": 0.5, "kl_steps": 1},
    {"policy": "ccd"},
    {"policy": "sched", "sched_high": 3.0, "sched_low": 1.0, "commit_threshold": 0.5},
    {"policy": "static_threshold", "threshold": 0.2, "credit": True},
    {"policy": "static_threshold", "threshold": 0.2, "draft": [9] * 24, "draft_threshold": 0.01},
    {"policy": "freedave", "freedave_drafts": 4},
)


def plain_cad_llm():
    rule = PlainCadLLM(8, shortest=1, first=6, high=0.9)
    rule.length = CANVAS["gen_length"]
    return rule


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_dream_checkpoint(tmp_path_factory.mktemp("dream") / "model", seed=1)


@pytest.fixture(scope="module")
def llm(checkpoint, start_llm):
    return start_llm(checkpoint, max_num_seqs=4, max_num_batched_tokens=256, max_model_len=128)


def test_a_block_that_begins_with_a_first_position_alone_is_cut_anew(llm, checkpoint):
    """Its first step decides that position, so that a limit of the block before would be read back in its place."""
    network, prompts = ReferenceDream.load(checkpoint), [[5, 6, 7, 8], [11, 30, 12], [40, 41, 9, 70, 33]]
    params = sampling(24, policy="cad_llm", cad_first_block=6, cad_min_block=1, cad_threshold=0.9, **CANVAS)
    for prompt in prompts:  # one after the other, in one slot
        expected = decode(network, prompt, plain_cad_llm(), **CANVAS)
        assert min(expected.rule_margin, expected.proposal_margin) > MIN_MARGIN
        assert tokens(generate(llm, [prompt], params)) == [expected.tokens]


def test_company_changes_nothing_and_nothing_waits(llm):
    params = [sampling(24, **CANVAS, **options) for options in OTHERS]
    prompts = [[5 + place, 6, 7, 8] for place in range(len(OTHERS))]
    alone = [tokens(generate(llm, [prompt], one))[0] for prompt, one in zip(prompts, params, strict=True)]
    LEDGER.clear()
    assert tokens(generate(llm, prompts, params)) == alone
    assert not LEDGER.waits


def test_accepted_drafts_are_read_back_as_denoising_steps(llm):
    """Masks and steps come to the host in one copy; noise and parameters of later steps belong to those."""
    prompts = [[5, 6, 7, 8], [11, 30, 12]]
    own = {"temperature": 0.7, "seed": 3, **CANVAS}
    base = generate(llm, prompts, sampling(24, policy="fixed_steps", **own))
    LEDGER.clear()
    got = generate(llm, prompts, sampling(24, policy="freedave", **own))
    assert not LEDGER.waits
    assert tokens(got) == tokens(base) and sum(map(nfe, got)) < sum(map(nfe, base))


def test_drafts_are_verified_by_branches_as_by_a_plain_loop(tmp_path, start_llm):
    """Spans come to the engine core in the report of their step, and nothing waits for them."""
    folder = make_sdar_checkpoint(tmp_path / "model", seed=1, num_hidden_layers=1)
    network, prompts = ReferenceSDAR.load(folder), [[5, 6, 7, 8], [40, 41, 9, 70, 33]]
    llm = start_llm(folder, max_num_seqs=2, max_model_len=64)
    settings = Settings(threshold=0.2, cost=0.8)
    expected = [decode_s2d2(SDARView(network, 8), prompt, settings, max_tokens=10) for prompt in prompts]
    assert min(min(one.proposal_margin, one.rule_margin) for one in expected) > MIN_MARGIN
    own = {"policy": "s2d2", "block_length": 8, "threshold": 0.2, "verify_cost": 0.8}
    LEDGER.clear()
    got = generate(llm, prompts, sampling(10, **own))
    assert not LEDGER.waits and tokens(got) == [one.tokens for one in expected]
    assert [nfe(one) for one in got] == [one.nfe for one in expected]
    sampled = [sampling(6, temperature=0.8, seed=seed, **own) for seed in range(2)]
    assert tokens(generate(llm, prompts, sampled))[:1] == tokens(generate(llm, prompts[:1], sampled[0]))
