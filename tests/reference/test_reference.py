"""The references stand on their own feet: they reproduce what the stock decoder did."""

from fractions import Fraction

import pytest

from tests.conftest import load_golden
from tests.reference.decode import calibrate, calibrate_together, conformal, decode, fixed_steps, static_threshold
from tests.reference.llada import ReferenceLLaDA


@pytest.mark.parametrize("name", ["llada_random", "llada_tasks"])
def test_reference_decoder_reproduces_the_stock_decoder(name):
    golden = load_golden(name)
    model = ReferenceLLaDA.load(golden.folder)
    wrong = []
    for index, case in enumerate(golden.cases):
        block_length, num_blocks = case["block_length"], case["gen_length"] // case["block_length"]
        if case["threshold"] is None:
            rule = fixed_steps(case["steps"] // num_blocks, block_length)
        else:
            rule = static_threshold(case["threshold"])
        result = decode(
            model,
            case["prompt_token_ids"],
            rule,
            gen_length=case["gen_length"],
            block_length=block_length,
            cache_mode=case["cache"],
        )
        if result.tokens != case["output_token_ids"] or not 1 <= result.nfe <= case["nfe"]:
            wrong.append((index, result.nfe, case["nfe"]))
    assert len(golden.cases) in (24, 60) and wrong == []


def test_reference_calibration_on_a_hand_made_record():
    # Two blocks. Committed samples of the first: 0.9 | 0.5, 0.7; of the second: 0.25.
    record = [
        [[(0.1, False), (0.9, True), (0.3, False)], [(0.5, True), (0.7, True)]],
        [[(0.25, True)]],
    ]
    assert calibrate(record, "block", "mean", False) == [[pytest.approx(0.5)], [0.25]]
    assert calibrate(record, "block", "q1", False)[0] == [pytest.approx(0.3)]
    assert calibrate(record, "step_block", "q3", False)[0] == [pytest.approx(0.6), pytest.approx(0.65)]
    assert calibrate(record, "step_block", "mean", True) == [[0.9, pytest.approx(0.6)], [0.25]]
    assert calibrate([[[(0.0, True)] + [(0.9 + i / 100, True) for i in range(8)]]], "block", "min_whisker", False) == [
        [0.9]
    ]


def test_reference_calibration_pools_the_requests_that_reached_a_block():
    records = [[[[(0.1, True)], [(0.2, True)]]], [[[(0.3, True)]], [[(0.8, True)]]]]
    assert calibrate_together(records, "block", "mean", False) == [[pytest.approx(0.2)], [0.8]]
    assert calibrate_together(records, "step_block", "mean", False) == [[pytest.approx(0.2), 0.2], [0.8]]


def test_reference_conformal_thresholds_on_a_hand_made_record():
    # One block, highest wrong confidences 0.4, 0.6, none; the third request takes one step, the others two.
    records = [
        [[[(0.9, False), (0.3, True)], [(0.4, True)]]],
        [[[(0.6, True)], [(0.5, True)]]],
        [[[(1.0, False)]]],
    ]
    quarter, half, tenth = Fraction(1, 4), Fraction(1, 2), Fraction(1, 10)
    assert conformal(records, "block", quarter, 32) == [[0.6]]  # the third of three: 3 / 4
    assert conformal(records, "block", half, 32) == [[0.4]]  # 2 / 4
    assert conformal(records, "block", tenth, 32) == [[None]]
    assert conformal(records, "step_block", half, 32) == [[0.3, 0.5]]  # of 0, 0.3, 0.6 and of 0.4, 0.5: 2 / 4, 2 / 3
    assert conformal(records, "step_block", quarter, 32) == [[0.6, 0.6]]  # two are too few in the second step
