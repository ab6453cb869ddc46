"""``lm_head_confidence``, its partials and their combination, against the reference and against written logits."""

import math

import pytest
import torch
from implementations import (
    run_combine_partials,
    run_confidence,
    run_lm_head_confidence,
    run_lm_head_partials,
)
from selection import HAS_GPU, per_implementation, per_implementation_and

import csrc_triton
from csrc_triton import Partial, reference
from csrc_triton.types import WITHOUT_MARGIN

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{warning}:RuntimeWarning:triton")
    for warning in ("All-NaN slice", "invalid value encountered in matmul")
]

PROBABILITY_RTOL = 1e-5  # as in test_confidence
KERNEL_CHUNK_V = 256  # of 16-bit dtypes; fp32 has a quarter
HIDDEN_SIZE = 70  # no multiple of a tile


def exact_operands(
    num_rows: int, vocabulary: int, dtype: torch.dtype = torch.bfloat16, hidden_size: int = HIDDEN_SIZE, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden rows and weight of few, small integers: sums are exact in any order, and many logits are equal."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randint(-1, 2, size, generator=generator).to(dtype)  # noqa: E731
    return draw(num_rows, hidden_size), draw(vocabulary, hidden_size)


def options_of(num_rows: int, rows: str, excluded_token_id: int | None = None) -> dict:
    options: dict = {"excluded_token_id": excluded_token_id}
    if "sampled" in rows:
        options["temperature"] = torch.tensor([0.0, 0.5, 1.0, 20.0, 1e-3]).repeat(num_rows)[:num_rows]
        options["noise_key"] = torch.arange(num_rows) * 2**31 - 5
    if "entropy" in rows:
        options["by_entropy"] = torch.tensor([True, False]).repeat(num_rows)[:num_rows]
    if "margin" in rows:
        options["margin"] = torch.full((num_rows,), -1.0)
    return options


def only(options: dict, row: int) -> dict:
    return {name: v[row : row + 1] if isinstance(v, torch.Tensor) else v for name, v in options.items()}


def assert_equals_reference(implementation: str, hidden: torch.Tensor, weight: torch.Tensor, **options) -> None:
    expected_margin = options["margin"].clone() if "margin" in options else None
    token, probability = run_lm_head_confidence(implementation, hidden, weight, **options)
    expected_token, expected = reference.lm_head_confidence(hidden, weight, **options | {"margin": expected_margin})
    if expected_margin is not None:
        assert torch.equal(options["margin"], expected_margin)
    assert (token.dtype, probability.dtype) == (torch.int64, torch.float32)
    assert torch.equal(token, expected_token)
    torch.testing.assert_close(probability, expected, rtol=PROBABILITY_RTOL, atol=1e-30)


@per_implementation_and(
    vocabulary=[2, 7, KERNEL_CHUNK_V + 1, 1025],
    dtype=[torch.float32, torch.bfloat16, torch.float16],
    excluded=["none", "first", "last"],
    rows=["greedy", "sampled", "entropy", "sampled, entropy", "margin", "sampled, entropy, margin"],
)
def test_matches_the_reference(implementation, vocabulary, dtype, excluded, rows):
    excluded_token_id = {"none": None, "first": 0, "last": vocabulary - 1}[excluded]
    hidden, weight = exact_operands(5, vocabulary, dtype)
    assert_equals_reference(implementation, hidden, weight, **options_of(5, rows, excluded_token_id))


@per_implementation_and(num_rows=[0, 1, 33, 129], hidden_size=[1, 64, 200])
def test_any_number_of_rows_of_any_size(implementation, num_rows, hidden_size):
    hidden, weight = exact_operands(num_rows, 300, torch.bfloat16, hidden_size)
    assert_equals_reference(implementation, hidden, weight, **options_of(num_rows, "sampled", 3))


@per_implementation_and(dtype=[torch.float32, torch.bfloat16, torch.float16])
def test_real_numbers_give_the_confidence_of_written_logits(implementation, dtype):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(6, 512, generator=generator).to(dtype)
    weight = (torch.randn(1000, 512, generator=generator) / 8).to(dtype)
    token, probability = run_lm_head_confidence(implementation, hidden, weight, excluded_token_id=7)
    expected_token, expected = reference.lm_head_confidence(hidden, weight, excluded_token_id=7)
    assert torch.equal(token, expected_token)
    # a sum in another order may round a logit to its neighbor, which is up to 2**-5 away in bf16
    torch.testing.assert_close(probability, expected, rtol=2e-5 if dtype == torch.float32 else 5e-2, atol=0)


@per_implementation
def test_equals_confidence_of_written_logits(implementation):
    hidden, weight = exact_operands(5, 900)
    options = options_of(5, "sampled, entropy", 4)
    logits = (hidden.float() @ weight.float().T).bfloat16()
    token, probability = run_confidence(implementation, logits, **options)
    got = run_lm_head_confidence(implementation, hidden, weight, **options)
    assert torch.equal(got[0], token)
    torch.testing.assert_close(got[1], probability, rtol=PROBABILITY_RTOL, atol=0)


@per_implementation
def test_logits_are_rounded_to_the_dtype(implementation):
    hidden = torch.tensor([[256.0, 1.0]]).bfloat16()
    weight = torch.tensor([[1.0, 0.0], [1.0, 1.0]]).bfloat16()  # 256 and 257, which bf16 has not: a tie
    token, probability = run_lm_head_confidence(implementation, hidden, weight)
    assert (token.item(), probability.item()) == (0, 0.5)


@per_implementation
def test_float32_is_multiplied_as_such(implementation):
    token, _ = run_lm_head_confidence(implementation, torch.ones(1, 1), torch.tensor([[1.0], [1.0 + 2**-20]]))
    assert token.item() == 1  # in TF32 the two are equal


@per_implementation
def test_lowest_id_wins_a_tie_between_chunks(implementation):
    hidden = torch.eye(4).bfloat16()
    weight = torch.zeros(3 * KERNEL_CHUNK_V + 5, 4).bfloat16()
    weight[[2, len(weight) - 1], 1] = 1.0
    weight[[KERNEL_CHUNK_V, 2 * KERNEL_CHUNK_V - 1], 2] = 1.0
    weight[[0, KERNEL_CHUNK_V - 1, KERNEL_CHUNK_V], 3] = 1.0  # 0 is excluded
    token, _ = run_lm_head_confidence(implementation, hidden, weight, excluded_token_id=0)
    assert token.tolist() == [1, 2, KERNEL_CHUNK_V, KERNEL_CHUNK_V - 1]


@per_implementation_and(excluded_token_id=[None, 0, 2], rows=["greedy", "sampled, entropy"])
def test_hopeless_rows_give_the_lowest_allowed_id_at_zero(implementation, excluded_token_id, rows):
    hidden = torch.tensor([[math.nan, 1.0], [0.0, -1.0], [1.0, 1.0], [1.0, 0.0]]).bfloat16()
    weight = torch.ones(KERNEL_CHUNK_V + 9, 2).bfloat16()
    weight[:, 1] = math.inf  # the second row's logits are -inf
    weight[:, 0] = 0.0
    weight[KERNEL_CHUNK_V + 4, 0] = 3.0
    hidden[2:, 1] = 0.0  # 0 * inf: NaN
    options = options_of(4, rows, excluded_token_id)
    token, probability = run_lm_head_confidence(implementation, hidden, weight, **options)
    assert token.tolist() == [1 if excluded_token_id == 0 else 0] * 4
    assert probability.tolist() == [0.0] * 4


@per_implementation
def test_impossible_ids_never_win(implementation):
    hidden = torch.ones(2, 1)
    weight = torch.full((700, 1), -math.inf)
    weight[[1, 650], 0] = torch.tensor([9.0, -200.0])
    for rows in ("greedy", "sampled, entropy"):
        assert_equals_reference(implementation, hidden, weight, **options_of(2, rows, 1))


@pytest.mark.parametrize("implementation", ["triton"])  # a CPU's matrix product sums by the number of rows
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_the_others(implementation, dtype):
    generator = torch.Generator().manual_seed(2)
    num_rows = 3
    hidden = torch.randn(num_rows, HIDDEN_SIZE, generator=generator).to(dtype)
    weight = torch.randn(600, HIDDEN_SIZE, generator=generator).to(dtype)
    options = options_of(num_rows, "sampled, entropy", 4)
    token, probability = run_lm_head_confidence(implementation, hidden, weight, **options)
    for row in range(num_rows):
        alone = run_lm_head_confidence(implementation, hidden[row : row + 1].clone(), weight, **only(options, row))
        assert torch.equal(alone[0], token[row : row + 1])
        assert torch.equal(alone[1], probability[row : row + 1])


@pytest.mark.parametrize("implementation", ["triton"])
def test_a_row_that_asks_for_nothing_gets_what_it_gets_without_options(implementation):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(3, HIDDEN_SIZE, generator=generator).bfloat16()
    weight = torch.randn(600, HIDDEN_SIZE, generator=generator).bfloat16()
    plain = run_lm_head_confidence(implementation, hidden, weight, excluded_token_id=4)
    general = run_lm_head_confidence(
        implementation,
        hidden,
        weight,
        excluded_token_id=4,
        temperature=torch.tensor([0.0, 1.0, 0.0]),
        noise_key=torch.arange(3),
        by_entropy=torch.tensor([False, True, False]),
    )
    for one, other in zip(plain, general, strict=True):
        assert torch.equal(one[[0, 2]], other[[0, 2]])


@per_implementation
def test_rows_and_weight_may_have_gaps(implementation):
    hidden, weight = exact_operands(8, 400)
    hidden, weight = hidden[::2, 3:40], weight[::2, 3:40]
    assert_equals_reference(implementation, hidden, weight, **options_of(4, "sampled", 1))


def shard(weight: torch.Tensor, num_shards: int, size: int) -> list[torch.Tensor]:
    """Equal shards; the last ones end in padding, which is garbage."""
    padded = torch.cat([weight, weight.new_full((num_shards * size - len(weight), weight.shape[1]), math.nan)])
    return list(padded.split(size))


@per_implementation_and(
    num_shards=[2, 4],
    dtype=[torch.float32, torch.bfloat16],
    rows=["greedy", "sampled", "sampled, entropy", "margin"],
    excluded_token_id=[None, 130, 599],
)
def test_shards_give_what_the_whole_weight_gives(implementation, num_shards, dtype, rows, excluded_token_id):
    vocabulary, size = 601, {2: 304, 4: 200}[num_shards]  # four shards: the last has one id
    hidden, weight = exact_operands(5, vocabulary, dtype, hidden_size=6)  # so that no id's share is too small to see
    options = options_of(5, rows, excluded_token_id)
    margin = options.pop("margin", None)
    parts = [
        run_lm_head_partials(
            implementation,
            hidden,
            piece,
            first_id=rank * size,
            vocabulary=vocabulary,
            with_margin=margin is not None,
            **options,
        )
        for rank, piece in enumerate(shard(weight, num_shards, size))
    ]
    assert len({part.shape for part in parts}) == 1
    assert parts[0].shape[1:] == (WITHOUT_MARGIN if margin is None else len(Partial), 5)
    by_entropy = options.get("by_entropy")
    combined, margins = {}, {}
    for order in (1, -1):
        margins[order] = {} if margin is None else {"margin": margin.clone()}
        combined[order] = run_combine_partials(
            implementation,
            torch.cat(parts[::order]),
            excluded_token_id=excluded_token_id,
            by_entropy=by_entropy,
            **margins[order],
        )
    whole = {} if margin is None else {"margin": margin}
    token, probability = run_lm_head_confidence(implementation, hidden, weight, **options, **whole)
    assert all(torch.equal(got["margin"], whole["margin"]) for got in margins.values() if got)
    for got in combined.values():
        assert torch.equal(got[0], token)
        torch.testing.assert_close(got[1], probability, rtol=PROBABILITY_RTOL, atol=0)


@pytest.mark.parametrize("num_shards", [2, 4])
def test_shards_of_whole_chunks_change_no_bit(num_shards):
    generator = torch.Generator().manual_seed(4)
    vocabulary, size = 4 * KERNEL_CHUNK_V - 9, 4 * KERNEL_CHUNK_V // num_shards
    hidden = torch.randn(3, HIDDEN_SIZE, generator=generator).bfloat16()
    weight = torch.randn(vocabulary, HIDDEN_SIZE, generator=generator).bfloat16()
    options = options_of(3, "sampled, entropy", 4)
    parts = [
        run_lm_head_partials("triton", hidden, piece, first_id=rank * size, vocabulary=vocabulary, **options)
        for rank, piece in enumerate(shard(weight, num_shards, size))
    ]
    got = run_combine_partials("triton", torch.cat(parts), excluded_token_id=4, by_entropy=options["by_entropy"])
    expected = run_lm_head_confidence("triton", hidden, weight, **options)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


def test_a_shard_of_padding_has_no_say():
    hidden, weight = exact_operands(4, 90)
    expected = run_lm_head_confidence("triton", hidden, weight, excluded_token_id=3)
    padding = torch.full((90, HIDDEN_SIZE), math.nan).bfloat16()
    parts = [
        run_lm_head_partials("triton", hidden, piece, first_id=first_id, vocabulary=90, excluded_token_id=3)
        for first_id, piece in ((0, weight), (90, padding))
    ]
    assert torch.equal(parts[1][:, Partial.BEST_SCORE], torch.full((1, 4), -math.inf))
    token, probability = run_combine_partials("triton", torch.cat(parts), excluded_token_id=3)
    assert torch.equal(token, expected[0])
    assert torch.equal(probability, expected[1])


@per_implementation
def test_nan_of_one_shard_makes_a_row_hopeless(implementation):
    hidden, weight = exact_operands(2, 90)
    weight[70] = math.nan
    parts = [
        run_lm_head_partials(implementation, hidden, piece, first_id=first_id, vocabulary=90, excluded_token_id=0)
        for first_id, piece in ((0, weight[:45]), (45, weight[45:]))
    ]
    token, probability = run_combine_partials(implementation, torch.cat(parts), excluded_token_id=0)
    assert (token.tolist(), probability.tolist()) == ([1, 1], [0.0, 0.0])


@pytest.mark.parametrize("rows", ["greedy", "sampled, entropy"])
def test_partials_of_one_implementation_suit_the_other(rows):
    """They need not have the same chunks, but every field means the same."""
    hidden, weight = exact_operands(5, 200)
    options = options_of(5, rows, 4)
    expected = reference.lm_head_confidence(hidden, weight, **options)
    for first, second in (("cpu", "triton"), ("triton", "cpu")):
        parts = run_lm_head_partials(first, hidden, weight, **options)
        got = run_combine_partials(second, parts, excluded_token_id=4, by_entropy=options.get("by_entropy"))
        assert torch.equal(got[0], expected[0])
        torch.testing.assert_close(got[1], expected[1], rtol=PROBABILITY_RTOL, atol=0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": torch.zeros(3)}, ValueError, r"hidden: shape is \(3,\)"),
        ({"hidden": torch.zeros(3, 0)}, ValueError, r"hidden: shape is \(3, 0\)"),
        ({"hidden": torch.zeros(3, 4).double()}, TypeError, "hidden: dtype is torch.float64"),
        ({"weight": torch.zeros(9, 5)}, ValueError, r"weight: shape is \(9, 5\), expected \[vocabulary, 4\]"),
        ({"weight": torch.zeros(0, 4)}, ValueError, r"weight: shape is \(0, 4\)"),
        ({"weight": torch.zeros(9, 4).half()}, TypeError, "weight: dtype is torch.float16, expected torch.float32"),
        ({"weight": torch.zeros(4, 9).t()}, ValueError, "weight: last stride is 9, expected 1"),
        ({"first_id": -1}, ValueError, "first_id is -1"),
        ({"first_id": 262_140}, ValueError, "vocabulary is 262149, expected 1 to 262144"),
        ({"vocabulary": 0}, ValueError, "vocabulary is 0"),
        ({"excluded_token_id": 9}, ValueError, "excluded_token_id is 9, expected 0 to 8"),
        ({"temperature": torch.ones(3)}, ValueError, "noise_key is None"),
        ({"by_entropy": torch.ones(2).bool()}, ValueError, r"by_entropy: shape is \(2,\), expected \(3,\)"),
    ],
)
def test_bad_arguments_are_refused_by_name(change, error, message):
    arguments = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(9, 4)} | change
    with pytest.raises(error, match=message):
        csrc_triton.lm_head_partials(**arguments)
    if not {"first_id", "vocabulary"} & set(change):
        with pytest.raises(error, match=message):
            csrc_triton.lm_head_confidence(**arguments)


