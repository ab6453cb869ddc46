"""A Llama in plain PyTorch, for training and decoding; its weights have the names of Hugging Face's checkpoints."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    """Shape of the network; the defaults are SmolLM2-135M's."""

    vocab_size: int = 49152
    hidden_size: int = 576
    intermediate_size: int = 1536
    num_hidden_layers: int = 30
    num_attention_heads: int = 9
    num_key_value_heads: int = 3
    rms_norm_eps: float = 1e-5
    rope_theta: float = 100000.0
    max_position_embeddings: int = 8192
    bos_token_id: int = 1
    eos_token_id: int = 2
    mask_token_id: int = 16  # <empty_output>, which its text does not use: the vocabulary need not grow
    block_length: int = 8

    @property
    def head_size(self) -> int:
        """Width of a head."""
        return self.hidden_size // self.num_attention_heads


class Cache:
    """Keys and values by position, a row per sequence; a position computed again is replaced."""

    def __init__(self, config: Config, num_sequences: int, length: int, device: torch.device) -> None:
        shape = (config.num_hidden_layers, num_sequences, length, config.num_key_value_heads, config.head_size)
        self.keys, self.values = torch.zeros(shape, device=device), torch.zeros(shape, device=device)
        self.sequences = torch.arange(num_sequences, device=device)[:, None]
        self.positions: Tensor  # of the rows of the forward pass under way

    def update(self, layer: int, key: Tensor, value: Tensor, end: int) -> tuple[Tensor, Tensor]:
        """Keeps rows `[batch, length, heads, head_size]`; returns what is before position `end`."""
        for kept, rows in ((self.keys[layer], key), (self.values[layer], value)):
            kept[self.sequences, self.positions] = rows
        return self.keys[layer][:, :end], self.values[layer][:, :end]


class Attention(nn.Module):
    """Attention of grouped heads; who sees whom is the caller's."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.layer, self.num_kv_heads, self.head_size = layer, config.num_key_value_heads, config.head_size
        width, kv_width = config.hidden_size, config.num_key_value_heads * config.head_size
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, kv_width, bias=False)
        self.v_proj = nn.Linear(width, kv_width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, visible: Tensor, cache: Cache | None) -> Tensor:
        """Maps `[batch, length, width]` to the same shape; `visible` and `cache` as in `Llama.forward`."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        query, key, value = (projection(x).unflatten(-1, (-1, self.head_size)) for projection in projections)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        if cache is not None:
            key, value = cache.update(self.layer, key, value, visible.shape[-1])
        # The heads of a group are more rows of one head, so that keys and values need not be repeated.
        group = query.shape[2] // self.num_kv_heads
        query = (
            query.unflatten(2, (-1, group)).permute(0, 2, 3, 1, 4).flatten(2, 3)
        )  # [batch, kv, group * length, size]
        visible = visible.repeat(1, group, 1)[:, None]
        mixed = F.scaled_dot_product_attention(query, key.transpose(1, 2), value.transpose(1, 2), visible)
        return self.o_proj(mixed.unflatten(2, (group, -1)).permute(0, 3, 1, 2, 4).flatten(2))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[..., width]` to the same shape."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Attention, then SwiGLU, each behind its norm."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, visible: Tensor, cache: Cache | None) -> Tensor:
        """As `Attention.forward`."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, visible, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Layers(nn.Module):
    """Everything, under the name that checkpoints give it."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)


class Llama(nn.Module):
    """Hidden states and logits of rows whose positions and visibility the caller gives; embeddings are tied."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.model = config, Layers(config)
        frequencies = config.rope_theta ** (-torch.arange(0, config.head_size, 2) / config.head_size)
        self.frequencies: Tensor
        self.register_buffer("frequencies", frequencies.repeat(2), persistent=False)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.frequencies.device

    def forward(self, ids: Tensor, positions: Tensor, visible: Tensor, cache: Cache | None = None) -> Tensor:
        """Hidden states `[batch, length, width]`, normed.

        Args:
            ids: `[batch, length]`.
            positions: `[batch, length]`.
            visible: `[batch, length, keys]` bool, which row sees which; keys are positions of the cache if there is one
                and rows otherwise.
            cache: Takes the rows' keys and values and gives those of all positions.
        """
        if cache is not None:
            cache.positions = positions
        angle = positions[:, :, None, None] * self.frequencies  # [batch, length, 1, head_size]
        cos, sin = angle.cos(), angle.sin()
        x = F.embedding(ids, self.model.embed_tokens.weight)
        for layer in self.model.layers:
            x = layer(x, cos, sin, visible, cache)
        return self.model.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Maps `[..., width]` to `[..., vocab_size]`."""
        return F.linear(hidden, self.model.embed_tokens.weight)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding that pairs the two halves of a head; `heads` is `[batch, length, heads, head_size]`."""
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat((-second, first), dim=-1) * sin
