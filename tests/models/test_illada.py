"""iLLaDA in vLLM against the same network in plain PyTorch, and what loads without remote code."""

import json

import pytest

from tests.reference.illada import ReferenceILLaDA, make_illada_checkpoint
from vllm_osdt.errors import UnsupportedModelError
from vllm_osdt.models.configs.illada import ILLaDAConfig
from vllm_osdt.plugin import register

# What is public of GSAI-ML/iLLaDA-8B-Base and -Instruct: sizes are the paper's (arXiv 2606.25331), fields are those
# that modeling_illada.py reads, mask token 5 is of LLaDA's README (2026-06-24), 291 tensors with one for the output
# matrix and the end token are of programs that load it. Neither config.json nor configuration_illada.py was found;
# rope_theta is a value of this test, and the config class has no default for it.
PUBLISHED = {
    "architectures": ["ILLaDAForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_illada.ILLaDAConfig",
        "AutoModelForCausalLM": "modeling_illada.ILLaDAForCausalLM",
    },
    "attention_bias": False,
    "attention_dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "layer_norm_eps": None,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "illada",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 123456.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 155136,
}


@pytest.mark.e2e
@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 5e5},
        {"weight_tying": False, "n_kv_heads": 4, "mlp_hidden_size": 88, "rms_norm_eps": 1e-3},
        {"d_model": 160, "n_heads": 5, "n_kv_heads": 1, "n_layers": 1, "vocab_size": 131, "embedding_size": 131},
    ],
    ids=["tied, with a copy", "not tied, no groups", "one layer, one kv head, odd width"],
)
def test_logits_equal_those_of_the_plain_network(tmp_path, monkeypatch, start_llm, fields):
    from tests.e2e.jobs import assert_first_canvas_logits_equal

    folder = make_illada_checkpoint(tmp_path / "model", seed=4, **fields)
    llm = start_llm(folder, max_num_seqs=4, max_model_len=128)
    assert_first_canvas_logits_equal(llm, ReferenceILLaDA.load(folder), monkeypatch)


def test_what_is_public_of_its_config_loads_without_remote_code(tmp_path):
    from vllm.transformers_utils.config import get_config

    register()
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED))
    config = get_config(str(tmp_path), trust_remote_code=False)
    assert type(config) is ILLaDAConfig
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (32, 8, 128)
    assert (config.hidden_size, config.intermediate_size, config.vocab_size) == (4096, 14336, 155136)
    assert (config.mask_token_id, config.block_length, config.canvas_length) == (5, 32, 32)
    assert (config.tie_word_embeddings, config.max_position_embeddings, config.eos_token_id) == (True, 8192, 2)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 123456.0}
    assert config.logits_shift == 0 and not config.is_block_causal


def test_sizes_of_the_paper_are_the_defaults():
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    names += ("vocab_size", "max_position_embeddings", "tie_word_embeddings")
    config = ILLaDAConfig(rope_theta=1.0)
    assert {name: getattr(config, name) for name in names} == {name: PUBLISHED[name] for name in names}


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_act": "gelu"},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"layer_norm_eps": 1e-5},
        {"head_dim": 64},
        {"block_length": 0},
    ],
    ids=str,
)
def test_what_is_not_implemented_is_refused_by_name(change):
    with pytest.raises(UnsupportedModelError, match=f"iLLaDA config field {next(iter(change))} is"):
        ILLaDAConfig(**{**PUBLISHED, **change})


@pytest.mark.parametrize(
    "rope", [{}, {"rope_parameters": {"rope_type": "default"}}, {"rope_scaling": {"type": "linear", "factor": 2.0}}]
)
def test_a_rotary_base_is_not_made_up(rope):
    fields = {name: value for name, value in PUBLISHED.items() if not name.startswith("rope_")}
    with pytest.raises(UnsupportedModelError, match="iLLaDA config field rope_theta is absent"):
        ILLaDAConfig(**{**fields, **rope})
