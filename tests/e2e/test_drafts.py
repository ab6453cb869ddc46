"""Drafts: a token that the model proposes too is taken early, and no other one changes anything."""

import random
from typing import Any

import pytest
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams

import vllm_osdt
from tests.e2e.engine import assert_idle, generate, nfe, sampling, tokens
from tests.e2e.jobs import (
    MIN_MARGIN,
    Job,
    assert_company_changes_nothing,
    assert_one_batch_is_right,
    assert_preemption_changes_nothing,
    random_draft,
)
from tests.reference.decode import Draft, decode, static_threshold

pytestmark = pytest.mark.e2e

BLOCK, LENGTH, THRESHOLD, DRAFT_THRESHOLD = 8, 32, 0.9, 0.1
OPTIONS = {"policy": "static_threshold", "threshold": THRESHOLD, "block_length": BLOCK, "draft_threshold": 0.1}


def asked(draft: Any = None, **values: Any) -> Any:
    options = {name: value for name, value in OPTIONS.items() if draft is not None or name != "draft_threshold"}
    params = sampling(LENGTH, **{**options, **values})
    if draft is not None:
        params.extra_args["osdt_draft"] = draft
    return params


@pytest.fixture(scope="module")
def answers(golden_tasks, tasks_twin):
    """Prompts with the answer that the task model gives without a draft."""
    prompts = [case["prompt_token_ids"] for case in golden_tasks.cases[:24]]
    canvas = {"gen_length": LENGTH, "block_length": BLOCK, "cache_mode": "dual"}
    return [(prompt, decode(tasks_twin, prompt, static_threshold(THRESHOLD), **canvas)) for prompt in prompts]


