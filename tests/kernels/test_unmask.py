"""``unmask``: every implementation against the reference, and the promises of its docstring."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import HAS_GPU, IMPLEMENTATIONS, run_unmask

import csrc_triton
from csrc_triton import Rule, reference

EOS = 3

per_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def block_state(
    confidence: list[float],
    masked: list[bool] | None = None,
    *,
    rule: Rule = Rule.THRESHOLD,
    parameter: float = 0.9,
    end_token_ids: tuple[int, ...] = (-1,),
    num_needed: int | None = None,
    quota: int = 0,
) -> dict[str, torch.Tensor]:
    """One block: canvas 10, 11, ...; proposal 100, 101, ..."""
    length = len(confidence)
    return {
        "canvas": torch.arange(10, 10 + length).unsqueeze(0),
        "masked": torch.tensor([[True] * length if masked is None else masked]),
        "proposal": torch.arange(100, 100 + length).unsqueeze(0),
        "confidence": torch.tensor([confidence]),
        "rule": torch.tensor([rule], dtype=torch.int8),
        "parameter": torch.tensor([parameter]),
        "end_token_ids": torch.tensor([end_token_ids]),
        "num_needed": torch.tensor([length if num_needed is None else num_needed], dtype=torch.int32),
        "quota": torch.tensor([quota], dtype=torch.int32),
    }


def random_state(
    num_blocks: int, block_length: int, *, rules: tuple[Rule, ...] = tuple(Rule), seed: int = 0
) -> dict[str, torch.Tensor]:
    """Blocks of every kind: full, empty and with one mask; ties, NaN; garbage wherever a position is decided."""
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator, dtype=dtype)

    shape = (num_blocks, block_length)
    masked = torch.rand(shape, generator=generator) < torch.rand(num_blocks, 1, generator=generator)
    masked[0::5] = True
    masked[1::5] = False
    masked[2::5] = False
    masked[2::5, block_length // 2] = True
    confidence = integers(0, 9, *shape) / 8  # few values, so many ties
    confidence[integers(0, 10, *shape) == 0] = torch.nan
    garbage = torch.tensor([torch.nan, torch.inf, -torch.inf, 7.0])[integers(0, 4, *shape)]
    rule = torch.tensor(rules, dtype=torch.int8)[integers(0, len(rules), num_blocks)]
    parameters = torch.tensor(
        [
            [0.0, 0.5, 0.625, 2.0],
            [0.0, 1.0, 3.7, 1e9],
            [0.0, 0.75, 1.0, 4.0],
            [0.0, 0.5, 1.0, 3.0],
            [0.0, 0.5, 1.0, 3.0],
        ]
    )
    return {
        "canvas": integers(0, 8, *shape),
        "masked": masked,
        "proposal": integers(0, 8, *shape),
        "confidence": torch.where(masked, confidence, garbage),
        "rule": rule,
        "parameter": parameters[rule.long(), integers(0, 4, num_blocks)],
        "end_token_ids": integers(0, 2, num_blocks, 3) * (integers(2, 7, num_blocks, 3) + 1) - 1,
        "num_needed": integers(0, block_length + 1, num_blocks, dtype=torch.int32),
        "quota": integers(0, 2, num_blocks, dtype=torch.int32) * integers(0, block_length + 2, num_blocks).int(),
    }


def assert_equals_reference(implementation: str, state: dict[str, torch.Tensor]) -> csrc_triton.UnmaskResult:
    expected_state = {name: value.clone() for name, value in state.items()}
    expected = reference.unmask(**expected_state)
    result = run_unmask(implementation, **state)
    for name, count in result._asdict().items():
        assert count.dtype == torch.int32
        assert torch.equal(count, getattr(expected, name)), name
    for name, value in state.items():
        assert torch.equal(value.nan_to_num(nan=99.0), expected_state[name].nan_to_num(nan=99.0)), name
    return result


@per_implementation
@pytest.mark.parametrize("block_length", [1, 3, 8, 32, 128])
def test_matches_the_reference(implementation, block_length):
    assert_equals_reference(implementation, random_state(40, block_length))


@per_implementation
@pytest.mark.parametrize("rule", list(Rule))
def test_matches_the_reference_when_all_blocks_share_a_rule(implementation, rule):
    assert_equals_reference(implementation, random_state(30, 5, rules=(rule,), seed=1))


@per_implementation
@pytest.mark.parametrize("proposal_dtype", [torch.int32, torch.int64])
def test_canvas_may_be_int32_with_gaps_between_rows(implementation, proposal_dtype):
    state = random_state(10, 6, seed=2)
    wide = torch.full((20, 9), 55, dtype=torch.int32)
    wide_masked = torch.ones(20, 9, dtype=torch.bool)
    wide[::2, 2:8], wide_masked[::2, 2:8] = state["canvas"].int(), state["masked"]
    untouched = torch.ones(20, 9, dtype=torch.bool)
    untouched[::2, 2:8] = False
    state |= {"canvas": wide[::2, 2:8], "masked": wide_masked[::2, 2:8]}
    state["proposal"] = state["proposal"].to(proposal_dtype)
    assert_equals_reference(implementation, state)
    assert (wide[untouched] == 55).all() and wide_masked[untouched].all()


@per_implementation
def test_no_blocks_give_empty_counts(implementation):
    state = {name: value[:0] for name, value in random_state(1, 4).items()}
    for count in run_unmask(implementation, **state):
        assert (count.shape, count.dtype) == ((0,), torch.int32)


@per_implementation
@pytest.mark.parametrize(
    ("rule", "parameter", "confidence", "unmasked"),
    [
        (Rule.THRESHOLD, 0.5, [0.4, 0.5, 0.6, 0.1], [1, 2]),
        (Rule.THRESHOLD, math.nextafter(0.5, 1.0) + 1e-7, [0.4, 0.5, 0.6, 0.1], [2]),
        (Rule.THRESHOLD, 0.9, [0.4, 0.6, 0.6, 0.1], [1]),
        (Rule.THRESHOLD, 0.9, [math.nan, math.nan, 0.0, math.nan], [2]),
        (Rule.THRESHOLD, 0.9, [math.nan, math.nan, math.nan, math.nan], [0]),
        (Rule.TOP_K, 2.0, [0.4, 0.6, 0.6, 0.1], [1, 2]),
        (Rule.TOP_K, 3.0, [0.5, 0.5, 0.5, 0.5], [0, 1, 2]),
        (Rule.TOP_K, 2.9, [math.nan, 0.2, 0.1, 0.3], [1, 3]),
        # Without logits there is nothing to unmask, whatever the rule would let pass.
        (Rule.TOP_K, 4.0, [reference.NO_CONFIDENCE, 0.2, reference.NO_CONFIDENCE, math.nan], [1, 3]),
        (Rule.FACTOR, 50.0, [0.9, reference.NO_CONFIDENCE, 0.8, reference.NO_CONFIDENCE], [0, 2]),
        (Rule.JOINT_BOUND, 100.0, [reference.NO_CONFIDENCE, 0.1, reference.NO_CONFIDENCE, 0.2], [1, 3]),
        (Rule.TOP_K, 0.0, [0.1, 0.2, 0.3, 0.2], [2]),
        (Rule.TOP_K, 100.0, [0.1, 0.2, math.nan, 0.2], [0, 1, 2, 3]),
        # (n + 1)(1 - c): 2 * 0.125 = 0.25, 3 * 0.25 = 0.75, 4 * 0.5 = 2
        (Rule.FACTOR, 1.0, [0.5, 0.75, 0.875, 0.0], [1, 2]),
        (Rule.FACTOR, 0.75, [0.5, 0.75, 0.875, 0.0], [2]),
        (Rule.FACTOR, 0.1, [0.5, 0.75, 0.875, 0.0], [2]),
        (Rule.FACTOR, 2.5, [0.5, 0.75, 0.875, 0.0], [0, 1, 2]),
        # sums of 1 - c, the last one twice: 0.25, 0.625, 1.375, 2.875
        (Rule.JOINT_BOUND, 0.75, [0.5, 0.75, 0.875, 0.0], [1, 2]),
        (Rule.JOINT_BOUND, 0.625, [0.5, 0.75, 0.875, 0.0], [2]),
        (Rule.JOINT_BOUND, 0.1, [0.5, 0.75, 0.875, 0.0], [2]),
        (Rule.JOINT_BOUND, 1.5, [0.5, 0.75, 0.875, math.nan], [0, 1, 2]),
        (Rule.JOINT_BOUND, 2.9, [0.5, 0.75, 0.875, 0.0], [0, 1, 2, 3]),
        # sums of 1 - c: 0.125, 0.375, 0.875, 1.875
        (Rule.DOUBT_BOUND, 0.375, [0.5, 0.75, 0.875, 0.0], [2]),
        (Rule.DOUBT_BOUND, 0.38, [0.5, 0.75, 0.875, 0.0], [1, 2]),
        (Rule.DOUBT_BOUND, 0.01, [0.5, 0.75, 0.875, 0.0], [2]),
        (Rule.DOUBT_BOUND, 1.9, [0.5, 0.75, 0.875, math.nan], [0, 1, 2]),
        (Rule.DOUBT_BOUND, 1.9, [0.5, 0.75, 0.875, 0.0], [0, 1, 2, 3]),
        (Rule.DOUBT_BOUND, 9.0, [reference.NO_CONFIDENCE, 0.1, reference.NO_CONFIDENCE, 0.2], [1, 3]),
    ],
)
def test_rule_unmasks_as_defined(implementation, rule, parameter, confidence, unmasked):
    state = block_state(confidence, rule=rule, parameter=parameter)
    result = assert_equals_reference(implementation, state)
    expected = torch.tensor([[k in unmasked for k in range(4)]])
    assert torch.equal(~state["masked"], expected)
    assert torch.equal(state["canvas"] >= 100, expected)
    assert result.num_unmasked.item() == len(unmasked)
    assert result.num_masked.item() == 4 - len(unmasked)


@per_implementation
@pytest.mark.parametrize("rule", list(Rule))
@pytest.mark.parametrize(
    ("quota", "confidence", "unmasked"),
    [
        (0, [0.2, 0.4, 0.3, 0.1], [1]),
        (3, [0.2, 0.4, 0.3, 0.1], [0, 1, 2]),
        (2, [0.3, 0.3, math.nan, 0.3], [0, 1]),
        (9, [0.2, math.nan, 0.3, 0.1], [0, 1, 2, 3]),
        (3, [reference.NO_CONFIDENCE, 0.4, reference.NO_CONFIDENCE, 0.1], [1, 3]),
    ],
)
def test_a_quota_is_unmasked_whatever_the_rule_says(implementation, rule, quota, confidence, unmasked):
    parameter = {Rule.THRESHOLD: 0.5, Rule.TOP_K: 1.0}.get(rule, 0.1)  # by which one position would pass, or none
    state = block_state(confidence, rule=rule, parameter=parameter, quota=quota)
    assert_equals_reference(implementation, state)
    assert (~state["masked"][0]).nonzero().flatten().tolist() == unmasked


@per_implementation
def test_a_quota_takes_nothing_from_what_the_rule_lets_pass(implementation):
    state = block_state([0.95, 0.4, 0.92, 0.91], quota=2)
    assert assert_equals_reference(implementation, state).num_unmasked.item() == 3


@per_implementation
def test_last_candidate_must_pass_the_factor_test_too(implementation):
    """Fast-dLLM's code takes it in any case."""
    state = block_state([0.99, 0.2], rule=Rule.FACTOR, parameter=1.0)
    assert assert_equals_reference(implementation, state).num_unmasked.item() == 1


