"""Decoding without vLLM: a batch of requests, block by block; with blocks of one token it is autoregressive."""

from dataclasses import dataclass

import torch
from torch import Tensor

from examples.real_text.model import Cache, Llama

ONE_PER_STEP = 2.0  # a threshold that no confidence passes


@dataclass(frozen=True)
class Decoded:
    """Output of a request, its end token included, and the forward passes after prefill."""

    tokens: list[int]
    nfe: int


@torch.no_grad()
def decode(
    model: Llama,
    prompts: list[list[int]],
    *,
    max_tokens: int,
    block_length: int,
    threshold: float = ONE_PER_STEP,
    temperature: float = 0.0,
    end_token_id: int | None = None,
) -> list[Decoded]:
    """Decodes requests that do not wait for each other.

    Position p is predicted from row p - 1. A forward of a finished block makes its keys final and gives the next
    block's first token; a forward of an unfinished one unmasks what is above the threshold, at least the best.

    Args:
        model: The network.
        prompts: Token ids, at least one each; the grid of blocks starts at a prompt's first.
        max_tokens: Most output tokens of a request.
        block_length: Positions denoised together.
        threshold: A confidence above it unmasks.
        temperature: 0 takes the likeliest token.
        end_token_id: Where output ends; the model's EOS by default.
    """
    config, device = model.config, model.device
    end_token_id = config.eos_token_id if end_token_id is None else end_token_id
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    wanted = lengths + max_tokens
    width = (int(wanted.max()) // block_length + 2) * block_length
    ids = torch.full((len(prompts), width), config.mask_token_id, device=device)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt, device=device)
    own = torch.arange(width, device=device)
    decided = own < lengths[:, None]
    cache = Cache(config, len(prompts), width, device)
    # The block with the prompt's last token. What prefill writes behind it, for longer prompts' sake, is replaced
    # before it is seen.
    start = (lengths - 1) // block_length * block_length
    if prefilled := int(start.max()):
        rows, block = own[:prefilled], own[:prefilled] // block_length
        visible = block[:, None] >= block
        model(ids[:, :prefilled], rows.expand(len(ids), -1), visible.expand(len(ids), -1, -1), cache)

    nfe = torch.zeros_like(lengths)
    is_open = torch.ones_like(lengths, dtype=torch.bool)
    offsets = own[:block_length]
    while is_open.any():
        rows = start[:, None] + offsets  # [requests, block_length]
        end = int(rows.max()) + 1
        visible = (own[:end] < start[:, None] + block_length)[:, None].expand(-1, block_length, -1)
        logits = model.logits(model(ids.gather(1, rows), rows, visible, cache)).float()
        nfe += is_open
        is_finished = decided.gather(1, rows).all(1)
        is_candidate = torch.where(
            is_finished[:, None],
            offsets == block_length - 1,
            ~decided.gather(1, rows + 1) & (offsets < block_length - 1),
        )
        proposal, confidence = propose(logits, config.mask_token_id, temperature)
        confidence = confidence.masked_fill(~is_candidate, -1.0)
        is_best = offsets == confidence.argmax(1, keepdim=True)
        is_chosen = is_candidate & (is_best | (confidence > threshold))
        ids.scatter_(1, rows + 1, torch.where(is_chosen, proposal, ids.gather(1, rows + 1)))
        decided.scatter_(1, rows + 1, is_chosen | decided.gather(1, rows + 1))

        num_ready = decided.long().cumprod(1).sum(1)
        is_end = (ids == end_token_id) & (own >= lengths[:, None]) & (own < num_ready[:, None])
        is_open = is_open & ~is_end.any(1) & (num_ready < wanted)
        start = torch.where(is_open & is_finished, start + block_length, start)
    return [
        Decoded(cut(row[len(prompt) : len(prompt) + max_tokens], end_token_id), count)
        for row, prompt, count in zip(ids.tolist(), prompts, nfe.tolist(), strict=True)
    ]


def propose(logits: Tensor, mask_token_id: int, temperature: float) -> tuple[Tensor, Tensor]:
    """A token and its probability for every row `[requests, rows, vocab_size]`, the mask token never among them."""
    allowed = logits.index_fill(-1, torch.tensor([mask_token_id], device=logits.device), -torch.inf)
    if temperature > 0:
        probability = (allowed / temperature).softmax(-1)
        proposal = torch.multinomial(probability.flatten(0, -2), 1).view(logits.shape[:-1])
    else:
        proposal = allowed.argmax(-1)
    return proposal, logits.softmax(-1).gather(-1, proposal[..., None]).squeeze(-1)


def cut(tokens: list[int], end_token_id: int) -> list[int]:
    """Tokens up to the first end token, which is kept."""
    return tokens[: tokens.index(end_token_id) + 1] if end_token_id in tokens else tokens
