"""Stable-DiffCoder in plain float32 PyTorch: Llama's layers under a block-causal mask; and its authors' decoding loop.

Source: Stable-DiffCoder (arXiv 2601.15892), and modeling_stable_diffcoder.py of ByteDance-Seed/Stable-DiffCoder-8B-Base
in its revision for transformers 5.3. Weight names are those of the published checkpoints.
"""

from pathlib import Path
from typing import Any

import torch

from tests.reference.block_causal import BlockCausalNetwork, _swiglu
from tests.reference.block_causal_checkpoints import COMMON_FIELDS, _attention_matrices, _Maker

MASK_TOKEN_ID = 5  # of the authors' decoder; the checkpoints' configs do not name it
FIELDS: dict[str, Any] = {
    **{name: value for name, value in COMMON_FIELDS.items() if name != "mask_token_id"},
    "architectures": ["StableDiffcoderForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_stable_diffcoder.StableDiffcoderForCausalLM"},
    "model_type": "llama",
    "attention_bias": False,
    "attention_dropout": 0.1,
    "eos_token_id": 2,
    "layer_norm_eps": None,
    "mlp_bias": False,
    "resid_pdrop": 0.1,
    "rope_theta": 500000.0,
}


class ReferenceStableDiffcoder(BlockCausalNetwork):
    """A Stable-DiffCoder checkpoint: neither norms on heads nor biases."""

    def __init__(self, config: dict[str, Any], weights: dict[str, torch.Tensor]) -> None:
        super().__init__({"mask_token_id": MASK_TOKEN_ID, **config}, weights)

    def project(self, layer: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See the base class."""
        prefix = f"model.layers.{layer}.self_attn."
        q, k, v = (
            (x @ self.weights[f"{prefix}{name}_proj.weight"].T).view(x.shape[0], -1, self.head_size) for name in "qkv"
        )
        return q, k, v

    def mix(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        """See the base class."""
        return _swiglu(x, self.weights, f"model.layers.{layer}.mlp.")


def decode_as_published(
    model: BlockCausalNetwork,
    prompt: list[int],
    *,
    gen_length: int,
    block_length: int,
    steps_per_block: int,
    threshold: float | None,
    end_token_id: int | None = None,
) -> tuple[list[int], float]:
    """Decode a request as the authors' ``generate_block`` does at temperature 0, without its cache.

    The prompt's incomplete last block is the first to be decoded. A step unmasks the most confident position and, with
    a threshold, every other one that is not below it; without one, the block's masked positions in equal shares.

    Args:
        model: The network.
        prompt: Token ids.
        gen_length: Positions decoded.
        block_length, steps_per_block: Positions and steps of a block.
        threshold: None or a probability.
        end_token_id: Decoding stops behind the block that has it.

    Returns:
        The tokens up to and with the first end token, and the smallest distance between a position's two best logits
        or between a confidence and the threshold.
    """
    end = len(prompt) + gen_length
    ids = torch.tensor(prompt + [model.mask_token_id] * gen_length)
    margin = float("inf")
    start = len(prompt)
    while start < end:
        stop = min((start // block_length + 1) * block_length, end)
        masked = list(range(start, stop))
        share, extra = divmod(len(masked), steps_per_block)
        for step in range(steps_per_block):
            count = share + (step < extra)
            if not masked or (threshold is None and count == 0):
                break
            logits = model.forward(ids[:stop], block_length)
            probability = logits.double().softmax(dim=-1)
            logits[:, model.mask_token_id] = -torch.inf
            best, second = logits.topk(2, dim=-1).values.T
            token = logits.argmax(dim=-1)
            confidence = {position: probability[position, token[position]].item() for position in masked}
            margin = min([margin, *((best - second)[position].item() for position in masked)])
            ranking = sorted(masked, key=lambda position: (-confidence[position], position))
            if threshold is None:
                chosen = ranking[:count]
            else:
                margin = min([margin, *(abs(c - threshold) for c in confidence.values())])
                chosen = ranking[:1] + [position for position in ranking[1:] if confidence[position] >= threshold]
            for position in chosen:
                ids[position] = token[position]
            masked = [position for position in masked if position not in chosen]
        assert not masked
        output = ids[start:stop].tolist()
        if end_token_id in output:
            stop = start + output.index(end_token_id) + 1
            break
        start = stop
    return ids[len(prompt) : stop].tolist(), margin


def make_stable_diffcoder_checkpoint(folder: Path, *, seed: int = 0, certain: bool = False, **fields: Any) -> Path:
    """Write a small random checkpoint in the published format.

    Args:
        folder: Where it goes; created.
        seed: Of the weights.
        certain: Whether logits are so far apart that every best token, never the mask token, has probability 1.
        fields: Config fields that differ from FIELDS.
    """
    config = {**FIELDS, **fields}
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    maker = _Maker(config, seed)
    maker.outer("model.embed_tokens")
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        maker.norm(f"{prefix}.input_layernorm")
        maker.norm(f"{prefix}.post_attention_layernorm")
        _attention_matrices(maker, f"{prefix}.self_attn", head)
        maker.mlp(f"{prefix}.mlp", config["intermediate_size"])
    if certain:
        maker.weights["lm_head.weight"] *= 1e6
        maker.weights["lm_head.weight"][MASK_TOKEN_ID] = 0.0
    return maker.save(folder)