@per_implementation
@pytest.mark.parametrize("rule", list(Rule))
def test_decided_positions_are_neither_read_nor_counted(implementation, rule):
    state = block_state([math.nan, 0.2, math.inf, 0.3], [False, True, False, True], rule=rule, parameter=1.0)
    assert_equals_reference(implementation, state)
    assert state["canvas"].tolist() == [[10, 11, 12, 103]]


@per_implementation
@pytest.mark.parametrize(
    ("canvas", "masked", "end", "num_needed", "num_ready"),
    [
        ([5, 6, 7, 8], [0, 0, 0, 0], EOS, 4, 4),
        ([5, 6, 7, 8], [0, 0, 0, 0], EOS, 2, 2),
        ([5, EOS, 7, 8], [0, 0, 0, 0], EOS, 4, 2),
        ([5, EOS, EOS, 8], [0, 0, 1, 1], EOS, 4, 2),
        ([5, EOS, 7, 8], [1, 0, 1, 1], EOS, 4, 0),
        ([5, EOS, 7, 8], [1, 1, 0, 0], EOS, 4, 0),
        ([5, 6, 7, EOS], [0, 0, 0, 0], EOS, 3, 3),
        ([5, 6, 7, 8], [0, 0, 0, 1], EOS, 3, 3),
        ([5, 6, EOS, 8], [0, 0, 1, 1], EOS, 2, 2),
        ([EOS, 6, 7, 8], [0, 1, 1, 1], EOS, 0, 0),
        ([EOS, 6, 7, 8], [0, 1, 1, 1], EOS, 1, 1),
        ([5, -1, 7, 8], [0, 0, 0, 0], -1, 4, 4),
        ([5, EOS, 7, 8], [0, 0, 0, 1], -1, 4, 0),
        ([5, 6, EOS, 8], [0, 0, 0, 1], (-1, 6, EOS), 4, 2),
        ([5, 6, EOS, 8], [0, 1, 0, 0], (6, -1, EOS), 4, 0),
        ([5, 6, EOS, 8], [0, 0, 0, 1], (9, EOS, 5), 4, 1),
        ([5, 6, 7, -1], [0, 0, 0, 0], (-1, -1), 4, 4),
    ],
)
def test_ready_tokens_end_at_eos_or_at_the_last_needed(implementation, canvas, masked, end, num_needed, num_ready):
    # one masked position more, at the end, which is decided in this call: the rest keeps its state
    state = block_state(
        [0.0] * 4 + [0.5], end_token_ids=end if isinstance(end, tuple) else (end,), num_output_positions=num_needed
    )
    state["canvas"] = torch.tensor([[*canvas, 0]])
    state["masked"] = torch.tensor([[*map(bool, masked), True]])
    assert assert_equals_reference(implementation, state).num_ready.item() == num_ready


