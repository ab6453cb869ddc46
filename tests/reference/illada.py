"""iLLaDA in plain float32 PyTorch: LLaDA's layers with grouped keys and values, under Llama's weight names.

Source: iLLaDA (arXiv 2606.25331), and modeling_illada.py of its checkpoints.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.reference.dream import ReferenceDream, make_dream_checkpoint

MASK_TOKEN_ID = 5  # of the authors' decoder; the checkpoints' config does not name it


class ReferenceILLaDA(ReferenceDream):
    """An iLLaDA checkpoint: Dream's names, neither its biases nor its shift."""

    logits_shift = 0

    def __init__(self, config: dict[str, Any], weights: dict[str, torch.Tensor]) -> None:
        assert not any(name.endswith(".bias") for name in weights)
        super().__init__({"mask_token_id": MASK_TOKEN_ID, **config}, weights)


def make_illada_checkpoint(folder: Path, *, seed: int = 0, **fields: Any) -> Path:
    """Write a small random checkpoint in the published format.

    Its embeddings are tied, and it stores a copy of them as the output matrix.

    Args:
        folder: Where it goes; created.
        seed: Of the weights.
        fields: As of ``make_checkpoint``, LLaDA's names; and the rest of the config.
    """
    sizes = {"n_heads": 4, "n_kv_heads": 2, "d_model": 128, "weight_tying": True, "mask_token_id": MASK_TOKEN_ID}
    make_dream_checkpoint(folder, seed=seed, **{**sizes, **fields})
    config = json.loads((folder / "config.json").read_text())
    del config["mask_token_id"]
    config |= {
        "architectures": ["ILLaDAForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_illada.ILLaDAConfig",
            "AutoModelForCausalLM": "modeling_illada.ILLaDAForCausalLM",
        },
        "model_type": "illada",
        "attention_bias": False,
        "mlp_bias": False,
        "layer_norm_eps": None,
        "resid_pdrop": 0.0,
    }
    weights = load_file(folder / "model.safetensors")
    weights = {name: weight for name, weight in weights.items() if not name.endswith(".bias")}
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"].clone())
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    return folder
