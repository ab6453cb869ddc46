"""Nemotron-Labs-Diffusion in plain float32 PyTorch: Ministral's layers, one sequence, a dense mask, no cache.

And how it is decoded: as a plain loop with any rule, and as the authors' loop does.

Source: the published configuration and model code of nvidia/Nemotron-Labs-Diffusion (modeling_ministral.py,
modeling_nemotron_labs_diffusion.py). Weight names are those of the published checkpoints.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.reference.block_causal_checkpoints import COMMON_FIELDS, _attention_matrices, _Maker
from tests.reference.decode import Decoded, Rule, sureness
from tests.reference.rope import rotate

FIELDS: dict[str, Any] = {
    **{name: value for name, value in COMMON_FIELDS.items() if name != "rope_theta"},
    "architectures": ["NemotronLabsDiffusionModel"],
    "model_type": "nemotron_labs_diffusion",
    "attention_bias": False,
    "block_size": 8,
    "dlm_paradigm": "bidirectional",
    "head_dim": 64,
    "mlp_bias": False,
    "rope_parameters": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 16.0,
        "llama_4_scaling_beta": 0.5,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 32,
        "rope_theta": 10000.0,
        "rope_type": "yarn",
    },
    "sliding_window": None,
}


class ReferenceNemotron:
    """A checkpoint: its config, its weights and its forward pass."""

    logits_shift = 0

    def __init__(self, config: dict[str, Any], weights: dict[str, torch.Tensor]) -> None:
        self.config, self.weights = config, {name: weight.float() for name, weight in weights.items()}
        self.mask_token_id = config["mask_token_id"]

    @classmethod
    def load(cls, folder: Path) -> "ReferenceNemotron":
        """Read ``config.json`` and ``model.safetensors``."""
        return cls(json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors"))

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ self.weights[f"{name}.weight"].T

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        mean = x.square().mean(dim=-1, keepdim=True)
        return x / (mean + self.config["rms_norm_eps"]).sqrt() * self.weights[f"{name}.weight"]

    def _query_scale(self, positions: torch.Tensor) -> torch.Tensor:
        """Llama 4's: 1 in the original range, then larger with the logarithm of how often it is passed."""
        rope = self.config.get("rope_parameters") or {}
        beta = rope.get("llama_4_scaling_beta", 0.0)
        steps = [p // rope["original_max_position_embeddings"] if beta else 0 for p in positions.tolist()]
        return torch.tensor([1 + beta * math.log(1 + step) for step in steps])

    @torch.no_grad()
    def forward(self, ids: torch.Tensor, num_decided: int) -> torch.Tensor:
        """Logits ``[rows, vocab_size]`` of a whole sequence.

        The first ``num_decided`` rows see the rows up to their own; the others see all.
        """
        config, positions = self.config, torch.arange(len(ids))
        head, num_kv = config["head_dim"], config["num_key_value_heads"]
        hidden = (positions[None, :] > positions[:, None]) & (positions[:, None] < num_decided)
        x = self.weights["encoder.embed_tokens.weight"][ids]
        for layer in range(config["num_hidden_layers"]):
            prefix = f"encoder.layers.{layer}"
            normed = self._norm(x, f"{prefix}.input_layernorm")
            q, k, v = (self._linear(normed, f"{prefix}.self_attn.{n}_proj").unflatten(-1, (-1, head)) for n in "qkv")
            q, k = rotate(q, positions, head, config), rotate(k, positions, head, config)
            q = q * self._query_scale(positions)[:, None, None]
            outputs = []
            for number in range(q.shape[1]):
                of_group = number * num_kv // q.shape[1]
                scores = q[:, number] @ k[:, of_group].T / math.sqrt(head)
                outputs.append(scores.masked_fill(hidden, -torch.inf).softmax(dim=-1) @ v[:, of_group])
            x = x + self._linear(torch.cat(outputs, dim=-1), f"{prefix}.self_attn.o_proj")
            normed = self._norm(x, f"{prefix}.post_attention_layernorm")
            gate, up = (self._linear(normed, f"{prefix}.mlp.{name}_proj") for name in ("gate", "up"))
            x = x + self._linear(gate * gate.sigmoid() * up, f"{prefix}.mlp.down_proj")
        x = self._norm(x, "encoder.norm")
        is_tied = config.get("tie_word_embeddings", False)
        return self._linear(x, "encoder.embed_tokens" if is_tied else "diffusion_head")


def decode_nemotron(
    model: ReferenceNemotron,
    prompt: list[int],
    rule: Rule,
    *,
    block_length: int,
    max_tokens: int,
    end_token_ids: tuple[int, ...] = (),
    cache_mode: str = "causal",
    pinned: dict[int, int] | None = None,
    banned: int | None = None,
) -> Decoded:
    """Decode a request with the whole sequence in every forward.

    Args:
        model: The network.
        prompt: Token ids; the first block begins behind it.
        rule: Which positions a step unmasks. Steps count in the block, a pass that gives the first token among them.
        block_length: Positions denoised together.
        max_tokens: Output tokens wanted.
        end_token_ids: Where output ends.
        cache_mode: ``causal``: the causal pass over what is decided gives a block's first token; ``causal_fused``: no
            such token.
        pinned: Tokens of the output that are given, by their index.
        banned: A token that no position is given.
    """
    ids, result = list(prompt), Decoded()
    end = len(prompt) + max_tokens
    given = {len(prompt) + place: token for place, token in (pinned or {}).items()}
    while len(ids) < end and (len(ids) == len(prompt) or ids[-1] not in end_token_ids):
        start = len(ids)
        canvas = torch.tensor(ids + [model.mask_token_id] * block_length)
        masked = set(range(start, start + block_length)) - given.keys()
        for position in range(start, start + block_length):
            canvas[position] = given.get(position, canvas[position])
        result.record.append([])
        step, ready = 0, None
        while ready is None:
            is_first = step == 0 and cache_mode == "causal"
            logits = model.forward(canvas[:start] if is_first else canvas, start)
            lines = {start: logits[-1]} if is_first else {position: logits[position] for position in sorted(masked)}
            result.nfe += 1
            confidence, token = {}, {}
            for position, line in lines.items():
                probability = line.double().softmax(dim=-1)
                line[[model.mask_token_id] if banned is None else [model.mask_token_id, banned]] = -torch.inf
                best, second = line.topk(2).values.tolist()
                result.proposal_margin = min(result.proposal_margin, best - second)
                token[position] = int(line.argmax())
                confidence[position] = sureness(rule, probability, token[position])
            if is_first:  # where that token is given, nothing is decided
                chosen = [start] if start in masked else []
            else:
                chosen = rule(len(result.record) - 1, step, confidence) if confidence else []
            result.record[-1].append([(c, position in chosen) for position, c in confidence.items()])
            for position in chosen:
                canvas[position] = token[position]
                masked.discard(position)
            ready = _ready(canvas[start:].tolist(), [k - start for k in masked], end - start, end_token_ids)
            step += 1
        ids += ready
    result.tokens = ids[len(prompt) :]
    result.rule_margin = getattr(rule, "margin", float("inf"))
    return result


def _ready(block: list[int], masked: list[int], wanted: int, end_token_ids: tuple[int, ...]) -> list[int] | None:
    """The block's output once nothing before its end is undecided."""
    for place, token in enumerate(block[:wanted]):
        if place in masked:
            return None
        if token in end_token_ids:
            return block[: place + 1]
    return block[:wanted]


def decode_as_published(
    model: ReferenceNemotron,
    prompt: list[int],
    *,
    max_new_tokens: int,
    block_length: int,
    threshold: float | None,
    end_token_id: int = -1,
) -> tuple[list[int], float]:
    """Decode a request as the authors' ``generate`` does at temperature 0, without its cache.

    A step unmasks the most confident position and, with a threshold, every other one that is not below it.

    Args:
        model: The network.
        prompt: Token ids.
        max_new_tokens: Whole blocks.
        block_length: Positions of a block.
        threshold: None or a probability.
        end_token_id: Decoding stops behind the block that has it; -1 for none.

    Returns:
        The tokens up to and with the first end token, and the smallest distance between a position's two best logits
        or between a confidence and the threshold.
    """
    ids, margin = list(prompt), math.inf

    def propose(line: torch.Tensor) -> tuple[int, float]:
        nonlocal margin
        probability = line.double().softmax(dim=-1)
        line = line.clone()
        line[model.mask_token_id] = -torch.inf  # the authors' may propose it; here and in the engine it is not chosen
        best, second = line.topk(2).values.tolist()
        margin = min(margin, best - second)
        return int(line.argmax()), probability[line.argmax()].item()

    for _ in range(max_new_tokens // block_length):
        start = len(ids)
        seed, _ = propose(model.forward(torch.tensor(ids), start)[-1])
        block: list[int | None] = [seed] + [None] * (block_length - 1)
        for _ in range(block_length):
            if None not in block or (end_token_id in block and None not in block[: block.index(end_token_id)]):
                break
            filled = [model.mask_token_id if token is None else token for token in block]
            logits = model.forward(torch.tensor(ids + filled), start)
            found = {place: propose(logits[start + place]) for place, token in enumerate(block) if token is None}
            ranking = sorted(found, key=lambda place: (-found[place][1], place))
            if threshold is not None:
                margin = min([margin, *(abs(found[place][1] - threshold) for place in ranking)])
                ranking = ranking[:1] + [place for place in ranking[1:] if not found[place][1] < threshold]
            for place in ranking if threshold is not None else ranking[:1]:
                block[place] = found[place][0]
        if end_token_id in block:
            block = block[: block.index(end_token_id) + 1]
        ids += [token for token in block if token is not None]
        if end_token_id in block:
            break
    return ids[len(prompt) :], margin


def make_nemotron_checkpoint(folder: Path, *, seed: int = 0, **fields: Any) -> Path:
    """Write a small random checkpoint in the published format.

    Args:
        folder: Where it goes; created.
        seed: Of the weights.
        fields: Config fields that differ from FIELDS.
    """
    config = {**FIELDS, **fields}
    maker = _Maker(config, seed)
    maker.matrix("encoder.embed_tokens", config["vocab_size"], maker.width, 3.0)
    maker.norm("encoder.norm")
    if not config["tie_word_embeddings"]:
        maker.matrix("diffusion_head", config["vocab_size"], maker.width, 3.0)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"encoder.layers.{layer}"
        maker.norm(f"{prefix}.input_layernorm")
        maker.norm(f"{prefix}.post_attention_layernorm")
        _attention_matrices(maker, f"{prefix}.self_attn", config["head_dim"])
        maker.mlp(f"{prefix}.mlp", config["intermediate_size"])
    return maker.save(folder)
