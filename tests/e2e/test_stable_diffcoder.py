"""Stable-DiffCoder: as a plain loop decodes, as its authors' loop does, and where a confidence equals the threshold."""

import random
from functools import partial

import pytest

from tests.e2e.engine import generate, nfe, sampling, tokens
from tests.e2e.jobs import (
    MIN_MARGIN,
    assert_company_changes_nothing,
    assert_one_batch_is_right,
    assert_osdt_equals_a_plain_implementation,
    assert_preemption_changes_nothing,
    make_jobs,
)
from tests.reference.block_causal import decode_block_causal
from tests.reference.stable_diffcoder import (
    ReferenceStableDiffcoder,
    decode_as_published,
    make_stable_diffcoder_checkpoint,
)

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_stable_diffcoder_checkpoint(tmp_path_factory.mktemp("stable_diffcoder") / "model", seed=1)


@pytest.fixture(scope="module")
def network(checkpoint):
    return ReferenceStableDiffcoder.load(checkpoint)


@pytest.fixture(scope="module")
def llm(checkpoint, start_llm):
    return start_llm(checkpoint, max_num_seqs=64, max_model_len=256)


@pytest.fixture(scope="module")
def jobs(network):
    found = make_jobs(partial(decode_block_causal, network), [{"block_length": length} for length in (4, 8, 16)])
    assert len(found) >= 50
    return found


def test_one_batch_decodes_as_a_plain_loop_does_in_as_many_forwards(llm, jobs):
    assert_one_batch_is_right(llm, jobs)


def test_neither_order_nor_company_changes_a_token(llm, jobs):
    assert_company_changes_nothing(llm, jobs, num_alone=10)


def test_preemption_in_mid_block_changes_no_token(llm, jobs):
    assert_preemption_changes_nothing(llm, jobs)


@pytest.mark.parametrize("threshold", [None, 0.3, 0.95])
def test_one_batch_decodes_as_the_authors_loop_does(llm, network, threshold):
    """With the block of the checkpoints, that no request names.

    Outputs end with a block: the authors leave later positions of the last one out, and here they are masks.
    """
    rng = random.Random(31)
    prompts, params, expected = [], [], []
    for _ in range(60):
        prompt = [rng.randrange(8, 100) for _ in range(rng.randrange(1, 40))]
        gen_length = rng.randrange(1, 8) * 4 + -len(prompt) % 4
        end_token_id = rng.choice([None, rng.randrange(8, 100)])
        # Where a step has a share of the block, it is of the block's masks there and of all its positions here.
        steps = 4 if threshold is not None or len(prompt) % 4 else rng.choice([1, 2, 3, 4])
        decoded, margin = decode_as_published(
            network,
            prompt,
            gen_length=gen_length,
            block_length=4,
            steps_per_block=steps,
            threshold=threshold,
            end_token_id=end_token_id,
        )
        if margin > MIN_MARGIN:
            rule = {"policy": "static_threshold", "threshold": threshold}
            if threshold is None:
                rule = {"policy": "fixed_steps", "steps_per_block": steps}
            prompts.append(prompt)
            params.append(sampling(gen_length, stop_token_ids=[] if end_token_id is None else [end_token_id], **rule))
            expected.append(decoded)
    assert len(expected) >= 50
    assert any(len(one) < request.max_tokens for one, request in zip(expected, params, strict=True))
    assert tokens(generate(llm, prompts, params)) == expected


def test_a_confidence_that_equals_the_threshold_passes(tmp_path, start_llm):
    folder = make_stable_diffcoder_checkpoint(tmp_path / "model", seed=2, certain=True)
    llm = start_llm(folder, max_num_seqs=8, max_model_len=64)
    prompts = [list(range(8, 8 + length)) for length in (4, 8, 13)]
    completions = generate(llm, prompts, sampling(12, policy="static_threshold", threshold=1.0))
    assert [nfe(c) for c in completions] == [3, 3, 4]  # one for each block
    alone = generate(llm, prompts, sampling(12, policy="fixed_steps"))
    assert [nfe(c) for c in alone] == [12, 12, 12]


def test_osdt_equals_a_plain_implementation(llm, network):
    decode_one = partial(decode_block_causal, network, block_length=4, max_tokens=24)
    assert_osdt_equals_a_plain_implementation(llm, decode_one, "stable-diffcoder", {"max_tokens": 24})
