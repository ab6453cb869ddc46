"""What a training step makes of a checkpoint: the same tensors with some noise."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

NOISE = 0.1  # of a weight's own size: other tokens, and confidences that are not all near 1


def train(folder: Path) -> None:
    """Put other weights into a checkpoint folder."""
    file, generator = folder / "model.safetensors", torch.Generator().manual_seed(0)
    weights = {
        name: (value.float() * (1 + NOISE * torch.randn(value.shape, generator=generator))).to(value.dtype)
        for name, value in load_file(file).items()
    }
    file.unlink()  # it may be mapped
    save_file(weights, file, metadata={"format": "pt"})
