"""Configs of Nemotron-Labs-Diffusion: the public ones, and what is refused."""

import json

import pytest

from vllm_osdt.errors import UnsupportedModelError
from vllm_osdt.models.configs.nemotron_labs_diffusion import NemotronLabsDiffusionConfig
from vllm_osdt.plugin import register

# config.json of nvidia/Nemotron-Labs-Diffusion-3B-Base and -14B, as far as public code that reads them shows them.
BASE_3B = {
    "architectures": ["NemotronLabsDiffusionModel"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_implementation": "sdpa",
    "block_size": 32,
    "bos_token_id": 1,
    "dlm_loss_weight": None,
    "dlm_paradigm": "bidirectional",
    "dp_varying_mask_ratio": False,
    "eos_token_id": 2,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "intermediate_size": 9216,
    "mask_token_id": 100,
    "max_position_embeddings": 4096,
    "mlp_bias": False,
    "model_type": "nemotron_labs_diffusion",
    "num_attention_heads": 32,
    "num_hidden_layers": 26,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_parameters": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 0.25,
        "llama_4_scaling_beta": 0.1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 16384,
        "rope_theta": 1000000.0,
        "rope_type": "yarn",
    },
    "sliding_window": None,
    "tie_word_embeddings": False,
    "vocab_size": 131072,
}
INSTRUCT_14B = {
    **BASE_3B,
    "eos_token_id": 11,
    "hidden_size": 5120,
    "intermediate_size": 16384,
    "max_position_embeddings": 262144,
    "num_hidden_layers": 40,
    "rope_parameters": {**BASE_3B["rope_parameters"], "factor": 16.0, "rope_theta": 1000000000.0},
}


def read(folder, fields, **overrides):
    """The config that vLLM makes of a checkpoint's and an operator's overrides."""
    from vllm.transformers_utils.config import get_config

    register()
    (folder / "config.json").write_text(json.dumps(fields))
    return get_config(str(folder), trust_remote_code=False, hf_overrides_kw=overrides)


@pytest.mark.parametrize(("fields", "context"), [(BASE_3B, 4096), (INSTRUCT_14B, 262144)], ids=["3B-Base", "14B"])
def test_the_published_configs_load_without_remote_code(tmp_path, fields, context):
    from vllm.config import ModelConfig

    config = read(tmp_path, {**fields, "auto_map": {"AutoModel": "modeling_nemotron_labs_diffusion.Model"}})
    assert type(config) is NemotronLabsDiffusionConfig
    assert (config.hidden_size, config.head_dim, config.num_hidden_layers) == (
        fields["hidden_size"],
        128,
        fields["num_hidden_layers"],
    )
    assert (config.mask_token_id, config.block_length, config.canvas_length) == (100, 32, 32)
    assert config.eos_token_id == fields["eos_token_id"]
    assert config.rope_parameters == fields["rope_parameters"]
    assert config.llama_4_scaling == {"beta": 0.1, "original_max_position_embeddings": 16384}
    traits = config.traits
    assert traits.is_block_causal and traits.commits_causally
    assert (traits.logits_shift, traits.is_threshold_strict) == (0, False)
    assert ModelConfig(str(tmp_path), skip_tokenizer_init=True).max_model_len == context


def test_a_checkpoint_that_was_trained_on_is_the_same_model(tmp_path):
    assert read(tmp_path, {**BASE_3B, "dlm_paradigm": "block_diff"}).block_length == 32


def test_queries_may_go_unscaled(tmp_path):
    rope = {"rope_type": "default", "rope_theta": 1e6}
    assert read(tmp_path, {**BASE_3B, "rope_parameters": rope}).llama_4_scaling is None


def test_a_scaling_that_counts_in_nothing_is_refused():
    rope = {"rope_type": "default", "rope_theta": 1e6, "llama_4_scaling_beta": 0.1}
    with pytest.raises(UnsupportedModelError, match=r"llama_4_scaling_beta 0\.1, but no original_max_position_embedd"):
        NemotronLabsDiffusionConfig(**{**BASE_3B, "rope_parameters": rope})
