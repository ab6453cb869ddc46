"""Dream: the decisions of the stock Fast-dLLM decoder, and of a plain decoder where that one has none."""

import random

import pytest

import vllm_osdt
from tests.e2e.engine import assert_idle, case_params, drive, generate, nfe, sampling, scheduler, submit, tokens
from tests.e2e.jobs import (
    assert_an_answer_is_a_request_of_its_own,
    assert_company_changes_nothing,
    assert_one_batch_is_right,
    assert_preemption_changes_nothing,
    make_canvas_jobs,
)
from tests.policies.test_block_cuts import LENGTH, PlainCadLLM
from tests.reference.decode import best_first, calibrate, decode, osdt, static_threshold
from tests.reference.dream import ReferenceDream, make_dream_checkpoint

pytestmark = pytest.mark.e2e

MIN_MARGIN = 1e-5
CACHES = ("none", "prefix", "dual")
CANVAS = {"gen_length": 32, "block_length": 8}


@pytest.fixture(scope="module")
def golden_llm(golden_dream, start_llm):
    return start_llm(golden_dream.folder, max_num_seqs=32, max_model_len=512)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_dream_checkpoint(tmp_path_factory.mktemp("dream") / "model", seed=1, n_kv_heads=1, embedding_size=101)


@pytest.fixture(scope="module")
def llm(checkpoint, start_llm):
    return start_llm(checkpoint, max_num_seqs=64, max_model_len=256)


@pytest.fixture(scope="module")
def network(checkpoint):
    return ReferenceDream.load(checkpoint)


def wrong_cases(cases, completions):
    pairs = enumerate(zip(cases, completions, strict=True))
    return [index for index, (case, c) in pairs if list(c.token_ids) != case["output_token_ids"]]


def test_one_batch_takes_the_stock_decisions_with_the_stock_forwards(golden_dream, golden_llm):
    cases = golden_dream.cases
    assert len(cases) == 24
    completions = generate(
        golden_llm, [case["prompt_token_ids"] for case in cases], [case_params(case) for case in cases]
    )
    assert wrong_cases(cases, completions) == []
    assert all(nfe(c) <= case["nfe"] for case, c in zip(cases, completions, strict=True))


def test_the_order_of_requests_changes_nothing(golden_dream, golden_llm):
    cases = list(golden_dream.cases)
    random.Random(1).shuffle(cases)
    completions = generate(
        golden_llm, [case["prompt_token_ids"] for case in cases], [case_params(case) for case in cases]
    )
    assert wrong_cases(cases, completions) == []
    alone = [generate(golden_llm, [case["prompt_token_ids"]], case_params(case))[0] for case in cases]
    assert wrong_cases(cases, alone) == []


def test_preemption_in_mid_block_changes_no_decision(golden_dream, golden_llm):
    cases = golden_dream.cases
    req_ids = [submit(golden_llm, case["prompt_token_ids"], case_params(case)) for case in cases]

    def preempt(step):
        if step in (1, 2, 5):
            scheduler(golden_llm).reset_prefix_cache(reset_running_requests=True)

    finished = drive(golden_llm, preempt)
    assert wrong_cases(cases, [finished[req_id] for req_id in req_ids]) == []
    assert_idle(golden_llm)


def random_prompts(number, seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(3, 90) for _ in range(rng.randrange(1, 40))] for _ in range(number)]


@pytest.fixture(scope="module")
def jobs(network):
    return make_canvas_jobs(network)


def test_random_requests_decode_as_a_plain_loop_does_in_as_many_forwards(llm, jobs):
    assert_one_batch_is_right(llm, jobs)


def test_neither_order_nor_company_changes_a_token(llm, jobs):
    assert_company_changes_nothing(llm, jobs)


def test_preemption_in_mid_block_changes_no_token(llm, jobs):
    assert_preemption_changes_nothing(llm, jobs)


@pytest.mark.parametrize("cache", CACHES)
def test_osdt_equals_a_plain_implementation(llm, network, cache):
    first, *later = random_prompts(9, seed=6)
    options = {
        "cache_mode": cache,
        "task": f"dream {cache}",
        "threshold": 0.3,
        "granularity": "step_block",
        "statistic": "q2",
    }
    options |= {"num_calibration_requests": 1, "slack": 0.1, "threshold_cap": 1.0, **CANVAS}
    phase_1 = decode(network, first, static_threshold(0.3), cache_mode=cache, **CANVAS)
    rule = osdt(calibrate(phase_1.record, "step_block", "q2", False), 1.0, 0.1)
    params = sampling(CANVAS["gen_length"], **options)
    [got] = generate(llm, [first], params)
    assert (list(got.token_ids), nfe(got)) == (phase_1.tokens, phase_1.nfe)
    expected = [decode(network, prompt, rule, cache_mode=cache, **CANVAS) for prompt in later]
    clear = [index for index, e in enumerate(expected) if e.proposal_margin > MIN_MARGIN]
    assert len(clear) >= 6 and rule.margin > MIN_MARGIN
    completions = generate(llm, later, params)
    assert [tokens(completions)[index] for index in clear] == [expected[index].tokens for index in clear]
    assert vllm_osdt.describe(completions[0])["profile"] is not None


@pytest.mark.parametrize(("steps", "cache"), [(32, "dual"), (16, "prefix"), (12, "dual"), (8, "none")])
def test_fixed_steps_take_as_many_forwards_as_asked_for(llm, network, steps, cache):
    per_block = steps // 4
    alone = cache != "none"

    def rule(block, step, masked):
        share, more = divmod(8 - alone, per_block - alone)
        return best_first(masked)[: share + (step - alone < more)]

    prompt = random_prompts(1, seed=9)[0]
    expected = decode(network, prompt, rule, cache_mode=cache, **CANVAS)
    [got] = generate(llm, [prompt], sampling(32, policy="fixed_steps", steps=steps, cache_mode=cache, **CANVAS))
    assert nfe(got) == expected.nfe == steps
    assert expected.proposal_margin > MIN_MARGIN and list(got.token_ids) == expected.tokens


@pytest.mark.parametrize("cache", ["none", "dual"])
def test_a_block_is_cut_when_all_of_its_proposals_are_known(llm, network, cache):
    canvas = {"gen_length": LENGTH, "block_length": 16, "cache_mode": cache}
    prompts, rules = random_prompts(6, seed=5), [PlainCadLLM(16) for _ in range(6)]
    expected = [decode(network, prompt, rule, **canvas) for prompt, rule in zip(prompts, rules, strict=True)]
    got = generate(llm, prompts, sampling(LENGTH, policy="cad_llm", cad_first_block=12, **canvas))
    clear = [i for i, one in enumerate(expected) if min(one.rule_margin, one.proposal_margin) > MIN_MARGIN]
    assert len(clear) >= 3 and all(len(set(rules[i].lengths)) > 1 for i in clear)
    assert [list(got[i].token_ids) for i in clear] == [expected[i].tokens for i in clear]
    assert [nfe(got[i]) for i in clear] == [expected[i].nfe for i in clear]


@pytest.mark.parametrize("cache", CACHES)
def test_an_answer_is_decoded_in_blocks_of_its_own_as_a_request_of_its_own(llm, cache):
    own = {"policy": "static_threshold", "threshold": 0.2, "cache_mode": cache}
    assert_an_answer_is_a_request_of_its_own(llm, 16, 1, whole=48, **own)
