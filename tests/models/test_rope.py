"""RoPE settings reach every family, however a checkpoint or an operator spells them."""

import json
from functools import partial

import pytest
import torch

from tests.e2e.engine import generate, sampling, watch_logits
from tests.e2e.jobs import LOGIT_TOLERANCE, assert_first_causal_logits_equal, assert_first_logits_equal
from tests.reference.a2d import ReferenceA2D, make_a2d_checkpoint
from tests.reference.block_causal import ReferenceFastDLLMv2, ReferenceLLaDA2, ReferenceSDAR
from tests.reference.block_causal_checkpoints import (
    make_fast_dllm_v2_checkpoint,
    make_llada2_checkpoint,
    make_sdar_checkpoint,
)
from tests.reference.dream import ReferenceDream, make_dream_checkpoint
from tests.reference.illada import ReferenceILLaDA, make_illada_checkpoint
from tests.reference.llada import ReferenceLLaDA, make_checkpoint
from tests.reference.llada_moe import ReferenceLLaDAMoE, make_llada_moe_checkpoint
from tests.reference.nemotron_labs_diffusion import ReferenceNemotron, make_nemotron_checkpoint
from tests.reference.rope import frequencies
from tests.reference.stable_diffcoder import ReferenceStableDiffcoder, make_stable_diffcoder_checkpoint
from vllm_osdt.plugin import register

THETA = 5000.0
YARN = {"factor": 8.0, "original_max_position_embeddings": 16}
BY_TYPE = {"type": "yarn", **YARN}
BY_ROPE_TYPE = {"rope_type": "yarn", **YARN}
# What a checkpoint's config says, and what the operator overrides.
SPELLINGS = {
    "rope_scaling, type": ({"rope_theta": THETA, "rope_scaling": BY_TYPE}, {}),
    "rope_scaling, rope_type": ({"rope_theta": THETA, "rope_scaling": BY_ROPE_TYPE}, {}),
    "rope_parameters": ({"rope_parameters": {**BY_ROPE_TYPE, "rope_theta": THETA}}, {}),
    "rope_parameters, theta beside": ({"rope_theta": THETA, "rope_parameters": BY_ROPE_TYPE}, {}),
    "rope_parameters, type": ({"rope_parameters": {**BY_TYPE, "rope_theta": THETA}}, {}),
    "override of rope_scaling": ({"rope_theta": THETA}, {"rope_scaling": BY_TYPE}),
    "override of rope_parameters": ({"rope_theta": THETA}, {"rope_parameters": BY_ROPE_TYPE}),
    "override of both": ({"rope_theta": 7.0}, {"rope_parameters": {**BY_ROPE_TYPE, "rope_theta": THETA}}),
    "override of rope_theta": ({"rope_theta": 7.0, "rope_scaling": BY_TYPE}, {"rope_theta": THETA}),
}


def make_sdar_moe(folder, **fields):
    return make_sdar_checkpoint(folder, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=96, **fields)


# Experts first: vLLM makes their process groups with a process's first engine.
FAMILIES = {
    "sdar_moe": (make_sdar_moe, ReferenceSDAR),
    "llada2_moe": (make_llada2_checkpoint, ReferenceLLaDA2),
    "llada_moe": (make_llada_moe_checkpoint, ReferenceLLaDAMoE),
    "llada": (make_checkpoint, ReferenceLLaDA),
    "dream": (make_dream_checkpoint, ReferenceDream),
    "sdar": (make_sdar_checkpoint, ReferenceSDAR),
    "fast_dllm_v2": (make_fast_dllm_v2_checkpoint, ReferenceFastDLLMv2),
    "illada": (make_illada_checkpoint, ReferenceILLaDA),
    "stable_diffcoder": (make_stable_diffcoder_checkpoint, ReferenceStableDiffcoder),
    "a2d_qwen3": (partial(make_a2d_checkpoint, base="qwen3"), ReferenceA2D),
    "a2d_qwen2": (partial(make_a2d_checkpoint, base="qwen2"), ReferenceA2D),
    "a2d_llama": (partial(make_a2d_checkpoint, base="llama"), ReferenceA2D),
    "nemotron_labs_diffusion": (make_nemotron_checkpoint, ReferenceNemotron),
}


