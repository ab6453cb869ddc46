"""Small random checkpoints of the block-causal families, in the published formats and at odd sizes."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

Weights = dict[str, torch.Tensor]

COMMON_FIELDS: dict[str, Any] = {
    "torch_dtype": "float32",
    "hidden_act": "silu",
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "vocab_size": 101,
    "mask_token_id": 100,
    "eos_token_id": 0,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
}
SDAR_FIELDS: dict[str, Any] = {
    **COMMON_FIELDS,
    "architectures": ["SDARForCausalLM"],
    "model_type": "sdar",
    "head_dim": 64,
    "block_size": 4,
    "attention_bias": False,
}
LLADA2_FIELDS: dict[str, Any] = {
    **COMMON_FIELDS,
    "architectures": ["LLaDA2MoeModelLM"],
    "model_type": "llada2_moe",
    "num_hidden_layers": 3,
    "head_dim": 64,
    "partial_rotary_factor": 0.5,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 96,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "num_shared_experts": 2,
    "n_group": 3,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "use_qk_norm": True,
}
FAST_DLLM_V2_FIELDS: dict[str, Any] = {
    **COMMON_FIELDS,
    "architectures": ["Fast_dLLM_QwenForCausalLM"],
    "model_type": "Fast_dLLM_Qwen",
    "bd_size": 16,
}


class _Maker:
    """Random weights, and where they belong."""

    def __init__(self, config: dict[str, Any], seed: int) -> None:
        self.config, self.width = config, config["hidden_size"]
        self.generator = torch.Generator().manual_seed(seed)
        self.weights: Weights = {}

    def random(self, *shape: int, scale: float) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator) * scale

    def matrix(self, name: str, rows: int, columns: int, scale: float = 1.0) -> None:
        self.weights[f"{name}.weight"] = self.random(rows, columns, scale=scale / columns**0.5)

    def norm(self, name: str, size: int | None = None, mean: float = 1.0) -> None:
        self.weights[f"{name}.weight"] = mean + self.random(size or self.width, scale=0.2)

    def mlp(self, prefix: str, inner: int) -> None:
        for name in ("gate_proj", "up_proj"):
            self.matrix(f"{prefix}.{name}", inner, self.width)
        self.matrix(f"{prefix}.down_proj", self.width, inner)

    def experts(self, prefix: str) -> None:
        self.matrix(f"{prefix}.gate", self.config["num_experts"], self.width)
        for expert in range(self.config["num_experts"]):
            self.mlp(f"{prefix}.experts.{expert}", self.config["moe_intermediate_size"])

    def outer(self, embedding: str) -> None:
        self.matrix(embedding, self.config["vocab_size"], self.width, 3.0)
        self.norm("model.norm")
        if not self.config["tie_word_embeddings"]:
            self.matrix("lm_head", self.config["vocab_size"], self.width, 3.0)

    def save(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        save_file(self.weights, folder / "model.safetensors")
        return folder


def make_sdar_checkpoint(folder: Path, *, seed: int = 0, **fields: Any) -> Path:
    """Write an SDAR checkpoint; with ``num_experts``, one of SDAR-MoE's."""
    config = {**SDAR_FIELDS, **fields}
    if "num_experts" in config:
        config |= {"architectures": ["SDARMoeForCausalLM"], "model_type": "sdar_moe", "norm_topk_prob": True}
        config |= {"decoder_sparse_step": 1, "mlp_only_layers": []}
    maker, head = _Maker(config, seed), config["head_dim"]
    maker.outer("model.embed_tokens")
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        maker.norm(f"{prefix}.input_layernorm")
        maker.norm(f"{prefix}.post_attention_layernorm")
        _attention_matrices(maker, f"{prefix}.self_attn", head)
        for name in ("q_norm", "k_norm"):
            maker.norm(f"{prefix}.self_attn.{name}", head, 2.0)
        if "num_experts" in config:
            maker.experts(f"{prefix}.mlp")
        else:
            maker.mlp(f"{prefix}.mlp", config["intermediate_size"])
    return maker.save(folder)


def make_fast_dllm_v2_checkpoint(folder: Path, *, seed: int = 0, **fields: Any) -> Path:
    """Write a Fast-dLLM v2 checkpoint."""
    config = {**FAST_DLLM_V2_FIELDS, **fields}
    maker, head = _Maker(config, seed), config["hidden_size"] // config["num_attention_heads"]
    maker.outer("model.embed_tokens")
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        maker.norm(f"{prefix}.input_layernorm")
        maker.norm(f"{prefix}.post_attention_layernorm")
        _attention_matrices(maker, f"{prefix}.self_attn", head, with_bias=True)
        maker.mlp(f"{prefix}.mlp", config["intermediate_size"])
    return maker.save(folder)


def make_llada2_checkpoint(folder: Path, *, seed: int = 0, **fields: Any) -> Path:
    """Write a LLaDA2 checkpoint."""
    config = {**LLADA2_FIELDS, **fields}
    maker, head = _Maker(config, seed), config["head_dim"]
    num_heads = config["num_attention_heads"] + 2 * config["num_key_value_heads"]
    maker.outer("model.word_embeddings")
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        maker.norm(f"{prefix}.input_layernorm")
        maker.norm(f"{prefix}.post_attention_layernorm")
        maker.matrix(f"{prefix}.attention.query_key_value", num_heads * head, maker.width)
        maker.matrix(f"{prefix}.attention.dense", maker.width, config["num_attention_heads"] * head)
        for name in ("query_layernorm", "key_layernorm"):
            maker.norm(f"{prefix}.attention.{name}", head, 2.0)
        if layer < config["first_k_dense_replace"]:
            maker.mlp(f"{prefix}.mlp", config["intermediate_size"])
            continue
        maker.experts(f"{prefix}.mlp")
        maker.weights[f"{prefix}.mlp.gate.expert_bias"] = maker.random(config["num_experts"], scale=0.1)
        maker.mlp(f"{prefix}.mlp.shared_experts", config["moe_intermediate_size"] * config["num_shared_experts"])
    return maker.save(folder)


def _attention_matrices(maker: _Maker, prefix: str, head: int, *, with_bias: bool = False) -> None:
    sizes = {"q": maker.config["num_attention_heads"], "k": maker.config["num_key_value_heads"]}
    sizes["v"] = sizes["k"]
    for name, number in sizes.items():
        maker.matrix(f"{prefix}.{name}_proj", number * head, maker.width)
        if with_bias:
            maker.weights[f"{prefix}.{name}_proj.bias"] = maker.random(number * head, scale=0.3)
    maker.matrix(f"{prefix}.o_proj", maker.width, sizes["q"] * head)
