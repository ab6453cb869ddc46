"""Block-causal models, by the example of SDAR: as a plain loop decodes, however steps and pages are shared."""

import random
from collections import Counter
from functools import partial

import pytest
import torch
from vllm.v1.core.sched.interface import PauseState

import vllm_osdt
from tests.e2e.engine import assert_idle, drive, generate, nfe, sampling, scheduler, submit, tokens
from tests.e2e.families import sdar_params
from tests.e2e.jobs import (
    MIN_MARGIN,
    Job,
    above,
    assert_company_changes_nothing,
    assert_one_batch_is_right,
    assert_preemption_changes_nothing,
    assert_takes_recorded_decisions,
    assert_takes_recorded_decisions_in_any_order,
    make_jobs,
    run,
    wrong,
)
from tests.e2e.self_speculation import assert_verifies_as_a_plain_loop, make_s2d2_jobs
from tests.reference.block_causal import ReferenceSDAR, decode_block_causal, decode_with_answer_blocks
from tests.reference.block_causal_checkpoints import make_sdar_checkpoint
from tests.reference.decode import best_first, calibrate, dynamic, osdt
from tests.reference.self_speculation import SDARView, Settings, decode_s2d2
from vllm_osdt.errors import InvalidOptionError
from vllm_osdt.messages import CANVAS_STEP

pytestmark = pytest.mark.e2e

PAGE = 32
ENGINE = {"max_num_seqs": 64, "max_model_len": 256, "block_size": PAGE}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_sdar_checkpoint(tmp_path_factory.mktemp("sdar") / "model", seed=1)


@pytest.fixture(scope="module")
def network(checkpoint):
    return ReferenceSDAR.load(checkpoint)


@pytest.fixture(scope="module")
def jobs(network):
    found = make_jobs(partial(decode_block_causal, network), [{"block_length": length} for length in (4, 8, 16)])
    assert len(found) >= 50
    return found


@pytest.fixture(scope="module")
def llm(checkpoint, start_llm):
    return start_llm(checkpoint, **ENGINE)


@pytest.fixture(scope="module")
def golden_llm(golden_sdar, start_llm):
    return start_llm(golden_sdar.folder, **ENGINE)


def test_one_batch_takes_the_recorded_decisions(golden_sdar, golden_llm):
    assert_takes_recorded_decisions(golden_llm, golden_sdar.cases, sdar_params)


def test_one_by_one_and_in_another_order_takes_the_recorded_decisions(golden_sdar, golden_llm):
    assert_takes_recorded_decisions_in_any_order(golden_llm, golden_sdar.cases, sdar_params)


def test_one_batch_decodes_as_a_plain_loop_does_in_as_many_forwards(llm, jobs):
    assert_one_batch_is_right(llm, jobs)


def test_neither_order_nor_company_changes_a_token(llm, jobs):
    assert_company_changes_nothing(llm, jobs)


def test_preemption_in_mid_block_changes_no_token(llm, jobs):
    assert_preemption_changes_nothing(llm, jobs)


def test_drafts_are_verified_as_by_a_plain_loop(llm, network):
    jobs = make_s2d2_jobs(partial(SDARView, network), [{"block_length": length} for length in (4, 8, 16)], quotas=True)
    assert_verifies_as_a_plain_loop(llm, jobs)
    assert_idle(llm)


def test_drafts_that_must_be_equal_have_the_tokens_of_the_static_threshold(llm, jobs):
    prompts, options = [job.prompt for job in jobs[:16]], {"threshold": 0.3, "block_length": 8}
    static = generate(llm, prompts, sampling(24, policy="static_threshold", **options))
    own = {"policy": "freedave", "freedave_base": "threshold", "freedave_accept": "equal", "freedave_drafts": 5}
    got = generate(llm, prompts, sampling(24, **own, **options))
    assert tokens(got) == tokens(static) and sum(map(nfe, got)) < sum(map(nfe, static))
    assert_idle(llm)


