"""The engine takes every decision that the stock Fast-dLLM v1 decoder takes, however requests are batched."""

import random

import pytest

from tests.e2e.engine import assert_idle, case_params, drive, generate, nfe, scheduler, submit, tokens

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module", params=["random", "tasks"])
def served(request):
    """A checkpoint's recorded cases and an engine that serves it."""
    return request.getfixturevalue(f"golden_{request.param}"), request.getfixturevalue(f"{request.param}_llm")


@pytest.fixture(scope="module")
def scarce_llm(golden_tasks, start_llm):
    """An engine whose KV pages hold a few requests at a time."""
    return start_llm(golden_tasks.folder, max_num_seqs=64, max_model_len=256, block_size=32, num_gpu_blocks_override=9)


def prompts_and_params(cases):
    return [case["prompt_token_ids"] for case in cases], [case_params(case) for case in cases]


def wrong_cases(cases, completions):
    return [
        index
        for index, (case, completion) in enumerate(zip(cases, completions, strict=True))
        if list(completion.token_ids) != case["output_token_ids"]
    ]


def test_one_batch_takes_the_stock_decisions(served):
    golden, llm = served
    assert len(golden.cases) in (24, 60)
    completions = generate(llm, *prompts_and_params(golden.cases))
    assert wrong_cases(golden.cases, completions) == []


def test_no_request_needs_more_forwards_than_the_stock_decoder(served):
    golden, llm = served
    completions = generate(llm, *prompts_and_params(golden.cases))
    for case, completion in zip(golden.cases, completions, strict=True):
        num_blocks = case["gen_length"] // case["block_length"]
        assert num_blocks <= nfe(completion) <= case["nfe"]
        if case["threshold"] is None:
            assert nfe(completion) == case["steps"]


def test_the_order_of_requests_changes_nothing(served):
    golden, llm = served
    for seed in (0, 1):
        cases = list(golden.cases)
        random.Random(seed).shuffle(cases)
        assert wrong_cases(cases, generate(llm, *prompts_and_params(cases))) == []


def test_one_request_at_a_time_takes_the_stock_decisions(served):
    golden, llm = served
    completions = [generate(llm, [case["prompt_token_ids"]], case_params(case))[0] for case in golden.cases]
    assert wrong_cases(golden.cases, completions) == []


def test_requests_that_arrive_one_by_one_take_the_stock_decisions(served):
    golden, llm = served
    pending = list(reversed(golden.cases))
    case_of = {}

    def arrive(step):
        if pending:
            case = pending.pop()
            case_of[submit(llm, case["prompt_token_ids"], case_params(case))] = case

    finished = drive(llm, arrive)
    assert len(finished) == len(golden.cases)
    assert wrong_cases(list(case_of.values()), [finished[req_id] for req_id in case_of]) == []


def test_preemption_in_mid_block_changes_no_decision(served):
    golden, llm = served
    req_ids = [submit(llm, case["prompt_token_ids"], case_params(case)) for case in golden.cases]
    num_preempted = 0

    def preempt(step):
        nonlocal num_preempted
        if step in (1, 2, 5, 9):
            num_preempted += len(scheduler(llm).running)
            scheduler(llm).reset_prefix_cache(reset_running_requests=True)

    finished = drive(llm, preempt)
    assert num_preempted > len(golden.cases)
    assert wrong_cases(golden.cases, [finished[req_id] for req_id in req_ids]) == []
    assert_idle(llm)


def test_requests_that_wait_for_pages_take_the_stock_decisions(golden_tasks, scarce_llm):
    req_ids = [submit(scarce_llm, case["prompt_token_ids"], case_params(case)) for case in golden_tasks.cases]
    most_running = num_steps_with_a_queue = 0

    def watch(step):
        nonlocal most_running, num_steps_with_a_queue
        most_running = max(most_running, len(scheduler(scarce_llm).running))
        num_steps_with_a_queue += bool(scheduler(scarce_llm).waiting)

    finished = drive(scarce_llm, watch)
    assert most_running <= 8 and num_steps_with_a_queue > 20
    assert wrong_cases(golden_tasks.cases, [finished[req_id] for req_id in req_ids]) == []
    assert_idle(scarce_llm)


def test_postponed_requests_take_the_stock_decisions(golden_tasks, narrow_llm):
    # 200 rows a step: two refreshes, or one and some blocks, of sixty requests.
    completions = generate(narrow_llm, *prompts_and_params(golden_tasks.cases))
    assert wrong_cases(golden_tasks.cases, completions) == []
    for case, completion in zip(golden_tasks.cases, completions, strict=True):
        assert nfe(completion) <= case["nfe"]  # waiting costs no forward passes
    assert tokens(completions[:1]) == [golden_tasks.cases[0]["output_token_ids"]]
