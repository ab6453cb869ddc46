"""Stable-DiffCoder in vLLM against the same network in plain PyTorch.

And a config that is Llama's but for its architecture, beside ordinary Llama configs, which are none of our business.
"""

import json

import pytest

from tests.reference.stable_diffcoder import ReferenceStableDiffcoder, make_stable_diffcoder_checkpoint
from vllm_osdt.errors import UnsupportedModelError
from vllm_osdt.models.configs.parser import CanvasConfigParser
from vllm_osdt.models.configs.stable_diffcoder import StableDiffcoderConfig
from vllm_osdt.plugin import register

# config.json of ByteDance-Seed/Stable-DiffCoder-8B-Instruct, of the commit "Update to support transformers v5.3.0"
# (7fb85466). The page that shows it ends at torch_dtype; the last two lines are those of the copy in
# PrunaAI/ByteDance-Seed-Stable-DiffCoder-8B-Instruct-HQQ-8bit-smashed. Mask token 5, block 4, no shift and the rule for
# a threshold are of modeling_stable_diffcoder.py in that commit.
PUBLISHED = {
    "architectures": ["StableDiffcoderForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_stable_diffcoder.StableDiffcoderForCausalLM"},
    "attention_bias": False,
    "attention_dropout": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.009882118,
    "intermediate_size": 14336,
    "layer_norm_eps": None,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "resid_pdrop": 0.1,
    "rms_norm_eps": 1e-06,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 155136,
}


def read(folder, fields, **overrides):
    """The config that vLLM makes of a checkpoint's and an operator's overrides."""
    from vllm.transformers_utils.config import get_config

    register()
    (folder / "config.json").write_text(json.dumps(fields))
    return get_config(str(folder), trust_remote_code=False, hf_overrides_kw=overrides)


@pytest.mark.e2e
@pytest.mark.parametrize(
    "fields",
    [
        {"num_key_value_heads": 3, "num_hidden_layers": 3, "rope_theta": 1e4},
        {"tie_word_embeddings": True, "hidden_size": 160, "intermediate_size": 136, "num_attention_heads": 5},
        {"head_dim": 64, "num_attention_heads": 6, "num_key_value_heads": 2, "num_hidden_layers": 1, "vocab_size": 131},
    ],
    ids=["no groups", "tied, odd widths", "one layer, wide heads in groups of three"],
)
def test_logits_equal_those_of_the_plain_network(tmp_path, monkeypatch, start_llm, fields):
    from tests.e2e.jobs import assert_first_logits_equal

    folder = make_stable_diffcoder_checkpoint(tmp_path / "model", seed=4, **fields)
    llm = start_llm(folder, max_num_seqs=4, max_model_len=128)
    assert_first_logits_equal(llm, ReferenceStableDiffcoder.load(folder), monkeypatch, block_length=16)


def test_the_published_config_loads_without_remote_code(tmp_path):
    config = read(tmp_path, PUBLISHED)
    assert type(config) is StableDiffcoderConfig and config.architectures == ["StableDiffcoderForCausalLM"]
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (32, 8, 128)
    assert (config.hidden_size, config.intermediate_size, config.vocab_size) == (4096, 14336, 155136)
    assert (config.num_hidden_layers, config.max_position_embeddings, config.rms_norm_eps) == (32, 8192, 1e-6)
    assert (config.mask_token_id, config.block_length, config.canvas_length) == (5, 4, 4)
    assert (config.logits_shift, config.is_block_causal, config.is_threshold_strict) == (0, True, False)
    assert (config.eos_token_id, config.tie_word_embeddings, config.name_or_path) == (2, False, str(tmp_path))
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 500000.0}


def test_its_block_is_no_guess(tmp_path):
    """No warning that the config does not say it, as of families whose checkpoints differ."""
    assert read(tmp_path, PUBLISHED).assumed_block_length is None
    assert read(tmp_path, PUBLISHED, block_size=8).block_length == 8


@pytest.mark.parametrize("architectures", [["LlamaForCausalLM"], ["LlamaForSequenceClassification"], None])
def test_an_ordinary_llama_config_is_the_one_of_transformers(tmp_path, monkeypatch, architectures):
    from transformers import AutoConfig, LlamaConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from vllm.transformers_utils.config import HFConfigParser, get_config_parser

    read(tmp_path, PUBLISHED)  # leaves nothing behind
    fields = {name: value for name, value in PUBLISHED.items() if name != "auto_map"}
    config = read(tmp_path, {**fields, "architectures": architectures})
    assert type(config) is type(AutoConfig.from_pretrained(tmp_path)) is CONFIG_MAPPING["llama"] is LlamaConfig
    assert config.to_dict() == AutoConfig.from_pretrained(tmp_path).to_dict() | {"architectures": config.architectures}
    seen = []
    parse = HFConfigParser.parse
    monkeypatch.setattr(HFConfigParser, "parse", lambda *args, **kwargs: seen.append(parse(*args, **kwargs)) or seen[0])
    parser = get_config_parser("hf")
    assert type(parser) is CanvasConfigParser
    got = parser.parse(tmp_path, trust_remote_code=False)
    assert got[0] is seen[0][0] and got[1] is seen[0][1]


def test_an_operator_may_name_the_architecture_of_a_checkpoint_that_does_not(tmp_path):
    """As PrunaAI's copy, which says LlamaForCausalLM."""
    copy = {**PUBLISHED, "architectures": ["LlamaForCausalLM"]}
    named = read(tmp_path, copy, architectures=["StableDiffcoderForCausalLM"])
    assert type(named) is StableDiffcoderConfig and named.block_length == 4
    assert type(read(tmp_path, PUBLISHED, architectures=["LlamaForCausalLM"])) is not StableDiffcoderConfig


@pytest.mark.parametrize("change", [{"hidden_act": "gelu"}, {"attention_bias": True}, {"mlp_bias": True}], ids=str)
def test_what_is_not_implemented_is_refused_by_name(tmp_path, change):
    with pytest.raises(UnsupportedModelError, match=f"Stable-DiffCoder config field {next(iter(change))}"):
        StableDiffcoderConfig(**{**PUBLISHED, **change})
