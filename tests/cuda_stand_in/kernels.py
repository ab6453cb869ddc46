"""vLLM's C++ kernels for CUDA in PyTorch, for tensors of the stand-in: those that the models of the tests call.

Each has the arguments of the operation that it stands in for, and writes the same of them in place.
"""

import itertools
from typing import Any

import torch

from tests.cuda_stand_in import graphs


def rms_norm(result: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, epsilon: float) -> None:
    """Norm of the last dimension, computed in float32."""
    wide = x.float()
    wide = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)).to(x.dtype)
    result.copy_(wide if weight is None else wide * weight)


def fused_add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, epsilon: float) -> None:
    """Adds ``x`` to the residual, and writes the norm of the sum to ``x``."""
    residual.add_(x)
    rms_norm(x, residual, weight, epsilon)


def silu_and_mul(result: torch.Tensor, x: torch.Tensor) -> None:
    """Gate and value are the halves of the last dimension."""
    gate, value = x.chunk(2, dim=-1)
    result.copy_(torch.nn.functional.silu(gate) * value)


def rotary_embedding(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor | None,
    head_size: int,
    cos_sin_cache: torch.Tensor,
    is_neox: bool,
    rope_dim_offset: int = 0,
    inverse: bool = False,
) -> None:
    """Rotates query and key ``[num_tokens, num_heads * head_size]`` in place; the cache has cosines, then sines."""
    assert is_neox and not rope_dim_offset and not inverse, "not what the models of the tests call"
    cos, sin = cos_sin_cache[positions].unsqueeze(1).chunk(2, dim=-1)
    half = cos.shape[-1]
    for heads in (query, key):
        if heads is None:
            continue
        rotated = heads.view(positions.numel(), -1, head_size)
        first, second = rotated[..., :half].clone(), rotated[..., half : 2 * half].clone()
        rotated[..., :half] = first * cos - second * sin
        rotated[..., half : 2 * half] = second * cos + first * sin


