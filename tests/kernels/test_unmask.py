"""``unmask``: every implementation against the reference, and the promises of its docstring."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import in_tables, run_unmask, run_unmask_in_tables
from selection import HAS_GPU, number, per_implementation, per_implementation_and

import csrc_triton
from csrc_triton import Blocks, Proposals, Rule, cpu, implementations, reference
from csrc_triton.types import NO_CONFIDENCE

EOS = 3


def block_state(
    confidence: list[float],
    masked: list[bool] | None = None,
    *,
    rule: Rule = Rule.THRESHOLD,
    parameter: float = 0.9,
    end_token_ids: tuple[int, ...] = (-1,),
    num_output_positions: int | None = None,
    min_unmask: int = 0,
) -> dict[str, torch.Tensor]:
    """One block, every position with logits: canvas 10, 11, ...; proposal 100, 101, ..."""
    length = len(confidence)
    return {
        "canvas": torch.arange(10, 10 + length).unsqueeze(0),
        "masked": torch.tensor([[True] * length if masked is None else masked]),
        "proposal": torch.arange(100, 100 + length).unsqueeze(0),
        "confidence": torch.tensor([confidence]),
        "has_logits": torch.ones(1, length, dtype=torch.bool),
        "rule": torch.tensor([rule], dtype=torch.int8),
        "parameter": torch.tensor([parameter]),
        "end_token_ids": torch.tensor([end_token_ids]),
        "num_output_positions": torch.tensor(
            [length if num_output_positions is None else num_output_positions], dtype=torch.int32
        ),
        "min_unmask": torch.tensor([min_unmask], dtype=torch.int32),
    }


def random_state(
    num_blocks: int,
    block_length: int,
    *,
    rules: tuple[Rule, ...] = tuple(Rule),
    logits_at: str = "all",
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Blocks of five kinds in turn, among them full, empty and with one mask.

    Ties, NaN; garbage wherever a position is decided. Logits at all positions, at the masked ones, or at some of those.
    """
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
    has_logits = torch.ones_like(masked) if logits_at == "all" else masked.clone()
    if logits_at == "some":
        has_logits &= integers(0, 3, *shape) > 0
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
        "has_logits": has_logits,
        "rule": rule,
        "parameter": parameters[rule.long(), integers(0, 4, num_blocks)],
        "end_token_ids": integers(0, 2, num_blocks, 3) * (integers(2, 7, num_blocks, 3) + 1) - 1,
        "num_output_positions": integers(0, block_length + 1, num_blocks, dtype=torch.int32),
        "min_unmask": integers(0, 2, num_blocks, dtype=torch.int32) * integers(0, block_length + 2, num_blocks).int(),
    }


def assert_equals_reference(implementation: str, state: dict[str, torch.Tensor]) -> csrc_triton.UnmaskResult:
    expected_state = {name: value.clone() for name, value in state.items()}
    expected = run_unmask("reference", **expected_state)
    result = run_unmask(implementation, **state)
    for name, count in result._asdict().items():
        assert count.dtype == torch.int32
        assert torch.equal(count, getattr(expected, name)), name
    for name, value in state.items():
        assert torch.equal(value.nan_to_num(nan=99.0), expected_state[name].nan_to_num(nan=99.0)), name
    return result


@per_implementation_and(block_length=[1, 3, 8, 32, 128], logits_at=["all", "masked", "some"])
def test_matches_the_reference(implementation, block_length, logits_at):
    num_blocks = number(implementation, 40, sample=5)
    assert_equals_reference(implementation, random_state(num_blocks, block_length, logits_at=logits_at))


@per_implementation_and(rule=list(Rule))
def test_matches_the_reference_when_all_blocks_share_a_rule(implementation, rule):
    num_blocks = number(implementation, 30, sample=5)
    assert_equals_reference(implementation, random_state(num_blocks, 5, rules=(rule,), seed=1))


@per_implementation
def test_canvas_may_have_gaps_between_rows(implementation):
    state = random_state(10, 6, seed=2)
    untouched = torch.ones(20, 9, dtype=torch.bool)
    untouched[::2, 2:8] = False
    tables = []
    for run in (implementation, "reference"):
        wide = torch.full((20, 9), 55, dtype=torch.int32)
        wide_masked = torch.ones(20, 9, dtype=torch.bool)
        wide[::2, 2:8], wide_masked[::2, 2:8] = state["canvas"].int(), state["masked"]
        blocks, *others = in_tables(**state)
        blocks = blocks._replace(
            cells=wide.view(-1),
            masked=wide_masked[:, 2:],
            slots=torch.arange(0, 20, 2),
            canvas_index=torch.arange(180).view(20, 9)[::2, 2:8],
        )
        canvas, _, counts = run_unmask_in_tables(run, blocks, *others)
        assert torch.equal(canvas, wide[::2, 2:8])
        tables.append((wide, wide_masked, canvas, *counts))
        assert (wide[untouched] == 55).all() and wide_masked[untouched].all()
    for own, expected in zip(*tables, strict=True):
        assert torch.equal(own, expected)