@per_implementation
def test_eos_proposed_in_this_call_ends_the_request(implementation):
    state = block_state([0.95, 0.95, 0.1], end_token_ids=(101,))
    result = assert_equals_reference(implementation, state)
    assert result.num_ready.item() == 2


@per_implementation
def test_repeated_calls_decide_every_block(implementation):
    state = random_state(8, 6, seed=3)
    for _ in range(6):
        had_masks = state["masked"].any(dim=1)
        result = run_unmask(implementation, **state)
        assert torch.equal(result.num_unmasked > 0, had_masks)
    assert not state["masked"].any()
    assert result.num_masked.tolist() == [0] * 8


confidences = st.floats(0, 1, width=32) | st.just(math.nan) | st.sampled_from([0.0, 0.5, 1.0])
blocks = st.lists(st.tuples(confidences, st.booleans()), min_size=1, max_size=8)
rules = st.sampled_from(list(Rule))
parameters = st.floats(0, 10, width=32)


def examples(implementation: str, num_cpu: int) -> settings:
    return settings(max_examples=num_cpu if implementation == "cpu" or HAS_GPU else 15, deadline=None)


@per_implementation
def test_every_call_makes_progress(implementation):
    @examples(implementation, 200)
    @given(block=blocks, rule=rules, parameter=parameters)
    def check(block, rule, parameter):
        confidence, masked = map(list, zip(*block, strict=True))
        state = block_state(confidence, masked, rule=rule, parameter=parameter)
        result = assert_equals_reference(implementation, state)
        assert result.num_unmasked.item() >= min(1, sum(masked))

    check()