@pytest.fixture(scope="module")
def jobs(answers, tasks_twin):
    """Right, wrong and partly wrong drafts, in all cache modes."""
    found = []
    for index, (prompt, answer) in enumerate(answers):
        rng, cache_mode = random.Random(index), ("none", "prefix", "dual")[index % 3]
        draft = random_draft(rng, answer.tokens, share=(0.0, 0.3, 1.0)[index // 3 % 3])
        own = Draft(dict(enumerate(draft)), DRAFT_THRESHOLD)
        canvas = {"gen_length": LENGTH, "block_length": BLOCK, "cache_mode": cache_mode}
        done = decode(tasks_twin, prompt, static_threshold(THRESHOLD), draft=own, **canvas)
        if min(done.proposal_margin, done.rule_margin) > MIN_MARGIN:
            found.append(Job(prompt, asked(draft, cache_mode=cache_mode), done))
    assert len(found) >= 16
    return found


def test_drafts_are_confirmed_as_by_the_plain_loop(tasks_llm, jobs):
    assert_one_batch_is_right(tasks_llm, jobs)
    assert_company_changes_nothing(tasks_llm, jobs, 6)


def test_preemption_changes_nothing(tasks_llm, jobs):
    assert_preemption_changes_nothing(tasks_llm, jobs)


def test_a_draft_that_the_model_proposes_takes_one_forward_a_block(tasks_llm, answers):
    """What a threshold of 0 decides in one step of each block is such a draft."""
    prompts = [prompt for prompt, _ in answers]
    whole = generate(tasks_llm, prompts, sampling(LENGTH, policy="fixed_steps", steps_per_block=1, block_length=BLOCK))
    drafts = tokens(whole)
    got = generate(tasks_llm, prompts, [asked(draft, draft_threshold=0.0) for draft in drafts])
    assert tokens(got) == drafts and {nfe(one) for one in got} == {LENGTH // BLOCK}
    slow = generate(tasks_llm, prompts, [asked(draft, draft_threshold=1.0) for draft in drafts])
    assert sum(map(nfe, slow)) > 2 * sum(map(nfe, got))


def test_a_draft_that_the_model_never_proposes_changes_nothing(tasks_llm, golden_tasks, answers):
    """The mask token stands where nothing is drafted."""
    prompts, mask = [prompt for prompt, _ in answers[:8]], golden_tasks.config["mask_token_id"]
    with_draft = generate(tasks_llm, prompts, asked([mask] * 200))
    without = generate(tasks_llm, prompts, asked())
    assert tokens(with_draft) == tokens(without)
    assert [nfe(one) for one in with_draft] == [nfe(one) for one in without]


def test_a_text_is_a_draft_and_an_empty_one_is_none(tasks_llm, answers):
    prompt, answer = max(answers, key=lambda one: one[1].nfe)
    text = " ".join(tasks_llm.get_tokenizer().convert_ids_to_tokens(answer.tokens))
    by_text, by_ids, empty, without = generate(
        tasks_llm, [prompt] * 4, [asked(text), asked(answer.tokens), asked("", draft_threshold=0.5), asked()]
    )
    assert nfe(by_text) == nfe(by_ids) < nfe(without) == nfe(empty)


def test_a_drafted_request_ends_at_an_end_token_and_is_sampled_by_its_seed(tasks_llm, answers):
    for prompt, answer in answers[:6]:
        end = answer.tokens[LENGTH // 2]
        before = answer.tokens[: answer.tokens.index(end) + 1]
        for draft in (before, before[:-1]):
            [one] = generate(tasks_llm, [prompt], [asked(draft, stop_token_ids=[end], temperature=0.0)])
            assert one.token_ids[-1] == end and end not in one.token_ids[:-1]
    prompts = [prompt for prompt, _ in answers[:6]]
    params = [asked(answer.tokens, temperature=1.0, seed=3) for _, answer in answers[:6]]
    together = tokens(generate(tasks_llm, prompts, params))
    alone = [tokens(generate(tasks_llm, [prompt], [one]))[0] for prompt, one in zip(prompts, params, strict=True)]
    assert together == alone


def test_a_draft_fills_holes_and_calibrates_nothing(tasks_llm, answers):
    prompt, answer = answers[0]
    params = asked(answer.tokens, return_trace=True, task="drafted", policy="osdt", threshold=0.9)
    [one] = generate(tasks_llm, [prompt], [params])
    assert not vllm_osdt.describe(one)["calibrating"]
    assert len(vllm_osdt.describe(one)["trace"]["step"]) == LENGTH
    params = asked(answer.tokens)
    params.max_tokens, params.extra_args["osdt_infill"] = None, [answer.tokens[:3], 13]
    [filled] = generate(tasks_llm, [prompt], [params])
    assert list(filled.token_ids[:3]) == answer.tokens[:3] and len(filled.token_ids) == 16


def test_n_grams_draft_what_repeats(tasks_llm, tasks_twin, golden_tasks):
    """The tokens behind the first earlier occurrence of a block's last two draft the next block."""
    prompts = [case["prompt_token_ids"] for case in golden_tasks.cases[:12]]
    shortened = 0
    for prompt in prompts:
        prompt = prompt + generate(tasks_llm, [prompt], [asked()])[0].token_ids[:16]
        got, without = (generate(tasks_llm, [prompt], [asked(**own)])[0] for own in ({"draft_ngram": 1}, {}))
        shortened += nfe(got) < nfe(without)
        known, draft = [*prompt], {}
        for begin in range(0, LENGTH, BLOCK):
            match = known.index(known[-1])
            draft |= {begin + k: token for k, token in enumerate(known[match + 1 :][:BLOCK])}
            known += list(got.token_ids[begin : begin + BLOCK])
        canvas = {"gen_length": LENGTH, "block_length": BLOCK, "cache_mode": "dual"}
        done = decode(tasks_twin, prompt, static_threshold(THRESHOLD), draft=Draft(draft, 0.3), **canvas)
        if min(done.proposal_margin, done.rule_margin) > MIN_MARGIN:
            assert (list(got.token_ids), nfe(got)) == (done.tokens, done.nfe)
    assert shortened
    assert_idle(tasks_llm)


REFUSED = [
    ({"draft": 5}, "osdt_draft is 5; expected text or a list of token ids below"),
    ({"draft": [5, 10**6]}, "expected text or a list of token ids"),
    ({"draft": [5], "structured_outputs": StructuredOutputsParams(regex="a")}, "osdt_draft cannot be sent with"),
    ({"draft_ngram": 2, "structured_outputs": StructuredOutputsParams(regex="a")}, "osdt_draft_ngram cannot be sent"),
    ({"draft_threshold": 0.5}, "the request has no draft"),
    ({"draft": [5], "draft_threshold": 1.5}, r"expected a number in \[0, 1\]"),
    ({"draft_ngram": 0}, "expected an integer from 1 to 32"),
]


@pytest.mark.parametrize(("values", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_a_draft_that_makes_no_sense_is_refused(tasks_llm, answers, values, words):
    with pytest.raises(VLLMValidationError, match=words):
        generate(tasks_llm, [answers[0][0]], [asked(ignore_eos=False, **values)])