@per_implementation_and(shape=[(0, 4), (1, 1), (7, 32), (12, 5)])
def test_blocks_in_tables_equal_gathering_them_and_writing_them_back(implementation, shape):
    num_blocks, block_length = shape
    state = random_state(num_blocks, block_length, logits_at="masked", seed=num_blocks)
    generator = torch.Generator().manual_seed(block_length)
    num_slots, stride = num_blocks + 3, block_length + 9
    slots = torch.randperm(num_slots, generator=generator)[:num_blocks]
    canvas_index = slots[:, None] * stride + 4 + torch.arange(block_length)
    _, proposals, rules = in_tables(**state)
    results = []
    for in_place in (True, False):
        cells = torch.arange(num_slots * stride + 1, dtype=torch.int32)
        masked = torch.zeros(num_slots, block_length + 2, dtype=torch.bool)
        masked[slots, :block_length] = state["masked"]
        if in_place:
            ends, num_output_positions = state["end_token_ids"], state["num_output_positions"]
            blocks = Blocks(cells, masked, slots, canvas_index, ends, num_output_positions)
            canvas, best, counts = run_unmask_in_tables(implementation, blocks, proposals, rules)
        else:
            gathered = state | {"canvas": cells[canvas_index], "masked": masked[slots, :block_length]}
            blocks, *_ = in_tables(**gathered)
            canvas, best, counts = reference.unmask(blocks, proposals, rules)
            cells[canvas_index], masked[slots, :block_length] = canvas, blocks.masked
        results.append((cells, masked, canvas, best.flatten()[proposals.position].nan_to_num(-5), *counts))
    for own, expected in zip(*results, strict=True):
        assert own.dtype == expected.dtype
        assert torch.equal(own, expected)


@per_implementation
def test_padding_and_blocks_that_do_not_take_part_change_nothing(implementation):
    lengths, width, num_slots = [5, 1, 0, 8, 3, 0, 8], 8, 7
    padding_cell = num_slots * width
    cells = torch.arange(padding_cell + 1, dtype=torch.int32)
    masked = torch.zeros(num_slots + 1, width + 1, dtype=torch.bool)
    canvas_index = torch.full((num_slots, width), padding_cell)
    for slot, length in enumerate(lengths):
        masked[slot] = length == 0  # a slot whose block does not take part keeps its masks
        masked[slot, :length] = True
        canvas_index[slot, :length] = slot * width + torch.arange(length)
    position = (canvas_index < padding_cell).flatten().nonzero().flatten()
    confidence = torch.linspace(0, 1, position.numel())
    slots = torch.tensor([slot if length else num_slots for slot, length in enumerate(lengths)])
    state = random_state(num_slots, width, seed=4)
    ends, lengths_tensor = state["end_token_ids"], torch.tensor(lengths, dtype=torch.int32)
    blocks = Blocks(cells, masked, slots, canvas_index, ends, lengths_tensor)
    proposals = Proposals(position, 100 + position, confidence)
    _, _, rules = in_tables(**state)
    before = masked.clone()
    together, _, counts = run_unmask_in_tables(implementation, blocks, proposals, rules)
    assert cells[-1] == padding_cell and (together[canvas_index == padding_cell] == padding_cell).all()
    assert torch.equal(masked[:, width], before[:, width]) and not masked[num_slots].any()
    for slot, length in enumerate(lengths):
        if length == 0:
            assert torch.equal(masked[slot], before[slot])
            assert [count[slot].item() for count in counts] == [0, 0, 0]
            continue
        alone = blocks._replace(
            cells=torch.arange(padding_cell + 1, dtype=torch.int32),
            masked=before.clone(),
            slots=slots[slot : slot + 1],
            canvas_index=canvas_index[slot : slot + 1, :length],
            end_token_ids=ends[slot : slot + 1],
            num_output_positions=lengths_tensor[slot : slot + 1],
        )
        mine = (position >= slot * width) & (position < (slot + 1) * width)
        own = Proposals(position[mine] - slot * width, proposals.token[mine], confidence[mine])
        canvas, _, expected = reference.unmask(alone, own, rules._make(each[slot : slot + 1] for each in rules))
        assert torch.equal(together[slot : slot + 1, :length], canvas)
        assert torch.equal(masked[slot], alone.masked[slot])
        assert [count[slot].item() for count in counts] == [count.item() for count in expected]


