"""Tiny-A2D in plain float32 PyTorch: the layers of Qwen3, Qwen2 or Llama, over the whole canvas or in blocks.

Source: dLLM (github.com/ZHZisZZ/dllm), whose model files take the causal mask away and nothing else. Weight names are
those of the published checkpoints.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.reference.block_causal import BlockCausalNetwork, ReferenceFastDLLMv2, ReferenceSDAR
from tests.reference.block_causal_checkpoints import make_fast_dllm_v2_checkpoint, make_sdar_checkpoint
from tests.reference.dream import _FIELDS
from tests.reference.llada import ReferenceLLaDA, rms_norm
from tests.reference.llada_moe import _llada_name
from tests.reference.stable_diffcoder import ReferenceStableDiffcoder, make_stable_diffcoder_checkpoint


class ReferenceA2D(ReferenceLLaDA):
    """A checkpoint whose positions see the whole canvas; it has norms on heads or biases where its weights have."""

    @classmethod
    def load(cls, folder: Path) -> "ReferenceA2D":
        """Read ``config.json`` and ``model.safetensors``."""
        config = json.loads((folder / "config.json").read_text())
        config |= {other: config[name] for name, other in _FIELDS.items()}
        weights = load_file(folder / "model.safetensors")
        model = cls(config, {_llada_name(name): weight for name, weight in weights.items()})
        model.head_size = config.get("head_dim", model.head_size)
        return model

    def norm_heads(self, layer: int, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See the base class."""
        prefix, eps = f"model.transformer.blocks.{layer}.", self.config["rms_norm_eps"]
        if f"{prefix}q_norm.weight" not in self.weights:
            return q, k
        return (
            rms_norm(q, self.weights[f"{prefix}q_norm.weight"], eps),
            rms_norm(k, self.weights[f"{prefix}k_norm.weight"], eps),
        )


class _ReferenceQwen2(ReferenceFastDLLMv2):
    logits_shift = 0


# By the model that they were made of: its checkpoint, and the network that sees blocks.
_FAMILIES: dict[str, tuple[str, Callable[..., Path], type[BlockCausalNetwork]]] = {
    "qwen3": ("A2DQwen3LMHeadModel", make_sdar_checkpoint, ReferenceSDAR),
    "qwen2": ("A2DQwen2LMHeadModel", make_fast_dllm_v2_checkpoint, _ReferenceQwen2),
    "llama": ("A2DLlamaLMHeadModel", make_stable_diffcoder_checkpoint, ReferenceStableDiffcoder),
}
_OF_OTHERS = ("block_size", "bd_size", "auto_map", "layer_norm_eps", "resid_pdrop")


def make_a2d_checkpoint(folder: Path, *, base: str, seed: int = 0, **fields: Any) -> Path:
    """Write a small random checkpoint in the published format, but for the mask token, which the config names.

    Args:
        folder: Where it goes; created.
        base: ``qwen3``, ``qwen2`` or ``llama``: the model that it is made of.
        seed: Of the weights.
        fields: Config fields that differ from those of the other family with these layers.
    """
    architecture, make, _ = _FAMILIES[base]
    make(folder, seed=seed, **{"mask_token_id": 100, **fields})
    config = json.loads((folder / "config.json").read_text())
    config = {name: value for name, value in config.items() if name not in _OF_OTHERS}
    config |= {"architectures": [architecture], "model_type": f"a2d-{base}"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def load_block_causal(folder: Path, base: str) -> BlockCausalNetwork:
    """The network of such a checkpoint that was trained in blocks."""
    return _FAMILIES[base][2].load(folder)
