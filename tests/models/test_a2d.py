"""Tiny-A2D in vLLM against the same networks in plain PyTorch, and what loads without remote code."""

import json

import pytest

from tests.reference.a2d import ReferenceA2D, load_block_causal, make_a2d_checkpoint
from vllm_osdt.errors import UnsupportedModelError
from vllm_osdt.models.configs.a2d import A2DLlamaConfig, A2DQwen2Config, A2DQwen3Config
from vllm_osdt.plugin import register

# dllm-hub/Qwen3-0.6B-diffusion-mdlm-v0.1 and -bd3lm-v0.1: config.json was not found. Architecture and model type are of
# dLLM's model files (ZHZisZZ/dllm, dllm/pipelines/a2d/models), sizes are those of Qwen/Qwen3-0.6B; the mask token is
# behind that model's last one, where dLLM's get_tokenizer adds it (a port that was checked against the mdlm checkpoint
# has 151669 too).
QWEN3 = {
    "architectures": ["A2DQwen3LMHeadModel"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "a2d-qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
# dllm-hub/Qwen2.5-Coder-0.5B-Instruct-diffusion-mdlm-v0.1 and -bd3lm-v0.1, likewise: sizes of
# Qwen/Qwen2.5-Coder-0.5B-Instruct; added_tokens.json has one entry more than that model's, for 151665.
QWEN2 = {
    "architectures": ["A2DQwen2LMHeadModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 24,
    "model_type": "a2d-qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
# No checkpoint made of a Llama was found; sizes are those of meta-llama/Llama-3.2-1B, the mask token is this test's.
LLAMA = {
    "architectures": ["A2DLlamaLMHeadModel"],
    "attention_bias": False,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "a2d-llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "vocab_size": 128257,
}
CLASSES = [(A2DQwen3Config, QWEN3), (A2DQwen2Config, QWEN2), (A2DLlamaConfig, LLAMA)]

SIZES = {
    "qwen3": {"tie_word_embeddings": True, "num_attention_heads": 4, "num_key_value_heads": 2},
    "qwen2": {"tie_word_embeddings": True, "rope_theta": 1e4, "rms_norm_eps": 1e-4},
    "llama": {"num_key_value_heads": 3, "intermediate_size": 88, "num_hidden_layers": 3},
}


@pytest.mark.e2e
@pytest.mark.parametrize("base", SIZES)
def test_logits_equal_those_of_the_plain_network(tmp_path, monkeypatch, start_llm, base):
    from tests.e2e.jobs import assert_first_canvas_logits_equal

    folder = make_a2d_checkpoint(tmp_path / "model", base=base, seed=4, **SIZES[base])
    llm = start_llm(folder, max_num_seqs=4, max_model_len=128)
    assert_first_canvas_logits_equal(llm, ReferenceA2D.load(folder), monkeypatch)


@pytest.mark.e2e
@pytest.mark.parametrize("base", SIZES)
def test_logits_in_blocks_equal_those_of_the_plain_network(tmp_path, monkeypatch, start_llm, base):
    from tests.e2e.jobs import assert_first_logits_equal

    folder = make_a2d_checkpoint(tmp_path / f"{base}-bd3lm-v0.1", base=base, seed=5, **SIZES[base])
    llm = start_llm(folder, max_num_seqs=4, max_model_len=128)
    assert_first_logits_equal(llm, load_block_causal(folder, base), monkeypatch, block_length=16)


def read(folder, fields, **overrides):
    """The config that vLLM makes of a checkpoint's and an operator's overrides."""
    from vllm.transformers_utils.config import get_config

    register()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    return get_config(str(folder), trust_remote_code=False, hf_overrides_kw=overrides)


@pytest.mark.parametrize(
    ("own", "fields", "mask_token_id"), [(*CLASSES[0], 151669), (*CLASSES[1], 151665), (*CLASSES[2], None)]
)
def test_a_config_loads_without_remote_code(tmp_path, own, fields, mask_token_id):
    config = read(tmp_path, fields)
    assert type(config) is own
    assert (config.mask_token_id, config.block_length, config.canvas_length) == (mask_token_id, 32, 32)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": float(fields["rope_theta"])}
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "tie_word_embeddings")
    assert {name: getattr(config, name) for name in names} == {name: fields[name] for name in names}
    assert config.sliding_window is None if own is not A2DLlamaConfig else config.head_dim == 64
    assert config.logits_shift == 0 and not config.is_threshold_strict


@pytest.mark.parametrize(
    ("folder", "overrides", "is_block_causal"),
    [
        ("Qwen3-0.6B-diffusion-mdlm-v0.1", {}, False),
        ("Qwen3-0.6B-diffusion-bd3lm-v0.1", {}, True),
        ("Qwen3-0.6B-diffusion-bd3lm-v0.1", {"block_causal": False}, False),
        ("my-model", {"block_causal": True}, True),
        ("bd3lm/my-model", {}, False),
        ("models--dllm-hub--Qwen3-0.6B-diffusion-bd3lm-v0.1/snapshots/0a1b2c", {}, True),
        ("models--dllm-hub--Qwen3-0.6B-diffusion-mdlm-v0.1/snapshots/0a1b2c", {}, False),
    ],
)
def test_the_name_says_what_was_trained_in_blocks_unless_the_config_does(tmp_path, folder, overrides, is_block_causal):
    assert read(tmp_path / folder, QWEN3, **overrides).is_block_causal is is_block_causal


@pytest.mark.parametrize(("is_block_causal", "cache"), [(True, "block"), (False, "dual")])
def test_an_engine_has_the_cache_of_what_attention_sees(tmp_path, is_block_causal, cache):
    from vllm.engine.arg_utils import EngineArgs

    from vllm_osdt.options.operator import default_decoding_options

    folder = make_a2d_checkpoint(tmp_path / "model", base="qwen3", block_causal=is_block_causal)
    config = EngineArgs(model=str(folder), skip_tokenizer_init=True).create_engine_config()
    assert (default_decoding_options(config).cache_mode, default_decoding_options(config).block_length) == (cache, 32)


def test_a_llama_without_a_mask_token_is_refused_until_an_operator_names_it(tmp_path):
    from vllm.engine.arg_utils import EngineArgs

    folder = make_a2d_checkpoint(tmp_path / "model", base="llama")
    config = json.loads((folder / "config.json").read_text())
    del config["mask_token_id"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"A2D-Llama config field mask_token_id is None; .* --hf-overrides"):
        EngineArgs(model=str(folder), skip_tokenizer_init=True).create_engine_config()
    named = EngineArgs(model=str(folder), skip_tokenizer_init=True, hf_overrides={"mask_token_id": 100})
    assert named.create_engine_config().model_config.hf_config.mask_token_id == 100


@pytest.mark.parametrize(
    ("own", "fields", "change"),
    [
        (A2DQwen3Config, QWEN3, {"use_sliding_window": True}),
        (A2DQwen3Config, QWEN3, {"block_causal": "yes"}),
        (A2DQwen2Config, QWEN2, {"use_sliding_window": True}),
        (A2DQwen2Config, QWEN2, {"hidden_act": "gelu"}),
        (A2DLlamaConfig, LLAMA, {"attention_bias": True}),
        (A2DLlamaConfig, LLAMA, {"mlp_bias": True}),
        (A2DLlamaConfig, LLAMA, {"block_length": 129}),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(own, fields, change):
    [name] = change
    with pytest.raises(UnsupportedModelError, match=f"{own.family} config field {name} is"):
        own(**{**fields, **change})