def write(folder, fields, remove=("rope_theta", "rope_scaling", "rope_parameters")):
    """Put RoPE settings in place of a checkpoint's."""
    path = folder / "config.json"
    config = {name: value for name, value in json.loads(path.read_text()).items() if name not in remove}
    path.write_text(json.dumps({**config, **fields}))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    register()
    return {name: make(tmp_path_factory.mktemp(name) / "model", seed=2) for name, (make, _) in FAMILIES.items()}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_spelling_means_the_same(checkpoints, family, spelling):
    from vllm.config import ModelConfig

    fields, overrides = SPELLINGS[spelling]
    write(checkpoints[family], fields)
    config = ModelConfig(str(checkpoints[family]), hf_overrides=overrides, skip_tokenizer_init=True).hf_config
    partial = {"partial_rotary_factor": 0.5} if family == "llada2_moe" else {}
    found = {name: value for name, value in config.rope_parameters.items() if name != "type"}
    assert found == {**BY_ROPE_TYPE, "rope_theta": THETA, **partial}


def test_an_override_without_the_original_range_has_the_models(checkpoints):
    from vllm.config import ModelConfig

    write(checkpoints["llada"], {"rope_theta": THETA})
    arguments = {"hf_overrides": {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "skip_tokenizer_init": True}
    config = ModelConfig(str(checkpoints["llada"]), **arguments).hf_config
    assert config.rope_parameters["original_max_position_embeddings"] == config.max_position_embeddings == 256


def test_an_override_of_null_takes_the_scaling_away(checkpoints):
    from vllm.config import ModelConfig

    write(checkpoints["llada"], SPELLINGS["rope_scaling, type"][0])
    arguments = {"hf_overrides": {"rope_scaling": None}, "skip_tokenizer_init": True}
    config = ModelConfig(str(checkpoints["llada"]), **arguments).hf_config
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": THETA}


@pytest.mark.e2e
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_beyond_the_original_range_equal_those_of_the_plain_network(checkpoints, start_llm, monkeypatch, family):
    folder, reference = checkpoints[family], FAMILIES[family][1]
    index = list(FAMILIES).index(family)
    fields, overrides = SPELLINGS[list(SPELLINGS)[index % len(SPELLINGS)]]  # another one for each of the first
    write(folder, {"rope_theta": THETA, "rope_scaling": BY_TYPE})
    network = reference.load(folder)
    plain, _ = frequencies(32, {"rope_theta": THETA})
    assert not torch.equal(frequencies(32, network.config)[0], plain)
    write(folder, fields)
    llm = start_llm(folder, max_num_seqs=4, max_model_len=128, hf_overrides=overrides)
    if isinstance(network, ReferenceNemotron):
        assert_first_causal_logits_equal(llm, network, monkeypatch, "causal_fused")
        return
    if not isinstance(network, ReferenceLLaDA):
        parts = {"sub_block_length": 16} if family == "fast_dllm_v2" else {}
        assert_first_logits_equal(llm, network, monkeypatch, block_length=16, **parts)  # up to position 64
        return
    seen = []
    watch_logits(monkeypatch, lambda logits, _: seen.append(logits))
    prompt = list(range(8, 58))
    generate(llm, [prompt], sampling(32, policy="static_threshold", block_length=16, cache_mode="none"))
    full, _ = network.forward(torch.tensor(prompt + [network.mask_token_id] * 32))
    first = len(prompt) - network.logits_shift
    assert full.std() > 0.5
    torch.testing.assert_close(seen[0], full[first : first + 16], rtol=1e-5, atol=LOGIT_TOLERANCE)


def test_a_context_beyond_the_scaled_range_is_refused(checkpoints, start_llm):
    """vLLM's tables end there, and what it reads behind them is no angle."""
    write(checkpoints["llada"], {"rope_theta": THETA, "rope_scaling": BY_TYPE})
    with pytest.raises(ValueError, match=r"max_model_len is 129, but .* 16 positions by 8, to 128"):
        start_llm(checkpoints["llada"], max_num_seqs=4, max_model_len=129)


def test_a_scaling_that_vllm_does_not_know_is_refused_by_name(checkpoints, start_llm):
    write(checkpoints["llada"], {"rope_theta": THETA, "rope_scaling": {"rope_type": "spiral", "factor": 2.0}})
    with pytest.raises(ValueError, match="spiral"):
        start_llm(checkpoints["llada"], max_num_seqs=4, max_model_len=128)
