"""What a request may rely on, whoever shares its batch."""

import pytest
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from tests.e2e.engine import (
    assert_idle,
    case_params,
    drive,
    generate,
    nfe,
    sampling,
    scheduler,
    submit,
    tokens,
)
from tests.reference.decode import decode, dynamic, fixed_steps, static_threshold
from vllm_osdt.messages import RESOLVED_KEY

pytestmark = pytest.mark.e2e

EOS, MASK, SEMICOLON, EQUALS = 0, 1, 23, 24


@pytest.fixture(scope="module")
def prompts(golden_tasks):
    distinct = {tuple(case["prompt_token_ids"]): None for case in golden_tasks.cases}
    return [list(prompt) for prompt in distinct][:16]


def static(max_tokens=32, **values):
    return sampling(max_tokens, **{"policy": "static_threshold", "threshold": 0.7, "block_length": 16, **values})


MIXTURE = [
    static(cache_mode="none"),
    static(cache_mode="prefix", block_length=8),
    static(64, cache_mode="dual", block_length=32),
    static(33, cache_mode="dual", block_length=7, threshold=0.3),
    sampling(32, policy="factor", factor=0.8, block_length=16),
    sampling(32, policy="joint_bound", delta=0.2, block_length=16),
    sampling(32, policy="entropy_bound", entropy=1.5, block_length=16),
    sampling(24, policy="fixed_steps", steps=12, block_length=8, cache_mode="prefix"),
    static(temperature=0.7, seed=11),
    static(40, temperature=0.7, seed=12, block_length=8, cache_mode="none"),
    sampling(32, policy="fixed_steps", block_length=16, temperature=1.0, seed=13),
    sampling(128, policy="static_threshold", threshold=0.1, block_length=128),
    static(7, ignore_eos=False),
    static(1),
]


def test_a_request_has_the_same_tokens_alone_and_in_a_mixed_batch(tasks_llm, prompts):
    requests = [(prompt, params) for index, prompt in enumerate(prompts[:3]) for params in MIXTURE[index::2]]
    alone = [generate(tasks_llm, [prompt], params)[0] for prompt, params in requests]
    together = generate(tasks_llm, *zip(*requests, strict=True))
    assert tokens(together) == tokens(alone)
    assert [nfe(c) for c in together] == [nfe(c) for c in alone]
    for (_, params), completion in zip(requests, alone, strict=True):
        assert len(completion.token_ids) == params.max_tokens or completion.token_ids[-1] == EOS
        assert MASK not in completion.token_ids


def test_a_narrow_engine_gives_the_same_tokens(tasks_llm, narrow_llm, prompts):
    requests = [(prompt, params) for prompt in prompts[:4] for params in MIXTURE]
    wide = generate(tasks_llm, *zip(*requests, strict=True))
    narrow = generate(narrow_llm, *zip(*requests, strict=True))
    assert narrow_llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens == 200
    ignoring_eos = [index for index, (_, params) in enumerate(requests) if params.ignore_eos]
    assert [tokens(narrow)[i] for i in ignoring_eos] == [tokens(wide)[i] for i in ignoring_eos]


def test_seeds_repeat_and_differ(random_llm, golden_random):
    prompt = golden_random.cases[0]["prompt_token_ids"]
    seeds = [1, 2, 1, 2, 3]
    params = [sampling(32, policy="fixed_steps", steps=8, block_length=16, temperature=1.0, seed=s) for s in seeds]
    got = tokens(generate(random_llm, [prompt] * 5, params))
    assert got[0] == got[2] and got[1] == got[3]
    assert len({tuple(row) for row in got}) == 3


def test_requests_without_a_seed_are_independent(random_llm, golden_random):
    prompt = golden_random.cases[0]["prompt_token_ids"]
    params = sampling(32, policy="fixed_steps", steps=8, block_length=16, temperature=1.0)
    got = tokens(generate(random_llm, [prompt] * 4, params))
    assert len({tuple(row) for row in got}) == 4


def test_temperature_zero_ignores_the_seed(tasks_llm, prompts):
    assert tokens(generate(tasks_llm, prompts[:2], static(seed=1))) == tokens(
        generate(tasks_llm, prompts[:2], static())
    )