def test_verified_samples_depend_on_the_seed_alone(llm, network, jobs):
    """Alone, beside others, and after preemptions; log probabilities are those of the verification."""
    prompts = [job.prompt for job in jobs[:6]]
    own = {"policy": "s2d2", "verify_cost": 0.8, "threshold": 0.2, "top_p": 0.95, "logprobs": 0}
    params = [sampling(24, temperature=0.9, seed=seed, block_length=8, **own) for seed in range(6)]
    together = generate(llm, prompts, params)
    assert len({tuple(one.token_ids) for one in together}) == 6
    for prompt, one, request in zip(prompts[:2], together, params, strict=False):
        [alone] = generate(llm, [prompt], request)
        assert alone.token_ids == one.token_ids and alone.logprobs == one.logprobs
    req_ids = [submit(llm, *one) for one in zip(prompts, params, strict=True)]

    def preempt(step):
        if step in (2, 3, 6, 9):
            scheduler(llm).reset_prefix_cache(reset_running_requests=True)

    finished = drive(llm, preempt)
    assert tokens(finished[req_id] for req_id in req_ids) == tokens(together)
    [greedy] = generate(llm, prompts[:1], sampling(12, policy="s2d2", verify_router="span", logprobs=0, block_length=8))
    ids = list(prompts[0])
    for token, found in zip(greedy.token_ids, greedy.logprobs, strict=True):
        line = SDARView(network, 8).next(ids, len(ids) // 8 * 8)
        assert found[token].logprob == pytest.approx(line.log_softmax(dim=-1)[token].item(), abs=1e-3)
        ids.append(token)


@pytest.mark.parametrize("own", [{"temperature": 1.0}, {"temperature": 1.5, "top_k": 3}], ids=["plain", "top_k"])
def test_verified_samples_have_the_distribution_from_left_to_right(llm, network, own):
    """Of two tokens: pairs that are expected five times or more, and all others as one; chi-squared, fixed seeds."""
    prompt, number, view = [11, 47, 30, 76], 600, SDARView(network, 4)

    def likely(ids):
        line = view.next(ids, 4)
        line[network.mask_token_id] = -torch.inf
        best = line.topk(own.get("top_k", len(line) - 1))
        return dict(zip(best.indices.tolist(), (best.values / own["temperature"]).softmax(dim=0).tolist(), strict=True))

    expected = {(a, b): p * q for a, p in likely(prompt).items() for b, q in likely([*prompt, a]).items()}
    usual = {pair: number * p for pair, p in expected.items() if number * p >= 5}
    others = number - sum(usual.values())

    def probability(**policy):
        params = [sampling(2, seed=seed, block_length=4, **own, **policy) for seed in range(number)]
        counts = Counter(map(tuple, tokens(generate(llm, [prompt] * number, params))))
        assert policy["policy"] != "s2d2" or counts.keys() <= expected.keys()
        sum_of_squares = sum((counts[pair] - n) ** 2 / n for pair, n in usual.items())
        if others > 5:
            sum_of_squares += (number - sum(counts[pair] for pair in usual) - others) ** 2 / others
        freedom = len(usual) - (others <= 5)
        return torch.special.gammaincc(torch.tensor(freedom / 2), torch.tensor(sum_of_squares / 2)).item()

    assert len(usual) >= (9 if "top_k" in own else 20)
    assert probability(policy="s2d2", verify_router="span") > 0.001
    assert probability(policy="static_threshold", threshold=0.01) < 1e-9


def test_pages_of_verifications_are_given_back_when_their_requests_are_aborted(llm, jobs):
    params = sampling(24, policy="s2d2", verify_router="span", block_length=16)
    req_ids = [submit(llm, job.prompt, params) for job in jobs[:8]]
    drive(llm, lambda step: llm.llm_engine.abort_request(req_ids[step : step + 2]))
    assert_idle(llm)


@pytest.fixture(scope="module")
def slim_llm(checkpoint, start_llm):
    """An engine whose steps have room for two blocks of 16."""
    engine = {**ENGINE, "max_num_batched_tokens": 32, "max_num_seqs": 4, "num_gpu_blocks_override": 14}
    return start_llm(checkpoint, **engine)


def test_few_rows_and_pages_verify_fewer_positions(slim_llm, network):
    """A step has room for the first positions of a block of 16 alone; tokens are the same at every span."""
    llm, rng = slim_llm, random.Random(6)
    prompts = [[rng.randrange(8, 100) for _ in range(number)] for number in (3, 20, 40)]
    lengths, schedule = [], scheduler(llm).schedule

    def watched(*args):
        output = schedule(*args)
        lengths.extend(span.length for span in getattr(output, CANVAS_STEP).verified.values())
        return output

    scheduler(llm).schedule = watched
    got = generate(llm, prompts, sampling(20, policy="s2d2", verify_router="span", block_length=16))
    assert 1 < max(lengths) < 6
    for prompt, one in zip(prompts, got, strict=True):
        decoded = decode_s2d2(SDARView(network, 16), prompt, Settings(router="span"), max_tokens=20)
        assert decoded.proposal_margin > MIN_MARGIN and list(one.token_ids) == decoded.tokens
    assert_idle(llm)


@pytest.mark.parametrize(
    "own",
    [
        {"policy": "s2d2", "verify_router": "span"},
        {"policy": "freedave", "freedave_base": "threshold", "threshold": 0.3, "freedave_drafts": 12},
    ],
    ids=lambda own: own["policy"],
)
def test_requests_wait_for_pages_of_branches_in_place_of_preempting_each_other_again_and_again(llm, own):
    rng, params, sched = random.Random(6), sampling(64, block_length=16, **own), scheduler(llm)
    prompts = [[rng.randrange(8, 100) for _ in range(number)] for number in (30, 45, 20, 60)]
    alone = [generate(llm, [prompt], params)[0] for prompt in prompts]
    pool, waited, preempted, preempt = sched.kv_cache_manager.block_pool, [], [], sched._preempt_request
    others = pool.get_new_blocks(pool.get_num_free_blocks() - 21)  # one request has 4 pages, and 15 for its branches
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sched, "_preempt_request", lambda *args, **own: (preempted.append(1), preempt(*args, **own))[1])
        req_ids = [submit(llm, prompt, params) for prompt in prompts]
        finished = drive(llm, lambda step: waited.extend(sched._lacking))
    together = [finished[req_id] for req_id in req_ids]
    pool.free_blocks(others)
    assert tokens(together) == tokens(alone)
    assert len(waited) > 20 and len(preempted) < 20
    assert sum(map(nfe, together)) < 1.2 * sum(map(nfe, alone))
    assert_idle(llm)


