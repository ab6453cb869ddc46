"""Dream: the decisions of the stock Fast-dLLM decoder, and of a plain decoder where that one has none."""

import random

import pytest

import vllm_osdt
from tests.e2e.engine import assert_idle, case_params, drive, generate, nfe, sampling, scheduler, submit, tokens
from tests.reference.decode import best_first, calibrate, decode, osdt, static_threshold
from tests.reference.dream import ReferenceDream

pytestmark = pytest.mark.e2e

MIN_MARGIN = 1e-5
CACHES = ("none", "prefix", "dual")
CANVAS = {"gen_length": 32, "block_length": 8}


@pytest.fixture(scope="module")
def llm(golden_dream, start_llm):
    return start_llm(golden_dream.folder, max_num_seqs=32, max_model_len=512)


@pytest.fixture(scope="module")
def twin(golden_dream):
    return ReferenceDream.load(golden_dream.folder)


def wrong_cases(cases, completions):
    pairs = enumerate(zip(cases, completions, strict=True))
    return [index for index, (case, c) in pairs if list(c.token_ids) != case["output_token_ids"]]


def test_one_batch_takes_the_stock_decisions_with_the_stock_forwards(golden_dream, llm):
    cases = golden_dream.cases
    assert len(cases) == 24
    completions = generate(llm, [case["prompt_token_ids"] for case in cases], [case_params(case) for case in cases])
    assert wrong_cases(cases, completions) == []
    assert all(nfe(c) <= case["nfe"] for case, c in zip(cases, completions, strict=True))


def test_the_order_of_requests_changes_nothing(golden_dream, llm):
    cases = list(golden_dream.cases)
    random.Random(1).shuffle(cases)
    completions = generate(llm, [case["prompt_token_ids"] for case in cases], [case_params(case) for case in cases])
    assert wrong_cases(cases, completions) == []
    alone = [generate(llm, [case["prompt_token_ids"]], case_params(case))[0] for case in cases]
    assert wrong_cases(cases, alone) == []


def test_preemption_in_mid_block_changes_no_decision(golden_dream, llm):
    cases = golden_dream.cases
    req_ids = [submit(llm, case["prompt_token_ids"], case_params(case)) for case in cases]

    def preempt(step):
        if step in (1, 2, 5):
            scheduler(llm).reset_prefix_cache(reset_running_requests=True)

    finished = drive(llm, preempt)
    assert wrong_cases(cases, [finished[req_id] for req_id in req_ids]) == []
    assert_idle(llm)


def random_prompts(number, seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(3, 250) for _ in range(rng.randrange(1, 40))] for _ in range(number)]


@pytest.mark.parametrize("cache", CACHES)
def test_random_requests_decode_as_a_plain_loop_does(llm, twin, cache):
    jobs = []
    for index, prompt in enumerate(random_prompts(24)):
        threshold = (0.1, 0.2, 0.4)[index % 3]
        block_length = (4, 8, 16)[index // 3 % 3]
        canvas = {"gen_length": 2 * block_length, "block_length": block_length}
        expected = decode(twin, prompt, static_threshold(threshold), cache=cache, **canvas)
        if min(expected.rule_margin, expected.proposal_margin) > MIN_MARGIN:
            jobs.append(
                (
                    prompt,
                    sampling(None, policy="static_threshold", threshold=threshold, cache=cache, **canvas),
                    expected,
                )
            )
    assert len(jobs) >= 17  # with three cache modes more than 50
    for job in jobs:
        job[1].max_tokens = len(job[2].tokens)
    completions = generate(llm, [job[0] for job in jobs], [job[1] for job in jobs])
    assert tokens(completions) == [job[2].tokens for job in jobs]
    assert [nfe(completion) for completion in completions] == [job[2].nfe for job in jobs]


@pytest.mark.parametrize("cache", CACHES)
def test_osdt_equals_a_plain_implementation(llm, twin, cache):
    first, *later = random_prompts(9, seed=5)
    options = {"cache": cache, "task": f"dream {cache}", "threshold": 0.3, "mode": "step_block", "metric": "q2"}
    options |= {"calibrations": 1, "slack": 0.1, "cap": 1.0, **CANVAS}
    phase_1 = decode(twin, first, static_threshold(0.3), cache=cache, **CANVAS)
    rule = osdt(calibrate(phase_1.record, "step_block", "q2", False), 1.0, 0.1)
    params = sampling(CANVAS["gen_length"], **options)
    [got] = generate(llm, [first], params)
    assert (list(got.token_ids), nfe(got)) == (phase_1.tokens, phase_1.nfe)
    expected = [decode(twin, prompt, rule, cache=cache, **CANVAS) for prompt in later]
    clear = [index for index, e in enumerate(expected) if e.proposal_margin > MIN_MARGIN]
    assert len(clear) >= 6 and rule.margin > MIN_MARGIN
    completions = generate(llm, later, params)
    assert [tokens(completions)[index] for index in clear] == [expected[index].tokens for index in clear]
    assert vllm_osdt.describe(completions[0])["profile"] is not None


@pytest.mark.parametrize(("steps", "cache"), [(32, "dual"), (16, "prefix"), (12, "dual"), (8, "none")])
def test_fixed_steps_take_as_many_forwards_as_asked_for(llm, twin, steps, cache):
    per_block = steps // 4
    alone = cache != "none"

    def rule(block, step, masked):
        share, more = divmod(8 - alone, per_block - alone)
        return best_first(masked)[: share + (step - alone < more)]

    prompt = random_prompts(1, seed=9)[0]
    expected = decode(twin, prompt, rule, cache=cache, **CANVAS)
    [got] = generate(llm, [prompt], sampling(32, policy="fixed_steps", steps=steps, cache=cache, **CANVAS))
    assert nfe(got) == expected.nfe == steps
    assert expected.proposal_margin > MIN_MARGIN and list(got.token_ids) == expected.tokens