def test_sampling_never_emits_the_mask_token(random_llm, golden_random):
    mask = golden_random.config["mask_token_id"]
    prompts = [case["prompt_token_ids"] for case in golden_random.cases]
    params = [sampling(64, policy="fixed_steps", steps=4, block_length=32, temperature=2.0, seed=i) for i in range(24)]
    got = [token for row in tokens(generate(random_llm, prompts, params)) for token in row]
    assert len(got) == 24 * 64 and len(set(got)) > 100  # of 256: hot enough that the mask token would be drawn
    assert mask not in got


def test_children_of_a_seeded_request_differ_and_repeat(random_llm, golden_random):
    prompt = {"prompt_token_ids": golden_random.cases[0]["prompt_token_ids"]}
    params = sampling(32, policy="fixed_steps", steps=8, block_length=16, temperature=1.0, seed=5, n=3)
    first, second = (tokens(random_llm.generate(prompt, params, use_tqdm=False)[0].outputs) for _ in range(2))
    assert len({tuple(child) for child in first}) == 3
    assert first == second


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_fewer_tokens_are_a_prefix_of_more_when_the_canvas_is_pinned(tasks_llm, prompts, cache):
    lengths = (1, 7, 16, 33, 64)
    params = [static(length, gen_length=64, cache_mode=cache) for length in lengths]
    got = [generate(tasks_llm, [prompt] * 5, params) for prompt in prompts[:4]]
    for completions in got:
        rows = tokens(completions)
        assert [len(row) for row in rows] == list(lengths)
        assert all(row == rows[-1][: len(row)] for row in rows)
        assert all(completion.finish_reason == "length" for completion in completions)
        forwards = [nfe(completion) for completion in completions]
        assert forwards == sorted(forwards)
    # Output that nobody wants costs nothing: one token is there before its block of 16 is.
    assert any(nfe(completions[0]) < nfe(completions[2]) for completions in got)


def test_output_ends_with_eos_unless_it_is_ignored(tasks_llm, prompts):
    ended, ignored = (generate(tasks_llm, prompts, static(64, ignore_eos=flag)) for flag in (False, True))
    num_ended = 0
    for short, full in zip(ended, ignored, strict=True):
        assert len(full.token_ids) == 64
        if EOS in full.token_ids:
            num_ended += 1
            assert list(short.token_ids) == list(full.token_ids[: full.token_ids.index(EOS) + 1])
            assert short.finish_reason == "stop"
            assert nfe(short) <= nfe(full)
        else:
            assert list(short.token_ids) == list(full.token_ids)
    assert num_ended >= 4


@pytest.mark.parametrize("ends", [(SEMICOLON,), (EQUALS, SEMICOLON), (SEMICOLON, 190, 191, EQUALS)])
def test_end_tokens_end_their_block_before_the_rest_is_decided(tasks_llm, tasks_twin, prompts, ends):
    params = sampling(32, policy="fixed_steps", block_length=16, cache_mode="dual", stop_token_ids=list(ends))
    got = generate(tasks_llm, prompts, params)
    rule = fixed_steps(16, 16)
    expected = [
        decode(tasks_twin, prompt, rule, gen_length=32, block_length=16, cache_mode="dual", end_token_ids=ends)
        for prompt in prompts
    ]
    assert min(result.proposal_margin for result in expected) > 1e-5
    assert tokens(got) == [result.tokens for result in expected]
    assert [nfe(completion) for completion in got] == [result.nfe for result in expected]
    assert any(result.nfe % 16 for result in expected)


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_steps_bound_the_forwards_of_a_static_threshold(tasks_llm, tasks_twin, prompts, cache):
    canvas = {"gen_length": 32, "block_length": 16, "cache_mode": cache}
    expected = [decode(tasks_twin, prompt, dynamic(0.95, 4, 16, strict=False), **canvas) for prompt in prompts[:6]]
    plain = [decode(tasks_twin, prompt, static_threshold(0.95), **canvas) for prompt in prompts[:6]]
    assert min(result.proposal_margin for result in expected) > 1e-5
    got = generate(tasks_llm, prompts[:6], static(threshold=0.95, steps=8, cache_mode=cache))
    assert tokens(got) == [result.tokens for result in expected]
    assert [nfe(completion) for completion in got] == [result.nfe for result in expected]
    assert max(result.nfe for result in expected) <= 8 < max(result.nfe for result in plain)


