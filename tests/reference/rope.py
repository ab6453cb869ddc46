"""Rotary position embeddings in plain PyTorch, with the kinds of scaling that checkpoints ask for.

Sources: RoFormer (arXiv 2104.09864); position interpolation (arXiv 2306.15595), "linear"; YaRN (arXiv 2309.00071).
"""

import math
from typing import Any

import torch


def rotate(x: torch.Tensor, positions: torch.Tensor, size: int, config: dict[str, Any]) -> torch.Tensor:
    """Turn the first ``size`` entries of every head by its row's position.

    Args:
        x: ``[rows, heads, head size]``.
        positions: int64 ``[rows]``.
        size: Even.
        config: A checkpoint's, with ``rope_theta`` and perhaps ``rope_scaling`` or ``rope_parameters``.
    """
    frequency, scale = frequencies(size, config)
    angle = positions.float()[:, None, None] * frequency
    cos, sin = angle.cos() * scale, angle.sin() * scale
    first, second, rest = x[..., : size // 2], x[..., size // 2 : size], x[..., size:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def frequencies(size: int, config: dict[str, Any]) -> tuple[torch.Tensor, float]:
    """Angle per position of every pair, float32 ``[size / 2]``, and the factor on turned entries."""
    asked = {**config, **(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    theta, kind = asked["rope_theta"], asked.get("rope_type", asked.get("type", "default"))
    pair = torch.arange(size // 2, dtype=torch.float32)
    frequency = theta ** (-2 * pair / size)
    if kind == "default":
        return frequency, 1.0
    if kind == "linear":
        return frequency / asked["factor"], 1.0
    assert kind == "yarn"

    def pair_that_turns(times: float) -> float:
        """The pair that turns so often within the original range."""
        wavelength = asked["original_max_position_embeddings"] / times
        return size * math.log(wavelength / (2 * math.pi)) / (2 * math.log(theta))

    fast = math.floor(pair_that_turns(asked.get("beta_fast", 32)))
    slow = math.ceil(pair_that_turns(asked.get("beta_slow", 1)))
    fast, slow = max(fast, 0), min(slow, size - 1)
    interpolated = ((pair - fast) / max(slow - fast, 0.001)).clamp(0, 1)
    frequency = frequency * (1 - interpolated) + frequency / asked["factor"] * interpolated
    growth = 0.1 * max(math.log(asked["factor"]), 0.0)
    if "mscale" in asked and "mscale_all_dim" in asked:  # as DeepSeek-V2's code has it
        return frequency, (growth * asked["mscale"] + 1.0) / (growth * asked["mscale_all_dim"] + 1.0)
    return frequency, growth + 1.0
