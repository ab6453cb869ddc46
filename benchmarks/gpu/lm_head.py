"""``lm_head_confidence``, whole and in shards, against a matrix product that writes its logits."""

import math
from collections.abc import Iterable
from typing import Any

from benchmarks.gpu.lines import gib, median_us, part
from benchmarks.gpu.sizes import IS_STAND_IN, SIZES

NUM_SHARDS = 4  # ranks that share a vocabulary
# A logit near 20 of bf16 may be its neighbor, 1/8 away, in a product that is summed in another order.
NEIGHBOR_RTOL = 0.15
SHARD_RTOL = 2e-5  # partials of other chunks, combined in another order
MIN_SHARE = 0.9  # of tokens that are those of written logits: two ids may be that near


def check_lm_head(stage: str) -> None:
    """The fused op at LLaDA-8B's head: right, how fast, and up to how many rows as fast as logits that are written."""
    import torch

    vocabulary, hidden_size = SIZES.lm_head
    dtype = torch.float32 if IS_STAND_IN else torch.bfloat16  # Triton's interpreter multiplies no bf16
    torch.manual_seed(0)
    weight = (3 * torch.randn(vocabulary, hidden_size, device="cuda") / hidden_size**0.5).to(dtype)
    for case in ("greedy", "sampled"):
        times: list[dict[str, Any]] = []
        for num_rows in SIZES.lm_head_rows:
            with part(stage, "lm_head_confidence", case=case, rows=num_rows, vocabulary=vocabulary) as found:
                found |= _compare(weight, num_rows, case)
                times.append({"rows": num_rows, **found})
        with part(stage, "crossover", case=case, vocabulary=vocabulary) as found:
            found["up_to_rows"] = crossover(times)


def _compare(weight: Any, num_rows: int, case: str) -> dict[str, Any]:
    """Check the ops at a number of rows; their times in microseconds, and the memory that written logits take."""
    import torch

    import csrc_triton

    hidden = (torch.randn(num_rows, weight.shape[1], device="cuda") + 20 / 9 * weight[7]).to(weight.dtype)
    by_row: dict[str, Any] = {}
    if case == "sampled":
        by_row["temperature"] = torch.full((num_rows,), 0.7, device="cuda")
        by_row["noise_key"] = torch.arange(num_rows, device="cuda")
    options = {"excluded_token_id": 5, **by_row}

    def fused() -> Any:
        return csrc_triton.lm_head_confidence(hidden, weight, **options)

    def written() -> Any:
        return csrc_triton.confidence(hidden @ weight.T, **options)

    size = math.ceil(weight.shape[0] / NUM_SHARDS)
    shards = [(index * size, shard) for index, shard in enumerate(weight.split(size))]

    def partials(first_id: int, shard: Any) -> Any:
        about = {"first_id": first_id, "vocabulary": weight.shape[0]}
        return csrc_triton.lm_head_partials(hidden, shard, **about, **options)

    token, probability = fused()
    expected_token, expected = written()
    same = token == expected_token
    share = same.float().mean().item()
    assert share >= MIN_SHARE, f"{share:.1%} of the tokens of written logits"
    torch.testing.assert_close(probability[same], expected[same], rtol=NEIGHBOR_RTOL, atol=0)
    joined = torch.cat([partials(*shard) for shard in shards])
    of_shards = csrc_triton.combine_partials(joined, excluded_token_id=5)
    assert torch.equal(of_shards[0], token), "shards give other tokens than the whole"
    torch.testing.assert_close(of_shards[1], probability, rtol=SHARD_RTOL, atol=0)
    return {
        "share_of_tokens": round(share, 4),
        "us": median_us(fused),
        "with_logits_us": median_us(written),
        "product_us": median_us(lambda: hidden @ weight.T),
        "shard_us": median_us(lambda: partials(*shards[0])),
        "combine_us": median_us(lambda: csrc_triton.combine_partials(joined, excluded_token_id=5)),
        "logits_gib": gib(num_rows * weight.shape[0] * weight.element_size()),
    }


def crossover(times: Iterable[dict[str, Any]]) -> int | None:
    """The most rows at which the op is as fast as written logits, there and at fewer; 0 at none, None without times."""
    most = 0
    for one in sorted(times, key=lambda one: one["rows"]):
        if one.get("us") is None or one.get("with_logits_us") is None:
            return None
        if one["us"] > one["with_logits_us"]:
            break
        most = one["rows"]
    return most
