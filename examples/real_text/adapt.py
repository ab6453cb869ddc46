"""Training on the teacher's own text, so that the model learns to fill in what it would have written."""

import json
import math
import random
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from examples.real_text.decode import decode
from examples.real_text.model import Llama
from examples.real_text.rows import loss_of, noise

TEMPERATURES = (0.7, 1.0)  # greedy text runs into loops
FINAL_LEARNING_RATE = 0.1  # of the peak
WARMUP = 0.03  # of the training
BETAS, MAX_GRADIENT_NORM = (0.9, 0.95), 1.0
SAVE_INTERVAL_S, LOG_INTERVAL = 120.0, 10
POOL = 16  # batches among which a batch is chosen by length
Pair = tuple[list[int], list[int]]  # prompt, output


def sample(model: Llama, prompts: list[list[int]], *, max_tokens: int, batch: int, seconds: float) -> list[Pair]:
    """Lets the teacher answer prompts until the time is up; always the first batch."""
    pairs: list[Pair] = []
    begin = time.monotonic()
    for first in range(0, len(prompts), batch):
        some = prompts[first : first + batch]
        temperature = random.uniform(*TEMPERATURES)
        decoded = decode(model, some, max_tokens=max_tokens, block_length=1, temperature=temperature)
        pairs += [(prompt, one.tokens) for prompt, one in zip(some, decoded, strict=True)]
        if time.monotonic() - begin > seconds:
            break
    return pairs


class MaskRow(nn.Module):
    """An embedding table of which only the mask token's row is trained, from the mean embedding on."""

    def __init__(self, table: Tensor, mask_token_id: int) -> None:
        super().__init__()
        self.row = nn.Parameter(table.mean(0, keepdim=True))
        self.index: Tensor
        self.register_buffer("index", torch.tensor([mask_token_id], device=table.device))

    def forward(self, table: Tensor) -> Tensor:
        """The table with that row."""
        return table.index_copy(0, self.index, self.row)


class LowRank(nn.Module):
    """A matrix plus a trained one of low rank, at first zero; alpha equals the rank."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        (rows, columns), device = weight.shape, weight.device
        self.down = nn.Parameter(torch.randn(rank, columns, device=device) / columns**0.5)
        self.up = nn.Parameter(torch.zeros(rows, rank, device=device))

    def forward(self, weight: Tensor) -> Tensor:
        """The sum."""
        return weight + self.up @ self.down


def make_trainable(model: Llama, rank: int) -> None:
    """Readies a pretrained model in place: the mask token's vector, and LoRA of a rank or, for 0, all layers."""
    embedding = model.model.embed_tokens
    model.requires_grad_(rank == 0)
    embedding.weight.requires_grad_(False)
    parametrize.register_parametrization(embedding, "weight", MaskRow(embedding.weight, model.config.mask_token_id))
    for module in [module for module in model.modules() if isinstance(module, nn.Linear)] if rank else []:
        parametrize.register_parametrization(module, "weight", LowRank(module.weight, rank))


def merge(model: Llama) -> Llama:
    """Ends the training in place: weights are plain tensors again."""
    for module in [module for module in model.modules() if parametrize.is_parametrized(module)]:
        parametrize.remove_parametrizations(module, "weight")
    return model.eval().requires_grad_(False)


def learning_rate_factor(progress: float) -> float:
    """Linear warm-up, then a cosine down to FINAL_LEARNING_RATE; progress is in [0, 1]."""
    if progress < WARMUP:
        return progress / WARMUP
    cosine = 0.5 * (1 + math.cos(math.pi * (progress - WARMUP) / (1 - WARMUP)))
    return FINAL_LEARNING_RATE + (1 - FINAL_LEARNING_RATE) * cosine


def adapt(
    model: Llama,
    pairs: list[Pair],
    folder: Path,
    *,
    rank: int,
    learning_rate: float,
    batch: int,
    max_steps: int,
    seconds: float,
    seed: int = 0,
) -> Llama:
    """Trains a pretrained model in place until steps or time are up; a `state.pt` in the folder is continued.

    Its progress, which the learning rate follows, is the larger share of the two. `learning_curve.jsonl` gets a line
    every few steps.
    """
    torch.manual_seed(seed)
    make_trainable(model, rank)
    model.train()
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    optimizer = torch.optim.AdamW(weights.values(), lr=learning_rate, betas=BETAS, weight_decay=0.0)
    lengths = np.array([len(prompt) + 3 * len(output) for prompt, output in pairs])
    step, elapsed_s, num_targets, path = 0, 0.0, 0, folder / "state.pt"
    if path.exists():
        saved = torch.load(path, map_location=model.device)
        model.load_state_dict(saved["weights"], strict=False)
        optimizer.load_state_dict(saved["optimizer"])
        step, elapsed_s, num_targets = saved["progress"]
    last_save = time.monotonic()
    begin = last_save - elapsed_s
    losses: list[Tensor] = []
    while (progress := max(step / max_steps, elapsed_s / seconds)) < 1:
        rng = np.random.default_rng((seed, step))
        pool = rng.integers(len(pairs), size=batch * POOL)
        pool, first = pool[lengths[pool].argsort(kind="stable")], batch * int(rng.integers(POOL))
        drawn = [pairs[index] for index in pool[first : first + batch]]
        texts = [noise(prompt, output, model.config, rng) for prompt, output in drawn]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * learning_rate_factor(max(progress, 1 / max_steps))
        loss = loss_of(model, texts)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights.values(), MAX_GRADIENT_NORM)
        optimizer.step()
        losses.append(loss.detach())
        step, elapsed_s = step + 1, time.monotonic() - begin
        num_targets += sum(len(text.targets) for text in texts)
        is_last = max(step / max_steps, elapsed_s / seconds) >= 1
        if is_last or step % LOG_INTERVAL == 0:
            mean = torch.stack(losses).mean().item()
            losses.clear()
            line = json.dumps({"step": step, "elapsed_s": elapsed_s, "num_targets": num_targets, "loss": mean})
            print(line, flush=True)
            with (folder / "learning_curve.jsonl").open("a") as curve:
                curve.write(line + "\n")
        if is_last or time.monotonic() - last_save > SAVE_INTERVAL_S:
            last_save = time.monotonic()
            saved = {
                "weights": weights,
                "optimizer": optimizer.state_dict(),
                "progress": (step, elapsed_s, num_targets),
            }
            torch.save(saved, path)
    return merge(model)
