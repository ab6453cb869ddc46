"""Dream in plain float32 PyTorch: LLaDA's layers with grouped keys and values and biases, logits shifted by one.

Source: Dream (arXiv 2508.15487). Weight names are those of the published checkpoints.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.reference.llada import ReferenceLLaDA, make_checkpoint

# In a layer: Dream's name and LLaDA's.
_NAMES = {
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "attn_out",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ff_norm",
}
_FIELDS = {
    "hidden_size": "d_model",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "num_hidden_layers": "n_layers",
    "intermediate_size": "mlp_hidden_size",
    "tie_word_embeddings": "weight_tying",
}
_OUTER = {"model.embed_tokens": "wte", "model.norm": "ln_f", "lm_head": "ff_out"}


def _llada_name(name: str) -> str:
    stem, kind = name.rsplit(".", 1)
    if stem in _OUTER:
        return f"model.transformer.{_OUTER[stem]}.{kind}"
    layer, inner = stem.removeprefix("model.layers.").split(".", 1)
    return f"model.transformer.blocks.{layer}.{_NAMES[inner]}.{kind}"


class ReferenceDream(ReferenceLLaDA):
    """A Dream checkpoint."""

    logits_shift = 1

    @classmethod
    def load(cls, folder: Path) -> "ReferenceDream":
        """Read ``config.json`` and ``model.safetensors``."""
        config = json.loads((folder / "config.json").read_text())
        config |= {other: config[name] for name, other in _FIELDS.items()}
        weights = load_file(folder / "model.safetensors")
        return cls(config, {_llada_name(name): weight for name, weight in weights.items()})


def make_dream_checkpoint(folder: Path, *, seed: int = 0, **fields: Any) -> Path:
    """Write a small random checkpoint in the published format; arguments as of ``make_checkpoint``, LLaDA's names."""
    make_checkpoint(folder, seed=seed, **{"embedding_size": 101, "max_sequence_length": 256, **fields})
    config = json.loads((folder / "config.json").read_text())
    names = {other: name for name, other in _FIELDS.items()}
    kept = ("vocab_size", "mask_token_id", "eos_token_id", "rms_norm_eps", "rope_theta")
    dream = {
        "architectures": ["DreamModel"],
        "model_type": "Dream",
        "torch_dtype": "float32",
        "hidden_act": "silu",
        "max_position_embeddings": config["max_sequence_length"],
        **{names[other]: config[other] for other in names},
        **{name: config[name] for name in kept},
    }
    generator = torch.Generator().manual_seed(seed + 1)
    inner = {other: name for name, other in _NAMES.items()}
    outer = {f"model.transformer.{other}": name for name, other in _OUTER.items()}
    weights = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        stem = name.removesuffix(".weight")
        if stem in outer:
            weights[f"{outer[stem]}.weight"] = weight
            continue
        layer, part = stem.removeprefix("model.transformer.blocks.").split(".", 1)
        weights[f"model.layers.{layer}.{inner[part]}.weight"] = weight
        if part in ("q_proj", "k_proj", "v_proj"):
            bias = 0.5 * torch.randn(weight.shape[0], generator=generator)
            weights[f"model.layers.{layer}.{inner[part]}.bias"] = bias
    (folder / "config.json").write_text(json.dumps(dream))
    save_file(weights, folder / "model.safetensors")
    return folder