def reshape_and_cache_flash(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_cache_dtype: str,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
) -> None:
    """Writes keys and values ``[num_tokens, num_heads, head_size]`` into pages ``[num_pages, page, ...]``; -1: none."""
    rows = (slot_mapping >= 0).nonzero().squeeze(-1)
    page, offset = slot_mapping[rows] // key_cache.shape[1], slot_mapping[rows] % key_cache.shape[1]
    key_cache[page, offset] = key[rows]
    value_cache[page, offset] = value[rows]


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    out: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seqused_k: torch.Tensor,
    block_table: torch.Tensor,
    softmax_scale: float,
    causal: bool,
    **others: Any,
) -> torch.Tensor:
    """FlashAttention over pages.

    Queries are ``[num_tokens, num_heads, head_size]``, pages ``[num_pages, page, num_kv_heads, head_size]``.
    """
    assert not causal, "canvas models attend without a causal mask"
    graphs.launch(lambda: _attend(q, k, v, out, cu_seqlens_q, seqused_k, block_table, softmax_scale))
    return out


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seqused_k: torch.Tensor,
    block_table: torch.Tensor,
    softmax_scale: float,
) -> None:
    with torch._C.DisableTorchFunction():
        starts, lengths = cu_seqlens_q.tolist(), seqused_k.tolist()
        for request, (start, end) in enumerate(itertools.pairwise(starts)):
            length = lengths[request]
            pages = block_table[request, : -(-length // k.shape[1])].long()
            keys, values = (pool[pages].flatten(0, 1)[:length].transpose(0, 1) for pool in (k, v))
            rows = q[start:end].transpose(0, 1)
            seen = torch.nn.functional.scaled_dot_product_attention(
                rows[None], keys[None], values[None], scale=softmax_scale, enable_gqa=True
            )
            out[start:end] = seen[0].transpose(0, 1)


def flex_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    score_mod: Any,
    block_mask: Any,
    scale: float,
    **others: Any,
) -> torch.Tensor:
    """FlexAttention of rows ``[1, num_heads, num_tokens, head_size]`` over all pages that the mask's blocks name."""
    assert score_mod is None, "not what the models of the tests call"
    with torch._C.DisableTorchFunction():
        number, indices = block_mask.kv_num_blocks[0, 0], block_mask.kv_indices[0, 0]
        named = [row[:count] for row, count in zip(indices, number.tolist(), strict=True)]
        size = block_mask.BLOCK_SIZE[1]
        places = (torch.cat(named).unique()[:, None] * size + torch.arange(size)).flatten()
        rows, zero = torch.arange(query.shape[2])[:, None], torch.zeros((), dtype=torch.int64)
        seen = block_mask.mask_mod(zero, zero, rows, places[None])
        return torch.nn.functional.scaled_dot_product_attention(
            query, key[:, :, places], value[:, :, places], attn_mask=seen, scale=scale, enable_gqa=True
        )


def grouped_topk(
    scores: torch.Tensor,
    num_groups: int,
    topk_group: int,
    topk: int,
    renormalize: bool,
    routed_scaling_factor: float,
    bias: torch.Tensor,
    scoring_func: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights float32 and ids int32 of the chosen experts ``[num_tokens, topk]``; groups rank by their two best."""
    scores = scores.float().sigmoid() if scoring_func == 1 else scores.float()
    ranked = (scores + bias).unflatten(-1, (num_groups, -1))
    groups = ranked.topk(2, dim=-1).values.sum(-1).topk(topk_group, dim=-1).indices
    is_out = torch.ones(groups.shape[0], num_groups, dtype=torch.bool).scatter_(1, groups, False)
    ids = ranked.masked_fill(is_out.unsqueeze(-1), -torch.inf).flatten(1).topk(topk, dim=-1).indices
    weights = scores.gather(1, ids)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights * routed_scaling_factor, ids.int()


def moe_align_block_size(
    topk_ids: torch.Tensor,
    num_experts: int,
    block_size: int,
    sorted_token_ids: torch.Tensor,
    expert_ids: torch.Tensor,
    num_tokens_post_pad: torch.Tensor,
    expert_map: torch.Tensor | None = None,
    scatter_idx: torch.Tensor | None = None,
) -> None:
    """Sorts the (token, choice) pairs by expert, each expert's padded to whole blocks with an id behind the last."""
    chosen, num_blocks = topk_ids.flatten(), 0
    sorted_token_ids.fill_(chosen.numel())
    for expert in range(num_experts):
        pairs = (chosen == expert).nonzero().squeeze(-1)
        first, needed = num_blocks * block_size, -(-pairs.numel() // block_size)
        sorted_token_ids[first : first + pairs.numel()] = pairs
        expert_ids[num_blocks : num_blocks + needed] = expert
        num_blocks += needed
    num_tokens_post_pad.fill_(num_blocks * block_size)


def moe_sum(
    x: torch.Tensor,
    output: torch.Tensor,
    topk_ids: torch.Tensor | None = None,
    expert_map: torch.Tensor | None = None,
) -> None:
    """Sums the outputs of a token's experts, ``[num_tokens, topk, width]``."""
    output.copy_(x.sum(1))


def apply_repetition_penalties_(
    logits: torch.Tensor, prompt_mask: torch.Tensor, output_mask: torch.Tensor, penalties: torch.Tensor
) -> None:
    """Divides positive logits of the tokens that were seen, and multiplies the others, ``[num_rows, vocabulary]``."""
    penalties = torch.where(prompt_mask | output_mask, penalties[:, None], 1.0)
    logits.copy_(torch.where(logits > 0, logits / penalties, logits * penalties))


IMPLEMENTATIONS = {
    "_C": (rms_norm, fused_add_rms_norm, silu_and_mul, rotary_embedding, apply_repetition_penalties_),
    "_C_cache_ops": (reshape_and_cache_flash,),
    "_moe_C": (grouped_topk, moe_align_block_size, moe_sum),
}


def register() -> list[torch.library.Library]:
    """Let the dispatcher and vLLM's attention find them. Returns what has to stay alive."""
    from vllm.v1.attention.backends import flash_attn
    from vllm.v1.attention.backends import flex_attention as flex

    flash_attn.flash_attn_varlen_func = flash_attn_varlen_func
    flex.flex_attention_compiled = flex_attention
    libraries = []
    for namespace, functions in IMPLEMENTATIONS.items():
        library = torch.library.Library(namespace, "IMPL")
        for function in functions:
            library.impl(function.__name__, function, "CPU")
        libraries.append(library)
    return libraries
