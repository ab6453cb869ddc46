"""SDAR with experts. A module of its own: vLLM makes the process groups of experts with the first engine."""

from functools import partial

import pytest

from tests.e2e.jobs import (
    assert_company_changes_nothing,
    assert_first_logits_equal,
    assert_one_batch_is_right,
    assert_osdt_equals_a_plain_implementation,
    assert_preemption_changes_nothing,
    make_jobs,
)
from tests.reference.block_causal import ReferenceSDAR, decode_block_causal
from tests.reference.block_causal_checkpoints import make_sdar_checkpoint

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    fields = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
    return make_sdar_checkpoint(tmp_path_factory.mktemp("sdar") / "model", seed=1, **fields)


@pytest.fixture(scope="module")
def jobs(checkpoint):
    network = ReferenceSDAR.load(checkpoint)

    found = make_jobs(partial(decode_block_causal, network), [{"block_length": length} for length in (4, 8, 16)])
    assert len(found) >= 50
    return found


@pytest.fixture(scope="module")
def llm(checkpoint, start_llm):
    return start_llm(checkpoint, max_num_seqs=64, max_model_len=256)


def test_one_batch_decodes_as_a_plain_loop_does_in_as_many_forwards(llm, jobs):
    assert_one_batch_is_right(llm, jobs)


def test_logits_equal_those_of_the_plain_network(llm, checkpoint, monkeypatch):
    assert_first_logits_equal(llm, ReferenceSDAR.load(checkpoint), monkeypatch, block_length=8)


def test_neither_order_nor_company_changes_a_token(llm, jobs):
    assert_company_changes_nothing(llm, jobs)


def test_preemption_in_mid_block_changes_no_token(llm, jobs):
    assert_preemption_changes_nothing(llm, jobs)


def test_osdt_equals_a_plain_implementation(llm, checkpoint):
    network = ReferenceSDAR.load(checkpoint)

    def decode(prompt, rule):
        return decode_block_causal(network, prompt, rule, block_length=8, max_tokens=40)

    assert_osdt_equals_a_plain_implementation(llm, decode, "experts", {"block_length": 8, "max_tokens": 40})


def test_rows_that_a_dummy_step_left_as_padding_have_their_experts(llm, jobs):
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.model_runner
    runner.input_buffers.is_padding.fill_(True)
    assert_one_batch_is_right(llm, jobs)
    assert not runner.input_buffers.is_padding[0]
