"""The block-causal families: logits at odd sizes, and what loads without remote code."""

import json

import pytest

from tests.reference.block_causal import ReferenceFastDLLMv2, ReferenceSDAR
from tests.reference.block_causal_checkpoints import make_fast_dllm_v2_checkpoint, make_sdar_checkpoint
from vllm_osdt.errors import UnsupportedModelError

# config.json of the published checkpoints, without what only their own code reads.
PUBLISHED = {
    "JetLM/SDAR-8B-Chat": {
        "architectures": ["SDARForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration_sdar.SDARConfig", "AutoModelForCausalLM": "modeling_sdar.SDAR"},
        "bos_token_id": 151643,
        "eos_token_id": 151643,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "max_position_embeddings": 32768,
        "max_window_layers": 36,
        "model_type": "sdar",
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "JetLM/SDAR-30B-A3B-Chat": {
        "architectures": ["SDARMoeForCausalLM"],
        "decoder_sparse_step": 1,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "max_position_embeddings": 32768,
        "mlp_only_layers": [],
        "model_type": "sdar_moe",
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "rope_theta": 1000000.0,
        "torch_dtype": "bfloat16",
        "vocab_size": 151936,
    },
    "inclusionAI/LLaDA2.1-mini": {
        "architectures": ["LLaDA2MoeModelLM"],
        "first_k_dense_replace": 1,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 5120,
        "max_position_embeddings": 32768,
        "model_type": "llada2_moe",
        "moe_intermediate_size": 512,
        "n_group": 8,
        "num_attention_heads": 16,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 20,
        "num_key_value_heads": 4,
        "num_shared_experts": 1,
        "pad_token_id": 156892,
        "partial_rotary_factor": 0.5,
        "rope_theta": 600000,
        "routed_scaling_factor": 2.5,
        "topk_group": 4,
        "use_qk_norm": True,
        "vocab_size": 157184,
    },
    "Efficient-Large-Model/Fast_dLLM_v2_7B": {
        "architectures": ["Fast_dLLM_QwenForCausalLM"],
        "bd_size": 32,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "hidden_act": "silu",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "max_position_embeddings": 32768,
        "model_type": "Fast_dLLM_Qwen",
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "vocab_size": 152064,
    },
}
EXPECTED = {
    # mask token, block, shift, edits, sub-block, vLLM's rotary base
    "JetLM/SDAR-8B-Chat": (151669, 4, 0, False, None, 1e6),
    "JetLM/SDAR-30B-A3B-Chat": (151669, 4, 0, False, None, 1e6),
    "inclusionAI/LLaDA2.1-mini": (156895, 32, 0, True, None, 6e5),
    "Efficient-Large-Model/Fast_dLLM_v2_7B": (151665, 32, 1, False, 8, 1e6),
}


@pytest.mark.e2e
@pytest.mark.parametrize(
    "fields",
    [
        {"num_key_value_heads": 3, "num_hidden_layers": 3, "rope_theta": 1e4},
        {"tie_word_embeddings": True, "hidden_size": 80, "intermediate_size": 136, "num_attention_heads": 5},
        {"head_dim": 32, "num_attention_heads": 6, "num_key_value_heads": 2, "num_hidden_layers": 1, "vocab_size": 131},
    ],
    ids=["no groups", "tied, odd widths", "one layer, groups of three"],
)
def test_logits_equal_those_of_the_plain_network(tmp_path, monkeypatch, start_llm, fields):
    from tests.e2e.jobs import assert_first_logits_equal

    folder = make_sdar_checkpoint(tmp_path / "model", seed=4, **fields)
    llm = start_llm(folder, max_num_seqs=4, max_model_len=128)
    assert_first_logits_equal(llm, ReferenceSDAR.load(folder), monkeypatch, block_length=16)


@pytest.mark.e2e
@pytest.mark.parametrize(
    "fields",
    [
        {"num_attention_heads": 4, "num_key_value_heads": 4, "hidden_size": 128, "intermediate_size": 72},
        {"tie_word_embeddings": True, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "num_hidden_layers": 1},
    ],
    ids=["no groups, odd width", "tied, one layer, other constants"],
)
def test_logits_of_fast_dllm_v2_equal_those_of_the_plain_network(tmp_path, monkeypatch, start_llm, fields):
    from tests.e2e.jobs import assert_first_logits_equal

    folder = make_fast_dllm_v2_checkpoint(tmp_path / "model", seed=4, **fields)
    llm = start_llm(folder, max_num_seqs=4, max_model_len=128)
    network = ReferenceFastDLLMv2.load(folder)
    assert_first_logits_equal(llm, network, monkeypatch, block_length=16, sub_block_length=16)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_config_loads_without_remote_code(tmp_path, name):
    from vllm.transformers_utils.config import get_config

    from vllm_osdt.models.registry import FAMILIES
    from vllm_osdt.plugin import register

    register()
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]))
    config = get_config(str(tmp_path), trust_remote_code=False)
    assert type(config).__module__.startswith("vllm_osdt.models.")
    assert config.architectures[0] in FAMILIES
    assert config.is_block_causal and config.is_threshold_strict
    got = (config.mask_token_id, config.block_length, config.logits_shift, config.can_edit, config.sub_block_length)
    assert (*got, config.rope_parameters["rope_theta"]) == EXPECTED[name]
    assert config.canvas_length == config.block_length
    assert config.num_key_value_heads == PUBLISHED[name]["num_key_value_heads"]