@pytest.mark.parametrize(
    ("own", "name"),
    [
        ({"repetition_penalty": 1.2}, "repetition_penalty"),
        ({"draft": [5, 6]}, "osdt_draft"),
        ({"logprobs": 1, "steps_per_block": 2}, "logprobs"),
        ({"return_trace": True, "steps_per_block": 2}, "osdt_return_trace"),
    ],
)
def test_what_a_verification_cannot_honor_is_refused(llm, own, name):
    with pytest.raises(ValueError, match=f"{name} cannot be sent with policy 's2d2'.*Leave it out"):
        generate(llm, [[5, 6, 7]], sampling(8, policy="s2d2", **own))


def test_sampling_depends_on_the_seed_alone(llm, jobs):
    params = [sampling(24, temperature=0.8, seed=seed, block_length=8, threshold=0.3) for seed in (1, 2, 1)]
    prompts = [jobs[0].prompt, jobs[0].prompt, jobs[0].prompt]
    together = tokens(generate(llm, prompts, params))
    assert together[0] == together[2] != together[1]
    assert tokens(generate(llm, prompts[:1], params[:1])) == together[:1]


def best(block, step, masked, number):
    return best_first(masked)[:number]


def other_engine(checkpoint, start_llm, jobs, **arguments):
    """An engine of other arguments, and what it makes of the jobs."""
    llm = start_llm(checkpoint, **{**ENGINE, **arguments})
    return llm, run(llm, jobs)


def test_without_fused_commit_the_tokens_stay_and_forwards_are_added(checkpoint, start_llm, jobs):
    config = {"osdt": {"profile_dir": "", "fused_commit": False}}
    llm, completions = other_engine(checkpoint, start_llm, jobs, additional_config=config)
    assert wrong(jobs, completions) == []
    # The last block of a request needs no keys and values.
    assert [nfe(c) for c in completions] == [job.decoded.nfe + len(job.decoded.record) - 1 for job in jobs]
    assert_idle(llm)


def test_prompts_are_cut_into_whole_blocks_where_they_do_not_fit_a_step(checkpoint, start_llm, jobs):
    llm, completions = other_engine(checkpoint, start_llm, jobs, max_num_batched_tokens=41, max_num_seqs=32)
    assert wrong(jobs, completions) == []
    # Where there is room for one block only, a commit takes a forward of its own, and is counted.
    extra = [nfe(c) - job.decoded.nfe for c, job in zip(completions, jobs, strict=True)]
    assert all(0 <= more < len(job.decoded.record) for more, job in zip(extra, jobs, strict=True))
    assert_idle(llm)


@pytest.mark.parametrize(("adaptive", "most"), [(False, 40), (True, 64)])
def test_long_prompts_leave_room_for_others(checkpoint, start_llm, network, adaptive, most):
    """At most 40 rows a step, or the fourth part of 256, unless a request is alone."""
    arguments = {"long_prefill_token_threshold": 44, "long_prefill_token_threshold_adaptive": adaptive}
    llm = start_llm(checkpoint, **{**ENGINE, "max_num_batched_tokens": 256}, **arguments)
    rng = random.Random(23)
    prompts = [[rng.randrange(3, 100) for _ in range(length)] for length in (200, 30, 170, 9)]
    rows, schedule = [], scheduler(llm).schedule

    def watched(*args):
        output = schedule(*args)
        rows.append(list(output.num_scheduled_tokens.values()))
        return output

    scheduler(llm).schedule = watched
    got = generate(llm, prompts, sampling(20, policy="static_threshold", threshold=0.4, block_length=8))
    expected = [decode_block_causal(network, prompt, above(0.4), block_length=8, max_tokens=20) for prompt in prompts]
    assert min(min(e.proposal_margin, e.rule_margin) for e in expected) > MIN_MARGIN
    assert tokens(got) == [e.tokens for e in expected]
    assert max(max(step) for step in rows if len(step) > 1) == most
    rows.clear()
    scheduler(llm).reset_prefix_cache()
    assert tokens(generate(llm, prompts[:1], sampling(20, threshold=0.4, block_length=8))) == [expected[0].tokens]
    assert rows[0] == [208]


