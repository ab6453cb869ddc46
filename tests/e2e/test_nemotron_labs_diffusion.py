"""Nemotron-Labs-Diffusion: as a plain loop decodes, and as its authors' loop does."""

import random
from functools import partial

import pytest

from tests.e2e.engine import generate, nfe, sampling, scheduler, tokens
from tests.e2e.jobs import (
    MIN_MARGIN,
    assert_an_answer_is_a_request_of_its_own,
    assert_company_changes_nothing,
    assert_first_causal_logits_equal,
    assert_one_batch_is_right,
    assert_osdt_equals_a_plain_implementation,
    assert_preemption_changes_nothing,
    make_jobs,
    run,
    wrong,
)
from tests.e2e.self_speculation import assert_verifies_as_a_plain_loop, make_s2d2_jobs
from tests.reference.decode import static_threshold
from tests.reference.nemotron_labs_diffusion import (
    ReferenceNemotron,
    decode_as_published,
    decode_nemotron,
    make_nemotron_checkpoint,
)
from tests.reference.self_speculation import NemotronView

pytestmark = pytest.mark.e2e

ENGINE = {"max_num_seqs": 64, "max_model_len": 250}
VARIANTS = [
    {"block_length": 8, "cache_mode": "causal"},
    {"block_length": 16, "cache_mode": "causal_fused"},
    {"block_length": 5, "cache_mode": "causal"},
    {"block_length": 8, "cache_mode": "causal_fused"},
    {"block_length": 16, "cache_mode": "causal"},
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_nemotron_checkpoint(tmp_path_factory.mktemp("nemotron") / "model", seed=1)


@pytest.fixture(scope="module")
def network(checkpoint):
    return ReferenceNemotron.load(checkpoint)


@pytest.fixture(scope="module")
def llm(checkpoint, start_llm):
    return start_llm(checkpoint, **ENGINE)


@pytest.fixture(scope="module")
def jobs(network):
    found = make_jobs(partial(decode_nemotron, network), VARIANTS)
    assert len(found) >= 50
    return found


@pytest.mark.parametrize("cache_mode", ["causal", "causal_fused"])
def test_logits_equal_those_of_the_plain_network(llm, network, monkeypatch, cache_mode):
    """In the seeded mode those of the last prompt token, else of the first denoising step."""
    assert_first_causal_logits_equal(llm, network, monkeypatch, cache_mode)


def test_one_batch_decodes_as_a_plain_loop_does_in_as_many_forwards(llm, jobs):
    assert_one_batch_is_right(llm, jobs)


def test_neither_order_nor_company_changes_a_token(llm, jobs):
    assert_company_changes_nothing(llm, jobs, num_alone=10)


def test_preemption_in_mid_block_changes_no_token(llm, jobs):
    assert_preemption_changes_nothing(llm, jobs)


def test_drafts_are_verified_as_by_a_plain_loop(llm, network):
    variants = [{"block_length": length} for length in (8, 5, 16)]
    jobs = make_s2d2_jobs(partial(NemotronView, network), variants, is_strict=False)
    assert_verifies_as_a_plain_loop(llm, jobs)


def test_prompts_and_finished_blocks_are_cut_anywhere_where_they_do_not_fit_a_step(checkpoint, start_llm, jobs):
    llm = start_llm(checkpoint, **{**ENGINE, "max_num_seqs": 32}, max_num_batched_tokens=37)
    completions = run(llm, jobs)
    assert wrong(jobs, completions) == []
    assert all(nfe(c) >= job.decoded.nfe for job, c in zip(jobs, completions, strict=True))


def test_pages_of_prompts_and_finished_blocks_are_shared_whatever_the_block_length(llm, network):
    scheduler(llm).reset_prefix_cache()
    rng = random.Random(8)
    prompt = [rng.randrange(8, 100) for _ in range(45)]
    [first] = generate(llm, [prompt], sampling(40, policy="fixed_steps", block_length=8))
    longer = prompt + list(first.token_ids)[:38] + [9]  # 84 tokens, of which 72 were committed: two pages of 32
    rule = {"policy": "static_threshold", "threshold": 0.4}
    expected = decode_nemotron(network, longer, static_threshold(0.4), block_length=16, max_tokens=20)
    assert min(expected.proposal_margin, expected.rule_margin) > MIN_MARGIN
    request = {"prompt_token_ids": longer}
    [output] = llm.generate([request], sampling(20, block_length=16, **rule), use_tqdm=False)
    assert output.num_cached_tokens == 64
    assert list(output.outputs[0].token_ids) == expected.tokens


@pytest.mark.parametrize("threshold", [None, 0.3, 0.9])
def test_one_batch_decodes_as_the_authors_loop_does(llm, network, threshold):
    """With the block of the checkpoint, that no request names; outputs are whole blocks."""
    rng = random.Random(31)
    decode_one = partial(decode_as_published, network, block_length=8, threshold=threshold)
    prompts, params, expected = [], [], []
    for index in range(20):
        prompt = [rng.randrange(8, 100) for _ in range(rng.randrange(1, 70))]
        length, end_token_id = rng.randrange(1, 6) * 8, -1
        decoded, margin = decode_one(prompt, max_new_tokens=length)
        if index % 3 == 0:  # it ends where the undisturbed output comes by
            end_token_id = decoded[length // 2]
            decoded, margin = decode_one(prompt, max_new_tokens=length, end_token_id=end_token_id)
        if margin > MIN_MARGIN:
            rule = {"policy": "static_threshold", "threshold": threshold}
            if threshold is None:
                rule = {"policy": "fixed_steps"}
            prompts.append(prompt)
            params.append(sampling(length, stop_token_ids=[end_token_id] if end_token_id >= 0 else [], **rule))
            expected.append(decoded)
    assert len(expected) >= 17
    assert any(len(one) < request.max_tokens for one, request in zip(expected, params, strict=True))
    assert tokens(generate(llm, prompts, params)) == expected


@pytest.mark.parametrize("cache_mode", ["causal", "causal_fused"])
def test_templates_are_filled_as_by_the_plain_loop(llm, network, cache_mode):
    """Blocks, and so the holes that a text may follow, begin behind the prompt."""
    rng, jobs = random.Random(4), []
    for _ in range(10):
        prompt = [rng.randrange(8, 100) for _ in range(rng.randrange(1, 40))]
        template = [rng.choice([-1, rng.randrange(8, 100)]) for _ in range(24)]
        template[7] = template[15] = 8
        if len(jobs) % 3 == 0:
            template[8:16] = range(8, 16)  # a block without holes
        pinned = {place: token for place, token in enumerate(template) if token >= 0}
        kwargs = {
            "block_length": 8,
            "max_tokens": 24,
            "cache_mode": cache_mode,
            "banned": network.config["eos_token_id"],
        }
        decoded = decode_nemotron(network, prompt, static_threshold(0.3), pinned=pinned, **kwargs)
        if min(decoded.proposal_margin, decoded.rule_margin) > MIN_MARGIN:
            jobs.append((prompt, template, decoded))
    assert len(jobs) >= 7
    params = []
    for _, template, _ in jobs:
        params.append(sampling(None, policy="static_threshold", threshold=0.3, cache_mode=cache_mode))
        params[-1].extra_args["osdt_infill"] = [1 if token < 0 else [token] for token in template]
    got = generate(llm, [prompt for prompt, *_ in jobs], params)
    assert tokens(got) == [decoded.tokens for *_, decoded in jobs]
    assert [nfe(one) for one in got] == [decoded.nfe for *_, decoded in jobs]


def test_the_context_ends_with_a_whole_block(llm):
    prompt = [9] * 232
    [longest] = generate(llm, [prompt], sampling(16, policy="fixed_steps"))
    assert len(longest.token_ids) == 16
    with pytest.raises(ValueError, match="max_tokens is 17, but the prompt of 232 tokens leaves 16 of max_model_len"):
        generate(llm, [prompt], sampling(17, policy="fixed_steps"))
    with pytest.raises(ValueError, match="its first block of 8 new ones would end at 251, beyond max_model_len 250"):
        generate(llm, [[9] * 243], sampling(1, policy="fixed_steps"))


def test_other_cache_modes_are_refused(llm):
    with pytest.raises(ValueError, match="osdt_cache_mode is 'block'; this model's attention allows causal, causal_f"):
        generate(llm, [[5, 6]], sampling(8, cache_mode="block"))


def test_osdt_equals_a_plain_implementation(llm, network):
    decode_one = partial(decode_nemotron, network, block_length=8, max_tokens=24)
    assert_osdt_equals_a_plain_implementation(llm, decode_one, "nemotron", {"max_tokens": 24})


@pytest.mark.parametrize("cache_mode", ["causal", "causal_fused"])
def test_an_answer_is_decoded_in_blocks_of_its_own_as_a_request_of_its_own(llm, cache_mode):
    own = {"policy": "static_threshold", "threshold": 0.2, "cache_mode": cache_mode}
    assert_an_answer_is_a_request_of_its_own(llm, 16, 1, **own)
    with pytest.raises(ValueError, match="answer_block_length is 4, but this model's blocks begin behind"):
        generate(llm, [[5]], sampling(8, block_length=16, answer_block_length=4, think_end_token=9, **own))
