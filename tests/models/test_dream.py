"""Dream in vLLM against the same network in plain PyTorch, and what loads without remote code."""

import json

import pytest
import torch

from tests.reference.decode import decode, static_threshold
from tests.reference.dream import ReferenceDream, make_dream_checkpoint
from vllm_osdt.errors import UnsupportedModelError
from vllm_osdt.models.configs.dream import DreamConfig

LOGIT_TOLERANCE = 2e-4  # see test_llada.py
PROMPTS = [[7], [3, 14, 15, 9, 26], list(range(2, 39))]

# config.json of Dream-org/Dream-v0-Instruct-7B.
PUBLISHED = {
    "architectures": ["DreamModel"],
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "mask_token_id": 151666,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "model_type": "Dream",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "pad_token_id": 151643,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.46.2",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 152064,
}


@pytest.mark.e2e
@pytest.mark.parametrize(
    "fields",
    [
        {"n_kv_heads": 1},
        {"weight_tying": True, "n_kv_heads": 3},
        {"d_model": 128, "n_heads": 4, "n_kv_heads": 2, "mlp_hidden_size": 96, "rope_theta": 1e6, "n_layers": 1},
    ],
    ids=["one kv head", "tied", "two kv heads, other constants"],
)
def test_logits_and_tokens_equal_those_of_the_plain_model(tmp_path, monkeypatch, start_llm, fields):
    from tests.e2e.engine import generate, sampling, watch_logits

    folder = make_dream_checkpoint(tmp_path / "model", seed=4, **fields)
    network = ReferenceDream.load(folder)
    llm = start_llm(folder, max_num_seqs=4, max_model_len=128)
    seen = []
    watch_logits(monkeypatch, lambda logits, batch: seen.append((logits, list(batch.num_scheduled_tokens))))
    options = {"policy": "static_threshold", "threshold": 0.3, "block_length": 16, "cache_mode": "none"}
    completions = generate(llm, PROMPTS, sampling(32, **options))
    logits, num_rows = seen[0]
    num_lines = [len(prompt) + 32 for prompt in PROMPTS]
    expected = []
    for prompt in (PROMPTS[num_lines.index(count)] for count in num_rows):
        full, _ = network.forward(torch.tensor(prompt + [network.mask_token_id] * 32))
        expected.append(full[len(prompt) - 1 : len(prompt) + 15])  # position i is read at i - 1
    plain = torch.cat(expected)
    assert plain.std() > 0.5
    torch.testing.assert_close(logits, plain, rtol=1e-5, atol=LOGIT_TOLERANCE)
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        decoded = decode(network, prompt, static_threshold(0.3), gen_length=32, block_length=16, cache_mode="none")
        assert min(decoded.proposal_margin, decoded.rule_margin) > 1e-5
        assert list(completion.token_ids) == decoded.tokens


def test_the_published_config_loads_without_remote_code(tmp_path):
    from vllm.transformers_utils.config import get_config

    from vllm_osdt.plugin import register

    register()
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED))
    config = get_config(str(tmp_path), trust_remote_code=False)
    assert type(config) is DreamConfig
    assert (config.hidden_size, config.num_key_value_heads, config.canvas_length) == (3584, 4, 32)
    assert (config.mask_token_id, config.logits_shift, config.qkv_bias) == (151666, 1, True)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 1000000.0}


@pytest.mark.parametrize(
    "change", [{"hidden_act": "gelu"}, {"use_sliding_window": True}, {"block_length": 129}], ids=str
)
def test_what_is_not_implemented_is_refused_by_name(change):
    with pytest.raises(UnsupportedModelError, match=next(iter(change))):
        DreamConfig(**{**PUBLISHED, **change})


def test_the_published_tokenizer_loads_without_remote_code(tmp_path):
    from vllm.tokenizers import get_tokenizer

    from vllm_osdt.plugin import register

    register()
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED))
    letters = {"Ġ": 0, "a": 1, "b": 2, "ab": 3, "<|endoftext|>": 4}
    (tmp_path / "vocab.json").write_text(json.dumps(letters))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    settings = {
        "tokenizer_class": "DreamTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "added_tokens_decoder": {"5": {"content": "<|mask|>", "special": True}},
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = get_tokenizer(str(tmp_path), trust_remote_code=False)
    assert tokenizer.encode("ab<|mask|>ba") == [3, 5, 2, 1]
    assert tokenizer.decode([3, 2]) == "abb"
