"""Block-causal networks in plain float32 PyTorch: one sequence, a dense mask, no cache; and how they are decoded.

Sources: SDAR (arXiv 2510.06303), layers of Qwen3; LLaDA2.0 and 2.1 (arXiv 2602.08676), a mixture of experts routed as
DeepSeek-V3 (arXiv 2412.19437, section 2.1.2) describes; Fast-dLLM v2 (arXiv 2509.26328), layers of Qwen2.5. Weights
have the names of the published checkpoints.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.reference.decode import Decoded, Draft, Rule, Shape, decide_alone, enter, look, sureness
from tests.reference.rope import rotate

MAX_POST_STEPS = 16  # of LLaDA2.1's editing
Weights = dict[str, torch.Tensor]


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + eps) * weight


def _swiglu(x: torch.Tensor, weights: Weights, prefix: str) -> torch.Tensor:
    gate, up, down = (weights[f"{prefix}{name}_proj.weight"] for name in ("gate", "up", "down"))
    return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T


class BlockCausalNetwork(ABC):
    """A checkpoint's config and weights, and its forward pass; subclasses say what their layers are made of."""

    logits_shift = 0
    embedding = "model.embed_tokens.weight"

    def __init__(self, config: dict[str, Any], weights: Weights) -> None:
        self.config = config
        self.weights = {name: weight.float() for name, weight in weights.items()}
        self.num_heads, self.num_kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.head_size = config.get("head_dim") or config["hidden_size"] // self.num_heads
        self.mask_token_id = config["mask_token_id"]

    @classmethod
    def load(cls, folder: Path, **fields: Any) -> "BlockCausalNetwork":
        """Read ``config.json`` and ``model.safetensors``; ``fields`` are added to the config."""
        config = json.loads((folder / "config.json").read_text())
        return cls({**config, **fields}, load_file(folder / "model.safetensors"))

    @abstractmethod
    def project(self, layer: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys (both not yet rotated) and values, [rows, heads, head size]."""

    @abstractmethod
    def mix(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        """The feed-forward part."""

    def attention_output(self, layer: int) -> torch.Tensor:
        """The matrix behind attention."""
        return self.weights[f"model.layers.{layer}.self_attn.o_proj.weight"]

    def forward(self, ids: torch.Tensor, block_length: int) -> torch.Tensor:
        """Logits ``[rows, vocab_size]`` of a whole sequence; a row sees the blocks up to its own."""
        positions = torch.arange(ids.shape[0])
        block = positions // block_length
        return self.run(ids, positions, block[:, None] >= block[None, :])

    @torch.no_grad()
    def run(self, ids: torch.Tensor, positions: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """Logits of rows at these positions; ``visible[q, k]``: row q sees row k."""
        eps, num_rows = self.config["rms_norm_eps"], ids.shape[0]
        rotary_size = int(self.head_size * self.config.get("partial_rotary_factor", 1.0))
        bias = torch.where(visible, 0.0, -torch.inf)
        x = self.weights[self.embedding][ids]
        for layer in range(self.config["num_hidden_layers"]):
            norms = [
                self.weights[f"model.layers.{layer}.{name}_layernorm.weight"] for name in ("input", "post_attention")
            ]
            q, k, v = self.project(layer, _norm(x, norms[0], eps))
            q, k = (rotate(heads, positions, rotary_size, self.config) for heads in (q, k))
            k, v = (heads.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1) for heads in (k, v))
            scores = torch.einsum("qhd,khd->hqk", q, k) / self.head_size**0.5 + bias
            mixed = torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), v).reshape(num_rows, -1)
            x = x + mixed @ self.attention_output(layer).T
            x = x + self.mix(layer, _norm(x, norms[1], eps))
        x = _norm(x, self.weights["model.norm.weight"], eps)
        tied = self.config.get("tie_word_embeddings", False)
        return x @ self.weights[self.embedding if tied else "lm_head.weight"].T


class ReferenceSDAR(BlockCausalNetwork):
    """SDAR, dense or with experts: query and key heads are normed."""

    def project(self, layer: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See the base class."""
        prefix, eps = f"model.layers.{layer}.self_attn.", self.config["rms_norm_eps"]
        q, k, v = (
            (x @ self.weights[f"{prefix}{name}_proj.weight"].T).view(x.shape[0], -1, self.head_size) for name in "qkv"
        )
        return (
            _norm(q, self.weights[f"{prefix}q_norm.weight"], eps),
            _norm(k, self.weights[f"{prefix}k_norm.weight"], eps),
            v,
        )

    def mix(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        """See the base class."""
        prefix = f"model.layers.{layer}.mlp."
        if "num_experts" not in self.config:
            return _swiglu(x, self.weights, prefix)
        share = (x @ self.weights[f"{prefix}gate.weight"].T).softmax(dim=-1)
        best = share.topk(self.config["num_experts_per_tok"], dim=-1)
        weight = best.values / best.values.sum(dim=-1, keepdim=True)
        return _experts(x, self.weights, prefix, best.indices, weight)


class ReferenceFastDLLMv2(BlockCausalNetwork):
    """Fast-dLLM v2: biases on queries, keys and values; position i is predicted by the logits at i - 1."""

    logits_shift = 1

    def project(self, layer: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See the base class."""
        prefix = f"model.layers.{layer}.self_attn."
        q, k, v = (
            (x @ self.weights[f"{prefix}{name}_proj.weight"].T + self.weights[f"{prefix}{name}_proj.bias"]).view(
                x.shape[0], -1, self.head_size
            )
            for name in "qkv"
        )
        return q, k, v

    def mix(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        """See the base class."""
        return _swiglu(x, self.weights, f"model.layers.{layer}.mlp.")


class ReferenceLLaDA2(BlockCausalNetwork):
    """LLaDA2: one matrix for queries, keys and values, half the head rotated, experts in groups."""

    embedding = "model.word_embeddings.weight"

    def project(self, layer: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See the base class."""
        prefix, eps = f"model.layers.{layer}.attention.", self.config["rms_norm_eps"]
        heads = (x @ self.weights[f"{prefix}query_key_value.weight"].T).view(x.shape[0], -1, self.head_size)
        q, k, v = heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        return (
            _norm(q, self.weights[f"{prefix}query_layernorm.weight"], eps),
            _norm(k, self.weights[f"{prefix}key_layernorm.weight"], eps),
            v,
        )

    def attention_output(self, layer: int) -> torch.Tensor:
        """See the base class."""
        return self.weights[f"model.layers.{layer}.attention.dense.weight"]

    def mix(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        """The best groups by the sum of their two best experts, then the best experts in them.

        A bias chooses but does not weigh.
        """
        prefix, config = f"model.layers.{layer}.mlp.", self.config
        if layer < config["first_k_dense_replace"]:
            return _swiglu(x, self.weights, prefix)
        share = (x @ self.weights[f"{prefix}gate.weight"].T).sigmoid()
        choice = share + self.weights[f"{prefix}gate.expert_bias"]
        grouped = choice.view(x.shape[0], config["n_group"], -1)
        best_groups = grouped.topk(2, dim=-1).values.sum(dim=-1).topk(config["topk_group"], dim=-1).indices
        allowed = torch.zeros(grouped.shape[:2], dtype=torch.bool).scatter(1, best_groups, True)
        choice = choice.masked_fill(~allowed.repeat_interleave(grouped.shape[2], dim=1), -torch.inf)
        experts = choice.topk(config["num_experts_per_tok"], dim=-1).indices
        weight = share.gather(1, experts)
        weight = weight / (weight.sum(dim=-1, keepdim=True) + 1e-20) * config["routed_scaling_factor"]
        shared = _swiglu(x, self.weights, f"{prefix}shared_experts.")
        return _experts(x, self.weights, prefix, experts, weight) + shared


def _experts(x: torch.Tensor, weights: Weights, prefix: str, chosen: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    mixed = torch.zeros_like(x)
    for expert in chosen.unique().tolist():
        rows, place = (chosen == expert).nonzero(as_tuple=True)
        mixed[rows] += share[rows, place, None] * _swiglu(x[rows], weights, f"{prefix}experts.{expert}.")
    return mixed


def decode_block_causal(
    model: BlockCausalNetwork,
    prompt: list[int],
    rule: Rule,
    *,
    block_length: int,
    max_tokens: int,
    end_token_ids: tuple[int, ...] = (),
    edit_threshold: float | None = None,
    shape: Shape | None = None,
    pinned: dict[int, int] | None = None,
    draft: Draft | None = None,
) -> Decoded:
    """Decode a request with the whole sequence in every forward.

    Args:
        model: The network; its logits are not shifted.
        prompt: Token ids. Blocks lie on a grid from its start; its incomplete last one is the first to be denoised.
        rule: Which positions a step unmasks; blocks count from the first that is denoised.
        block_length: Positions denoised together.
        max_tokens: Output tokens wanted.
        end_token_ids: Where output ends.
        edit_threshold: LLaDA2.1's token editing: a written token is replaced where another is surer than this, until a
            step without masks edits nothing, at most MAX_POST_STEPS of them.
        shape: Changes the logits from which a token is proposed; its confidence stays the model's.
        pinned: Tokens of the output that are given, by their index.
        draft: Tokens that a step unmasks beside what the rule says, where it proposes them.
    """
    ids, result = list(prompt), Decoded()
    chosen_from: dict[int, torch.Tensor] = {}
    steps: dict[int, tuple[int, int, float]] = {}
    first_block = len(prompt) // block_length
    while len(ids) < len(prompt) + max_tokens and (len(ids) == len(prompt) or ids[-1] not in end_token_ids):
        block, start = len(ids) // block_length, len(ids)
        end = (block + 1) * block_length
        canvas = torch.tensor(ids + [model.mask_token_id] * (end - start))
        decided = [True] * start + [False] * (end - start)
        for place, token in (pinned or {}).items():
            if start <= len(prompt) + place < end:
                canvas[len(prompt) + place], decided[len(prompt) + place] = token, True
        needed = min(end, len(prompt) + max_tokens)
        num_behind = _canvas_end(len(prompt), max_tokens, block_length) - end
        result.record.append([])
        enter(rule, start)
        num_post_steps = 0
        for step in range(block_length + MAX_POST_STEPS):
            logits = model.forward(canvas, block_length)
            result.nfe += 1
            probability, own = logits.double().softmax(dim=-1), logits.clone()
            logits[:, model.mask_token_id] = -torch.inf
            if shape is not None:
                before = [token for token, known in zip(canvas.tolist(), decided, strict=True) if known]
                logits = torch.stack([shape(row, before, place - len(prompt)) for place, row in enumerate(logits)])
            top = logits.topk(2, dim=-1)
            masked, edits, found = {}, [], {}
            for position in range(start, end):
                token = int(top.indices[position, 0])
                confidence = sureness(rule, probability[position], token)
                if decided[position] and edit_threshold is None:
                    continue
                margin = (top.values[position, 0] - top.values[position, 1]).item()
                result.proposal_margin = min(result.proposal_margin, margin)
                if not decided[position]:
                    masked[position], found[position] = confidence, token
                elif token != canvas[position]:
                    result.edit_margin = min(result.edit_margin, abs(confidence - edit_threshold))
                    if confidence > edit_threshold:
                        edits.append(position)
            num_post_steps += not masked
            if masked:
                rows, written = ({place: one[place] for place in masked} for one in (logits, own))
                look(rule, step, rows, written, found, masked, num_behind + len(masked))
            chosen = rule(block - first_block, step, masked) if masked else []
            if draft is not None:
                chosen = list({*chosen, *draft.confirmed(rule, -len(prompt), found, masked)})
            if masked:
                result.record[-1].append([(c, position in chosen) for position, c in masked.items()])
            for position in chosen + edits:
                canvas[position], decided[position] = found.get(position, int(top.indices[position, 0])), True
                chosen_from[position] = own[position]
                steps[position] = step, result.nfe, masked.get(position, 0.0)
            result.num_edits += len(edits)
            is_open = edit_threshold is not None and (masked or (edits and num_post_steps < MAX_POST_STEPS))
            ready = None if is_open else _ready(canvas.tolist(), decided, start, needed, end_token_ids)
            if ready is not None:
                break
        assert ready is not None
        ids += ready
    result.tokens = ids[len(prompt) :]
    if not pinned:
        result.chosen_from = [chosen_from[place] for place in range(len(prompt), len(ids))]
        result.steps = [steps[place] for place in range(len(prompt), len(ids))]
    result.rule_margin = min(getattr(rule, "margin", float("inf")), draft.margin if draft else float("inf"))
    return result


def decode_with_answer_blocks(
    model: BlockCausalNetwork,
    prompt: list[int],
    make_rule: Callable[[], Rule],
    *,
    block_length: int,
    answer_block_length: int,
    think_end: int,
    check: list[int],
    max_tokens: int,
    end_token_ids: tuple[int, ...] = (),
) -> tuple[Decoded, range]:
    """TCCF (arXiv 2602.09555): two decodings, the second of which has the first one's output in its prompt.

    Args:
        model, prompt, block_length, max_tokens, end_token_ids: See :func:`decode_block_causal`.
        make_rule: Of each of the two.
        answer_block_length: Of the second.
        think_end: Token that ends the first.
        check: What stands in its place; empty where it stays.

    Returns:
        Both as one, and the places of the check prompt in the output; empty where it does not end its thinking.
    """
    ends = (*end_token_ids, think_end)
    first = decode_block_causal(
        model, prompt, make_rule(), block_length=block_length, max_tokens=max_tokens, end_token_ids=ends
    )
    if first.tokens[-1] != think_end:
        return first, range(0)
    written = (first.tokens[:-1] + check if check else first.tokens)[:max_tokens]
    num_own = len(first.tokens) - bool(check)
    given = range(num_own, len(written))
    steps = first.steps[:num_own] + [(0, 0, 0.0)] * len(given)
    result = replace(first, tokens=written, steps=steps)
    if len(written) == max_tokens:
        return result, given
    second = decode_block_causal(
        model,
        prompt + written,
        make_rule(),
        block_length=answer_block_length,
        max_tokens=max_tokens - len(written),
        end_token_ids=end_token_ids,
    )
    result.tokens, result.nfe = written + second.tokens, first.nfe + second.nfe
    result.proposal_margin = min(first.proposal_margin, second.proposal_margin)
    result.rule_margin = min(first.rule_margin, second.rule_margin)
    result.steps += [(step, first.nfe + forward, confidence) for step, forward, confidence in second.steps]
    return result, given


def decode_fast_dllm_v2(
    model: BlockCausalNetwork,
    prompt: list[int],
    rule: Rule,
    *,
    block_length: int,
    sub_block_length: int,
    sub_block_cache: bool,
    max_tokens: int,
    end_token_ids: tuple[int, ...] = (),
    draft: Draft | None = None,
) -> Decoded:
    """Decode a request with Fast-dLLM v2's sub-blocks.

    The forward that finishes the KV of a block gives the first token of the next one, whatever its confidence. A
    sub-block is decoded before the next begins. With the cache, a step whose sub-block begins with a written token
    computes the sub-block alone, against the rest of the block as it was when it was last computed whole.

    Args:
        model: The network, whose logits are shifted by one.
        prompt: Token ids.
        rule: Which positions a step unmasks, called with those of one sub-block; steps count in the block, the forward
            that gives a first token among them.
        block_length, sub_block_length: Positions of a block, and those denoised together.
        sub_block_cache: See above.
        max_tokens: Output tokens wanted.
        end_token_ids: Where output ends.
        draft: Tokens that a step unmasks beside what the rule says, where it proposes them.
    """
    ids, result = list(prompt), Decoded()
    first_block = len(prompt) // block_length
    while len(ids) < len(prompt) + max_tokens and (len(ids) == len(prompt) or ids[-1] not in end_token_ids):
        start, block = len(ids), len(ids) // block_length
        base, end = block * block_length, (block + 1) * block_length
        canvas = torch.tensor(ids + [model.mask_token_id] * (end - start))
        decided = [True] * start + [False] * (end - start)
        needed = min(end, len(prompt) + max_tokens)
        num_behind = _canvas_end(len(prompt), max_tokens, block_length) - end
        result.record.append([])
        enter(rule, start)
        stale: torch.Tensor | None = None
        step = 0
        ready = None
        while ready is None:
            if start == base and step == 0 and base > 0:
                proposals = {base: model.forward(canvas[:base], block_length)[-1]}
                chosen = [base]
                decide_alone(rule, 1)
            else:
                sub = next(s for s in range(base, end, sub_block_length) if not all(decided[s : s + sub_block_length]))
                last = sub + sub_block_length
                if not sub_block_cache or stale is None or not decided[sub]:
                    logits = model.forward(canvas, block_length)
                    stale = canvas.clone()
                else:
                    logits = _beside_stale_block(model, stale, canvas, sub, last, block_length)
                proposals = {p: logits[p - 1 if p > base else p] for p in range(sub, last) if not decided[p]}
                chosen = None
            result.nfe += 1
            masked, tokens, written = {}, {}, {place: line.clone() for place, line in proposals.items()}
            for position, line in proposals.items():
                probability = line.double().softmax(dim=-1)
                line[model.mask_token_id] = -torch.inf
                top = line.topk(2)
                tokens[position] = int(top.indices[0])
                masked[position] = sureness(rule, probability, tokens[position])
                result.proposal_margin = min(result.proposal_margin, (top.values[0] - top.values[1]).item())
            if chosen is None:
                look(rule, step, proposals, written, tokens, masked, num_behind + decided.count(False))
                chosen = rule(block - first_block, step, masked)
            if draft is not None:
                chosen = list({*chosen, *draft.confirmed(rule, -len(prompt), tokens, masked)})
            result.record[-1].append([(c, position in chosen) for position, c in masked.items()])
            for position in chosen:
                canvas[position], decided[position] = tokens[position], True
            ready = _ready(canvas.tolist(), decided, start, needed, end_token_ids)
            step += 1
        ids += ready
    result.tokens = ids[len(prompt) :]
    result.rule_margin = min(getattr(rule, "margin", float("inf")), draft.margin if draft else float("inf"))
    return result


def _canvas_end(prompt_length: int, max_tokens: int, block_length: int) -> int:
    """The position behind the last block of a request."""
    return -(-(prompt_length + max_tokens) // block_length) * block_length


def _beside_stale_block(
    model: BlockCausalNetwork, stale: torch.Tensor, canvas: torch.Tensor, first: int, last: int, block_length: int
) -> torch.Tensor:
    """Logits at all positions, those of [first, last) from rows that see the rest of their block as in ``stale``."""
    length = len(canvas)
    positions = torch.cat([torch.arange(length), torch.arange(first, last)])
    is_new = torch.arange(len(positions)) >= length
    block = positions // block_length
    replaced = (positions >= first) & (positions < last) & ~is_new
    visible = (block[:, None] >= block[None, :]) & torch.where(is_new[:, None], ~replaced[None, :], ~is_new[None, :])
    logits = model.run(torch.cat([stale, canvas[first:last]]), positions, visible)
    return torch.cat([logits[:first], logits[length:], logits[last:length]])


def _ready(
    ids: list[int], decided: list[bool], start: int, end: int, end_token_ids: tuple[int, ...]
) -> list[int] | None:
    """The block's output once nothing before its end is undecided."""
    for position in range(start, end):
        if not decided[position]:
            return None
        if ids[position] in end_token_ids:
            return ids[start : position + 1]
    return ids[start:end]
