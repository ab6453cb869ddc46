"""Gumbel noise as a hash of a row's key and a vocabulary id.

The hash is the same on every device bit for bit, its logarithms are up to rounding. This module defines it for PyTorch,
NumPy and Triton, without importing Triton: ``confidence_kernel`` compiles the functions of the hash from their source.

Source: MurmurHash3 (public domain) for ``mix``.
"""

from typing import TypeVar

import numpy as np
import torch

UINT32_MASK = 0xFFFFFFFF
KEY_INCREMENT = 0x9E3779B9  # 2**32 / golden ratio: keeps the hash of key 0 from being 0
# u has 23 random bits and half a step on top, which fp32 holds exactly: 2**-24 <= u <= 1 - 2**-24.
UNIFORM_SHIFT = 9
UNIFORM_STEP = 2.0**-23
GUMBEL_MAX = 16.7  # above the largest noise value, 24 ln 2 = 16.64

Array = TypeVar("Array", torch.Tensor, np.ndarray)


def mix(bits: Array) -> Array:
    """MurmurHash3's 32-bit finalizer of integers 0 to 2**32 - 1, int64 or uint32."""
    bits = bits ^ (bits >> 16)
    bits = (bits * 0x85EBCA6B) & UINT32_MASK
    bits = bits ^ (bits >> 13)
    bits = (bits * 0xC2B2AE35) & UINT32_MASK
    return bits ^ (bits >> 16)


def mix_key(noise_key: Array) -> tuple[Array, Array]:
    """Two words of 32 bits, held in int64, of every int64 key."""
    first = mix(((noise_key & UINT32_MASK) + KEY_INCREMENT) & UINT32_MASK)
    second = mix((((noise_key >> 32 & UINT32_MASK) ^ first) + KEY_INCREMENT) & UINT32_MASK)
    return first, second


def hash_ids(first: Array, second: Array, ids: Array) -> Array:
    """32 random bits of every vocabulary id under a mixed key; int64 or uint32, like the arguments."""
    return mix(mix((ids + first) & UINT32_MASK) ^ second)


def uniform_noise(noise_key: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Uniform noise of every pair of a key and a number.

    Args:
        noise_key: [num_keys] int64.
        ids: [num_ids] int64, 0 to 2**32 - 1.

    Returns:
        [num_keys, num_ids] fp32, 2**-24 to 1 - 2**-24.
    """
    first, second = mix_key(noise_key.unsqueeze(-1))
    return ((hash_ids(first, second, ids) >> UNIFORM_SHIFT).float() + 0.5) * UNIFORM_STEP


def gumbel_noise(noise_key: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise of every pair of a key and a vocabulary id.

    Args:
        noise_key: [num_keys] int64.
        ids: [num_ids] int64, 0 to 2**32 - 1.

    Returns:
        [num_keys, num_ids] fp32, within [-2.82, 16.64].
    """
    return -torch.log(-torch.log(uniform_noise(noise_key, ids)))


def gumbel_noise_np(first: np.ndarray, second: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """``gumbel_noise`` of mixed keys, uint32, one for every id or one for all of them; fp32, shape of ``ids``."""
    bits = hash_ids(first, second, ids.astype(np.uint32)) >> UNIFORM_SHIFT
    u = (bits.astype(np.float32) + np.float32(0.5)) * np.float32(UNIFORM_STEP)
    return -np.log(-np.log(u))
