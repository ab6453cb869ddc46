"""``confidence``: every implementation against the reference, and the promises of its docstring."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import run_confidence
from selection import HAS_GPU, number, per_implementation, per_implementation_and

import csrc_triton
from csrc_triton import cpu, reference

pytestmark = pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning:triton")

# fp32 against the reference's fp64: the order of a long sum, and exp(x) as 2 ** (x log2 e), which loses |x| ulps
PROBABILITY_RTOL = 1e-5
CHUNK_V = 4096  # of the kernel: from 4097 ids on, a row's chunks are combined
CHI_SQUARE_4_DF = 18.47  # exceeded by one deterministic key set in a thousand


def random_logits(num_rows: int, vocabulary: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(num_rows, vocabulary, generator=generator)).to(dtype)


def noise(*temperatures: float) -> dict[str, torch.Tensor]:
    keys = torch.tensor([0, 1, -1, 2**31, 2**32, -(2**63), 2**63 - 1, 123456789])
    return {"temperature": torch.tensor(temperatures), "noise_key": keys[: len(temperatures)]}


def assert_equals_reference(implementation: str, logits: torch.Tensor, **options) -> tuple[torch.Tensor, torch.Tensor]:
    before = logits.clone()
    expected_margin = options["margin"].clone() if "margin" in options else None
    token, probability = run_confidence(implementation, logits, **options)
    expected_token, expected_probability = reference.confidence(logits, **options | {"margin": expected_margin})
    if expected_margin is not None:
        assert torch.equal(options["margin"], expected_margin)
    assert torch.equal(logits.nan_to_num(nan=99.0), before.nan_to_num(nan=99.0)), "logits were modified"
    assert (token.dtype, probability.dtype) == (torch.int64, torch.float32)
    assert torch.equal(token, expected_token)
    torch.testing.assert_close(probability, expected_probability, rtol=PROBABILITY_RTOL, atol=1e-30)
    return token, probability


@per_implementation_and(
    vocabulary=[2, 7, 1023, 1025],
    dtype=[torch.float32, torch.bfloat16, torch.float16],
    excluded=["none", "first", "last"],
    rows=["greedy", "sampled", "entropy", "sampled, entropy", "margin", "sampled, entropy, margin"],
)
def test_matches_the_reference(implementation, vocabulary, dtype, excluded, rows):
    options = {"excluded_token_id": {"none": None, "first": 0, "last": vocabulary - 1}[excluded]}
    if "sampled" in rows:
        options |= noise(0.0, 1e-3, 0.5, 1.0, 20.0)
    if "entropy" in rows:
        options["by_entropy"] = torch.tensor([True, False, True, False, True])
    if "margin" in rows:
        options["margin"] = torch.full((5,), -1.0)
    assert_equals_reference(implementation, random_logits(5, vocabulary, dtype), **options)


@per_implementation_and(dtype=[torch.float32, torch.bfloat16])
def test_matches_the_reference_at_a_real_vocabulary(implementation, dtype):
    assert_equals_reference(
        implementation,
        random_logits(3, 126464, dtype),
        excluded_token_id=126336,
        margin=torch.zeros(3),
        **noise(0.0, 0.7, 3.0),
    )


@per_implementation_and(vocabulary=[2, 9, CHUNK_V + 3], excluded=[None, 0, 1])
def test_margin_where_two_tokens_are_not_to_be_had(implementation, vocabulary, excluded):
    logits = torch.full((6, vocabulary), -torch.inf)
    last = vocabulary - 1
    logits[1, last] = 2.0  # one, or none where it is excluded
    logits[2, [0, last]] = torch.tensor([5.0, 4.5])
    logits[3, [1, last]] = torch.tensor([-3.0, -3.0])
    logits[4] = 7.0  # equals, in two chunks too
    logits[5, :] = 1.0
    logits[5, last] = torch.nan
    margin = torch.full((6,), -1.0)
    assert_equals_reference(implementation, logits, excluded_token_id=excluded, margin=margin)
    if vocabulary > 2:
        expected = [math.inf, math.inf, 0.5 if excluded != 0 else math.inf, 0.0 if excluded != 1 else math.inf, 0.0]
        assert margin.tolist() == [*expected, math.inf]


@per_implementation
def test_only_id_of_a_vocabulary_of_one_is_certain(implementation):
    token, probability = run_confidence(implementation, torch.tensor([[-3.0], [0.0], [5.0]]))
    assert token.tolist() == [0, 0, 0]
    assert probability.tolist() == [1.0, 1.0, 1.0]


@per_implementation
def test_more_rows_than_one_piece_of_work(implementation):
    vocabulary = 4097
    num_rows = cpu.CHUNK_ELEMENTS // vocabulary + 3 if implementation == "cpu" else 3
    assert_equals_reference(implementation, random_logits(num_rows, vocabulary), excluded_token_id=1)


@per_implementation_and(vocabulary=[2, 7, 1025, 2 * CHUNK_V + 5], dtype=[torch.float32, torch.bfloat16])
def test_rows_that_ask_for_it_have_the_entropy_in_place_of_the_probability(implementation, vocabulary, dtype):
    logits = torch.stack([scale * random_logits(1, vocabulary, seed=5)[0] for scale in (1, 1, 0.1, 10, 0)]).to(dtype)
    by_entropy = torch.tensor([False, True, True, True, True])
    _, value = assert_equals_reference(implementation, logits, excluded_token_id=1, by_entropy=by_entropy)
    _, plain = run_confidence(implementation, logits, excluded_token_id=1)
    assert value[0] == plain[0]
    entropy = -(logits.double().softmax(-1).clamp_min(1e-300).log() * logits.double().softmax(-1)).sum(-1)
    torch.testing.assert_close(value[1:], (1 - entropy[1:] / 32).float(), rtol=0, atol=2e-6)
    assert value[4].item() == pytest.approx(1 - math.log(vocabulary) / 32, abs=2e-6)


@per_implementation
def test_entropy_of_rows_of_every_kind(implementation):
    logits = torch.full((6, CHUNK_V + 3), -torch.inf)
    logits[0, CHUNK_V + 1] = 2.0  # certain
    logits[1, [4, CHUNK_V]] = 5.0  # one bit
    logits[2, 3] = torch.nan
    logits[3, 1] = 7.0  # the excluded id alone
    logits[4, :] = -1e4
    logits[5, [0, 9]] = torch.tensor([300.0, -300.0])
    _, value = run_confidence(implementation, logits, excluded_token_id=1, by_entropy=torch.ones(6, dtype=torch.bool))
    expected = [1.0, 1 - math.log(2) / 32, 0.0, 0.0, 1 - math.log(CHUNK_V + 3) / 32, 1.0]
    assert value.tolist() == pytest.approx(expected, abs=2e-6)
    assert (value <= 1).all()


@per_implementation
def test_rows_may_have_gaps(implementation):
    logits = random_logits(9, 50)[::2, 3:40]
    assert logits.stride() == (100, 1)
    assert_equals_reference(implementation, logits, excluded_token_id=4, **noise(0.0, 1.0, 0.0, 2.0, 1.0))


@per_implementation
def test_no_rows_give_no_proposals(implementation):
    token, probability = run_confidence(implementation, torch.zeros(0, 10), excluded_token_id=3)
    assert (token.shape, token.dtype) == ((0,), torch.int64)
    assert (probability.shape, probability.dtype) == ((0,), torch.float32)


@per_implementation
@pytest.mark.parametrize("vocabulary", [7, 2 * CHUNK_V + 5])
def test_lowest_id_wins_a_tie(implementation, vocabulary):
    logits = torch.zeros(4, vocabulary)
    logits[1, [2, vocabulary - 1]] = 1.0
    logits[2, [5, vocabulary - 2]] = 1.0
    logits[3, 0] = 1.0
    token, _ = assert_equals_reference(implementation, logits, excluded_token_id=0)
    assert token.tolist() == [1, 2, 5, 1]


@per_implementation
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning:triton")
def test_chunks_of_any_kind_combine(implementation):
    logits = torch.full((6, 2 * CHUNK_V + 5), -torch.inf)
    logits[0, [CHUNK_V - 1, CHUNK_V]] = 2.0  # a tie across a border
    logits[1, [CHUNK_V, 2 * CHUNK_V]] = 3.0  # nothing in the first chunk
    logits[2, [0, 2 * CHUNK_V - 1]] = torch.tensor([3e38, -3e38])
    logits[3, [0, 2 * CHUNK_V + 4]] = torch.tensor([5.0, torch.nan])
    logits[4, 2 * CHUNK_V + 4] = 1.0  # excluded
    logits[5, [7, CHUNK_V + 7, 2 * CHUNK_V + 3]] = torch.tensor([-90.0, 0.0, 0.1])
    excluded = 2 * CHUNK_V + 4
    token, probability = assert_equals_reference(implementation, logits, excluded_token_id=excluded)
    assert token.tolist() == [CHUNK_V - 1, CHUNK_V, 0, 0, 0, 2 * CHUNK_V + 3]
    assert probability[:5].tolist() == [0.5, 0.5, 1.0, 0.0, 0.0]
    options = noise(*[0.5] * 6) | {"by_entropy": torch.tensor([True] * 6)}
    assert_equals_reference(implementation, logits, excluded_token_id=excluded, **options)


@per_implementation
@pytest.mark.parametrize("excluded_token_id", [0, 3, 6])
def test_excluded_id_is_passed_over_but_counts_in_the_softmax(implementation, excluded_token_id):
    logits = torch.zeros(2, 7)
    logits[:, excluded_token_id] = 10.0
    logits[1, 4] = 5.0
    token, probability = assert_equals_reference(implementation, logits, excluded_token_id=excluded_token_id)
    assert token.tolist() == [1 if excluded_token_id == 0 else 0, 4]
    assert probability[0].item() == pytest.approx(1 / (math.exp(10) + 6), rel=PROBABILITY_RTOL, abs=0)
    assert (probability < 0.01).all()


@per_implementation
def test_impossible_ids_never_win(implementation):
    logits = torch.full((3, 1500), -torch.inf)
    logits[0, 1400] = -200.0
    logits[1, [7, 1200]] = torch.tensor([1.0, 2.0])
    logits[2, [0, 9]] = torch.tensor([50.0, -50.0])  # 0 is excluded
    for options in ({}, noise(3.0, 1e-3, 3.0)):
        token, _ = assert_equals_reference(implementation, logits, excluded_token_id=0, **options)
        assert token.tolist() == [1400, 1200, 9]


@per_implementation
@pytest.mark.parametrize("excluded_token_id", [None, 0, 2])
@pytest.mark.parametrize("vocabulary", [1025, CHUNK_V + 1])
def test_hopeless_rows_give_the_lowest_allowed_id_at_zero(implementation, excluded_token_id, vocabulary):
    logits = random_logits(6, vocabulary)
    logits[0] = -torch.inf
    logits[1] = torch.nan
    logits[2, -1] = torch.nan
    logits[3, 0] = torch.nan
    logits[4] = -torch.inf
    logits[4, 2] = 1.0  # hopeless only if 2 is excluded
    for options in ({}, noise(*[1.0] * 6)):
        token, probability = assert_equals_reference(
            implementation, logits, excluded_token_id=excluded_token_id, **options
        )
        hopeless = [0, 1, 2, 3] + ([4] if excluded_token_id == 2 else [])
        assert token[hopeless].tolist() == [1 if excluded_token_id == 0 else 0] * len(hopeless)
        assert probability[hopeless].tolist() == [0.0] * len(hopeless)


@per_implementation
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning:triton")
def test_large_logits_do_not_overflow(implementation):
    logits = torch.tensor([[3e38, -3e38, 0.0], [-3e38, -3e38, -3e38], [1e4, 1e4 - 1, -1e4]])
    assert_equals_reference(implementation, logits)


@per_implementation
def test_temperature_zero_is_greedy(implementation):
    logits = random_logits(3, 100)
    greedy = run_confidence(implementation, logits, excluded_token_id=2)
    frozen = run_confidence(implementation, logits, excluded_token_id=2, **noise(0.0, 0.0, 0.0))
    assert torch.equal(greedy[0], frozen[0])
    assert torch.equal(greedy[1], frozen[1])


@per_implementation
def test_noise_is_the_reference_noise_for_every_key(implementation):
    num_rows = number(implementation, 200, sample=12)
    keys = torch.randint(-(2**63), 2**63 - 1, (num_rows,), generator=torch.Generator().manual_seed(1))
    flat = torch.zeros(num_rows, 1025)  # so that the noise alone decides
    token, _ = assert_equals_reference(
        implementation, flat, temperature=torch.ones(num_rows), noise_key=keys, excluded_token_id=5
    )
    assert len(token.unique()) > 0.75 * num_rows


@per_implementation_and(vocabulary=[64, 2 * CHUNK_V + 5], dtype=[torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_the_others(implementation, vocabulary, dtype):
    logits = random_logits(5, vocabulary, dtype)
    options = noise(1.0, 1.0, 0.0, 2.0, 1.0) | {"by_entropy": torch.tensor([True, False, True, True, False])}
    token, probability = run_confidence(implementation, logits, **options)
    for row in range(5):
        alone = {name: value[row : row + 1] for name, value in options.items()}
        # a copy: at another alignment a GPU loads, and so sums, in another order
        one_token, one_probability = run_confidence(implementation, logits[row : row + 1].clone(), **alone)
        assert torch.equal(one_token, token[row : row + 1])
        assert torch.equal(one_probability, probability[row : row + 1])


@per_implementation_and(vocabulary=[64, 2 * CHUNK_V + 5], dtype=[torch.float32, torch.bfloat16])
def test_a_row_that_asks_for_nothing_gets_what_it_gets_without_options(implementation, vocabulary, dtype):
    logits = random_logits(4, vocabulary, dtype)
    logits[2, 9] = -torch.inf
    plain = run_confidence(implementation, logits, excluded_token_id=3)
    sampled, by_entropy = noise(0.0, 1.0, 0.0, 0.0), torch.tensor([False, True, False, True])
    every = sampled | {"by_entropy": by_entropy}
    for options in (sampled, {"by_entropy": by_entropy}, every, every | {"margin": torch.zeros(4)}):
        general = run_confidence(implementation, logits, excluded_token_id=3, **options)
        for one, other in zip(plain, general, strict=True):
            assert torch.equal(one[[0, 2]], other[[0, 2]])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("step", [1, 2**32, -(2**17)], ids=["low_bits", "high_bits", "both"])
def test_proposals_follow_the_tempered_softmax(temperature, step):
    num_samples = 4000
    logits = torch.tensor([1.0, 0.0, -1.0, 0.5, 0.0, 9.0])
    allowed = 5  # the last id is excluded
    token, probability = csrc_triton.confidence(
        logits.expand(num_samples, -1),
        excluded_token_id=5,
        temperature=torch.full((num_samples,), temperature),
        noise_key=torch.arange(num_samples) * step,
    )
    expected = num_samples * (logits[:allowed] / temperature).softmax(-1)
    observed = token.bincount(minlength=allowed)
    assert ((observed - expected) ** 2 / expected).sum().item() < CHI_SQUARE_4_DF
    # the confidence knows neither noise nor temperature
    torch.testing.assert_close(probability, logits.softmax(-1)[token], rtol=PROBABILITY_RTOL, atol=0)


@per_implementation
def test_excluded_id_is_never_proposed_and_rows_are_independent(implementation):
    @settings(max_examples=number(implementation, 100, sample=10), deadline=None)
    @given(
        values=st.lists(
            st.lists(st.sampled_from([-math.inf, math.nan, -1.0, 0.0, 2.0, 30.0]), min_size=4, max_size=4),
            min_size=1,
            max_size=3,
        ),
        excluded_token_id=st.integers(0, 3),
        temperature=st.sampled_from([0.0, 1.0, 100.0]),
        key=st.integers(-(2**63), 2**63 - 1),
    )
    def check(values, excluded_token_id, temperature, key):
        logits = torch.tensor(values)
        num_rows = len(values)
        options = {"temperature": torch.full((num_rows,), temperature), "noise_key": torch.full((num_rows,), key)}
        token, probability = run_confidence(implementation, logits, excluded_token_id=excluded_token_id, **options)
        assert (token != excluded_token_id).all()
        assert ((token >= 0) & (token < 4) & (probability >= 0) & (probability <= 1)).all()
        reverse = run_confidence(implementation, logits.flip(0), excluded_token_id=excluded_token_id, **options)
        assert torch.equal(reverse[0].flip(0), token)
        assert torch.equal(reverse[1].flip(0), probability)

    check()


@pytest.mark.parametrize(
    ("logits", "options", "error", "message"),
    [
        (torch.zeros(3), {}, ValueError, r"logits: shape is \(3,\)"),
        (torch.zeros(3, 0), {}, ValueError, "vocabulary is 0, expected 1 to 262144"),
        (torch.zeros(1, 1).expand(1, 262145), {}, ValueError, "vocabulary is 262145"),
        (torch.zeros(3, 4, dtype=torch.float64), {}, TypeError, "logits: dtype is torch.float64"),
        (torch.zeros(4, 3).t(), {}, ValueError, "logits: last stride is 3, expected 1"),
        (torch.zeros(3, 4), {"excluded_token_id": 4}, ValueError, "excluded_token_id is 4, expected 0 to 3"),
        (torch.zeros(3, 4), {"excluded_token_id": -1}, ValueError, "excluded_token_id is -1"),
        (torch.zeros(3, 1), {"excluded_token_id": 0}, ValueError, "no other id"),
        (torch.zeros(3, 4), {"temperature": torch.ones(3)}, ValueError, "noise_key is None"),
        (torch.zeros(3, 4), {"noise_key": torch.ones(3).long()}, ValueError, "temperature is None"),
        (torch.zeros(3, 4), noise(1.0, 1.0), ValueError, r"temperature: shape is \(2,\), expected \(3,\)"),
        (torch.zeros(3, 4), {"margin": torch.ones(2)}, ValueError, r"margin: shape is \(2,\), expected \(3,\)"),
        (torch.zeros(1, 4), {"margin": torch.ones(1).half()}, TypeError, "margin: dtype is torch.float16"),
        (torch.zeros(1, 4), {**noise(1.0), "noise_key": torch.ones(1)}, TypeError, "noise_key: dtype is torch.float32"),
    ],
)
def test_bad_arguments_are_refused_by_name(logits, options, error, message):
    with pytest.raises(error, match=message):
        csrc_triton.confidence(logits, **options)


def test_import_loads_neither_triton_nor_vllm():
    modules = "csrc_triton, csrc_triton.edit, csrc_triton.noise, csrc_triton.reference"
    code = f"import sys, {modules}; print(sorted({{'triton', 'vllm', 'vllm_osdt'}} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_no_module_hides_an_op():
    modules = {path.stem for path in Path(csrc_triton.__file__).parent.glob("*.py")}
    assert not modules & set(csrc_triton.__all__)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_batch_of_a_real_size_matches_without_a_sync(dtype):
    logits = random_logits(256, 126464, dtype).cuda()
    options = {"temperature": torch.linspace(0, 2, 256).cuda(), "noise_key": torch.arange(256).cuda()}
    expected_token, expected_probability = reference.confidence(logits, excluded_token_id=126336, **options)
    csrc_triton.confidence(logits, excluded_token_id=126336, **options)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        token, probability = csrc_triton.confidence(logits, excluded_token_id=126336, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # logarithms differ in the last bit, so a sampled near-tie may fall the other way
    assert (token == expected_token).float().mean().item() > 0.99
    same = token == expected_token
    torch.testing.assert_close(probability[same], expected_probability[same], rtol=PROBABILITY_RTOL, atol=1e-30)