def test_scarce_pages_make_requests_wait_and_change_no_token(checkpoint, start_llm, jobs):
    llm = start_llm(checkpoint, max_num_seqs=32, max_model_len=128, block_size=32, num_gpu_blocks_override=9)
    seen = []
    preempt = scheduler(llm)._preempt_request
    scheduler(llm)._preempt_request = lambda *args, **kwargs: (seen.append(1), preempt(*args, **kwargs))[1]
    assert wrong(jobs, run(llm, jobs)) == []
    assert seen
    assert_idle(llm)


def num_cached(llm, prompt, params):
    """Tokens of a prompt that came from the prefix cache, and the completion."""
    [output] = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    return output.num_cached_tokens, list(output.outputs[0].token_ids)


def test_prompts_that_share_an_unaligned_beginning_share_its_whole_pages(llm, network):
    rng = random.Random(11)
    scheduler(llm).reset_prefix_cache()
    shared = [rng.randrange(3, 100) for _ in range(77)]
    rule, options = above(0.4), {"policy": "static_threshold", "threshold": 0.4, "block_length": 8}
    cached = []
    for index in range(4):
        prompt = shared + [rng.randrange(3, 100) for _ in range(index * 7 + 1)]
        expected = decode_block_causal(network, prompt, rule, block_length=8, max_tokens=20)
        assert min(expected.proposal_margin, expected.rule_margin) > MIN_MARGIN
        hit, got = num_cached(llm, prompt, sampling(20, **options))
        cached.append(hit)
        assert got == expected.tokens
    assert cached == [0, 64, 64, 64]


def test_a_conversation_reuses_the_blocks_that_were_generated(llm, network):
    rng = random.Random(12)
    scheduler(llm).reset_prefix_cache()
    rule, options = above(0.4), {"policy": "static_threshold", "threshold": 0.4, "block_length": 8}
    prompt = [rng.randrange(3, 100) for _ in range(21)]
    for turn in range(3):
        expected = decode_block_causal(network, prompt, rule, block_length=8, max_tokens=40)
        assert min(expected.proposal_margin, expected.rule_margin) > MIN_MARGIN
        hit, got = num_cached(llm, prompt, sampling(40, **options))
        assert got == expected.tokens
        # The last block of a turn has no final keys and values, since nothing came after it.
        assert hit == (len(prompt) - 5 - 1) // 8 * 8 // PAGE * PAGE * (turn > 0)
        prompt = prompt + got + [rng.randrange(3, 100) for _ in range(5)]
    assert hit >= 96


def test_a_page_that_ends_with_a_requests_last_block_is_not_shared(llm, network):
    """Its keys and values are those of a canvas with masks: nothing came after it that would have written them anew."""
    rng = random.Random(13)
    scheduler(llm).reset_prefix_cache()
    options = {"policy": "static_threshold", "threshold": 0.4, "block_length": 8}
    prompt = [rng.randrange(3, 100) for _ in range(PAGE - 8)]
    _, got = num_cached(llm, prompt, sampling(8, **options))
    prompt = [*prompt, *got, *prompt[:8]]
    expected = decode_block_causal(network, prompt, above(0.4), block_length=8, max_tokens=8)
    assert min(expected.proposal_margin, expected.rule_margin) > MIN_MARGIN
    assert num_cached(llm, prompt, sampling(8, **options)) == (0, expected.tokens)


def test_without_prefix_caching_the_tokens_stay(checkpoint, start_llm, llm, jobs):
    llm_without, completions = other_engine(checkpoint, start_llm, jobs, enable_prefix_caching=False)
    assert wrong(jobs, completions) == []
    assert_idle(llm_without)
    rng = random.Random(21)
    shared = [rng.randrange(3, 100) for _ in range(77)]
    prompts = [shared + [rng.randrange(3, 100) for _ in range(index)] for index in range(6)]
    params = sampling(24, policy="static_threshold", threshold=0.4, block_length=8)
    scheduler(llm).reset_prefix_cache()
    first = generate(llm, prompts[:1], params)  # leaves its pages to the others
    assert tokens([*first, *generate(llm, prompts[1:], params)]) == tokens(generate(llm_without, prompts, params))


def test_pages_of_a_request_are_free_as_soon_as_it_ends(llm, jobs):
    manager = scheduler(llm).kv_cache_manager
    all_free = manager.block_pool.num_gpu_blocks - 1  # one is vLLM's null block
    assert manager.block_pool.get_num_free_blocks() == all_free
    jobs = [job for job in jobs if job.decoded.nfe >= 4][:8]
    req_ids = [submit(llm, job.prompt, job.params) for job in jobs]
    llm.llm_engine.step()
    internal = {name.rsplit("-", 1)[0]: name for name in scheduler(llm).requests}
    held = {req_id: len(manager.get_block_ids(internal[req_id])[0]) for req_id in req_ids}
    assert min(held.values()) > 0
    for number, req_id in enumerate(req_ids[:4]):  # in mid-block
        before = manager.block_pool.get_num_free_blocks()
        llm.llm_engine.abort_request([req_id])
        assert manager.block_pool.get_num_free_blocks() == before + held[req_id], number
    finished = drive(llm, lambda step: None)
    assert {req_id: list(finished[req_id].token_ids) for req_id in req_ids[4:]} == {
        req_id: job.decoded.tokens for req_id, job in zip(req_ids[4:], jobs[4:], strict=True)
    }
    assert manager.block_pool.get_num_free_blocks() == all_free


