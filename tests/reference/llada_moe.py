"""LLaDA-MoE in plain float32 PyTorch: LLaDA's layers with norms on heads and a mixture of experts.

Source: LLaDA-MoE (arXiv 2509.24389); an expert's weight is its share of the softmax over all experts. Weight names are
those of the published checkpoints.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.reference.dream import _FIELDS, _NAMES, _OUTER
from tests.reference.llada import ReferenceLLaDA, make_checkpoint, rms_norm


class ReferenceLLaDAMoE(ReferenceLLaDA):
    """A LLaDA-MoE checkpoint."""

    @classmethod
    def load(cls, folder: Path) -> "ReferenceLLaDAMoE":
        """Read ``config.json`` and ``model.safetensors``."""
        config = json.loads((folder / "config.json").read_text())
        config |= {other: config[name] for name, other in _FIELDS.items() if name in config}
        weights = load_file(folder / "model.safetensors")
        model = cls(config, {_llada_name(name): weight for name, weight in weights.items()})
        return model

    def norm_heads(self, layer: int, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See the base class."""
        prefix, eps = f"model.transformer.blocks.{layer}.", self.config["rms_norm_eps"]
        return (
            rms_norm(q, self.weights[f"{prefix}q_norm.weight"], eps),
            rms_norm(k, self.weights[f"{prefix}k_norm.weight"], eps),
        )

    def feed_forward(self, layer: int, h: torch.Tensor) -> torch.Tensor:
        """See the base class."""
        prefix = f"model.transformer.blocks.{layer}.mlp."
        share = (h @ self.weights[f"{prefix}gate.weight"].T).softmax(dim=-1)
        best = share.topk(self.config["num_experts_per_tok"], dim=-1)
        out = torch.zeros_like(h)
        for expert in range(share.shape[1]):
            gate, up, down = (
                self.weights[f"{prefix}experts.{expert}.{name}_proj.weight"] for name in ("gate", "up", "down")
            )
            weight = torch.where(best.indices == expert, best.values, 0.0).sum(dim=-1, keepdim=True)
            out += weight * ((torch.nn.functional.silu(h @ gate.T) * (h @ up.T)) @ down.T)
        return out


def _llada_name(name: str) -> str:
    stem, kind = name.rsplit(".", 1)
    if stem in _OUTER:
        return f"model.transformer.{_OUTER[stem]}.{kind}"
    layer, inner = stem.removeprefix("model.layers.").split(".", 1)
    return f"model.transformer.blocks.{layer}.{_NAMES.get(inner, inner.removeprefix('self_attn.'))}.{kind}"


def make_llada_moe_checkpoint(folder: Path, *, seed: int = 0, num_experts: int = 6, **fields: Any) -> Path:
    """Write a small random checkpoint in the published format; fields as of ``make_checkpoint``, LLaDA's names."""
    make_checkpoint(folder, seed=seed, **{"embedding_size": 101, **fields})
    config = json.loads((folder / "config.json").read_text())
    names = {other: name for name, other in _FIELDS.items()}
    inner_size = config["mlp_hidden_size"]
    moe = {
        "architectures": ["LLaDAMoEModelLM"],
        "model_type": "llada_moe",
        "torch_dtype": "float32",
        "hidden_act": "silu",
        "expert_intermediate_size": inner_size,
        "num_experts": num_experts,
        "num_experts_per_tok": 2,
        "qk_layernorm": True,
        "max_position_embeddings": config["max_sequence_length"],
        **{names[other]: config[other] for other in names if other != "mlp_hidden_size"},
        **{
            name: config[name] for name in ("vocab_size", "mask_token_id", "eos_token_id", "rms_norm_eps", "rope_theta")
        },
    }
    generator = torch.Generator().manual_seed(seed + 1)
    inner = {other: name for name, other in _NAMES.items()}
    outer = {f"model.transformer.{other}": name for name, other in _OUTER.items()}
    width, head = config["d_model"], config["d_model"] // config["n_heads"]
    weights = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        stem = name.removesuffix(".weight")
        if stem in outer:
            weights[f"{outer[stem]}.weight"] = weight
            continue
        layer, part = stem.removeprefix("model.transformer.blocks.").split(".", 1)
        prefix = f"model.layers.{layer}."
        if part not in ("ff_proj", "up_proj", "ff_out"):
            weights[f"{prefix}{inner[part]}.weight"] = weight
            continue
        for expert in range(num_experts):
            own = torch.randn(weight.shape, generator=generator) * (2.0 / weight.shape[1] ** 0.5)
            weights[f"{prefix}mlp.experts.{expert}.{inner[part].removeprefix('mlp.')}.weight"] = own
        weights[f"{prefix}mlp.gate.weight"] = torch.randn(num_experts, width, generator=generator) / width**0.5
        for norm in ("q_norm", "k_norm"):
            weights[f"{prefix}self_attn.{norm}.weight"] = 2.0 + 0.2 * torch.randn(head, generator=generator)
    (folder / "config.json").write_text(json.dumps(moe))
    save_file(weights, folder / "model.safetensors")
    return folder
