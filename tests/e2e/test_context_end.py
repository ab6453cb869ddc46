"""Near the end of the context: what fits is served, token for token, and what does not is refused, at every value."""

from functools import partial

import pytest

import vllm_osdt
from tests.e2e.engine import assert_idle, generate, nfe, sampling
from tests.reference.block_causal import ReferenceSDAR, decode_block_causal
from tests.reference.block_causal_checkpoints import make_sdar_checkpoint
from tests.reference.decode import best_first, decode, static_threshold
from tests.reference.dream import ReferenceDream, make_dream_checkpoint
from tests.reference.llada import ReferenceLLaDA, make_checkpoint

pytestmark = pytest.mark.e2e

CONTEXT, BLOCK = 80, 16
PROMPTS = [list(range(20, 34)), list(range(20, 36)), [9]]  # 14 tokens, a whole block, one
MIN_MARGIN = 1e-5


@pytest.fixture(scope="module", params=[(make_checkpoint, ReferenceLLaDA), (make_dream_checkpoint, ReferenceDream)])
def whole_canvas(request, start_llm, tmp_path_factory):
    make, reference = request.param
    folder = make(tmp_path_factory.mktemp("checkpoint") / "model", seed=3)
    llm = start_llm(folder, max_num_seqs=64, max_model_len=CONTEXT, max_num_batched_tokens=4096)
    return llm, reference.load(folder)


def canvas_of(prompt, max_tokens):
    return min(-(-max_tokens // BLOCK) * BLOCK, CONTEXT - len(prompt))


def one_best(block, step, masked):
    return best_first(masked)[:1]


RULES = [
    ({"policy": "static_threshold", "threshold": 0.3}, lambda: static_threshold(0.3)),
    ({"policy": "fixed_steps"}, lambda: one_best),
]


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_where_every_position_sees_the_whole_canvas(whole_canvas, cache):
    llm, network = whole_canvas
    jobs = []
    for index, max_tokens in enumerate(range(CONTEXT - 2 * BLOCK - 14, CONTEXT)):
        prompt, (options, rule) = PROMPTS[index % len(PROMPTS)], RULES[index % len(RULES)]
        if len(prompt) + max_tokens > CONTEXT:
            left = CONTEXT - len(prompt)
            words = f"max_tokens is {max_tokens}, but the prompt of {len(prompt)} tokens leaves {left} of max_model_len"
            with pytest.raises(ValueError, match=words):
                generate(llm, [prompt], sampling(max_tokens, block_length=BLOCK))
            continue
        part = {"block_length": BLOCK, "cache_mode": cache}
        canvas = canvas_of(prompt, max_tokens)
        expected = decode(network, prompt, rule(), gen_length=canvas, max_tokens=max_tokens, **part)
        assert len(expected.tokens) == max_tokens
        if min(expected.proposal_margin, expected.rule_margin) > MIN_MARGIN:
            jobs.append((prompt, sampling(max_tokens, **part, **options), expected))
    assert len(jobs) >= 20 and any(canvas_of(prompt, params.max_tokens) % BLOCK for prompt, params, _ in jobs)
    done = generate(llm, [prompt for prompt, _, _ in jobs], [params for _, params, _ in jobs])
    assert [(list(c.token_ids), nfe(c)) for c in done] == [(e.tokens, e.nfe) for _, _, e in jobs]
    assert_idle(llm)


def test_a_task_calibrates_and_decodes_in_a_block_that_the_context_cuts(whole_canvas):
    llm, _ = whole_canvas
    options = {
        "task": "cut",
        "statistic": "q1",
        "num_calibration_requests": 1,
        "block_length": BLOCK,
        "threshold": 0.5,
        "slack": 0.2,
    }
    for prompt in PROMPTS:
        done = [generate(llm, [prompt], sampling(CONTEXT - len(prompt), **options))[0] for _ in range(2)]
        assert [len(c.token_ids) for c in done] == [CONTEXT - len(prompt)] * 2
    assert vllm_osdt.describe(done[-1])["profile"] is not None
    [profile] = [profile for profile in vllm_osdt.profiles(llm) if profile["task"] == "cut"]
    assert len(profile["mean_confidence"]) == -(-(CONTEXT - len(PROMPTS[0])) // BLOCK)


@pytest.mark.parametrize("left", [1, 3, 16, 17])
def test_without_a_limit_the_rest_of_the_context_is_served(whole_canvas, left):
    llm, _ = whole_canvas
    [completion] = generate(llm, [[9] * (CONTEXT - left)], sampling(None, block_length=BLOCK))
    assert len(completion.token_ids) == left


def test_where_a_block_sees_no_later_one(start_llm, tmp_path):
    folder = make_sdar_checkpoint(tmp_path / "model", seed=3, block_size=BLOCK)
    network = ReferenceSDAR.load(folder)
    llm = start_llm(folder, max_num_seqs=64, max_model_len=CONTEXT)
    plain = partial(decode_block_causal, network, block_length=BLOCK, end_token_ids=())
    jobs = []
    for index, max_tokens in enumerate(range(CONTEXT - 2 * BLOCK - 14, CONTEXT)):
        prompt = PROMPTS[index % len(PROMPTS)]
        params = sampling(max_tokens, policy="fixed_steps")
        if len(prompt) + max_tokens > CONTEXT:
            with pytest.raises(ValueError, match=f"max_tokens is {max_tokens}, but the prompt of {len(prompt)} tokens"):
                generate(llm, [prompt], params)
            continue
        expected = plain(prompt, one_best, max_tokens=max_tokens)
        if expected.proposal_margin > MIN_MARGIN:
            jobs.append((prompt, params, expected))
    assert len(jobs) >= 20
    done = generate(llm, [prompt for prompt, _, _ in jobs], [params for _, params, _ in jobs])
    assert [(list(c.token_ids), nfe(c)) for c in done] == [(e.tokens, e.nfe) for _, _, e in jobs]
    assert_idle(llm)