@pytest.mark.parametrize("stop", [[EQUALS], [EQUALS, SEMICOLON], [SEMICOLON]])
def test_a_stop_token_ends_output_where_it_stands(tasks_llm, prompts, stop):
    full, cut = (generate(tasks_llm, prompts[:6], static(64, stop_token_ids=ids)) for ids in ([], stop))
    num_cut = 0
    for whole, short in zip(full, cut, strict=True):
        ends = [index for index, token in enumerate(whole.token_ids) if token in stop]
        if ends:
            num_cut += 1
            assert list(short.token_ids) == list(whole.token_ids[: ends[0] + 1])
            assert (short.finish_reason, short.stop_reason) == ("stop", whole.token_ids[ends[0]])
    assert num_cut >= 2


def test_a_stop_string_ends_the_text_before_it(tasks_llm, prompts):
    full, cut = (generate(tasks_llm, prompts[:6], static(64, stop=stop)) for stop in (None, ["="]))
    with_stop = [index for index, completion in enumerate(full) if "=" in completion.text]
    assert len(with_stop) >= 2
    for index in with_stop:
        assert cut[index].text == full[index].text[: full[index].text.index("=")]
        assert cut[index].finish_reason == "stop"
    assert_idle(tasks_llm)


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_a_literal_mask_token_in_the_prompt_is_no_hole(tasks_llm, tasks_twin, prompts, cache):
    prompt = [MASK, *prompts[0][:5], MASK, MASK, *prompts[0][5:], MASK]
    [got] = generate(tasks_llm, [prompt], static(32, cache_mode=cache))
    expected = decode(tasks_twin, prompt, static_threshold(0.7), gen_length=32, block_length=16, cache_mode=cache)
    assert min(expected.proposal_margin, expected.rule_margin) > 1e-5
    assert list(got.token_ids) == expected.tokens and nfe(got) == expected.nfe


REFUSED = [
    ("prompt_logprobs", 1),
    ("logprob_token_ids", [3]),
    ("thinking_token_budget", 5),
]
BEYOND_LIMITS = [
    ({"logit_bias": {192: 1.0}}, "192. in logit_bias contain out-of-vocab"),
    ({"allowed_token_ids": [3] * 1025}, "has 1025 tokens; at most 1024"),
    ({"allowed_token_ids": [3, -1]}, "allowed_token_ids contains out-of-vocab"),
    ({"allowed_token_ids": [MASK]}, "leaves no token"),
    ({"allowed_token_ids": [3], "stop_token_ids": [3], "min_tokens": 2}, "min_tokens is 2"),
    ({"stop_token_ids": list(range(129)), "min_tokens": 2}, "at most 128"),
    ({"bad_words": ["def def"]}, "bad_words holds 'def def', which is 2 tokens"),
]


@pytest.mark.parametrize(("values", "words"), BEYOND_LIMITS, ids=[words for _, words in BEYOND_LIMITS])
def test_a_value_beyond_its_limit_is_refused_by_name(tasks_llm, prompts, still_working, values, words):
    with pytest.raises(VLLMValidationError, match=words):
        generate(tasks_llm, prompts[:1], SamplingParams(max_tokens=16, **values))
    still_working()


@pytest.fixture(scope="module")
def still_working(tasks_llm, prompts):
    """Asserts that the engine serves on as before."""
    expected = tokens(generate(tasks_llm, prompts[:2], static(16)))

    def check():
        assert not tasks_llm.llm_engine.has_unfinished_requests()
        assert tokens(generate(tasks_llm, prompts[:2], static(16))) == expected

    return check