@per_implementation
def test_a_block_whose_masked_positions_have_no_logits_still_moves_on(implementation):
    state = block_state([0.5, 0.5, 0.9], [False, True, True])
    state["has_logits"] = torch.tensor([[True, False, False]])
    assert assert_equals_reference(implementation, state).num_unmasked.item() == 1
    assert state["canvas"].tolist() == [[10, 0, 12]]


def test_a_cpu_tensor_gets_the_cpu_path():
    assert implementations(torch.device("cpu")).unmask is cpu.unmask


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
        (Rule.TOP_K, 4.0, [NO_CONFIDENCE, 0.2, NO_CONFIDENCE, math.nan], [1, 3]),
        (Rule.FACTOR, 50.0, [0.9, NO_CONFIDENCE, 0.8, NO_CONFIDENCE], [0, 2]),
        (Rule.JOINT_BOUND, 100.0, [NO_CONFIDENCE, 0.1, NO_CONFIDENCE, 0.2], [1, 3]),
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
        (Rule.ENTROPY_BOUND, 0.375, [0.5, 0.75, 0.875, 0.0], [2]),
        (Rule.ENTROPY_BOUND, 0.38, [0.5, 0.75, 0.875, 0.0], [1, 2]),
        (Rule.ENTROPY_BOUND, 0.01, [0.5, 0.75, 0.875, 0.0], [2]),
        (Rule.ENTROPY_BOUND, 1.9, [0.5, 0.75, 0.875, math.nan], [0, 1, 2]),
        (Rule.ENTROPY_BOUND, 1.9, [0.5, 0.75, 0.875, 0.0], [0, 1, 2, 3]),
        (Rule.ENTROPY_BOUND, 9.0, [NO_CONFIDENCE, 0.1, NO_CONFIDENCE, 0.2], [1, 3]),
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
    ("min_unmask", "confidence", "unmasked"),
    [
        (0, [0.2, 0.4, 0.3, 0.1], [1]),
        (3, [0.2, 0.4, 0.3, 0.1], [0, 1, 2]),
        (2, [0.3, 0.3, math.nan, 0.3], [0, 1]),
        (9, [0.2, math.nan, 0.3, 0.1], [0, 1, 2, 3]),
        (3, [NO_CONFIDENCE, 0.4, NO_CONFIDENCE, 0.1], [1, 3]),
    ],
)
def test_min_unmask_positions_are_unmasked_whatever_the_rule_says(
    implementation, rule, min_unmask, confidence, unmasked
):
    parameter = {Rule.THRESHOLD: 0.5, Rule.TOP_K: 1.0}.get(rule, 0.1)  # by which one position would pass, or none
    state = block_state(confidence, rule=rule, parameter=parameter, min_unmask=min_unmask)
    assert_equals_reference(implementation, state)
    assert (~state["masked"][0]).nonzero().flatten().tolist() == unmasked