@pytest.mark.parametrize(
    ("partials", "error", "message"),
    [
        (torch.zeros(8, 3), ValueError, r"partials: shape is \(8, 3\)"),
        (torch.zeros(0, 8, 3), ValueError, r"partials: shape is \(0, 8, 3\), expected \[at least 1, 6 or 8"),
        (torch.zeros(2, 5, 3), ValueError, r"partials: shape is \(2, 5, 3\)"),
        (torch.zeros(2, 8, 3).half(), TypeError, "partials: dtype is torch.float16"),
        (torch.zeros(8, 2, 3).transpose(0, 1), ValueError, "partials: strides are"),
    ],
)
def test_bad_partials_are_refused_by_name(partials, error, message):
    with pytest.raises(error, match=message):
        csrc_triton.combine_partials(partials)


def test_partials_without_margins_give_none():
    with pytest.raises(ValueError, match=r"partials: shape is \(2, 6, 3\), expected \[at least 1, 8, num_rows"):
        csrc_triton.combine_partials(torch.zeros(2, 6, 3), margin=torch.zeros(3))


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
@pytest.mark.parametrize("num_rows", [1, 129, 1024])
def test_gpu_batch_of_a_real_size_matches_without_a_sync(num_rows):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_rows, 4096, generator=generator).bfloat16().cuda()
    weight = (torch.randn(126464, 4096, generator=generator) / 20).bfloat16().cuda()
    expected_token, expected = csrc_triton.confidence(hidden @ weight.T, excluded_token_id=126336)
    csrc_triton.lm_head_confidence(hidden, weight, excluded_token_id=126336)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        token, probability = csrc_triton.lm_head_confidence(hidden, weight, excluded_token_id=126336)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    same = token == expected_token
    assert same.float().mean().item() > 0.95  # a logit of bf16 may be its neighbor, and the two best are often close
    torch.testing.assert_close(probability[same], expected[same], rtol=0.15, atol=0)
    alone = csrc_triton.lm_head_confidence(hidden[-1:].clone(), weight, excluded_token_id=126336)
    assert torch.equal(alone[0], token[-1:]) and torch.equal(alone[1], probability[-1:])
