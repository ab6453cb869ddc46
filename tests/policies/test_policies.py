"""Properties of every policy: its schedule and what ``unmask`` makes of it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from csrc_triton import Blocks, Proposals, Rule, Rules, unmask
from tests.reference import decode as reference
from vllm_osdt.calibration.thresholds import Fallback, Thresholds
from vllm_osdt.declaration import declarations
from vllm_osdt.geometry import DecodeShape
from vllm_osdt.options import DECLARED, DecodingOptions
from vllm_osdt.policies import POLICIES, Schedule

POLICY_NAMES = tuple(POLICIES)
MASK, PROPOSED = 99, 7
unit = st.floats(0, 1, width=32)
# A few fixed numbers, so that equal confidences and confidences on the cutoff are frequent.
confidences = st.one_of(unit, st.sampled_from([0.0, 0.25, 0.5, 0.75, float(np.float32(0.9)), 1.0]))


@st.composite
def options(draw, policy=None):
    block_length, num_blocks = draw(st.integers(1, 33)), draw(st.integers(1, 4))
    policy = policy or draw(st.sampled_from(POLICY_NAMES))
    needs_steps = policy in ("fixed_steps", "dimple", "prophet", "sched", "freedave")
    return DecodingOptions(
        policy=policy,
        statistic="q1",
        threshold=draw(st.floats(0.01, 1.0)),
        factor=draw(st.floats(0.01, 4.0)),
        delta=draw(st.floats(0.0, 0.99)),
        entropy=draw(st.floats(0.01, 40.0)),
        max_entropy=draw(st.floats(0.01, 31.0)),
        steps=num_blocks * draw(st.integers(1, block_length)) if needs_steps or draw(st.booleans()) else None,
        block_length=block_length,
        gen_length=num_blocks * block_length,
        threshold_cap=draw(st.floats(0.01, 1.0)),
        slack=draw(st.floats(0.0, 0.99)),
        floor=draw(st.sampled_from([0.0, 0.3, 1.0])),
        granularity=draw(st.sampled_from(["block", "step_block"])),
    )


def schedule_of(policy, opts, thresholds=None):
    """A policy's schedule of a request whose blocks have no parts."""
    return POLICIES[policy].schedule(opts, DecodeShape(opts.num_blocks, opts.block_length), thresholds)


def known(values):
    """A table whose every cell has a threshold of its own."""
    values = np.array(values, dtype=np.float32)
    return Thresholds(values, np.zeros(values.shape, dtype=np.int8))


@st.composite
def tables(draw, cells=unit):
    shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 33)))
    values = draw(st.lists(cells, min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]))
    return known(np.reshape(values, shape))


# Cells that nothing is known of are frequent in these.
gappy_tables = tables(st.one_of(unit, st.just(float("nan"))))


def unmask_blocks(canvas, masked, proposal, confidence, rules, end=-1):
    """One step of blocks [num_blocks, block_length] all of whose positions have logits.

    ``canvas`` and ``masked`` change in place.
    """
    num_blocks, length = canvas.shape
    blocks = Blocks(
        cells=canvas.view(-1),
        masked=masked,
        slots=torch.arange(num_blocks),
        canvas_index=torch.arange(canvas.numel()).view(canvas.shape),
        end_token_ids=torch.full((num_blocks, 1), end),
        num_output_positions=torch.full((num_blocks,), length, dtype=torch.int32),
    )
    proposals = Proposals(torch.arange(canvas.numel()), proposal.flatten(), confidence.flatten())
    return unmask(blocks, proposals, rules)[2]


def run_block(schedule: Schedule, block: int, rounds: list[list[float]]) -> list[set[int]]:
    """Positions unmasked by each step of a block until it is finished; ``rounds[step]`` are the confidences."""
    length = schedule.parameters.shape[1]
    canvas = torch.full((1, length), MASK, dtype=torch.int32)
    masked = torch.ones(1, length, dtype=torch.bool)
    min_unmask = np.zeros(length, dtype=np.int32) if schedule.min_unmask is None else schedule.min_unmask
    chosen = []
    while masked.any():
        before = masked.clone()
        step = len(chosen)
        rules = Rules(
            torch.tensor([schedule.rule], dtype=torch.int8),
            torch.from_numpy(schedule.parameters[block, step : step + 1].copy()),
            torch.from_numpy(min_unmask[step : step + 1].copy()),
        )
        confidence = torch.tensor([rounds[step % len(rounds)]])
        unmask_blocks(canvas, masked, torch.full((1, length), PROPOSED), confidence, rules)
        chosen.append(set(torch.nonzero((before & ~masked)[0])[:, 0].tolist()))
        assert (canvas[~masked] == PROPOSED).all() and (canvas[masked] == MASK).all()
    return chosen


