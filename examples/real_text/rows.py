"""What a text is trained on in one forward pass: itself and two noisy copies, who sees whom, and the loss."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from examples.real_text.model import Config, Llama

PADDING_WEIGHT = 0.2  # of EOS behind the output's end
CLEAN, PADDING = 0, -1  # copies; noisy ones count from 1


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
