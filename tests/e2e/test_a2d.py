"""Tiny-A2D: decoding as a plain loop does, over the whole canvas in all cache modes, and in blocks.

Made of a Llama, the network is iLLaDA's or, in blocks, Stable-DiffCoder's; tests/models/test_a2d.py has all six.
"""

from functools import partial

import pytest

from tests.e2e.jobs import (
    assert_company_changes_nothing,
    assert_one_batch_is_right,
    assert_osdt_equals_a_plain_implementation,
    assert_preemption_changes_nothing,
    make_canvas_jobs,
    make_jobs,
)
from tests.reference.a2d import ReferenceA2D, load_block_causal, make_a2d_checkpoint
from tests.reference.block_causal import decode_block_causal
from tests.reference.decode import decode

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module", params=["qwen3", "qwen2"])
def canvas(request, tmp_path_factory, start_llm):
    """An engine, the network and requests."""
    name = f"{request.param}-diffusion-mdlm-v0.1"
    folder = make_a2d_checkpoint(tmp_path_factory.mktemp("a2d") / name, base=request.param, seed=3)
    network = ReferenceA2D.load(folder)
    return start_llm(folder, max_num_seqs=64, max_model_len=256), network, make_canvas_jobs(network)


@pytest.fixture(scope="module")
def blocks(tmp_path_factory, start_llm):
    """The same of a checkpoint that was trained in blocks."""
    folder = tmp_path_factory.mktemp("a2d") / "qwen3-diffusion-bd3lm-v0.1"
    make_a2d_checkpoint(folder, base="qwen3", seed=3)
    network = load_block_causal(folder, "qwen3")
    jobs = make_jobs(partial(decode_block_causal, network), [{"block_length": length} for length in (4, 8, 32)])
    assert len(jobs) >= 50
    return start_llm(folder, max_num_seqs=64, max_model_len=256), network, jobs


def test_one_batch_decodes_as_a_plain_loop_does_in_as_many_forwards(canvas):
    llm, _, jobs = canvas
    assert_one_batch_is_right(llm, jobs)


@pytest.mark.parametrize("canvas", ["qwen3"], indirect=True)
def test_neither_company_nor_preemption_changes_a_token(canvas):
    llm, _, jobs = canvas
    assert_company_changes_nothing(llm, jobs, num_alone=5)
    assert_preemption_changes_nothing(llm, jobs)


@pytest.mark.parametrize("canvas", ["qwen3"], indirect=True)
def test_osdt_equals_a_plain_implementation(canvas):
    llm, network, _ = canvas
    options = {"gen_length": 32, "block_length": 8, "cache_mode": "dual"}

    def decode_one(prompt, rule):
        return decode(network, prompt, rule, **options)

    assert_osdt_equals_a_plain_implementation(llm, decode_one, "a2d", {**options, "max_tokens": 32})


def test_one_batch_decodes_in_blocks_as_a_plain_loop_does_in_as_many_forwards(blocks):
    llm, _, jobs = blocks
    assert_one_batch_is_right(llm, jobs)


def test_neither_company_nor_preemption_changes_a_token_in_blocks(blocks):
    llm, _, jobs = blocks
    assert_company_changes_nothing(llm, jobs, num_alone=5)
    assert_preemption_changes_nothing(llm, jobs)


def test_osdt_in_blocks_equals_a_plain_implementation(blocks):
    llm, network, _ = blocks
    decode_one = partial(decode_block_causal, network, block_length=8, max_tokens=32)
    assert_osdt_equals_a_plain_implementation(llm, decode_one, "a2d", {"block_length": 8, "max_tokens": 32})
