"""Fast-dLLM v2: the recorded decisions of the authors' decoder, and those of a plain loop."""

import random
from functools import partial

import pytest

import vllm_osdt
from tests.e2e.engine import generate, nfe, sampling, scheduler, tokens
from tests.e2e.families import FAMILIES, fast_dllm_v2_params
from tests.e2e.jobs import (
    MIN_MARGIN,
    above,
    assert_an_answer_is_a_request_of_its_own,
    assert_company_changes_nothing,
    assert_first_logits_equal,
    assert_one_batch_is_right,
    assert_preemption_changes_nothing,
    assert_takes_recorded_decisions,
    assert_takes_recorded_decisions_in_any_order,
    make_jobs,
    run,
    wrong,
)
from tests.e2e.self_speculation import assert_verifies_as_a_plain_loop, make_s2d2_jobs
from tests.reference.block_causal import ReferenceFastDLLMv2, decode_fast_dllm_v2
from tests.reference.block_causal_checkpoints import make_fast_dllm_v2_checkpoint
from tests.reference.decode import best_first, calibrate, osdt
from tests.reference.self_speculation import FastDLLMv2View

pytestmark = pytest.mark.e2e

ENGINE = {"max_num_seqs": 64, "max_model_len": 256}
VARIANTS = [
    {"block_length": 8, "sub_block_length": 4, "sub_block_cache": True},
    {"block_length": 16, "sub_block_length": 4, "sub_block_cache": False},
    {"block_length": 16, "sub_block_length": 8, "sub_block_cache": True},
    {"block_length": 8, "sub_block_length": 8, "sub_block_cache": False},
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_fast_dllm_v2_checkpoint(tmp_path_factory.mktemp("v2") / "model", seed=1)


@pytest.fixture(scope="module")
def network(checkpoint):
    return ReferenceFastDLLMv2.load(checkpoint)


@pytest.fixture(scope="module")
def llm(checkpoint, start_llm):
    return start_llm(checkpoint, **ENGINE)


@pytest.fixture(scope="module")
def golden_llm(golden_fast_dllm_v2, start_llm):
    return start_llm(golden_fast_dllm_v2.folder, **ENGINE, **FAMILIES["fast_dllm_v2_random"].settings)


@pytest.fixture(scope="module")
def jobs(network):
    found = make_jobs(partial(decode_fast_dllm_v2, network), VARIANTS)
    assert len(found) >= 50
    return found


def test_one_batch_takes_the_recorded_decisions(golden_fast_dllm_v2, golden_llm):
    assert_takes_recorded_decisions(golden_llm, golden_fast_dllm_v2.cases, fast_dllm_v2_params)


def test_one_by_one_and_in_another_order_takes_the_recorded_decisions(golden_fast_dllm_v2, golden_llm):
    assert_takes_recorded_decisions_in_any_order(golden_llm, golden_fast_dllm_v2.cases, fast_dllm_v2_params)


def test_one_batch_decodes_as_a_plain_loop_does_in_as_many_forwards(llm, jobs):
    assert_one_batch_is_right(llm, jobs)


def test_logits_equal_those_of_the_plain_network(llm, network, monkeypatch):
    assert_first_logits_equal(llm, network, monkeypatch, block_length=16, sub_block_length=16)


def test_neither_order_nor_company_changes_a_token(llm, jobs):
    assert_company_changes_nothing(llm, jobs)


def test_preemption_in_mid_block_changes_no_token(llm, jobs):
    assert_preemption_changes_nothing(llm, jobs)


def test_drafts_are_verified_as_by_a_plain_loop(llm, network):
    variants = [{**variant, "sub_block_cache": False} for variant in VARIANTS]
    jobs = make_s2d2_jobs(partial(FastDLLMv2View, network), variants)
    assert_verifies_as_a_plain_loop(llm, jobs)


def test_prompts_are_cut_into_whole_blocks_where_they_do_not_fit_a_step(checkpoint, start_llm, jobs):
    llm = start_llm(checkpoint, **ENGINE, max_num_batched_tokens=65)
    completions = run(llm, jobs)
    assert wrong(jobs, completions) == []
    assert [nfe(c) for c in completions] == [job.decoded.nfe for job in jobs]


def test_the_sub_block_cache_computes_fewer_rows(llm, network, monkeypatch):
    from vllm_osdt.worker.model_runner import CanvasRunnerMixin

    rows = []
    prepare = CanvasRunnerMixin.prepare_inputs

    def counting(self, *args):
        batch = prepare(self, *args)
        rows.append(batch.num_tokens)
        return batch

    monkeypatch.setattr(CanvasRunnerMixin, "prepare_inputs", counting)
    scheduler(llm).reset_prefix_cache()
    options = {"policy": "static_threshold", "threshold": 0.999, "block_length": 16, "sub_block_length": 4}
    totals = {}
    for cache in (False, True):
        rows.clear()
        generate(llm, [[9] * 5], sampling(27, sub_block_cache=cache, **options))
        totals[cache] = list(rows)
    assert set(totals[False]) == {16}
    assert set(totals[True]) == {4, 16}


@pytest.mark.parametrize("mode", ["block", "step_block"])
def test_osdt_equals_a_plain_implementation(llm, network, mode):
    rng = random.Random(5)
    first, *later = [[rng.randrange(3, 100) for _ in range(rng.randrange(1, 40))] for _ in range(9)]
    kwargs = {"block_length": 16, "sub_block_length": 4, "sub_block_cache": True, "max_tokens": 40}
    phase_1 = decode_fast_dllm_v2(network, first, above(0.6), **kwargs)
    options = {**kwargs, "task": f"v2 {mode}", "threshold": 0.6, "granularity": mode, "statistic": "q2"}
    options |= {"num_calibration_requests": 1, "slack": 0.1, "threshold_cap": 1.0}
    options.pop("max_tokens")
    params = sampling(40, **options)
    [got] = generate(llm, [first], params)
    assert (list(got.token_ids), nfe(got)) == (phase_1.tokens, phase_1.nfe)
    rule = osdt(calibrate(phase_1.record, mode, "q2", False), 1.0, 0.1)
    expected = [decode_fast_dllm_v2(network, prompt, rule, **kwargs) for prompt in later]
    clear = [index for index, e in enumerate(expected) if e.proposal_margin > MIN_MARGIN]
    assert len(clear) >= 6 and rule.margin > MIN_MARGIN
    completions = generate(llm, later, params)
    assert [tokens(completions)[index] for index in clear] == [expected[index].tokens for index in clear]
    assert vllm_osdt.describe(completions[0])["profile"] is not None


@pytest.mark.parametrize(("steps", "taken"), [(48, 48), (24, 24), (12, 12), (6, 9)])
@pytest.mark.parametrize("sub_block_cache", [False, True])
def test_fixed_steps_are_shared_out_by_sub_block(llm, network, steps, taken, sub_block_cache):
    """A sub-block of one step takes two where its first position is decided alone."""
    share = 48 // steps
    part = {"block_length": 16, "sub_block_length": 8, "sub_block_cache": sub_block_cache}

    def rule(block, step, masked):
        alone = len(masked) == 7  # the first of 8 came from the block before
        return best_first(masked)[: -(-7 // (8 // share - 1)) if alone and share < 8 else share]

    prompt = list(range(20, 36))
    expected = decode_fast_dllm_v2(network, prompt, rule, max_tokens=48, **part)
    [got] = generate(llm, [prompt], sampling(48, policy="fixed_steps", steps=steps, **part))
    assert network.mask_token_id not in got.token_ids
    assert nfe(got) == taken
    assert expected.proposal_margin > MIN_MARGIN and expected.nfe == taken
    assert list(got.token_ids) == expected.tokens


@pytest.mark.parametrize("factor", [10.0, 25.0, 300.0])
def test_no_policy_decides_a_position_that_was_not_computed(llm, network, factor):
    """Those of later sub-blocks: a factor that large would let any position pass."""
    options = {"block_length": 16, "sub_block_length": 8, "sub_block_cache": True}
    prompts = [list(range(20, 20 + length)) for length in (6, 7, 13, 16)]
    expected = [
        decode_fast_dllm_v2(network, prompt, lambda block, step, masked: list(masked), max_tokens=40, **options)
        for prompt in prompts
    ]
    assert all(e.proposal_margin > MIN_MARGIN for e in expected)
    got = generate(llm, prompts, sampling(40, policy="factor", factor=factor, **options))
    if factor > 100:  # every position of a sub-block at once
        assert tokens(got) == [e.tokens for e in expected]
    assert all(0 <= token < network.mask_token_id for one in tokens(got) for token in one)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_length": 16, "sub_block_length": 6}, "sub_block_length is 6; it must divide block_length 16"),
        ({"block_length": 4}, "sub_block_length is 8; it must divide block_length 4"),
        (
            {"policy": "fixed_steps", "steps": 2, "block_length": 16},
            "each 2 sub-blocks of 8, it must be a multiple of 4",
        ),
        ({"edit_threshold": 0.5}, "edit_threshold is 0.5, but this model was not trained"),
    ],
)
def test_options_that_do_not_fit_are_refused(llm, options, message):
    with pytest.raises(ValueError, match=message):
        generate(llm, [[5, 6]], sampling(32, **options))


def test_an_engine_refuses_to_part_what_is_one_forward(checkpoint, start_llm):
    config = {"osdt": {"profile_dir": "", "fused_commit": False}}
    with pytest.raises(ValueError, match="fused_commit is false"):
        start_llm(checkpoint, additional_config=config, **ENGINE)


def test_an_answer_is_decoded_in_blocks_of_its_own_as_a_request_of_its_own(llm):
    own = {"policy": "static_threshold", "threshold": 0.2, "sub_block_length": 4, "sub_block_cache": True}
    assert_an_answer_is_a_request_of_its_own(llm, 16, 4, **own)
    with pytest.raises(ValueError, match=r"answer_block_length is 2, but .*sub_block_length is 4; it must divide"):
        generate(llm, [[5]], sampling(8, block_length=16, answer_block_length=2, think_end_token=9, **own))
