"""iLLaDA: decoding as a plain loop does, in all cache modes."""

import pytest

from tests.e2e.jobs import (
    assert_company_changes_nothing,
    assert_one_batch_is_right,
    assert_osdt_equals_a_plain_implementation,
    assert_preemption_changes_nothing,
    make_canvas_jobs,
)
from tests.reference.decode import decode
from tests.reference.illada import ReferenceILLaDA, make_illada_checkpoint

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_illada_checkpoint(tmp_path_factory.mktemp("illada") / "model", seed=2)


@pytest.fixture(scope="module")
def network(checkpoint):
    return ReferenceILLaDA.load(checkpoint)


@pytest.fixture(scope="module")
def llm(checkpoint, start_llm):
    return start_llm(checkpoint, max_num_seqs=64, max_model_len=256)


@pytest.fixture(scope="module")
def jobs(network):
    return make_canvas_jobs(network)


def test_one_batch_decodes_as_a_plain_loop_does_in_as_many_forwards(llm, jobs):
    assert_one_batch_is_right(llm, jobs)


def test_neither_order_nor_company_changes_a_token(llm, jobs):
    assert_company_changes_nothing(llm, jobs, num_alone=10)


def test_preemption_in_mid_block_changes_no_token(llm, jobs):
    assert_preemption_changes_nothing(llm, jobs)


@pytest.mark.parametrize("cache", ["none", "dual"])
def test_osdt_equals_a_plain_implementation(llm, network, cache):
    canvas = {"gen_length": 32, "block_length": 8, "cache_mode": cache}

    def decode_one(prompt, rule):
        return decode(network, prompt, rule, **canvas)

    assert_osdt_equals_a_plain_implementation(llm, decode_one, f"illada {cache}", {**canvas, "max_tokens": 32})