def test_a_mask_token_in_a_prompt_is_a_token_like_any_other(llm, network):
    rng = random.Random(22)
    prompts = [[rng.choice([network.mask_token_id, 5, 9, 40]) for _ in range(length)] for length in (3, 8, 21, 37)]
    expected = [decode_block_causal(network, prompt, above(0.4), block_length=8, max_tokens=20) for prompt in prompts]
    assert min(min(e.proposal_margin, e.rule_margin) for e in expected) > MIN_MARGIN
    got = tokens(generate(llm, prompts, sampling(20, policy="static_threshold", threshold=0.4, block_length=8)))
    assert got == [e.tokens for e in expected]
    assert all(network.mask_token_id not in one for one in got)


def test_several_completions_of_one_prompt_are_those_of_their_seeds(llm, jobs):
    params = sampling(24, temperature=0.8, seed=3, n=3, block_length=8, threshold=0.3, policy="static_threshold")
    [output] = llm.generate([{"prompt_token_ids": jobs[0].prompt}], params, use_tqdm=False)
    several = tokens(output.outputs)
    assert len({tuple(one) for one in several}) == 3
    again = [
        sampling(24, temperature=0.8, seed=3 + i, block_length=8, threshold=0.3, policy="static_threshold")
        for i in range(3)
    ]
    assert tokens(generate(llm, [jobs[0].prompt] * 3, again)) == several