@per_implementation
def test_higher_threshold_never_unmasks_more(implementation):
    @examples(implementation, 200)
    @given(block=blocks, thresholds=st.tuples(st.floats(0, 1.5, width=32), st.floats(0, 1.5, width=32)))
    def check(block, thresholds):
        confidence, masked = map(list, zip(*block, strict=True))
        low, high = (block_state(confidence, masked, parameter=threshold) for threshold in sorted(thresholds))
        run_unmask(implementation, **low)
        run_unmask(implementation, **high)
        assert (low["masked"] <= high["masked"]).all()

    check()


@per_implementation
def test_permuting_the_blocks_permutes_the_results(implementation):
    @examples(implementation, 50)
    @given(seed=st.integers(0, 1000), num_blocks=st.integers(2, 5), data=st.data())
    def check(seed, num_blocks, data):
        order = torch.tensor(data.draw(st.permutations(range(num_blocks))))
        state = random_state(num_blocks, 4, seed=seed)
        shuffled = {name: value[order] for name, value in state.items()}
        result, shuffled_result = run_unmask(implementation, **state), run_unmask(implementation, **shuffled)
        for count, shuffled_count in zip(result, shuffled_result, strict=True):
            assert torch.equal(count[order], shuffled_count)
        assert torch.equal(state["canvas"][order], shuffled["canvas"])
        assert torch.equal(state["masked"][order], shuffled["masked"])

    check()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"canvas": torch.zeros(4)}, ValueError, r"canvas: shape is \(4,\)"),
        ({"canvas": torch.zeros(1, 129).long()}, ValueError, r"canvas: shape is \(1, 129\), expected .*1 to 128"),
        ({"canvas": torch.zeros(1, 0).long()}, ValueError, r"canvas: shape is \(1, 0\)"),
        ({"canvas": torch.zeros(1, 4)}, TypeError, "canvas: dtype is torch.float32"),
        ({"canvas": torch.zeros(1, 8).long()[:, ::2]}, ValueError, "canvas: last stride is 2"),
        ({"canvas": torch.zeros(1, 4).int(), "proposal": torch.zeros(1, 4).short()}, TypeError, "proposal: dtype"),
        ({"masked": torch.zeros(1, 4).byte()}, TypeError, "masked: dtype is torch.uint8, expected torch.bool"),
        ({"masked": torch.zeros(1, 3).bool()}, ValueError, r"masked: shape is \(1, 3\), expected \(1, 4\)"),
        ({"confidence": torch.zeros(1, 4).half()}, TypeError, "confidence: dtype is torch.float16"),
        ({"rule": torch.zeros(2).char()}, ValueError, r"rule: shape is \(2,\), expected \(1,\)"),
        ({"parameter": torch.zeros(1).double()}, TypeError, "parameter: dtype is torch.float64"),
        ({"end_token_ids": torch.zeros(1, 1).int()}, TypeError, "end_token_ids: dtype is torch.int32"),
        (
            {"end_token_ids": torch.zeros(1).long()},
            ValueError,
            r"end_token_ids: shape is \(1,\), expected \[num_blocks,",
        ),
        ({"num_needed": torch.zeros(1).long()}, TypeError, "num_needed: dtype is torch.int64"),
        ({"quota": torch.zeros(1).long()}, TypeError, "quota: dtype is torch.int64"),
        ({"quota": torch.zeros(2).int()}, ValueError, r"quota: shape is \(2,\), expected \(1,\)"),
        ({"num_needed": torch.zeros(1, device="meta").int()}, ValueError, "num_needed: device is meta, expected cpu"),
    ],
)
def test_bad_arguments_are_refused_by_name(change, error, message):
    with pytest.raises(error, match=message):
        csrc_triton.unmask(**block_state([0.5] * 4) | change)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
def test_gpu_batch_of_a_real_size_matches_without_a_sync():
    state = random_state(256, 32)
    on_gpu = {name: value.cuda() for name, value in state.items()}
    csrc_triton.unmask(**{name: value.clone() for name, value in on_gpu.items()})  # compiles
    expected = reference.unmask(**state)
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = csrc_triton.unmask(**on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for count, expected_count in zip(result, expected, strict=True):
        assert torch.equal(count.cpu(), expected_count)
    assert torch.equal(on_gpu["canvas"].cpu(), state["canvas"])
