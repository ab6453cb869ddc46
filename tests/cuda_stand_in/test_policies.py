"""Policies and modes where tables of the host and the device are two: what is cut, drafted, verified or begun anew.

No step waits for the device, and one copies to it once for each time that it runs the model.
"""

from functools import partial
from types import SimpleNamespace

import pytest

from tests.cuda_stand_in.cuda import LEDGER
from tests.cuda_stand_in.test_default_settings import num_copies
from tests.cuda_stand_in.test_graphs import count_replays, runner_of
from tests.e2e.engine import drive, generate, nfe, sampling, submit, tokens
from tests.e2e.jobs import above
from tests.policies.test_block_cuts import PlainCadLLM
from tests.reference.block_causal import ReferenceSDAR, decode_with_answer_blocks
from tests.reference.block_causal_checkpoints import make_sdar_checkpoint
from tests.reference.decode import decode, static_threshold
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


# Graphs of blocks, and none of all rows of a batch, which take the interpreter long.
GRAPHS = {"cudagraph_capture_sizes": [16, 64]}
SERVED = {"osdt": {"profile_dir": "", "block_length": 8}}


def plain_cad_llm(**options):
    rule = PlainCadLLM(8, shortest=1, first=6, high=0.9, **options)
    rule.length = CANVAS["gen_length"]
    return rule


def watched(llm, prompts, params):
    """As ``generate``. No step waits, and one that takes in no request copies once for each time that it runs.

    ``of_branches`` says of each step with branches whether it was a graph.
    """
    runner, replayed, takes_in = runner_of(llm), count_replays(llm), []
    add_requests, prepare_attn, of_branches = runner.add_requests, runner.prepare_attn, []

    def noted(output):
        takes_in.append(bool(output.scheduled_new_reqs))
        add_requests(output)

    def prepared(batch):
        if getattr(batch, "pages", None) is not None:
            of_branches.append(batch.graph is not None)
        return prepare_attn(batch)

    num_steps = {True: 0, False: 0}

    def check(step):
        assert not LEDGER.waits
        if not any(takes_in):
            assert num_copies(LEDGER.to_device) <= max(1, len(replayed)), LEDGER.to_device
            num_steps[bool(replayed)] += step > 0
        takes_in.clear()
        replayed.clear()
        LEDGER.clear()

    LEDGER.clear()
    params = params if isinstance(params, list) else [params] * len(prompts)
    req_ids = [submit(llm, *one) for one in zip(prompts, params, strict=True)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "add_requests", noted)
        patch.setattr(runner, "prepare_attn", prepared)
        finished = drive(llm, check)
    completions = [finished[one] for one in req_ids]
    return SimpleNamespace(completions=completions, num_steps=num_steps, of_branches=of_branches)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_dream_checkpoint(tmp_path_factory.mktemp("dream") / "model", seed=1)


@pytest.fixture(scope="module")
def llm(checkpoint, start_llm):
    sizes = {"max_num_seqs": 4, "max_num_batched_tokens": 256, "max_model_len": 128}
    return start_llm(checkpoint, compilation_config=GRAPHS, additional_config=SERVED, **sizes)


@pytest.fixture(scope="module")
def block_causal(tmp_path_factory, start_llm):
    """A block-causal engine with blocks of 8, and its network."""
    folder = make_sdar_checkpoint(tmp_path_factory.mktemp("sdar") / "model", seed=1, num_hidden_layers=1)
    config = {"osdt": {**SERVED["osdt"], "policy": "s2d2"}}  # so that there are graphs of verifications
    graphs = {"cudagraph_capture_sizes": [16, 88]}  # two whole blocks are verified by 86 rows at most
    llm = start_llm(folder, max_num_seqs=2, max_model_len=64, compilation_config=graphs, additional_config=config)
    return SimpleNamespace(llm=llm, network=ReferenceSDAR.load(folder))


def test_a_block_that_begins_with_a_first_position_alone_is_cut_anew(llm, checkpoint):
    """Its first step decides that position, so that a limit of the block before would be read back in its place."""
    network, prompts = ReferenceDream.load(checkpoint), [[5, 6, 7, 8], [11, 30, 12], [40, 41, 9, 70, 33]]
    params = sampling(24, policy="cad_llm", cad_first_block=6, cad_min_block=1, cad_threshold=0.9, **CANVAS)
    for prompt in prompts:  # one after the other, in one slot
        expected = decode(network, prompt, plain_cad_llm(), **CANVAS)
        assert min(expected.rule_margin, expected.proposal_margin) > MIN_MARGIN
        assert tokens(generate(llm, [prompt], params)) == [expected.tokens]


def test_far_masks_and_shares_of_a_vocabulary_are_as_in_a_plain_loop(llm, checkpoint):
    network, prompts = ReferenceDream.load(checkpoint), [[5, 6, 7, 8], [11, 30, 12]]
    cad = {"policy": "cad_llm", "cad_first_block": 6, "cad_min_block": 1, "cad_threshold": 0.9}
    kinds = [
        ({"policy": "static_threshold", "threshold": 0.2}, {"suffix_window": 0}, partial(static_threshold, 0.2)),
        ({**cad, "cad_vocabulary": True}, {}, partial(plain_cad_llm, vocabulary=True)),
    ]
    asked, expected = [], []
    for options, mode, make_rule in kinds:
        for prompt in prompts:
            asked.append((prompt, sampling(24, **options, **mode, **CANVAS)))
            expected.append(decode(network, prompt, make_rule(), **CANVAS, **mode))
    assert min(min(one.rule_margin, one.proposal_margin) for one in expected) > MIN_MARGIN
    got = watched(llm, *map(list, zip(*asked, strict=True)))
    assert tokens(got.completions) == [one.tokens for one in expected]
    assert [nfe(one) for one in got.completions] == [one.nfe for one in expected]
    assert got.num_steps[True] and got.num_steps[False]


