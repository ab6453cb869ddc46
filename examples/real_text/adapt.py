"""Training: the teacher's own text, masked, so that the model learns to fill in what it would have written."""

import json
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from examples.real_text.decode import decode
from examples.real_text.model import Config, Llama

TEMPERATURES = (0.7, 1.0)  # greedy text runs into loops
PADDING_WEIGHT = 0.2  # of EOS behind the output's end
CLEAN, PADDING = 0, -1  # copies; noisy ones count from 1
FINAL_LEARNING_RATE = 0.1  # of the peak
WARMUP = 0.03  # of the training
BETAS, MAX_GRADIENT_NORM = (0.9, 0.95), 1.0
SAVE_INTERVAL_S, LOG_INTERVAL = 60.0, 10
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


@dataclass(frozen=True)
class Rows:
    """A text's rows in one forward pass, and what they should predict."""

    ids: np.ndarray  # [rows]
    positions: np.ndarray  # [rows]
    copies: np.ndarray  # [rows]: CLEAN, or which noisy copy
    sources: np.ndarray  # [targets]: the row that predicts
    targets: np.ndarray  # [targets]: token ids
    weights: np.ndarray  # [targets]


def noise(prompt: Sequence[int], output: Sequence[int], config: Config, rng: np.random.Generator) -> Rows:
    """Lays out a text as itself, followed by two noisy copies of its output's blocks.

    A block of the first copy is masked at a rate that is uniform in [0, 1], the second copy has the other masks. A
    block's first token, which decoding has from the block before, and prompts are never masked; blocks without a mask
    are left out. So every output token is predicted once: from the row before it, in its own copy or, a block's first
    token, in the clean text. An output that ends is padded with EOS, another one cut, to whole blocks.
    """
    block_length = config.block_length
    text = [*prompt, *output]
    num_padding = -len(text) % block_length if text[-1] == config.eos_token_id else 0
    clean = np.array(text + [config.eos_token_id] * num_padding, dtype=np.int64)
    clean = clean[: len(clean) // block_length * block_length]
    own = np.arange(len(clean))
    is_output, is_first = own >= len(prompt), own % block_length == 0
    rate = rng.random(len(clean) // block_length).repeat(block_length)
    is_masked = rng.random(len(clean)) < rate
    wanted = np.flatnonzero(is_output & is_first)
    parts, sources, targets = [(clean, own, np.full_like(own, CLEAN))], [wanted - 1], [wanted]
    num_rows = len(clean)
    for copy, masked in enumerate((is_masked, ~is_masked), start=CLEAN + 1):
        masked = masked & is_output & ~is_first
        kept = own[masked.reshape(-1, block_length).any(1).repeat(block_length)]
        parts.append((np.where(masked, config.mask_token_id, clean)[kept], kept, np.full_like(kept, copy)))
        found = np.flatnonzero(masked[kept])
        sources.append(num_rows + found - 1)
        targets.append(kept[found])
        num_rows += len(kept)
    target = np.concatenate(targets)
    weights = np.where(target < len(text), 1.0, PADDING_WEIGHT)
    ids, positions, copies = (np.concatenate(part) for part in zip(*parts, strict=True))
    return Rows(ids, positions, copies, np.concatenate(sources), clean[target], weights)


def sees(positions: Tensor, copies: Tensor, block_length: int) -> Tensor:
    """Which row sees which, `[batch, rows, rows]`: clean blocks before its own, and its own block in its own copy."""
    block = positions // block_length
    is_before = block[:, None, :] < block[:, :, None]
    is_own = (block[:, None, :] == block[:, :, None]) & (copies[:, None, :] == copies[:, :, None])
    return is_own | is_before & (copies == CLEAN)[:, None, :]


def loss_of(model: Llama, texts: Sequence[Rows]) -> Tensor:
    """Weighted mean cross-entropy of all targets."""
    length = max(len(text.ids) for text in texts)
    laid = np.zeros((3, len(texts), length), dtype=np.int64)
    laid[2] = PADDING
    for row, text in enumerate(texts):
        laid[:, row, : len(text.ids)] = text.ids, text.positions, text.copies
    ids, positions, copies = torch.from_numpy(laid).to(model.device)
    sources = torch.from_numpy(np.concatenate([row * length + text.sources for row, text in enumerate(texts)]))
    targets = torch.from_numpy(np.concatenate([text.targets for text in texts])).to(model.device)
    weights = torch.from_numpy(np.concatenate([text.weights for text in texts])).float().to(model.device)
    with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=model.device.type == "cuda"):
        hidden = model(ids, positions, sees(positions, copies, model.config.block_length))
        logits = model.logits(hidden.flatten(0, 1)[sources.to(model.device)])
    return (F.cross_entropy(logits.float(), targets, reduction="none") * weights).sum() / weights.sum()


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
        texts = [noise(*pairs[index], model.config, rng) for index in pool[first : first + batch]]
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