def rounds_for(data, length, count=3):
    row = st.lists(confidences, min_size=length, max_size=length)
    return data.draw(st.lists(row, min_size=count, max_size=count))


def test_a_policy_is_asked_for_by_its_name_and_its_options_by_theirs():
    assert all(policy.name == name for name, policy in POLICIES.items())
    assert set(POLICY_NAMES) == set(DECLARED["policy"].schema["enum"])
    assert {name for policy in POLICIES.values() for name in declarations(policy.Options)} <= set(DECLARED)


@settings(deadline=None)
@given(options(), st.one_of(st.none(), tables(), gappy_tables))
def test_a_schedule_has_a_usable_parameter_for_every_block_and_step(opts, thresholds):
    schedule = schedule_of(opts.policy, opts, thresholds)
    assert schedule.parameters.shape == (opts.gen_length // opts.block_length, opts.block_length)
    assert schedule.parameters.dtype == np.float32 and np.isfinite(schedule.parameters).all()
    if opts.policy in ("fixed_steps", "prophet", "sched", "freedave"):
        needed = schedule.parameters[:, : opts.steps // (opts.gen_length // opts.block_length)]
        assert (needed >= 1).all()
    else:
        assert (schedule.parameters > 0).all()


@settings(deadline=None)
@given(st.data())
def test_every_step_unmasks_something_and_a_block_never_outlives_its_schedule(data):
    opts = data.draw(options())
    schedule = schedule_of(opts.policy, opts, data.draw(st.one_of(st.none(), tables(), gappy_tables)))
    chosen = run_block(schedule, 0, rounds_for(data, opts.block_length))
    assert all(chosen) and len(chosen) <= opts.block_length
    assert sorted(i for step in chosen for i in step) == list(range(opts.block_length))


@settings(deadline=None)
@given(st.data())
def test_every_policy_chooses_what_the_plain_decoder_chooses(data):
    # Those that adjust a step are more than their schedule: each has a module of its own.
    opts = data.draw(st.sampled_from([name for name, one in POLICIES.items() if not one.adjusts]).flatmap(options))
    table = data.draw(tables())
    schedule = schedule_of(opts.policy, opts, table)
    num_blocks = opts.gen_length // opts.block_length
    calibrated = reference.osdt(table.values.tolist(), opts.threshold_cap, opts.slack, opts.floor)
    # The plain rules take the numbers that a float32 schedule can hold.
    threshold, steps = float(np.float32(opts.threshold)), opts.steps and opts.steps // num_blocks
    rule = {
        "static_threshold": reference.dynamic(threshold, steps, opts.block_length, strict=False)
        if steps
        else reference.static_threshold(threshold),
        "factor": None,
        "joint_bound": None,
        "entropy_bound": None,
        "entropy_threshold": reference.static_threshold(float(np.float32(1 - opts.max_entropy / 32))),
        "fixed_steps": reference.fixed_steps(steps, opts.block_length) if steps else None,
        "freedave": reference.fixed_steps(steps, opts.block_length) if steps else None,
        "osdt": reference.ThresholdRule(lambda b, s: float(np.float32(calibrated.cutoff(b, s))), strict=True),
    }[opts.policy]
    rounds = rounds_for(data, opts.block_length)
    block = data.draw(st.integers(0, num_blocks - 1))
    left = set(range(opts.block_length))
    for step, chosen in enumerate(run_block(schedule, block, rounds)):
        masked = {i: rounds[step % len(rounds)][i] for i in sorted(left)}
        if rule is not None:
            assert chosen == set(rule(block, step, masked))
        else:
            n = len(chosen)
            ranking = reference.best_first(masked)
            assert chosen == set(ranking[:n])
            doubts = [1 - masked[position] for position in ranking]
            if opts.policy == "factor":
                passes = [(k + 1) * doubts[k - 1] - opts.factor for k in range(1, len(ranking) + 1)]
            elif opts.policy == "entropy_bound":
                passes = [sum(doubts[:k]) - opts.entropy / 32 for k in range(1, len(ranking) + 1)]
            else:
                passes = [sum(doubts[:k]) + doubts[k - 1] - 1 + opts.delta for k in range(1, len(ranking) + 1)]
            slack = 1e-4  # the kernel's test runs in float32
            assert n == 1 or passes[n - 1] < slack
            assert all(margin > -slack for margin in passes[n:])
        left -= chosen


@settings(deadline=None)
@given(st.data())
def test_a_higher_threshold_never_unmasks_more(data):
    length = data.draw(st.integers(1, 33))
    [row] = rounds_for(data, length, 1)
    low, high = sorted(data.draw(st.tuples(st.floats(0.01, 1), st.floats(0.01, 1))))
    first = {}
    for name, threshold in (("low", low), ("high", high)):
        opts = DecodingOptions(policy="static_threshold", threshold=threshold, block_length=length, gen_length=length)
        first[name] = run_block(schedule_of("static_threshold", opts, None), 0, [row])[0]
    assert first["high"] <= first["low"]


@settings(deadline=None)
@given(st.data())
def test_the_order_of_a_batch_changes_nothing(data):
    length, count = data.draw(st.integers(1, 16)), data.draw(st.integers(2, 6))
    confidence = torch.tensor(rounds_for(data, length, count), dtype=torch.float32)
    masked = torch.tensor(
        data.draw(st.lists(st.lists(st.booleans(), min_size=length, max_size=length), min_size=count, max_size=count))
    )
    rule = torch.tensor(
        data.draw(st.lists(st.sampled_from(list(Rule)), min_size=count, max_size=count)), dtype=torch.int8
    )
    parameter = torch.tensor(
        data.draw(st.lists(st.floats(0.01, 4), min_size=count, max_size=count)), dtype=torch.float32
    )
    min_unmask = torch.tensor(data.draw(st.lists(st.integers(0, length), min_size=count, max_size=count))).int()
    order = torch.tensor(data.draw(st.permutations(range(count))))

    def run(index):
        canvas, holes = torch.full((count, length), MASK, dtype=torch.int32), masked[index].clone()
        proposal = (torch.arange(count * length) % 50).view(count, length)[index].contiguous()
        rules = Rules(rule[index], parameter[index], min_unmask[index])
        result = unmask_blocks(canvas, holes, proposal, confidence[index].contiguous(), rules, end=3)
        return canvas, holes, result.num_ready

    for plain, shuffled in zip(run(torch.arange(count)), run(order), strict=True):
        assert torch.equal(plain[order], shuffled)


@given(options("fixed_steps"))
def test_fixed_steps_shares_add_up_to_the_block(opts):
    schedule = schedule_of("fixed_steps", opts, None)
    steps_per_block = opts.steps // (opts.gen_length // opts.block_length)
    for row in schedule.parameters:
        assert row.sum() == opts.block_length and (row[steps_per_block:] == 0).all()
        used = row[:steps_per_block].tolist()
        assert max(used) - min(used) <= 1 and used == sorted(used, reverse=True)


@given(options("static_threshold"))
def test_steps_of_a_static_threshold_are_the_shares_of_fixed_steps_and_of_no_policy_without_one(opts):
    opts = replace(opts, steps=opts.steps or opts.gen_length)
    shares = schedule_of("fixed_steps", opts, None).parameters
    for policy in ("static_threshold", "s2d2"):
        assert (schedule_of(policy, opts, None).min_unmask == shares).all()
        assert schedule_of(policy, replace(opts, steps=None), None).min_unmask is None
    for policy in {*POLICY_NAMES} - {"static_threshold", "s2d2"}:
        assert schedule_of(policy, replace(opts, policy=policy), None).min_unmask is None


def test_osdt_is_strict_and_static_threshold_is_not():
    static = DecodingOptions(policy="static_threshold", threshold=0.5, block_length=3, gen_length=3)
    row = [0.5, 0.75, 0.25]
    assert run_block(schedule_of("static_threshold", static, None), 0, [row])[0] == {0, 1}
    opts = DecodingOptions(policy="osdt", statistic="q1", threshold_cap=1.0, slack=0.0, block_length=3, gen_length=3)
    assert run_block(schedule_of("osdt", opts, known([[0.5]])), 0, [row])[0] == {1}


def test_where_nothing_is_known_osdt_takes_the_static_threshold_and_equality_passes():
    opts = DecodingOptions(
        policy="osdt",
        statistic="q1",
        threshold=0.5,
        threshold_cap=0.3,
        slack=0.9,
        floor=1.0,
        block_length=3,
        gen_length=6,
    )
    schedule = schedule_of("osdt", opts, known([[np.nan], [0.9]]))
    assert (schedule.parameters[0] == 0.5).all() and (schedule.parameters[1] > 1.0).all()
    assert run_block(schedule, 0, [[0.5, 0.75, 0.25]])[0] == {0, 1}
    static = schedule_of("static_threshold", opts, None).parameters
    assert np.array_equal(schedule_of("osdt", opts, known([[np.nan, np.nan]])).parameters, static)
    assert np.array_equal(schedule_of("osdt", opts, None).parameters, static)


def test_osdt_repeats_the_last_block_and_step_of_its_table():
    opts = DecodingOptions(policy="osdt", statistic="q1", threshold_cap=1.0, slack=0.0, block_length=3, gen_length=9)
    got = schedule_of("osdt", opts, known([[0.1, 0.2], [0.3, 0.4]])).parameters
    assert got == pytest.approx(np.array([[0.1, 0.2, 0.2], [0.3, 0.4, 0.4], [0.3, 0.4, 0.4]]), abs=1e-6)


@pytest.mark.parametrize(("cap", "slack", "expected"), [(0.75, 0.2, 0.6), (1.0, 0.2, 0.72), (0.9, 0.0, 0.9)])
def test_osdt_caps_before_it_takes_the_slack_off(cap, slack, expected):
    opts = DecodingOptions(policy="osdt", statistic="q1", threshold_cap=cap, slack=slack, block_length=2, gen_length=2)
    assert schedule_of("osdt", opts, known([[0.9, 0.9]])).parameters == pytest.approx(expected, abs=1e-6)


N, B, S, C = Fallback


@pytest.mark.parametrize(
    ("mode", "kinds", "expected"),
    [
        ("block", [[N, N], [C, C]], [[N] * 4, [C] * 4, [B] * 4]),  # a block's one threshold holds for its every step
        ("step_block", [[N, C], [N, S]], [[N, C, S, S], [N, S, S, S], [B] * 4]),
    ],
)
def test_osdt_says_where_each_threshold_comes_from(mode, kinds, expected):
    opts = DecodingOptions(policy="osdt", statistic="q1", granularity=mode, block_length=4, gen_length=12)
    table = Thresholds(np.full((2, 2), 0.5, np.float32), np.array(kinds, np.int8))
    schedule = schedule_of("osdt", opts, table)
    assert schedule.fallback.tolist() == expected and schedule.fallback.dtype == np.int8
    assert table.fallback.tolist() == kinds  # the profile's own table is shared by requests


@given(options(), tables())
def test_only_calibrated_schedules_tell_where_thresholds_come_from(opts, table):
    schedule = schedule_of(opts.policy, opts, table)
    assert (schedule.fallback is not None) == (opts.policy == "osdt")
    if schedule.fallback is not None:
        assert schedule.fallback.shape == schedule.parameters.shape
    assert schedule_of(opts.policy, opts, None).fallback is None


@pytest.mark.parametrize(("margin", "expected"), [(0.0, 0.5), (0.1, 0.55), (0.5, 0.75), (0.9, 0.9)])
def test_the_margin_raises_a_conformal_threshold_below_the_cap_and_no_other(margin, expected):
    opts = DecodingOptions(policy="osdt", margin=margin, block_length=2, gen_length=2)
    assert schedule_of("osdt", opts, known([[0.5, 0.5]])).parameters == pytest.approx(expected)
    assert schedule_of("osdt", replace(opts, statistic="q1"), known([[0.5, 0.5]])).parameters == pytest.approx(0.5)