@pytest.mark.parametrize(("name", "value"), REFUSED, ids=[name for name, _ in REFUSED])
def test_a_parameter_that_would_be_ignored_is_refused_by_name(tasks_llm, prompts, still_working, name, value):
    # Greedy parameters of vLLM drop some of these, so the request samples.
    params = SamplingParams(max_tokens=16, temperature=0.7, **{name: value})
    with pytest.raises(VLLMValidationError, match=rf"\b{name}\b"):
        generate(tasks_llm, prompts[:1], params)
    still_working()


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"osdt_threshold": 1.5}, ["osdt_threshold", "1.5"]),
        ({"osdt_policy": "beam"}, ["osdt_policy", "beam"]),
        ({"osdt_treshold": 0.5}, ["osdt_treshold", "osdt_threshold"]),
        ({"threshold": 0.5}, ["'threshold'", "osdt_threshold"]),
        ({RESOLVED_KEY: {}}, [RESOLVED_KEY]),
        ({"osdt_gen_length": 40}, ["40", "32"]),
    ],
)
def test_a_bad_option_is_refused_and_the_engine_serves_on(tasks_llm, prompts, still_working, extra, words):
    with pytest.raises(VLLMValidationError) as error:
        generate(tasks_llm, prompts[:1], SamplingParams(max_tokens=16, extra_args=extra))
    assert all(word in str(error.value) for word in words)
    still_working()


def test_a_canvas_above_the_model_length_is_refused_with_both_numbers(tasks_llm, still_working):
    with pytest.raises(
        VLLMValidationError, match=r"max_tokens is 256, but the prompt of 5 tokens leaves 251 of max_model_len 256"
    ):
        generate(tasks_llm, [[5] * 5], static(256))
    still_working()


def test_a_canvas_that_fills_the_model_is_decoded(tasks_llm):
    # More placeholders than the longest block: vLLM keeps statistics by placeholder position.
    assert len(generate(tasks_llm, [[5] * 16], static(240))[0].token_ids) == 240


def test_a_canvas_above_one_forward_pass_is_refused_with_both_numbers(narrow_llm):
    with pytest.raises(
        VLLMValidationError,
        match=r"max_tokens is 192, but the prompt of 9 tokens leaves 191 of max_num_batched_tokens 200",
    ):
        generate(narrow_llm, [[5] * 9], static(192))
    assert len(generate(narrow_llm, [[5] * 8], static(192))[0].token_ids) == 192


def test_aborted_requests_disturb_nobody_and_their_slots_are_clean(tasks_llm, prompts):
    params = [MIXTURE[index % len(MIXTURE)] for index in range(len(prompts))]
    alone = tokens(generate(tasks_llm, prompts, params))
    order, victims, num_running = {}, [], 0

    def disturb(step):
        nonlocal num_running
        if step < 4:
            for index in range(4 * step, 4 * step + 4):
                order[submit(tasks_llm, prompts[index], params[index])] = index
                victims.append(
                    submit(tasks_llm, prompts[-1], static(64, cache_mode="prefix", threshold=1.0, temperature=1.0))
                )
        if step in (1, 3, 4, 6):
            running = [request.request_id for request in scheduler(tasks_llm).running]
            aborted = [victims.pop(0) for _ in range(len(victims) if step == 6 else 2)]
            num_running += sum(any(req_id.startswith(victim) for req_id in running) for victim in aborted)
            tasks_llm.llm_engine.abort_request(aborted)

    finished = drive(tasks_llm, disturb)
    assert num_running > 8
    assert {req_id: list(c.token_ids) for req_id, c in finished.items() if req_id in order} == {
        req_id: alone[index] for req_id, index in order.items()
    }
    assert_idle(tasks_llm)


def test_more_requests_than_slots_all_finish_with_their_tokens(random_llm, golden_random):
    cases = golden_random.cases * 3
    assert len(cases) > random_llm.llm_engine.vllm_config.scheduler_config.max_num_seqs
    completions = generate(random_llm, [c["prompt_token_ids"] for c in cases], [case_params(c) for c in cases])
    assert tokens(completions) == [case["output_token_ids"] for case in cases]
    assert_idle(random_llm)  # no slot is left to a request that has ended
