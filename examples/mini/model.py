"""LLaDA and SDAR in plain PyTorch, for training and offline evaluation; checkpoints have the published tensor names."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

# Scale of the layers that write to the residual stream, relative to 1 / sqrt(fan-in).
RESIDUAL_SCALE = 0.35
EMBEDDING_STD = 0.5
# What SDAR's checkpoints call LLaDA's tensors: of a layer, and of the rest.
SDAR_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "attn_out": "self_attn.o_proj",
    "ff_norm": "post_attention_layernorm",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
}
SDAR_NAMES = {"wte": "model.embed_tokens", "ln_f": "model.norm", "ff_out": "lm_head"}


@dataclass(frozen=True)
class MiniConfig:
    """Shape of a bundled model; the rest of `config.json` is the same for all of a family, `llada` or `sdar`."""

    vocab_size: int
    eos_token_id: int
    mask_token_id: int
    block_length: int = 32
    d_model: int = 192
    n_layers: int = 4
    n_heads: int = 6
    mlp_hidden_size: int = 512
    max_sequence_length: int = 512
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    family: str = "llada"

    @property
    def is_block_causal(self) -> bool:
        """Whether a position sees the blocks up to its own; otherwise it sees all."""
        return self.family == "sdar"

    def to_json(self) -> str:
        """The text of `config.json`, with the fields of published checkpoints."""
        fields = self._sdar_fields() if self.family == "sdar" else self._llada_fields()
        return json.dumps(fields, indent=2) + "\n"

    def _sdar_fields(self) -> dict[str, Any]:
        return {
            "architectures": ["SDARForCausalLM"],
            "model_type": "sdar",
            "torch_dtype": "float32",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "block_size": self.block_length,
            "eos_token_id": self.eos_token_id,
            "head_dim": self.d_model // self.n_heads,
            "hidden_act": "silu",
            "hidden_size": self.d_model,
            "intermediate_size": self.mlp_hidden_size,
            "mask_token_id": self.mask_token_id,
            "max_position_embeddings": self.max_sequence_length,
            "num_attention_heads": self.n_heads,
            "num_hidden_layers": self.n_layers,
            "num_key_value_heads": self.n_heads,
            "pad_token_id": self.eos_token_id,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": False,
            "use_sliding_window": False,
            "vocab_size": self.vocab_size,
        }

    def _llada_fields(self) -> dict[str, Any]:
        return {
            "architectures": ["LLaDAModelLM"],
            "model_type": "llada",
            "torch_dtype": "float32",
            "activation_type": "silu",
            "alibi": False,
            "attention_dropout": 0.0,
            "attention_layer_norm": False,
            "attention_layer_norm_with_affine": True,
            "bias_for_layer_norm": False,
            "block_group_size": 1,
            "block_length": self.block_length,
            "block_type": "llama",
            "d_model": self.d_model,
            "embedding_dropout": 0.0,
            "embedding_size": self.vocab_size,
            "eos_token_id": self.eos_token_id,
            "flash_attention": False,
            "include_bias": False,
            "include_qkv_bias": False,
            "input_emb_norm": False,
            "layer_norm_type": "rms",
            "layer_norm_with_affine": True,
            "mask_token_id": self.mask_token_id,
            "max_sequence_length": self.max_sequence_length,
            "mlp_hidden_size": self.mlp_hidden_size,
            "mlp_ratio": 4,
            "multi_query_attention": None,
            "n_heads": self.n_heads,
            "n_kv_heads": self.n_heads,
            "n_layers": self.n_layers,
            "pad_token_id": self.eos_token_id,
            "residual_dropout": 0.0,
            "rms_norm_eps": self.rms_norm_eps,
            "rope": True,
            "rope_full_precision": True,
            "rope_theta": self.rope_theta,
            "scale_logits": False,
            "use_cache": False,
            "vocab_size": self.vocab_size,
            "weight_tying": False,
        }

    @classmethod
    def load(cls, folder: Path) -> "MiniConfig":
        """Reads `config.json`."""
        fields = json.loads((folder / "config.json").read_text())
        if fields["model_type"] == "sdar":
            fields |= {
                "block_length": fields["block_size"],
                "d_model": fields["hidden_size"],
                "n_layers": fields["num_hidden_layers"],
                "n_heads": fields["num_attention_heads"],
                "mlp_hidden_size": fields["intermediate_size"],
                "max_sequence_length": fields["max_position_embeddings"],
            }
        fields["family"] = fields["model_type"]
        return cls(**{name: fields[name] for name in cls.__dataclass_fields__})


class Block(nn.Module):
    """Pre-norm attention, then SwiGLU; SDAR's query and key heads are normed."""

    def __init__(self, config: MiniConfig) -> None:
        super().__init__()
        width, hidden = config.d_model, config.mlp_hidden_size
        self.n_heads = config.n_heads
        self.attn_norm = nn.RMSNorm(width, config.rms_norm_eps)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.has_head_norms = config.family == "sdar"
        if self.has_head_norms:
            self.q_norm = nn.RMSNorm(width // config.n_heads, config.rms_norm_eps)
            self.k_norm = nn.RMSNorm(width // config.n_heads, config.rms_norm_eps)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.ff_norm = nn.RMSNorm(width, config.rms_norm_eps)
        self.ff_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.ff_out = nn.Linear(hidden, width, bias=False)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, bias: Tensor | None) -> Tensor:
        """Maps `[batch, length, d_model]` to the same shape.

        Args:
            cos: Of the rotary angles, `[length, head_size]` or, by sequence, `[batch, 1, length, head_size]`.
            sin: As `cos`.
            bias: Added to the scores, `[batch, 1, length, length]`: 0 or, where a row does not see a column, -inf.
        """
        normed = self.attn_norm(hidden)
        heads = (hidden.shape[0], hidden.shape[1], self.n_heads, -1)
        query, key, value = (
            projection(normed).view(heads).transpose(1, 2) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.has_head_norms:
            # The fused kernel wants one type for input and weight.
            query = F.rms_norm(query, query.shape[-1:], self.q_norm.weight.to(query.dtype), self.q_norm.eps)
            key = F.rms_norm(key, key.shape[-1:], self.k_norm.weight.to(key.dtype), self.k_norm.eps)
        # Written out: on a CPU the fused kernel's bf16 backward pass is several times slower.
        scores = rotate(query, cos, sin) @ rotate(key, cos, sin).transpose(-1, -2) * query.shape[-1] ** -0.5
        if bias is not None:
            scores = scores + bias.to(scores.dtype)
        attended = scores.softmax(-1).to(value.dtype) @ value
        hidden = hidden + self.attn_out(attended.transpose(1, 2).flatten(2))
        normed = self.ff_norm(hidden)
        return hidden + self.ff_out(F.silu(self.ff_proj(normed)) * self.up_proj(normed))


class Transformer(nn.Module):
    """The layers, under the names the checkpoints give them."""

    def __init__(self, config: MiniConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.ln_f = nn.RMSNorm(config.d_model, config.rms_norm_eps)
        self.ff_out = nn.Linear(config.d_model, config.vocab_size, bias=False)

    def forward(self, token_ids: Tensor, cos: Tensor, sin: Tensor, bias: Tensor | None) -> Tensor:
        """Maps `[batch, length]` ids to `[batch, length, vocab_size]` logits; the rest is as in `Block.forward`."""
        hidden = self.wte(token_ids)
        for block in self.blocks:
            hidden = block(hidden, cos, sin, bias)
        return self.ff_out(self.ln_f(hidden))


class MiniLLaDA(nn.Module):
    """Logits of every position from all positions (no causal mask), or from those a view lets it see."""

    def __init__(self, config: MiniConfig) -> None:
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict({"transformer": Transformer(config)})
        head_size = config.d_model // config.n_heads
        frequencies = config.rope_theta ** (-torch.arange(0, head_size, 2) / head_size)
        angles = torch.outer(torch.arange(config.max_sequence_length), frequencies).repeat(1, 2)
        self.cos: Tensor  # [max_sequence_length, head_size]
        self.sin: Tensor
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    @torch.no_grad()
    def initialize(self) -> None:
        """Draws the weights: scaled by fan-in, smaller where a layer writes to the residual stream."""
        for name, weight in self.named_parameters():
            if name.endswith("wte.weight"):
                weight.normal_(std=EMBEDDING_STD)
            elif weight.dim() == 2:
                is_residual = ".blocks." in name and name.endswith(("attn_out.weight", "ff_out.weight"))
                weight.normal_(std=(RESIDUAL_SCALE if is_residual else 1.0) * weight.shape[1] ** -0.5)

    def forward(self, token_ids: Tensor, positions: Tensor | None = None, visible: Tensor | None = None) -> Tensor:
        """Maps `[batch, length]` ids to `[batch, length, vocab_size]` logits.

        Args:
            positions: Place of every token, `[batch, length]`; by default 0, 1, 2, ...
            visible: `[batch, length, length]` bool, which row (query) sees which column (key); by default all see all.
        """
        if positions is None:
            cos, sin = self.cos[: token_ids.shape[1]], self.sin[: token_ids.shape[1]]
        else:
            cos, sin = self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)
        bias = None
        if visible is not None:
            bias = torch.zeros(visible.shape, device=visible.device).masked_fill(~visible, -torch.inf).unsqueeze(1)
        return self.model["transformer"](token_ids, cos, sin, bias)

    def save(self, folder: Path) -> None:
        """Writes `config.json` and `model.safetensors`."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(self.config.to_json())
        weights = {self._published(name): weight for name, weight in self.state_dict().items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    def _published(self, name: str) -> str:
        """What a checkpoint calls a tensor."""
        if self.config.family == "llada":
            return name
        stem, kind = name.removeprefix("model.transformer.").rsplit(".", 1)
        if stem in SDAR_NAMES:
            return f"{SDAR_NAMES[stem]}.{kind}"
        _, layer, part = stem.split(".")
        return f"model.layers.{layer}.{SDAR_LAYER_NAMES[part]}.{kind}"

    @classmethod
    def load(cls, folder: Path) -> "MiniLLaDA":
        """Reads what `save` wrote."""
        model = cls(MiniConfig.load(folder))
        weights = load_file(folder / "model.safetensors")
        model.load_state_dict({name: weights[model._published(name)] for name in model.state_dict()})
        return model.eval()


def block_causal(block: Tensor) -> Tensor:
    """Who sees whom among positions of these blocks.

    Args:
        block: Block of each position, `[length]`.

    Returns:
        `[1, length, length]` bool, as `MiniLLaDA.forward` takes it.
    """
    return (block[:, None] >= block[None, :]).unsqueeze(0)


def beside_clean_blocks(states: Tensor, clean: Tensor, start: int, block_length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of one forward pass that denoises every block of many sequences at once, each behind the finished ones.

    Args:
        states: Noised sequences from position `start` on, `[batch, states, length - start]`.
        clean: The sequences, `[batch, length]`.
        start: A block boundary.
        block_length: Positions denoised together.

    Returns:
        Ids and positions `[batch, length + states * (length - start)]`, the finished sequences first, and who sees
        whom as `MiniLLaDA.forward` takes it: a noised block sees itself and the finished blocks before it.
    """
    num_states, length = states.shape[1], clean.shape[1]
    own = torch.arange(length, device=clean.device)
    position = torch.cat((own, own[start:].repeat(num_states)))
    state = torch.cat(
        (own.new_zeros(length), torch.arange(1, num_states + 1, device=clean.device).repeat_interleave(length - start))
    )
    block = position // block_length
    is_before, is_same = block[None, :] < block[:, None], block[None, :] == block[:, None]
    visible = (state == 0)[None, :] & is_before | is_same & (state[None, :] == state[:, None])
    token_ids = torch.cat((clean, states.flatten(1)), dim=1)
    return token_ids, position.expand(len(clean), -1), visible.unsqueeze(0)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding that pairs the two halves of a head; `heads` is `[batch, heads, length, head_size]`."""
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat((-second, first), dim=-1) * sin


def beside_stale_cache(token_ids: Tensor, starts: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of one forward pass that computes what the dual cache computes in two.

    The dual cache keeps the keys and values that all other positions had when the active block was entered. Here the
    sequences as they were then are followed by later states of the active block: the sequences see themselves, a later
    state sees itself and what is outside the active block.

    Args:
        token_ids: Sequences on entering the active block, `[batch, length]`.
        starts: First position of each active block, `[batch]`.
        blocks: Later states of the active blocks, `[batch, states, block_length]`.

    Returns:
        Ids and positions `[batch, length + states * block_length]`, and who sees whom as `MiniLLaDA.forward` takes it.
    """
    (num_sequences, length), (_, num_states, block_length) = token_ids.shape, blocks.shape
    offsets = torch.arange(block_length, device=token_ids.device)
    own = torch.arange(length, device=token_ids.device).expand(num_sequences, -1)
    later = (starts[:, None] + offsets).repeat(1, num_states)
    # Sequence columns are state 0, the later states of the block count from 1.
    states = torch.arange(1, num_states + 1, device=token_ids.device).repeat_interleave(block_length)
    state = torch.cat((states.new_zeros(length), states))
    positions = torch.cat((own, later), dim=1)
    is_active = (positions >= starts[:, None]) & (positions < starts[:, None] + block_length)
    is_cached = (state == 0) & ~is_active
    visible = (state[:, None] == state) | is_cached[:, None, :]
    return torch.cat((token_ids, blocks.flatten(1)), dim=1), positions, visible
