"""The large models whose shapes are measured, with random weights, and the least time that a forward pass can take."""

import json
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu.engines import start_engine
from benchmarks.gpu.lines import OUT
from benchmarks.gpu.sizes import IS_STAND_IN, SIZES

SDAR: dict[str, Any] = {
    "architectures": ["SDARForCausalLM"], "model_type": "sdar", "torch_dtype": "bfloat16", "attention_bias": False,
    "hidden_act": "silu", "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1000000, "tie_word_embeddings": False,
    "use_sliding_window": False, "vocab_size": 151936, "mask_token_id": 151669, "eos_token_id": 151643,
    "pad_token_id": 151643,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "llada-8b": {
        "architectures": ["LLaDAModelLM"], "model_type": "llada", "torch_dtype": "bfloat16", "activation_type": "silu",
        "alibi": False, "block_type": "llama", "d_model": 4096, "n_heads": 32, "n_kv_heads": 32, "n_layers": 32,
        "mlp_hidden_size": 12288, "embedding_size": 126464, "vocab_size": 126464, "layer_norm_type": "rms",
        "rms_norm_eps": 1e-5, "rope": True, "rope_theta": 500000.0, "max_sequence_length": 4096,
        "mask_token_id": 126336, "eos_token_id": 126081, "pad_token_id": 126081, "weight_tying": False,
        "include_bias": False, "include_qkv_bias": False, "block_length": 32,
    },
    "dream-7b": {
        "architectures": ["DreamModel"], "model_type": "Dream", "torch_dtype": "bfloat16", "hidden_act": "silu",
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "max_position_embeddings": 131072, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
        "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 152064, "mask_token_id": 151666,
        "eos_token_id": 151643, "pad_token_id": 151643,
    },
    "sdar-8b": {**SDAR, "hidden_size": 4096, "intermediate_size": 12288, "block_size": 32},
    "sdar-4b": {**SDAR, "hidden_size": 2560, "intermediate_size": 9728, "block_size": 4},
    "llada2-mini": {
        "architectures": ["LLaDA2MoeModelLM"], "model_type": "llada2_moe", "torch_dtype": "bfloat16",
        "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 5120, "num_hidden_layers": 20,
        "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128, "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6, "rope_theta": 600000, "partial_rotary_factor": 0.5, "tie_word_embeddings": False,
        "use_qk_norm": True, "vocab_size": 157184, "mask_token_id": 156895, "eos_token_id": 156892,
        "pad_token_id": 156892, "num_experts": 256, "num_experts_per_tok": 8, "num_shared_experts": 1, "n_group": 8,
        "topk_group": 4, "moe_intermediate_size": 512, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5,
    },
}  # fmt: skip


def start_shape(stage: str, name: str, *, memory_share: float = 0.85, **arguments: Any) -> Any:
    """An engine of a large shape with random weights in bfloat16.

    Args:
        stage: Of its line.
        name: Of the shape.
        memory_share: Of the card's memory.
        arguments: As of ``start_engine``.
    """
    config = SHAPES[name] | {key: value for key, value in SIZES.shape if key in SHAPES[name]}
    folder = OUT / f"config-{name}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return start_engine(
        stage, folder, dtype="bfloat16", load_format="dummy", skip_tokenizer_init=True, max_model_len=1024,
        max_num_seqs=max(SIZES.requests), max_num_batched_tokens=2048 if IS_STAND_IN else 16384,
        gpu_memory_utilization=memory_share, **arguments,
    )  # fmt: skip


@dataclass(frozen=True)
class Weights:
    """Numbers of weights that a forward pass reads.

    Attributes:
        dense: All but the others; the embedding is not read as a whole and left out.
        head: Of the matrix that gives logits.
        experts: Of all routed experts.
        num_experts, num_active: Experts of a layer, and those that a row goes through.
    """

    dense: int
    head: int
    experts: int
    num_experts: int
    num_active: int

    @classmethod
    def of(cls, model: Any, config: Any) -> "Weights":
        """Those of a loaded model."""
        num_experts = getattr(config, "num_experts", 0) or 0
        sums = dict.fromkeys(("embed", "head", "experts", "dense"), 0)
        for name, weight in model.named_parameters():
            if "embed" in name or "wte" in name:
                kind = "embed"
            elif "lm_head" in name:
                kind = "head"
            else:
                kind = "experts" if weight.dim() == 3 and weight.shape[0] == num_experts else "dense"
            sums[kind] += weight.numel()
        head = sums["head"] or sums["embed"]  # or both are one
        return cls(sums["dense"], head, sums["experts"], num_experts, getattr(config, "num_experts_per_tok", 0) or 0)

    def floor_s(self, num_rows: int, num_logits: int, bytes_per_s: float, operations_per_s: float) -> float:
        """The least seconds of a forward: bytes of the weights or operations of the products, whichever take longer.

        Experts are read if a row goes through them, which is taken as chance. Attention is left out.
        """
        active = self.num_active / self.num_experts if self.num_experts else 0.0
        read = self.experts * (1 - (1 - active) ** num_rows)
        num_bytes = 2 * (self.dense + (self.head if num_logits else 0) + read)
        operations = 2 * num_rows * (self.dense + active * self.experts) + 2 * num_logits * self.head
        return max(num_bytes / bytes_per_s, operations / operations_per_s)