def test_several_stop_tokens_end_their_block_early(llm, network, jobs):
    rule = partial(best, number=1)
    prompts, canvas = [job.prompt for job in jobs[:12]], {"block_length": 16, "max_tokens": 32}
    whole = [decode_block_causal(network, prompt, rule, **canvas) for prompt in prompts]
    ends = (whole[0].tokens[2], whole[1].tokens[5], whole[2].tokens[9])
    expected = [decode_block_causal(network, prompt, rule, end_token_ids=ends, **canvas) for prompt in prompts]
    assert min(e.proposal_margin for e in expected) > MIN_MARGIN
    # One forward a position; of its last block, a request that ends there has taken fewer.
    ends_of_blocks = [-(-(len(prompt) + len(e.tokens)) // 16) * 16 for prompt, e in zip(prompts, expected, strict=True)]
    is_early = [len(p) + e.nfe < end for p, e, end in zip(prompts, expected, ends_of_blocks, strict=True)]
    assert sum(is_early) >= 3
    got = generate(llm, prompts, sampling(32, policy="fixed_steps", block_length=16, stop_token_ids=list(ends)))
    assert [(list(c.token_ids), nfe(c)) for c in got] == [(e.tokens, e.nfe) for e in expected]


def test_pages_are_shared_between_equal_block_lengths_only(llm, network):
    rng = random.Random(13)
    scheduler(llm).reset_prefix_cache()
    prompt = [rng.randrange(3, 100) for _ in range(70)]
    cached = []
    for block_length in (4, 8, 24, 4, 8, 24):
        options = {"policy": "static_threshold", "threshold": 0.4, "block_length": block_length}
        expected = decode_block_causal(network, prompt, above(0.4), block_length=block_length, max_tokens=30)
        assert min(expected.proposal_margin, expected.rule_margin) > MIN_MARGIN
        hit, got = num_cached(llm, prompt, sampling(30, **options))
        cached.append(hit)
        assert got == expected.tokens
    assert cached == [0, 0, 0, 64, 64, 0]  # pages of 32 cut blocks of 24


def test_a_threshold_with_steps_is_the_dynamic_rule_of_the_authors(llm, network):
    rng = random.Random(19)
    prompts, params, expected, num_faster = [], [], [], 0
    for index in range(24):
        block_length, tau, max_tokens = (4, 8, 16)[index % 3], (0.3, 0.6, 0.9, 0.99)[index % 4], rng.randrange(1, 48)
        steps_per_block = rng.choice([1, 2, 3, block_length])  # 3 does not share out evenly
        prompt = [rng.randrange(3, 100) for _ in range(rng.randrange(1, 50))]
        rule = dynamic(tau, steps_per_block, block_length)
        decoded = decode_block_causal(network, prompt, rule, block_length=block_length, max_tokens=max_tokens)
        if decoded.proposal_margin > MIN_MARGIN:
            options = {"policy": "static_threshold", "threshold": tau, "block_length": block_length}
            total = -(-max_tokens // block_length) * steps_per_block
            steps = {"steps": total} if index % 2 else {"steps_per_block": steps_per_block}
            prompts.append(prompt)
            params.append(sampling(max_tokens, **steps, **options))
            expected.append(decoded)
            plain = decode_block_causal(network, prompt, above(tau), block_length=block_length, max_tokens=max_tokens)
            num_faster += decoded.nfe < plain.nfe
    assert len(expected) >= 20 and num_faster >= 10
    completions = generate(llm, prompts, params)
    assert [(list(c.token_ids), nfe(c)) for c in completions] == [(e.tokens, e.nfe) for e in expected]


@pytest.mark.parametrize("mode", ["block", "step_block"])
def test_osdt_equals_a_plain_implementation(llm, network, mode):
    rng = random.Random(5)
    first, *later = [[rng.randrange(3, 100) for _ in range(rng.randrange(1, 40))] for _ in range(9)]
    options = {"task": f"sdar {mode}", "threshold": 0.3, "granularity": mode, "statistic": "q2", "block_length": 8}
    options |= {"num_calibration_requests": 1, "slack": 0.1, "threshold_cap": 1.0}
    phase_1 = decode_block_causal(network, first, above(0.3), block_length=8, max_tokens=40)
    params = sampling(40, **options)
    [got] = generate(llm, [first], params)
    assert (list(got.token_ids), nfe(got)) == (phase_1.tokens, phase_1.nfe)
    rule = osdt(calibrate(phase_1.record, mode, "q2", False), 1.0, 0.1)
    expected = [decode_block_causal(network, prompt, rule, block_length=8, max_tokens=40) for prompt in later]
    clear = [index for index, e in enumerate(expected) if e.proposal_margin > MIN_MARGIN]
    assert len(clear) >= 6 and rule.margin > MIN_MARGIN
    completions = generate(llm, later, params)
    assert [tokens(completions)[index] for index in clear] == [expected[index].tokens for index in clear]
    assert vllm_osdt.describe(completions[0])["profile"] is not None
    [profile] = [p for p in vllm_osdt.profiles(llm) if p["task"] == f"sdar {mode}"]
    assert (profile["cache"], profile["block_length"]) == ("block", 8)


@pytest.mark.parametrize(("steps", "num_prompt"), [(32, 8), (16, 11), (8, 3)])
def test_fixed_steps_share_out_the_positions_of_new_tokens(llm, network, steps, num_prompt):
    rng = random.Random(steps)
    prompt = [rng.randrange(3, 100) for _ in range(num_prompt)]
    share = 32 // steps
    expected = decode_block_causal(
        network, prompt, lambda block, step, masked: best_first(masked)[:share], block_length=8, max_tokens=32
    )
    assert expected.proposal_margin > MIN_MARGIN
    [got] = generate(llm, [prompt], sampling(32, policy="fixed_steps", steps=steps, block_length=8))
    assert (list(got.token_ids), nfe(got)) == (expected.tokens, expected.nfe)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_mode": "dual"}, "osdt_cache_mode is 'dual'; this model's attention allows block"),
        ({"gen_length": 64}, "no block of this model sees a later one"),
        ({"suffix_window": 1}, "suffix_window is 1, but no block of this model sees a later one"),
        ({"policy": "fixed_steps", "steps": 5, "block_length": 8}, "steps is 5; with 4 blocks of 8"),
        ({"policy": "static_threshold", "steps": 5, "block_length": 8}, "steps is 5; with 4 blocks of 8"),
        ({"steps": 8}, "osdt_steps is 8, which policy 'osdt' does not use: leave it out, or send osdt_policy"),
    ],
)
def test_options_of_other_families_are_refused(llm, options, message):
    with pytest.raises(ValueError, match=message):
        generate(llm, [[5, 6]], sampling(32, **options))


def test_a_request_beyond_the_context_is_refused_and_the_last_block_of_it_is_served(llm):
    with pytest.raises(ValueError, match="max_tokens is 8, but the prompt of 250 tokens leaves 6 of max_model_len 256"):
        generate(llm, [[5] * 250], sampling(8, block_length=16))
    [completion] = generate(llm, [[5] * 250], sampling(6, block_length=16, policy="static_threshold"))
    assert len(completion.token_ids) == 6


def test_an_engine_refuses_rows_for_less_than_two_blocks(checkpoint, start_llm):
    with pytest.raises((InvalidOptionError, ValueError), match="max_num_batched_tokens is 60"):
        start_llm(
            checkpoint,
            max_num_seqs=2,
            max_model_len=48,
            max_num_batched_tokens=60,
            additional_config={"osdt": {"profile_dir": "", "block_length": 32}},
        )


def test_an_operators_canvas_length_is_refused_at_start(checkpoint, start_llm):
    config = {"osdt": {"profile_dir": "", "gen_length": 64}}
    with pytest.raises(ValueError, match="gen_length is 64, but no block of this model sees a later one"):
        start_llm(checkpoint, **ENGINE, additional_config=config)


def test_pages_of_a_request_that_is_preempted_before_its_step_are_not_shared(checkpoint, start_llm, network):
    """By priority, a later request of the same step takes the pages of one that was about to write final ones."""
    llm = start_llm(checkpoint, max_num_seqs=2, max_model_len=96, block_size=32, num_gpu_blocks_override=4,
                    scheduling_policy="priority")  # fmt: skip
    sched = scheduler(llm)
    rng = random.Random(17)
    victims = []
    preempt = sched._preempt_request

    def watched(request, *args, **kwargs):
        pages = sched.kv_cache_manager.get_block_ids(request.request_id)[0]
        blocks = [sched.kv_cache_manager.block_pool.blocks[page] for page in pages]
        num_shared = sum(block.block_hash is not None for block in blocks) * PAGE
        victims.append((num_shared, sched._rows[request.request_id]))
        return preempt(request, *args, **kwargs)

    sched._preempt_request = watched
    # One token a step: both enter position 32 in the third step, and there is one page for it.
    prompts = [[rng.randrange(8, 100) for _ in range(length)] for length in (30, 31)]
    expected = [decode_block_causal(network, p, above(0.999), block_length=4, max_tokens=30) for p in prompts]
    params = sampling(30, policy="static_threshold", threshold=0.999, block_length=4)
    finished = {}

    def arrive(step):
        if step < 2:
            llm.llm_engine.add_request(f"r{step}", {"prompt_token_ids": prompts[step]}, params, priority=1 - step)

    for step in range(200):
        arrive(step)
        finished |= {o.request_id: list(o.outputs[0].token_ids) for o in llm.llm_engine.step() if o.finished}
    assert [finished[f"r{i}"] for i in range(2)] == [e.tokens for e in expected]
    [(num_shared, rows), *_] = victims
    assert (rows.start, rows.end) == (28, 36)  # it would have finished its first page
    assert num_shared == 0


CHECK = [9, 10, 11, 12, 13]


@pytest.fixture(scope="module")
def thinking(network):
    """Requests that end their thinking, parameters for them, and what a plain loop makes of them."""
    rng, found = random.Random(31), []
    for index in range(24):
        prompt = [rng.randrange(8, 100) for _ in range(rng.randrange(1, 60))]
        number, tau, length = rng.randrange(8, 56), (0.2, 0.5)[index % 2], (1, 4, 8)[index % 3]
        plain = decode_block_causal(network, prompt, above(tau), block_length=16, max_tokens=number)
        think_end, check = rng.choice(plain.tokens), CHECK if index % 4 else []
        ends = (plain.tokens[-1],) if index % 5 == 4 and plain.tokens[-1] not in (think_end, *CHECK) else ()
        own = {"block_length": 16, "answer_block_length": length}
        expected, given = decode_with_answer_blocks(
            network, prompt, partial(above, tau), think_end=think_end, check=check, max_tokens=number,
            end_token_ids=ends, **own,
        )  # fmt: skip
        if min(expected.proposal_margin, expected.rule_margin) > MIN_MARGIN:
            own |= {"policy": "static_threshold", "threshold": tau, "return_trace": True, "think_end_token": think_end}
            own |= {"check_prompt": check} if check else {}
            found.append((Job(prompt, sampling(number, stop_token_ids=list(ends), **own), expected), given))
    assert sum(0 < given.stop < len(job.decoded.tokens) for job, given in found) >= 12
    return found


def test_behind_the_end_of_thinking_blocks_are_others_as_in_a_plain_loop(llm, thinking):
    jobs = [job for job, _ in thinking]
    assert_one_batch_is_right(llm, jobs)
    assert_company_changes_nothing(llm, jobs, num_alone=8)
    assert_preemption_changes_nothing(llm, jobs)


def test_what_an_answer_reads_before_it_begins_is_no_forward_of_its_own(slim_llm, thinking):
    """Its prompt, and what it thought, take several steps there, beside those of the plain loop."""
    jobs, steps = [job for job, given in thinking if given.stop + len(job.prompt) > 48], []
    assert len(jobs) >= 4
    for job in jobs:
        req_id = submit(slim_llm, job.prompt, job.params)
        finished = drive(slim_llm, steps.append)
        assert list(finished[req_id].token_ids) == job.decoded.tokens
        assert nfe(finished[req_id]) == job.decoded.nfe
    assert len(steps) > sum(job.decoded.nfe for job in jobs) + 2 * len(jobs)
    assert_idle(slim_llm)


def test_an_end_of_thinking_is_no_early_end_of_the_output(llm, thinking):
    """Without tokens that end the output, the guard of ``confidence_adaptive`` keeps nothing back."""
    asked = [(job.prompt, job.params.clone()) for job, given in thinking if given and not job.params.stop_token_ids]
    for _, params in asked:
        params.extra_args |= {"osdt_policy": "confidence_adaptive", "osdt_threshold": 0.2, "osdt_end_after": 0.0}
    found = [generate(llm, *zip(*asked, strict=True))]
    for _, params in asked:
        params.extra_args["osdt_end_after"] = 1.0
    found.append(generate(llm, *zip(*asked, strict=True)))
    assert len(asked) >= 6 and tokens(found[0]) == tokens(found[1])
    assert [vllm_osdt.describe(one)["trace"] for one in found[0]] == [
        vllm_osdt.describe(one)["trace"] for one in found[1]
    ]


def test_a_request_that_thinks_ends_while_new_ones_are_held_back(llm, thinking):
    """As a pause does that waits for what runs."""
    job, _ = next(one for one in thinking if 0 < one[1].stop < len(one[0].decoded.tokens) and one[1])
    req_id = submit(llm, job.prompt, job.params)
    llm.llm_engine.step()
    scheduler(llm).set_pause_state(PauseState.PAUSED_NEW)
    try:
        finished = drive(llm)
    finally:
        scheduler(llm).set_pause_state(PauseState.UNPAUSED)
    assert list(finished[req_id].token_ids) == job.decoded.tokens
    assert_idle(llm)


def test_a_trace_tells_what_was_given_and_what_was_decided_in_which_block(llm, thinking):
    traces = [vllm_osdt.describe(one)["trace"] for one in run(llm, [job for job, _ in thinking])]
    for (job, given), trace in zip(thinking, traces, strict=True):
        assert sum(block["num_tokens"] for block in trace["blocks"]) == len(job.decoded.tokens) == len(trace["step"])
        for place, (step, forward, confidence) in enumerate(job.decoded.steps):
            if place in given:
                assert trace["confidence"][place] is None
            else:
                assert (trace["step"][place], trace["forward"][place]) == (step, forward)
                assert trace["confidence"][place] == pytest.approx(confidence, abs=1e-4)


def test_pages_of_the_answer_are_shared_with_requests_of_its_block_length_alone(llm, network, monkeypatch):
    scheduler(llm).reset_prefix_cache()
    rng, options = random.Random(32), {"policy": "static_threshold", "threshold": 0.4}
    prompt = [rng.randrange(8, 100) for _ in range(PAGE + 5)]
    [plain] = tokens(generate(llm, [prompt], sampling(80, block_length=16, **options)))
    think_end = next(token for place, token in enumerate(plain) if place > 36 and token not in plain[:place])
    own = {"think_end_token": think_end, "check_prompt": CHECK, "answer_block_length": 4, "block_length": 16}
    scheduler(llm).reset_prefix_cache()
    hit, got = num_cached(llm, prompt, sampling(80, **own, **options))
    expected, given = decode_with_answer_blocks(
        network, prompt, partial(above, 0.4), block_length=16, answer_block_length=4, think_end=think_end, check=CHECK,
        max_tokens=80,
    )  # fmt: skip
    assert (hit, got) == (0, expected.tokens) and len(given) == 5
    thought, written = len(prompt) + given.start, len(prompt) + given.stop
    rows = rows_of_each_step(llm, monkeypatch)
    assert num_cached(llm, prompt, sampling(80, **own, **options)) == (PAGE, got)  # of the prompt
    answer = next(step for step in rows if 0 < step.num_drafts <= 4)
    assert answer.start == (written - 1) // PAGE * PAGE > PAGE  # of all that was written before the answer
    follow = [*prompt, *got, 8]
    for length, shared in ((16, thought // 16 * 16 // PAGE * PAGE), (4, (len(follow) - 1) // 4 * 4 // PAGE * PAGE)):
        expected = decode_block_causal(network, follow, above(0.4), block_length=length, max_tokens=16)
        assert min(expected.proposal_margin, expected.rule_margin) > MIN_MARGIN
        hit, tokens_of_turn = num_cached(llm, follow, sampling(16, block_length=length, **options))
        assert (hit, tokens_of_turn) == (shared, expected.tokens)


def rows_of_each_step(llm, monkeypatch):
    """The rows of the first request of each step, while the engine runs."""
    found, schedule = [], scheduler(llm).schedule

    def watched(*args):
        output = schedule(*args)
        found.extend(list(scheduler(llm)._rows.values())[:1])
        return output

    monkeypatch.setattr(scheduler(llm), "schedule", watched)
    return found


def test_answers_of_one_request_end_their_thinking_each_for_itself(llm):
    own = {"block_length": 16, "answer_block_length": 1, "temperature": 1.0, "policy": "bacd", "logit_bias": {9: 6.0}}
    own |= {"think_end_token": 9, "check_prompt": CHECK[1:]}
    [output] = llm.generate([{"prompt_token_ids": [5, 6]}], sampling(24, n=3, seed=5, **own), use_tqdm=False)
    alone = [generate(llm, [[5, 6]], sampling(24, seed=5 + index, **own))[0] for index in range(3)]
    assert tokens(output.outputs) == tokens(alone)
    assert sum(CHECK[1] in one.token_ids for one in output.outputs) >= 2
    assert_idle(llm)
