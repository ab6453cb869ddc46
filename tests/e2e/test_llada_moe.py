"""LLaDA-MoE: logits of a plain network, and decoding as a plain loop does, in all cache modes."""

import json

import pytest
import torch

from tests.e2e.engine import generate, sampling, watch_logits
from tests.e2e.jobs import (
    assert_company_changes_nothing,
    assert_one_batch_is_right,
    assert_osdt_equals_a_plain_implementation,
    assert_preemption_changes_nothing,
    make_canvas_jobs,
)
from tests.reference.decode import decode
from tests.reference.llada_moe import ReferenceLLaDAMoE, make_llada_moe_checkpoint
from vllm_osdt.errors import UnsupportedModelError
from vllm_osdt.models.configs.llada2 import LLaDA2MoeConfig
from vllm_osdt.models.configs.llada_moe import LLaDAMoEConfig
from vllm_osdt.plugin import register

pytestmark = pytest.mark.e2e

# The fields of inclusionAI/LLaDA-MoE-7B-A1B's own config class, with its defaults.
PUBLISHED = {
    "architectures": ["LLaDAMoEModelLM"],
    "attention_bias": False,
    "clip_qkv": None,
    "dense_intermediate_size": 8192,
    "expert_intermediate_size": 1024,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "max_position_embeddings": 8192,
    "model_type": "llada",
    "moe_layer_freq": [1] * 16,
    "moe_router_enable_expert_bias": False,
    "moe_router_score_function": "softmax",
    "norm_topk_prob": None,
    "num_attention_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 16,
    "num_key_value_heads": 16,
    "partial_rotary_factor": 1,
    "qk_layernorm": True,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 50000,
    "routed_scaling_factor": 1,
    "router_num_group": None,
    "router_topk_group": None,
    "shared_expert_intermediate_size": None,
    "tie_word_embeddings": False,
    "vocab_size": 157184,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_llada_moe_checkpoint(tmp_path_factory.mktemp("llada_moe") / "model", seed=2)


@pytest.fixture(scope="module")
def network(checkpoint):
    return ReferenceLLaDAMoE.load(checkpoint)


@pytest.fixture(scope="module")
def llm(checkpoint, start_llm):
    return start_llm(checkpoint, max_num_seqs=64, max_model_len=256)


def test_logits_equal_those_of_the_plain_network(llm, network, monkeypatch):
    seen = []
    watch_logits(monkeypatch, lambda logits, _: seen.append(logits))
    prompt = list(range(3, 40))
    generate(llm, [prompt], sampling(16, policy="static_threshold", block_length=16, cache_mode="none"))
    full, _ = network.forward(torch.tensor(prompt + [network.mask_token_id] * 16))
    assert full.std() > 0.5
    torch.testing.assert_close(seen[0], full[len(prompt) :], rtol=1e-5, atol=2e-4)


@pytest.fixture(scope="module")
def jobs(network):
    return make_canvas_jobs(network)


def test_one_batch_decodes_as_a_plain_loop_does_in_as_many_forwards(llm, jobs):
    assert_one_batch_is_right(llm, jobs)


def test_neither_order_nor_company_changes_a_token(llm, jobs):
    assert_company_changes_nothing(llm, jobs)


def test_preemption_in_mid_block_changes_no_token(llm, jobs):
    assert_preemption_changes_nothing(llm, jobs)


def test_osdt_equals_a_plain_implementation(llm, network):
    canvas = {"gen_length": 32, "block_length": 8, "cache_mode": "dual"}

    def decode_one(prompt, rule):
        return decode(network, prompt, rule, **canvas)

    assert_osdt_equals_a_plain_implementation(llm, decode_one, "llada-moe", {**canvas, "max_tokens": 32})


@pytest.mark.parametrize("model_type", ["llada", "llada_moe", "lladamoe"])
def test_the_published_config_loads_without_remote_code_whatever_its_model_type(tmp_path, model_type):
    from vllm.transformers_utils.config import get_config

    register()
    (tmp_path / "config.json").write_text(json.dumps({**PUBLISHED, "model_type": model_type}))
    config = get_config(str(tmp_path), trust_remote_code=False)
    assert type(config) is LLaDAMoEConfig and config.architectures == ["LLaDAMoEModelLM"]
    assert (config.mask_token_id, config.canvas_length, config.head_dim) == (156895, 32, 128)
    assert (config.moe_intermediate_size, config.norm_topk_prob) == (1024, False)
    assert (config.rope_parameters["rope_type"], config.rope_parameters["rope_theta"]) == ("default", 50000.0)


@pytest.mark.parametrize(
    "change",
    [{"qk_layernorm": False}, {"router_num_group": 4}, {"norm_topk_prob": True}, {"moe_layer_freq": [1, 0]}],
    ids=str,
)
def test_what_is_not_implemented_is_refused_by_name(change):
    with pytest.raises(UnsupportedModelError, match=next(iter(change))):
        LLaDAMoEConfig(**{**PUBLISHED, **change})


def test_rotary_parameters_in_the_new_form_hold():
    rope = {"rope_type": "default", "rope_theta": 1234.0}
    assert LLaDAMoEConfig(rope_parameters=rope).rope_parameters == rope
    half = LLaDA2MoeConfig(rope_parameters={**rope, "partial_rotary_factor": 0.25})
    assert (half.rope_parameters["rope_theta"], half.partial_rotary_factor) == (1234.0, 0.25)