def test_company_changes_nothing_and_nothing_waits(llm):
    params = [sampling(24, **CANVAS, **options) for options in OTHERS]
    prompts = [[5 + place, 6, 7, 8] for place in range(len(OTHERS))]
    alone = [tokens(generate(llm, [prompt], one))[0] for prompt, one in zip(prompts, params, strict=True)]
    got = watched(llm, prompts, params)
    assert tokens(got.completions) == alone
    assert got.num_steps[True] and got.num_steps[False] and got.of_branches  # of whole canvases, and others


@pytest.mark.parametrize(("kind", "temperature"), [("llm", 0.7), ("block_causal", 0.0)])
def test_steps_with_branches_are_graphs_and_accepted_drafts_are_denoising_steps(request, kind, temperature):
    """Masks and steps come to the host in one copy; noise and parameters of later steps belong to those."""
    engine, prompts = request.getfixturevalue(kind), [[5, 6, 7, 8], [11, 30, 12]]
    engine, mode = (engine, CANVAS) if kind == "llm" else (engine.llm, {})
    own = {"temperature": temperature, "seed": 3, **mode}
    base = generate(engine, prompts, sampling(24, policy="fixed_steps", **own))
    drafted = watched(engine, prompts, sampling(24, policy="freedave", freedave_drafts=4, **own))
    got = drafted.completions
    assert tokens(got) == tokens(base) and sum(map(nfe, got)) < sum(map(nfe, base))
    assert len(drafted.of_branches) >= 6 and all(drafted.of_branches)
    # As many rows as no graph has.
    more = watched(engine, prompts, sampling(24, policy="freedave", freedave_drafts=8, **own))
    assert tokens(more.completions) == tokens(base) and not all(more.of_branches)


def test_drafts_are_verified_by_branches_as_by_a_plain_loop(block_causal):
    """Spans come to the engine core in the report of their step, and nothing waits for them; one router is a bandit."""
    llm, prompts = block_causal.llm, [[5, 6, 7, 8], [40, 41, 9, 70, 33]]
    settings, view = Settings(threshold=0.2, cost=0.8), SDARView(block_causal.network, 8)
    expected = [
        decode_s2d2(view, prompts[0], settings, max_tokens=10),
        decode_s2d2(view, prompts[1], Settings(threshold=0.2, router="bandit"), max_tokens=24),
    ]
    assert min(min(one.proposal_margin, one.rule_margin) for one in expected) > MIN_MARGIN
    own = {"policy": "s2d2", "block_length": 8, "threshold": 0.2, "verify_cost": 0.8}
    bandit = sampling(24, policy="s2d2", block_length=8, threshold=0.2, verify_router="bandit")
    got = watched(llm, prompts, [sampling(10, **own), bandit])
    assert tokens(got.completions) == [one.tokens for one in expected]
    assert [nfe(one) for one in got.completions] == [one.nfe for one in expected]
    assert got.num_steps[True] and len(got.of_branches) >= 4 and all(got.of_branches)
    sampled = [sampling(6, temperature=0.8, seed=seed, **own) for seed in range(2)]
    assert tokens(generate(llm, prompts, sampled))[:1] == tokens(generate(llm, prompts[:1], sampled[0]))


def test_an_answer_in_shorter_blocks_is_as_in_a_plain_loop(block_causal):
    """A request whose thinking has ended is taken in anew, and its blocks are shorter than those of the graphs."""
    prompts, check, own = (
        [[5, 6, 7, 8], [40, 41, 9, 70, 33]],
        [9, 10, 11],
        {"block_length": 8, "answer_block_length": 4},
    )
    ends, expected = (79, 54), []
    for prompt, think_end in zip(prompts, ends, strict=True):
        found, given = decode_with_answer_blocks(
            block_causal.network, prompt, partial(above, 0.2), think_end=think_end, check=check, max_tokens=20, **own
        )
        assert min(found.rule_margin, found.proposal_margin) > MIN_MARGIN and 0 < given.start < given.stop
        expected.append(found)
    own |= {"policy": "static_threshold", "threshold": 0.2, "check_prompt": check}
    got = watched(block_causal.llm, prompts, [sampling(20, think_end_token=one, **own) for one in ends])
    assert tokens(got.completions) == [one.tokens for one in expected]
    assert [nfe(one) for one in got.completions] == [one.nfe for one in expected]
    assert got.num_steps[True]


def test_a_model_that_vllm_compiles_decodes_as_a_plain_loop(checkpoint, start_llm):
    """Its last layer computes all rows, and steps are graphs as well; the stand-in runs what torch would compile."""
    network, prompts = ReferenceDream.load(checkpoint), [[5, 6, 7, 8], [11, 30, 12]]
    sizes = {"max_num_seqs": 2, "max_num_batched_tokens": 128, "max_model_len": 64}
    llm = start_llm(checkpoint, compilation_config={"mode": 3, **GRAPHS}, **sizes)
    assert not runner_of(llm).model.narrows_last_layer
    expected = [decode(network, prompt, static_threshold(0.4), **CANVAS) for prompt in prompts]
    assert min(min(one.rule_margin, one.proposal_margin) for one in expected) > MIN_MARGIN
    got = watched(llm, prompts, sampling(24, policy="static_threshold", threshold=0.4, **CANVAS))
    assert tokens(got.completions) == [one.tokens for one in expected]
    assert got.num_steps[True]