def save_tokenizer(folder, name, tokenizer_class):
    """The slow files of Qwen's tokenizer, three tokens of it, and a config that offers remote code beside it."""
    (folder / "config.json").write_text(json.dumps(PUBLISHED[name]))
    words = ["a", "b", "ab", "<|endoftext|>", "<|MASK|>"]
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    config = {"tokenizer_class": tokenizer_class, "eos_token": "<|endoftext|>", "mask_token": "<|MASK|>"}
    config["auto_map"] = {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_tokenizer_that_offers_remote_code_loads_without(tmp_path, name):
    from vllm.tokenizers import get_tokenizer

    from vllm_osdt.plugin import register

    register()
    save_tokenizer(tmp_path, name, "Qwen2Tokenizer")
    tokenizer = get_tokenizer(str(tmp_path), trust_remote_code=False)
    assert (tokenizer.encode("abb"), tokenizer.eos_token_id, tokenizer.mask_token_id) == ([2, 1], 3, 4)


def test_a_tokenizer_that_is_remote_code_alone_says_what_to_do(tmp_path):
    from vllm.tokenizers import get_tokenizer

    save_tokenizer(tmp_path, "JetLM/SDAR-8B-Chat", "OwnTokenizer")
    with pytest.raises(ValueError, match=r"(?s)contains custom code .*trust_remote_code=True"):
        get_tokenizer(str(tmp_path), trust_remote_code=False)


@pytest.mark.parametrize("field", ["block_size", "block_length"])
def test_a_checkpoint_may_name_its_block(tmp_path, field):
    from vllm_osdt.models.configs.sdar import SDARConfig

    assert SDARConfig(**{**PUBLISHED["JetLM/SDAR-8B-Chat"], field: 16}).block_length == 16


@pytest.mark.parametrize("change", [{"hidden_act": "gelu"}, {"use_sliding_window": True}], ids=str)
def test_what_is_not_implemented_is_refused_by_name(change):
    from vllm_osdt.models.configs.fast_dllm_v2 import FastDLLMv2Config
    from vllm_osdt.models.configs.llada2 import LLaDA2MoeConfig
    from vllm_osdt.models.configs.sdar import SDARConfig

    for config in (SDARConfig, LLaDA2MoeConfig, FastDLLMv2Config):
        with pytest.raises(UnsupportedModelError, match=next(iter(change))):
            config(**change)


def test_a_mask_token_outside_the_vocabulary_is_refused_with_the_remedy(tmp_path, start_llm):
    folder = make_sdar_checkpoint(tmp_path / "model", mask_token_id=100)
    with pytest.raises(ValueError, match=r"mask_token_id is 500; it must be a token id in .0, 101.*hf-overrides"):
        start_llm(folder, max_num_seqs=2, max_model_len=64, hf_overrides={"mask_token_id": 500})
