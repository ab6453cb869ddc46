"""A canvas is as long as the model is used to at first, and grows block by block while the answer goes on."""

import random

import pytest

from tests.e2e.engine import assert_idle, drive, generate, nfe, sampling, scheduler, submit
from tests.e2e.jobs import MIN_MARGIN
from tests.reference.decode import decode, static_threshold
from tests.reference.llada import ReferenceLLaDA

pytestmark = pytest.mark.e2e

BLOCK, FIRST = 8, 16
VARIANTS = [
    {"cache_mode": "none"},
    {"cache_mode": "prefix"},
    {"cache_mode": "dual"},
    {"cache_mode": "dual", "refresh_interval": 2},
    {"cache_mode": "prefix", "refresh_interval": 3},
]
WINDOW = {"cache_mode": "dual", "suffix_window": 0}


@pytest.fixture(scope="module")
def growing_llm(golden_tasks, start_llm):
    """The task model, used to canvases of two blocks; its KV pages hold half of the whole canvases of ten requests."""
    return start_llm(
        golden_tasks.folder,
        max_num_seqs=16,
        max_model_len=128,
        hf_overrides={"gen_length": FIRST},
        block_size=32,
        num_gpu_blocks_override=21,
    )


@pytest.fixture(scope="module")
def jobs(golden_tasks):
    """Prompts, options, and what the plain loop makes of them; none whose outcome hangs on rounding."""
    network, rng, found = ReferenceLLaDA.load(golden_tasks.folder), random.Random(3), []
    for index, case in enumerate(golden_tasks.cases[:44]):
        prompt, variant = case["prompt_token_ids"], VARIANTS[index % len(VARIANTS)] if index < 40 else WINDOW
        max_tokens = rng.choice([12, 33, 56, 64])
        length = -(-max_tokens // BLOCK) * BLOCK
        canvas = {"gen_length": length, "block_length": BLOCK, "first_length": FIRST}
        done = decode(network, prompt, static_threshold(0.7), max_tokens=max_tokens, **canvas, **variant)
        if min(done.proposal_margin, done.rule_margin) > MIN_MARGIN:
            options = {"policy": "static_threshold", "threshold": 0.7, "block_length": BLOCK, **variant}
            found.append((prompt, sampling(max_tokens, **options), done))
    assert len(found) >= 26
    return found


def test_a_growing_canvas_is_decoded_as_by_the_plain_loop(growing_llm, jobs):
    got = generate(growing_llm, [prompt for prompt, _, _ in jobs], [params for _, params, _ in jobs])
    assert [list(one.token_ids) for one in got] == [done.tokens for _, _, done in jobs]
    for prompt, params, done in jobs[:10]:  # in the batch, requests that were preempted begin their block again
        [alone] = generate(growing_llm, [prompt], [params])
        assert (list(alone.token_ids), nfe(alone)) == (done.tokens, done.nfe)
    assert_idle(growing_llm)


def test_growth_that_finds_no_pages_preempts_and_fails_nothing(growing_llm, jobs):
    long = [job for job in jobs if job[1].max_tokens >= 56 and "refresh_interval" not in str(job[1].extra_args)][:10]
    assert len(long) == 10
    req_ids = [submit(growing_llm, prompt, params) for prompt, params, _ in long]
    num_preempted, most = 0, 0

    def count(step):
        nonlocal num_preempted, most
        num_preempted = sum(request.num_preemptions for request in scheduler(growing_llm).requests.values())
        most = max(most, len(scheduler(growing_llm).running) + 100 * (num_preempted > 0))

    finished = drive(growing_llm, count)
    assert most > 100  # somebody was preempted
    assert [list(finished[req_id].token_ids) for req_id in req_ids] == [done.tokens for _, _, done in long]
    assert_idle(growing_llm)


def test_an_answer_without_a_limit_goes_on_to_the_end_of_the_context(growing_llm, golden_tasks):
    prompt = golden_tasks.cases[0]["prompt_token_ids"]
    [one] = generate(growing_llm, [prompt], [sampling(None, policy="static_threshold", block_length=BLOCK)])
    assert len(one.token_ids) == 128 - len(prompt)


def test_a_canvas_that_is_asked_for_is_there_from_the_start(growing_llm, golden_tasks):
    network, prompt = ReferenceLLaDA.load(golden_tasks.folder), golden_tasks.cases[0]["prompt_token_ids"]
    canvas = {"gen_length": 48, "block_length": BLOCK, "cache_mode": "dual"}
    done = decode(network, prompt, static_threshold(0.7), **canvas)
    params = sampling(48, policy="static_threshold", threshold=0.7, **canvas)
    [one] = generate(growing_llm, [prompt], [params])
    assert (list(one.token_ids), nfe(one)) == (done.tokens, done.nfe)


def test_an_answer_goes_on_in_the_canvas_that_is_there(growing_llm, golden_tasks):
    """The plain loop decodes what was written, check prompt included, as a prompt, in blocks of 1."""
    network, check, found = ReferenceLLaDA.load(golden_tasks.folder), [30, 31, 32], []
    for index, case in enumerate(golden_tasks.cases[:15]):
        prompt, own = case["prompt_token_ids"], {**VARIANTS[index % 3], "block_length": BLOCK}
        canvas = {"gen_length": 48, "first_length": FIRST}
        plain = decode(network, prompt, static_threshold(0.7), **canvas, **own)
        think_end = plain.tokens[(5, 20)[index % 2]]
        first = decode(network, prompt, static_threshold(0.7), end_token_ids=(think_end,), **canvas, **own)
        written = [*first.tokens[:-1], *check]
        there = max(FIRST, -(-(len(written) + 1) // BLOCK) * BLOCK)
        canvas = {"gen_length": 48 - len(written), "first_length": there - len(written)}
        second = decode(network, prompt + written, static_threshold(0.7), **canvas, **{**own, "block_length": 1})
        if min(one.proposal_margin for one in (first, second)) > MIN_MARGIN < first.rule_margin:
            own |= {"policy": "static_threshold", "threshold": 0.7, "answer_block_length": 1}
            params = sampling(48, think_end_token=think_end, check_prompt=check, **own)
            found.append((prompt, params, written + second.tokens, first.nfe + second.nfe))
    assert len(found) >= 10
    prompts, params, expected, forwards = zip(*found, strict=True)
    alone = [generate(growing_llm, [prompt], one)[0] for prompt, one in zip(prompts[:5], params[:5], strict=True)]
    assert [(list(one.token_ids), nfe(one)) for one in alone] == list(zip(expected[:5], forwards[:5], strict=True))
    ids = [submit(growing_llm, prompt, one) for prompt, one in zip(prompts, params, strict=True)]

    def preempt(step):
        if step in (3, 9, 20):
            scheduler(growing_llm).reset_prefix_cache(reset_running_requests=True)

    finished = drive(growing_llm, preempt)
    assert [list(finished[req_id].token_ids) for req_id in ids] == list(expected)
    assert_idle(growing_llm)
