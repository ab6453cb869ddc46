"""LLaDA2 with and without token editing: the recorded decisions of the authors' decoder, and those of a plain loop."""

import random
from functools import partial

import pytest

import vllm_osdt
from tests.e2e.engine import generate, nfe, sampling, tokens
from tests.e2e.families import FAMILIES, llada2_params
from tests.e2e.jobs import (
    MIN_MARGIN,
    RULES,
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
from tests.policies.adjusted import policy_rule
from tests.policies.test_bacd import PlainBACD
from tests.policies.test_local_leap import passing
from tests.reference.block_causal import ReferenceLLaDA2, decode_block_causal
from tests.reference.block_causal_checkpoints import make_llada2_checkpoint
from tests.reference.decode import calibrate, dynamic, joint_bound, osdt

pytestmark = pytest.mark.e2e

ENGINE = {"max_num_seqs": 64, "max_model_len": 256}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_llada2_checkpoint(tmp_path_factory.mktemp("llada2") / "model", seed=1)


@pytest.fixture(scope="module")
def network(checkpoint):
    return ReferenceLLaDA2.load(checkpoint)


@pytest.fixture(scope="module")
def llm(checkpoint, start_llm):
    return start_llm(checkpoint, **ENGINE)


def decode_case(network, case):
    return decode_block_causal(
        network,
        case["prompt_token_ids"],
        above(case["threshold"]),
        block_length=case["block_length"],
        max_tokens=case["gen_length"],
        end_token_ids=(2,),
        edit_threshold=case["editing_threshold"],
    )


def test_the_plain_network_and_loop_take_the_recorded_decisions(golden_llada2):
    network = ReferenceLLaDA2.load(golden_llada2.folder, mask_token_id=255)
    decoded = [decode_case(network, case) for case in golden_llada2.cases]
    assert len(decoded) == 30
    assert [d.tokens for d in decoded] == [case["output_token_ids"] for case in golden_llada2.cases]
    assert all(d.nfe <= case["nfe"] for d, case in zip(decoded, golden_llada2.cases, strict=True))
    assert sum(d.num_edits > 0 for d in decoded) >= 8


@pytest.fixture(scope="module")
def golden_llm(golden_llada2, start_llm):
    return start_llm(golden_llada2.folder, **ENGINE, **FAMILIES["llada2_random"].settings)


def test_one_batch_takes_the_recorded_decisions(golden_llada2, golden_llm):
    assert_takes_recorded_decisions(golden_llm, golden_llada2.cases, llada2_params)


def test_one_by_one_and_in_another_order_takes_the_recorded_decisions(golden_llada2, golden_llm):
    assert_takes_recorded_decisions_in_any_order(golden_llm, golden_llada2.cases, llada2_params)


@pytest.fixture(scope="module")
def jobs(network):
    variants = [
        {"block_length": 8},
        {"block_length": 16, "edit_threshold": 0.4},
        {"block_length": 32, "edit_threshold": 0.0},
        {"block_length": 8, "edit_threshold": 0.7},
    ]
    rules = [*RULES[:-1], ({"policy": "joint_bound", "delta": 0.4}, lambda: joint_bound(0.4))]
    found = make_jobs(
        partial(decode_block_causal, network), variants, rules=rules
    )  # entropies and editing exclude each other
    assert len(found) >= 50
    assert sum(job.decoded.num_edits > 0 for job in found) >= 15
    return found


def test_one_batch_decodes_as_a_plain_loop_does_in_as_many_forwards(llm, jobs):
    assert_one_batch_is_right(llm, jobs)


def test_logits_equal_those_of_the_plain_network(llm, network, monkeypatch):
    assert_first_logits_equal(llm, network, monkeypatch, block_length=8)


@pytest.mark.parametrize(
    "fields",
    [
        {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 8, "n_group": 4, "topk_group": 1,
         "num_experts_per_tok": 2, "num_shared_experts": 1, "partial_rotary_factor": 0.25},
        {"first_k_dense_replace": 0, "num_experts": 5, "n_group": 1, "topk_group": 1, "num_hidden_layers": 1,
         "moe_intermediate_size": 64, "routed_scaling_factor": 1.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": True},
    ],
    ids=["one group of four", "experts alone, no groups, tied"],
)  # fmt: skip
def test_logits_at_other_sizes(tmp_path, monkeypatch, start_llm, fields):
    folder = make_llada2_checkpoint(tmp_path / "model", seed=4, **fields)
    llm = start_llm(folder, max_num_seqs=4, max_model_len=128)
    assert_first_logits_equal(llm, ReferenceLLaDA2.load(folder), monkeypatch, block_length=16)


def test_neither_order_nor_company_changes_a_token(llm, jobs):
    assert_company_changes_nothing(llm, jobs)


def test_preemption_in_mid_block_changes_no_token(llm, jobs):
    assert_preemption_changes_nothing(llm, jobs)


def test_without_fused_commit_the_tokens_stay(checkpoint, start_llm, jobs):
    config = {"osdt": {"profile_dir": "", "fused_commit": False}}
    llm = start_llm(checkpoint, additional_config=config, **ENGINE)
    completions = run(llm, jobs)
    assert wrong(jobs, completions) == []
    assert [nfe(c) for c in completions] == [job.decoded.nfe + len(job.decoded.record) - 1 for job in jobs]


def test_log_probabilities_are_of_the_step_that_wrote_a_token_or_put_it_in_anothers_place(llm, jobs):
    edited = [job for job in jobs if job.decoded.num_edits][:16]
    params = [job.params.clone() for job in edited]
    for number, one in enumerate(params):
        one.logprobs = number % 3
    got = generate(llm, [job.prompt for job in edited], params)
    for job, asked, one in zip(edited, params, got, strict=True):
        assert list(one.token_ids) == job.decoded.tokens
        for found, token, logits in zip(one.logprobs, job.decoded.tokens, job.decoded.chosen_from, strict=True):
            expected = logits.double().log_softmax(dim=-1)
            assert set(found) == {token, *expected.topk(asked.logprobs).indices.tolist()}
            assert {key: value.logprob for key, value in found.items()} == pytest.approx(
                {key: expected[key].item() for key in found}, abs=2e-4
            )
            assert found[token].rank == int((expected >= expected[token]).sum())


@pytest.mark.parametrize("edit_threshold", [None, 0.3])
def test_a_threshold_with_steps_is_the_dynamic_rule_of_the_authors(llm, network, edit_threshold):
    rng = random.Random(20)
    prompts = [[rng.randrange(8, 100) for _ in range(rng.randrange(1, 40))] for _ in range(10)]
    kwargs = {"block_length": 8, "max_tokens": 40, "edit_threshold": edit_threshold}
    expected = [decode_block_causal(network, prompt, dynamic(0.9, 3, 8), **kwargs) for prompt in prompts]
    clear = [i for i, e in enumerate(expected) if min(e.proposal_margin, e.edit_margin) > MIN_MARGIN]
    assert len(clear) >= 6
    edit = {} if edit_threshold is None else {"edit_threshold": edit_threshold}
    params = sampling(40, policy="static_threshold", threshold=0.9, steps=15, block_length=8, **edit)
    completions = generate(llm, [prompts[i] for i in clear], params)
    assert [(list(c.token_ids), nfe(c)) for c in completions] == [(expected[i].tokens, expected[i].nfe) for i in clear]


def test_editing_and_entropies_exclude_each_other(llm):
    with pytest.raises(ValueError, match=r"edit_threshold is 0.5, a confidence, but policy 'entropy_bound'"):
        generate(llm, [[5, 6]], sampling(8, policy="entropy_bound", edit_threshold=0.5))


def test_editing_composes_with_osdt_and_records_only_what_is_unmasked(llm, network):
    rng = random.Random(18)
    first, *later = [[rng.randrange(8, 100) for _ in range(rng.randrange(1, 40))] for _ in range(9)]
    kwargs = {"block_length": 8, "max_tokens": 40, "edit_threshold": 0.3}
    phase_1 = decode_block_causal(network, first, above(0.6), **kwargs)
    assert phase_1.num_edits and phase_1.edit_margin > MIN_MARGIN
    options = {
        "task": "edited",
        "threshold": 0.6,
        "granularity": "step_block",
        "statistic": "q2",
        "num_calibration_requests": 1,
    }
    options |= {"slack": 0.1, "threshold_cap": 1.0, "block_length": 8, "edit_threshold": 0.3}
    params = sampling(40, **options)
    [got] = generate(llm, [first], params)
    assert (list(got.token_ids), nfe(got)) == (phase_1.tokens, phase_1.nfe)
    rule = osdt(calibrate(phase_1.record, "step_block", "q2", False), 1.0, 0.1)
    expected = [decode_block_causal(network, prompt, rule, **kwargs) for prompt in later]
    clear = [i for i, e in enumerate(expected) if min(e.proposal_margin, e.edit_margin) > MIN_MARGIN]
    assert len(clear) >= 5 and rule.margin > MIN_MARGIN
    completions = generate(llm, later, params)
    assert [tokens(completions)[i] for i in clear] == [expected[i].tokens for i in clear]
    assert vllm_osdt.describe(completions[0])["profile"] is not None


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"policy": "bacd", "min_threshold": 0.05, "max_threshold": 0.9}, lambda: PlainBACD(0.05, 0.9)),
        (
            {"policy": "local_leap", "anchor_threshold": 0.3, "relaxed_threshold": 0.1, "leap_radius": 2},
            lambda: policy_rule(lambda confidence: passing(confidence, 2, 0.3, 0.1)),
        ),
    ],
)
def test_policies_that_adjust_a_step_look_at_masked_positions_alone_where_others_are_edited(
    llm, network, options, rule
):
    rng = random.Random(5)
    prompts = [[rng.randrange(8, 100) for _ in range(rng.randrange(1, 30))] for _ in range(24)]
    canvas = {"block_length": 8, "edit_threshold": 0.3}
    expected = [decode_block_causal(network, prompt, rule(), max_tokens=24, **canvas) for prompt in prompts]
    assert sum(one.num_edits for one in expected)
    margins = [min(one.proposal_margin, one.rule_margin, one.edit_margin) for one in expected]
    clear = [index for index, margin in enumerate(margins) if margin > MIN_MARGIN]
    assert len(clear) >= 16
    got = generate(llm, prompts, sampling(24, **options, **canvas))
    assert [list(got[index].token_ids) for index in clear] == [expected[index].tokens for index in clear]


def test_an_answer_is_decoded_in_blocks_of_its_own_as_a_request_of_its_own(llm):
    own = {"policy": "static_threshold", "threshold": 0.2, "edit_threshold": 0.3}
    assert_an_answer_is_a_request_of_its_own(llm, 16, 2, **own)