@per_implementation
def test_min_unmask_takes_nothing_from_what_the_rule_lets_pass(implementation):
    state = block_state([0.95, 0.4, 0.92, 0.91], min_unmask=2)
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
    ("canvas", "masked", "end", "num_output_positions", "num_ready"),
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
def test_ready_tokens_end_at_eos_or_at_the_last_output_position(
    implementation, canvas, masked, end, num_output_positions, num_ready
):
    # one masked position more, at the end, which is decided in this call: the rest keeps its state
    state = block_state(
        [0.0] * 4 + [0.5],
        end_token_ids=end if isinstance(end, tuple) else (end,),
        num_output_positions=num_output_positions,
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
    num_blocks = number(implementation, 8, sample=5)
    state = random_state(num_blocks, 6, seed=3)
    for _ in range(6):
        had_masks = state["masked"].any(dim=1)
        result = run_unmask(implementation, **state)
        assert torch.equal(result.num_unmasked > 0, had_masks)
    assert not state["masked"].any()
    assert result.num_masked.tolist() == [0] * num_blocks


confidences = st.floats(0, 1, width=32) | st.just(math.nan) | st.sampled_from([0.0, 0.5, 1.0])
blocks = st.lists(st.tuples(confidences, st.booleans()), min_size=1, max_size=8)
rules = st.sampled_from(list(Rule))
parameters = st.floats(0, 10, width=32)


def examples(implementation: str, num_examples: int, sample: int = 15) -> settings:
    return settings(max_examples=number(implementation, num_examples, sample=sample), deadline=None)


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
    @examples(implementation, 50, sample=5)
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
        ({"canvas_index": torch.zeros(4).long()}, ValueError, r"canvas_index: shape is \(4,\)"),
        (
            {"canvas_index": torch.zeros(1, 129).long()},
            ValueError,
            r"canvas_index: shape is \(1, 129\), expected .*1 to 128",
        ),
        ({"canvas_index": torch.zeros(1, 0).long()}, ValueError, r"canvas_index: shape is \(1, 0\)"),
        ({"canvas_index": torch.zeros(1, 4)}, TypeError, "canvas_index: dtype is torch.float32"),
        ({"canvas_index": torch.zeros(1, 8).long()[:, ::2]}, ValueError, "canvas_index: last stride is 2"),
        ({"cells": torch.zeros(1, 4).int()}, ValueError, r"cells: shape is \(1, 4\), expected \[num_cells\]"),
        ({"cells": torch.zeros(4)}, TypeError, "cells: dtype is torch.float32"),
        ({"cells": torch.zeros(4).long()}, TypeError, "cells: dtype is torch.int64, expected torch.int32"),
        ({"cells": torch.zeros(8).int()[::2]}, ValueError, "cells: last stride is 2"),
        ({"slots": torch.zeros(2).long()}, ValueError, r"slots: shape is \(2,\), expected \(1,\)"),
        ({"slots": torch.zeros(1).int()}, TypeError, "slots: dtype is torch.int32"),
        ({"position": torch.zeros(1, 4).long()}, ValueError, r"position: shape is \(1, 4\), expected \[num_prop"),
        ({"position": torch.zeros(4).int()}, TypeError, "position: dtype is torch.int32"),
        ({"token": torch.zeros(4).short()}, TypeError, "token: dtype"),
        ({"token": torch.zeros(3).long()}, ValueError, r"token: shape is \(3,\), expected \(4,\)"),
        ({"masked": torch.zeros(1, 4).byte()}, TypeError, "masked: dtype is torch.uint8, expected torch.bool"),
        ({"masked": torch.zeros(1, 3).bool()}, ValueError, r"masked: shape is \(1, 3\), expected .*at least 4\]"),
        ({"masked": torch.zeros(4).bool()}, ValueError, r"masked: shape is \(4,\), expected .*at least 4\]"),
        ({"confidence": torch.zeros(4).half()}, TypeError, "confidence: dtype is torch.float16"),
        ({"rule": torch.zeros(2).char()}, ValueError, r"rule: shape is \(2,\), expected \(1,\)"),
        ({"parameter": torch.zeros(1).double()}, TypeError, "parameter: dtype is torch.float64"),
        ({"end_token_ids": torch.zeros(1, 1).int()}, TypeError, "end_token_ids: dtype is torch.int32"),
        (
            {"end_token_ids": torch.zeros(1).long()},
            ValueError,
            r"end_token_ids: shape is \(1,\), expected \[num_blocks,",
        ),
        ({"num_output_positions": torch.zeros(1).long()}, TypeError, "num_output_positions: dtype is torch.int64"),
        ({"min_unmask": torch.zeros(1).long()}, TypeError, "min_unmask: dtype is torch.int64"),
        ({"min_unmask": torch.zeros(2).int()}, ValueError, r"min_unmask: shape is \(2,\), expected \(1,\)"),
        (
            {"num_output_positions": torch.zeros(1, device="meta").int()},
            ValueError,
            "num_output_positions: device is meta, expected cpu",
        ),
    ],
)
def test_bad_arguments_are_refused_by_name(change, error, message):
    arguments = in_tables(**block_state([0.5] * 4))
    changed = [some._replace(**{name: change[name] for name in change if name in some._fields}) for some in arguments]
    with pytest.raises(error, match=message):
        csrc_triton.unmask(*changed)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
def test_gpu_batch_of_a_real_size_matches_without_a_sync():
    arguments = in_tables(**random_state(256, 32))
    on_gpu, warm_up = (
        [some._make(tensor.to("cuda", copy=True) for tensor in some) for some in arguments] for _ in range(2)
    )
    csrc_triton.unmask(*warm_up)  # compiles
    expected_canvas, _, expected = reference.unmask(*arguments)
    torch.cuda.set_sync_debug_mode("error")
    try:
        canvas, _, result = csrc_triton.unmask(*on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for count, expected_count in zip(result, expected, strict=True):
        assert torch.equal(count.cpu(), expected_count)
    assert torch.equal(canvas.cpu(), expected_canvas)
    assert torch.equal(on_gpu[0].cells.cpu(), arguments[0].cells)
