"""LLaDA in plain float32 PyTorch: one sequence, no paging, every position sees every position.

Source: LLaDA (arXiv 2502.09992); RMSNorm, rotary embedding by halves, SwiGLU, no bias. Weight names are those of the
published checkpoints.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.reference.rope import rotate

KV = list[tuple[torch.Tensor, torch.Tensor]]  # by layer: keys and values, each [positions, kv heads, head size]


class ReferenceLLaDA:
    """A checkpoint's config and weights, and its forward pass."""

    logits_shift = 0  # position i is predicted by the logits at i - logits_shift

    def __init__(self, config: dict[str, Any], weights: dict[str, torch.Tensor]) -> None:
        self.config = config
        self.weights = {name: weight.float() for name, weight in weights.items()}
        self.num_heads = config["n_heads"]
        self.num_kv_heads = config.get("n_kv_heads") or self.num_heads
        self.head_size = config["d_model"] // self.num_heads
        self.mask_token_id = config["mask_token_id"]

    @classmethod
    def load(cls, folder: Path) -> "ReferenceLLaDA":
        """Read ``config.json`` and ``model.safetensors``."""
        config = json.loads((folder / "config.json").read_text())
        return cls(config, load_file(folder / "model.safetensors"))

    @torch.no_grad()
    def forward(
        self, ids: torch.Tensor, positions: torch.Tensor | None = None, prefix: KV | None = None
    ) -> tuple[torch.Tensor, KV]:
        """Run rows of a sequence.

        Args:
            ids: int64 ``[rows]``.
            positions: Where the rows stand; 0, 1, ... when None.
            prefix: Keys and values that the rows see besides their own.

        Returns:
            Logits ``[rows, vocab_size]``; keys and values of the rows alone.
        """
        weights, eps = self.weights, self.config["rms_norm_eps"]
        num_rows = ids.shape[0]
        if positions is None:
            positions = torch.arange(num_rows)
        x = weights["model.transformer.wte.weight"][ids]
        kv: KV = []
        for layer in range(self.config["n_layers"]):
            w = {
                name: weights[f"model.transformer.blocks.{layer}.{name}.weight"]
                for name in ("q_proj", "k_proj", "v_proj", "attn_out", "attn_norm", "ff_norm")
            }
            h = rms_norm(x, w["attn_norm"], eps)
            q, k, v = (
                (h @ w[name].T + weights.get(f"model.transformer.blocks.{layer}.{name}.bias", 0.0)).view(
                    num_rows, -1, self.head_size
                )
                for name in ("q_proj", "k_proj", "v_proj")
            )
            q, k = self.norm_heads(layer, q, k)
            q, k = (rotate(heads, positions, self.head_size, self.config) for heads in (q, k))
            kv.append((k, v))
            if prefix is not None:
                k = torch.cat([prefix[layer][0], k])
                v = torch.cat([prefix[layer][1], v])
            group = self.num_heads // self.num_kv_heads
            k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
            scores = torch.einsum("qhd,khd->hqk", q, k) / self.head_size**0.5
            mixed = torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), v).reshape(num_rows, -1)
            x = x + mixed @ w["attn_out"].T
            h = rms_norm(x, w["ff_norm"], eps)
            x = x + self.feed_forward(layer, h)
        x = rms_norm(x, weights["model.transformer.ln_f.weight"], eps)
        tied = self.config["weight_tying"]
        head = weights["model.transformer.wte.weight" if tied else "model.transformer.ff_out.weight"]
        return (x @ head.T)[:, : self.config["vocab_size"]], kv

    def norm_heads(self, layer: int, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys [rows, heads, head size], as they are: only LLaDA-MoE has norms on heads."""
        return q, k

    def feed_forward(self, layer: int, h: torch.Tensor) -> torch.Tensor:
        """The part of a layer behind attention."""
        gate, up, down = (
            self.weights[f"model.transformer.blocks.{layer}.{name}.weight"] for name in ("ff_proj", "up_proj", "ff_out")
        )
        return (torch.nn.functional.silu(h @ gate.T) * (h @ up.T)) @ down.T


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + eps) * weight


def make_checkpoint(folder: Path, *, seed: int = 0, mask_scale: float = 1.0, **fields: Any) -> Path:
    """Write a small random checkpoint in the published format.

    Args:
        folder: Where ``config.json`` and ``model.safetensors`` go; created.
        seed: Of the weights.
        mask_scale: Factor on the mask token's logits; above 1 it is the best token of many positions.
        fields: Config fields that differ from the defaults below.
    """
    config: dict[str, Any] = {
        "architectures": ["LLaDAModelLM"],
        "model_type": "llada",
        "torch_dtype": "float32",
        "d_model": 96,
        "n_heads": 3,
        "n_kv_heads": 3,
        "n_layers": 2,
        "mlp_hidden_size": 160,
        "vocab_size": 101,
        "embedding_size": 128,
        "weight_tying": False,
        "mask_token_id": 100,
        "eos_token_id": 0,
        "max_sequence_length": 256,
        "rms_norm_eps": 1e-5,
        "rope": True,
        "rope_theta": 10000.0,
        "activation_type": "silu",
        "block_type": "llama",
        "layer_norm_type": "rms",
        "alibi": False,
        "include_bias": False,
        "include_qkv_bias": False,
        "bias_for_layer_norm": False,
        "attention_layer_norm": False,
        "input_emb_norm": False,
        "clip_qkv": None,
        "block_group_size": 1,
        "scale_logits": False,
        **fields,
    }
    generator = torch.Generator().manual_seed(seed)
    width, inner = config["d_model"], config["mlp_hidden_size"]
    kv_width = config["n_kv_heads"] * (width // config["n_heads"])

    def matrix(rows: int, columns: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * (scale / columns**0.5)

    def norm() -> torch.Tensor:
        return 1.0 + 0.2 * torch.randn(width, generator=generator)

    weights = {"model.transformer.wte.weight": matrix(config["embedding_size"], width, 3.0)}
    for layer in range(config["n_layers"]):
        prefix = f"model.transformer.blocks.{layer}."
        weights |= {
            f"{prefix}attn_norm.weight": norm(),
            f"{prefix}q_proj.weight": matrix(width, width, 2.0),
            f"{prefix}k_proj.weight": matrix(kv_width, width, 2.0),
            f"{prefix}v_proj.weight": matrix(kv_width, width),
            f"{prefix}attn_out.weight": matrix(width, width),
            f"{prefix}ff_norm.weight": norm(),
            f"{prefix}ff_proj.weight": matrix(inner, width),
            f"{prefix}up_proj.weight": matrix(inner, width),
            f"{prefix}ff_out.weight": matrix(width, inner),
        }
    weights["model.transformer.ln_f.weight"] = norm()
    if not config["weight_tying"]:
        weights["model.transformer.ff_out.weight"] = matrix(config["embedding_size"], width, 3.0)
    head = "model.transformer.wte.weight" if config["weight_tying"] else "model.transformer.ff_out.weight"
    weights[head][config["mask_token_id"]] *= mask_scale
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    return folder
