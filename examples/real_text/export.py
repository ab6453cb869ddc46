"""What is left of a training: a checkpoint that vLLM loads, and a small file that makes it from the base model."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from examples.real_text.model import Config, Llama
from examples.real_text.prompts import CHAT_TEMPLATE

MASK_ROW = "mask_row"
EMBEDDING = "model.embed_tokens.weight"


def config_fields(config: Config, dtype: torch.dtype) -> dict[str, Any]:
    """`config.json` of Fast-dLLM v2: Qwen2's fields and the block."""
    shape = {name: value for name, value in vars(config).items() if name != "block_length"}
    return {
        "architectures": ["Fast_dLLM_QwenForCausalLM"],
        "model_type": "Fast_dLLM_Qwen",
        "torch_dtype": str(dtype).removeprefix("torch."),
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bd_size": config.block_length,
        "sub_block_length": config.block_length,
        **shape,
    }


def export(model: Llama, tokenizer: Tokenizer | None, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Writes a checkpoint. Qwen2 has biases where a Llama has none: they are zero."""
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config
    weights = {name: weight.to(dtype).cpu().contiguous() for name, weight in model.state_dict().items()}
    for layer in range(config.num_hidden_layers):
        for name in "qkv":
            matrix = f"model.layers.{layer}.self_attn.{name}_proj"
            weights[f"{matrix}.bias"] = torch.zeros(weights[f"{matrix}.weight"].shape[0], dtype=dtype)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config_fields(config, dtype), indent=2) + "\n")
    ends = {"eos_token_id": config.eos_token_id, "pad_token_id": config.eos_token_id}
    (folder / "generation_config.json").write_text(json.dumps(ends, indent=2) + "\n")
    if tokenizer is not None:
        tokenizer.save(str(folder / "tokenizer.json"))
        name_of = {role: tokenizer.id_to_token(getattr(config, f"{role}_token_id")) for role in ("bos", "eos", "mask")}
        fields = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": config.max_position_embeddings,
            "pad_token": name_of["eos"],
            **{f"{role}_token": token for role, token in name_of.items()},
            "chat_template": CHAT_TEMPLATE,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(fields, indent=2) + "\n")


def save_adapter(base: Llama, adapted: Llama, path: Path, rank: int) -> float:
    """Writes what the training changed, in bfloat16, matrices as products of a rank; returns the share left out.

    The share is of the changes' squared norm. LoRA of that rank leaves out next to nothing, other training more.
    """
    before, parts = base.state_dict(), {}
    left_out = total = 0.0
    torch.manual_seed(0)
    for name, after in adapted.state_dict().items():
        change = after.float() - before[name].to(after.device)
        if name == EMBEDDING:
            parts[MASK_ROW] = after[adapted.config.mask_token_id]
            continue
        if change.dim() == 1:
            parts[name] = change
            continue
        u, s, v = torch.svd_lowrank(change, q=min(rank, *change.shape), niter=4)
        parts[f"{name}.up"], parts[f"{name}.down"] = u * s.sqrt(), s.sqrt()[:, None] * v.T
        total += change.square().sum().item()
        left_out += (change - (u * s) @ v.T).square().sum().item()
    save_file({name: part.to(torch.bfloat16).cpu().contiguous() for name, part in parts.items()}, path)
    return left_out / total if total else 0.0


@torch.no_grad()
def apply_adapter(base: Llama, path: Path) -> Llama:
    """Puts a file of `save_adapter` into the base model, in place."""
    parts: dict[str, Tensor] = {name: part.float().to(base.device) for name, part in load_file(path).items()}
    for name, weight in base.state_dict().items():
        if name == EMBEDDING:
            weight[base.config.mask_token_id] = parts[MASK_ROW]
        elif name in parts:
            weight += parts[name]
        else:
            weight += parts[f"{name}.up"] @ parts[f"{name}.down"]
    return base
