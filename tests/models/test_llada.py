"""LLaDA in vLLM against the same network in plain PyTorch, and the configs that are refused."""

import json

import pytest
import torch

from tests.reference.decode import decode, static_threshold
from tests.reference.llada import ReferenceLLaDA, make_checkpoint
from vllm_osdt.errors import UnsupportedModelError
from vllm_osdt.models.configs.llada import LLaDAConfig

# Logits have a size of about 3; float32 sums of at most 200 terms in another order, through two layers, move them by
# some 1e-5. A wrong norm, rotation, head or weight moves them by more than 0.1.
LOGIT_TOLERANCE = 2e-4

PROMPTS = [[7], [3, 14, 15, 9, 26], list(range(2, 39))]

# config.json of GSAI-ML/LLaDA-8B-Instruct.
PUBLISHED = {
    "activation_type": "silu",
    "alibi": False,
    "alibi_bias_max": 8.0,
    "architectures": ["LLaDAModelLM"],
    "attention_dropout": 0.0,
    "attention_layer_norm": False,
    "attention_layer_norm_with_affine": True,
    "auto_map": {"AutoConfig": "configuration_llada.LLaDAConfig", "AutoModel": "modeling_llada.LLaDAModelLM"},
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "d_model": 4096,
    "embedding_dropout": 0.0,
    "embedding_size": 126464,
    "eos_token_id": 126081,
    "flash_attention": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "init_cutoff_factor": None,
    "init_device": "meta",
    "init_fn": "mitchell",
    "init_std": 0.02,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "mask_token_id": 126336,
    "max_sequence_length": 4096,
    "mlp_hidden_size": 12288,
    "mlp_ratio": 4,
    "model_type": "llada",
    "multi_query_attention": None,
    "n_heads": 32,
    "n_kv_heads": 32,
    "n_layers": 32,
    "pad_token_id": 126081,
    "precision": "amp_bf16",
    "residual_dropout": 0.0,
    "rms_norm_eps": 1e-05,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 500000.0,
    "scale_logits": False,
    "transformers_version": "4.46.3",
    "use_cache": False,
    "vocab_size": 126464,
    "weight_tying": False,
}


@pytest.mark.e2e
@pytest.mark.parametrize(
    "fields",
    [
        {"n_kv_heads": 1, "vocab_size": 101, "embedding_size": 128},
        {"weight_tying": True, "vocab_size": 101, "embedding_size": 128},
        {
            "d_model": 128, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 65, "embedding_size": 65, "mask_token_id": 64,
            "mlp_hidden_size": 96, "rope_theta": 500000.0, "rms_norm_eps": 1e-3, "n_layers": 1,
        },
    ],
    ids=["one kv head, padded vocabulary", "tied, padded vocabulary", "two kv heads, other constants"],
)  # fmt: skip
def test_logits_and_tokens_equal_those_of_the_plain_model(tmp_path, monkeypatch, start_llm, fields):
    from tests.e2e.engine import generate, sampling, watch_logits

    folder = make_checkpoint(tmp_path / "model", seed=3, mask_scale=4.0, **fields)
    network = ReferenceLLaDA.load(folder)
    llm = start_llm(folder, max_num_seqs=4, max_model_len=128)
    seen = []
    watch_logits(monkeypatch, lambda logits, batch: seen.append((logits, list(batch.num_scheduled_tokens))))
    completions = generate(llm, PROMPTS, sampling(64, policy="static_threshold", threshold=0.2, block_length=32))
    logits, num_rows = seen[0]  # the first step: every prompt with its whole canvas, logits of the first block

    num_lines = [len(prompt) + 64 for prompt in PROMPTS]
    assert sorted(num_rows) == sorted(num_lines) and logits.shape == (3 * 32, network.config["vocab_size"])
    order = [num_lines.index(count) for count in num_rows]
    expected = []
    for prompt in (PROMPTS[index] for index in order):
        full, _ = network.forward(torch.tensor(prompt + [network.mask_token_id] * 64))
        expected.append(full[len(prompt) : len(prompt) + 32])
    plain = torch.cat(expected)
    assert plain.std() > 0.5
    torch.testing.assert_close(logits, plain, rtol=1e-5, atol=LOGIT_TOLERANCE)

    assert (plain.argmax(dim=-1) == network.mask_token_id).any()  # the best token, but none to emit
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        decoded = decode(network, prompt, static_threshold(0.2), gen_length=64, block_length=32, cache_mode="dual")
        assert min(decoded.proposal_margin, decoded.rule_margin) > 1e-5
        assert list(completion.token_ids) == decoded.tokens
        assert network.mask_token_id not in completion.token_ids


def test_the_published_config_loads_without_remote_code(tmp_path):
    from vllm.transformers_utils.config import get_config

    from vllm_osdt.plugin import register

    register()
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED))
    config = get_config(str(tmp_path), trust_remote_code=False)
    assert type(config) is LLaDAConfig
    assert (config.hidden_size, config.num_attention_heads, config.num_key_value_heads) == (4096, 32, 32)
    assert (config.num_hidden_layers, config.intermediate_size, config.vocab_size) == (32, 12288, 126464)
    assert (config.max_position_embeddings, config.tie_word_embeddings, config.hidden_act) == (4096, False, "silu")
    assert (config.mask_token_id, config.eos_token_id, config.canvas_length) == (126336, 126081, 32)
    assert config.rope_parameters["rope_theta"] == 500000.0


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"n_kv_heads": None}, {"num_key_value_heads": 32}),
        ({"n_kv_heads": None, "multi_query_attention": True}, {"num_key_value_heads": 1}),
        ({"mlp_hidden_size": None}, {"intermediate_size": 16384}),
        ({"embedding_size": None}, {"embedding_size": 126464}),
        ({"block_length": 8}, {"canvas_length": 8}),
    ],
)
def test_missing_fields_follow_from_the_others(change, expected):
    config = LLaDAConfig(**{**PUBLISHED, **change})
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("alibi", True),
        ("block_type", "sequential"),
        ("activation_type", "gelu"),
        ("layer_norm_type", "default"),
        ("rope", False),
        ("include_bias", True),
        ("include_qkv_bias", True),
        ("bias_for_layer_norm", True),
        ("attention_layer_norm", True),
        ("input_emb_norm", True),
        ("clip_qkv", 8.0),
        ("block_group_size", 2),
        ("scale_logits", True),
        ("embedding_size", 126463),
    ],
)
def test_what_the_layers_do_not_implement_is_refused_by_name(field, value):
    with pytest.raises(UnsupportedModelError, match=rf"\b{field} is {value!r}"):
        LLaDAConfig(**{**PUBLISHED, field: value})


def test_fields_that_a_checkpoint_leaves_open_follow_from_the_others():
    open_ones = {"n_kv_heads": None, "mlp_hidden_size": None, "embedding_size": None, "vocab_size": 100}
    config = LLaDAConfig(**{**PUBLISHED, **open_ones, "multi_query_attention": True, "mlp_ratio": 3})
    assert (config.num_key_value_heads, config.intermediate_size, config.embedding_size) == (1, 3 * 4096, 100)
    assert LLaDAConfig(**{**PUBLISHED, **open_ones, "multi_query_attention": False}).num_key_value_heads == 32
