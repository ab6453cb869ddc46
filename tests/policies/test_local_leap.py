"""LocalLeap against its definition, step by step and in an engine, with its own thresholds and with a profile's."""

import pytest
import torch

from tests.e2e.engine import generate, nfe, sampling
from tests.policies.adjusted import make_step, policy_rule
from tests.policies.test_policies import known, schedule_of
from tests.reference.decode import best_first, calibrate, decode, osdt, static_threshold
from tests.reference.llada import ReferenceLLaDA
from vllm_osdt.errors import InvalidOptionError
from vllm_osdt.options import DecodingOptions
from vllm_osdt.options.parsing import parse_options
from vllm_osdt.policies import POLICIES

ANCHOR, RELAXED = 0.9, 0.75


def passing(confidence, radius=4, anchor=ANCHOR, relaxed=RELAXED):
    """Positions that pass, by the published rule; at least the most confident one."""
    anchors = {i for i, c in confidence.items() if c >= anchor}
    near = {i for i, c in confidence.items() if c >= relaxed and any(abs(i - a) <= radius for a in anchors)}
    return anchors | near or {best_first(confidence)[0]}


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("radius", [0, 1, 4, 128])
def test_scores_pass_as_published(seed, radius):
    generator = torch.Generator().manual_seed(seed)
    score = torch.rand(3, 17, generator=generator)
    score[torch.rand(3, 17, generator=generator) < 0.3] = -2.0  # not masked, or without logits
    score[0, 3], score[0, 5] = 0.9, 0.75  # equality passes
    schedule = schedule_of("local_leap", DecodingOptions(leap_radius=radius, block_length=17, gen_length=17))
    step = make_step(score.clone(), schedule, rows=3)
    POLICIES["local_leap"].adjust(step)
    for row in range(3):
        confidence = {i: c for i, c in enumerate(score[row].tolist()) if c >= 0}
        expected = passing(confidence, radius, step.parameter[row].item(), torch.tensor(RELAXED).item())
        got = set((step.score[row] >= step.parameter[row]).nonzero()[:, 0].tolist())
        assert (got or {best_first(confidence)[0]}) == expected


@pytest.mark.e2e
def test_an_engine_decodes_as_the_plain_loop(tasks_llm, golden_tasks):
    network = ReferenceLLaDA.load(golden_tasks.folder)
    prompts = [case["prompt_token_ids"] for case in golden_tasks.cases[:24]]
    options = {"policy": "local_leap", "anchor_threshold": 0.6, "relaxed_threshold": 0.3, "leap_radius": 2}
    canvas = {"gen_length": 48, "block_length": 16, "cache_mode": "dual"}
    rules = [policy_rule(lambda confidence: passing(confidence, 2, 0.6, 0.3)) for _ in prompts]
    expected = [decode(network, prompt, rule, **canvas) for prompt, rule in zip(prompts, rules, strict=True)]
    static = sampling(48, policy="static_threshold", threshold=0.6, **canvas)
    params = [one for _ in prompts for one in (sampling(48, **options, **canvas), static)]
    got = generate(tasks_llm, [prompt for prompt in prompts for _ in range(2)], params)
    assert [list(one.token_ids) for one in got[::2]] == [one.tokens for one in expected]
    assert [nfe(one) for one in got[::2]] == [one.nfe for one in expected]
    assert sum(map(nfe, got[::2])) < sum(map(nfe, got[1::2]))  # beside requests that leap nowhere


class CalibratedLeap:
    """A profile's table says when a position is an anchor; near one, a share of that is enough."""

    def __init__(self, table, ratio, radius, cap=1.0, slack=0.1):
        self.table, self.ratio, self.radius, self.margin, self.num_leaps = (
            osdt(table, cap, slack),
            ratio,
            radius,
            1.0,
            0,
        )

    def __call__(self, block, step, masked):
        tau = self.table.cutoff(block, step)
        low = tau * self.ratio
        self.margin = min([self.margin, *(min(abs(c - tau), abs(c - low)) for c in masked.values())])
        anchors = {i for i, c in masked.items() if c > tau}
        near = {i for i, c in masked.items() if c > low and any(abs(i - a) <= self.radius for a in anchors)}
        self.num_leaps += len(near - anchors)
        return sorted(anchors | near) or [best_first(masked)[0]]


def test_calibrated_the_relaxed_threshold_is_a_share_of_the_profiles():
    calibrated = {"calibrated": True, "statistic": "q1", "relaxed_ratio": 0.5, "leap_radius": 1}
    opts = DecodingOptions(policy="local_leap", block_length=5, gen_length=5, threshold_cap=1.0, **calibrated)
    step = make_step(torch.tensor([[0.61, 0.31, 0.29, 0.31, 0.1]]), schedule_of("local_leap", opts, known([[0.6]])), 1)
    POLICIES["local_leap"].adjust(step)
    assert (step.score >= step.parameter).tolist() == [[True, True, False, False, False]]  # the last is not near


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"policy": "local_leap", "calibrated": True}, "osdt_calibrated is True, but the request names no task"),
        (
            {"policy": "factor", "calibrated": True, "task": "a"},
            "takes no threshold of a profile",
        ),
        (
            {"policy": "osdt", "calibrated": True, "task": "a"},
            "its thresholds are the profile's",
        ),
        ({"policy": "local_leap", "calibrated": True, "task": "a", "anchor_threshold": 0.8}, "send one of them"),
        ({"policy": "local_leap", "relaxed_ratio": 0.8}, "says nothing without osdt_calibrated = True"),
        ({"policy": "local_leap", "task": "a", "recalibrate": True}, "which policy 'local_leap' does not use"),
    ],
)
def test_what_a_profile_does_not_go_with_is_refused(values, words):
    with pytest.raises(InvalidOptionError, match=words):
        parse_options({f"osdt_{name}": value for name, value in values.items()}, base=DecodingOptions(), prefix="osdt_")


def test_calibrated_a_request_may_say_how_its_task_calibrates():
    asked = {"policy": "local_leap", "calibrated": True, "task": "a", "threshold": 0.8, "recalibrate": True}
    got = parse_options(
        {f"osdt_{name}": value for name, value in asked.items()}, base=DecodingOptions(), prefix="osdt_"
    )
    assert got.calibrates and (got.threshold, got.recalibrate) == (0.8, True)


@pytest.mark.e2e
def test_calibrated_an_engine_decodes_as_the_plain_loop_with_the_profiles_table(tasks_llm, tasks_twin, golden_tasks):
    canvas = {"gen_length": 48, "block_length": 16, "cache_mode": "dual"}
    prompts = [case["prompt_token_ids"] for case in golden_tasks.cases[:12]]
    first = decode(tasks_twin, prompts[0], static_threshold(0.9), **canvas)
    table = calibrate(first.record, "step_block", "q1", False)
    rules = [CalibratedLeap(table, 0.5, 2) for _ in prompts]
    expected = [decode(tasks_twin, prompt, rule, **canvas) for prompt, rule in zip(prompts, rules, strict=True)]
    clear = [i for i, one in enumerate(expected) if min(one.rule_margin, one.proposal_margin) > 1e-5]
    assert len(clear) >= 7 and sum(rules[i].num_leaps for i in clear) > 0
    profile = {"task": "leaps", "num_calibration_requests": 1, "statistic": "q1", "granularity": "step_block"}
    profile |= {"slack": 0.1, "threshold_cap": 1.0}
    leaping = sampling(48, policy="local_leap", calibrated=True, relaxed_ratio=0.5, leap_radius=2, **profile, **canvas)
    [calibrating] = generate(tasks_llm, prompts[:1], leaping)
    assert list(calibrating.token_ids) == first.tokens and nfe(calibrating) == first.nfe  # the static threshold alone
    params = [one for _ in prompts for one in (leaping, sampling(48, **profile, **canvas))]
    got = generate(tasks_llm, [prompt for prompt in prompts for _ in range(2)], params)
    assert [list(got[2 * i].token_ids) for i in clear] == [expected[i].tokens for i in clear]
    assert [nfe(got[2 * i]) for i in clear] == [expected[i].nfe for i in clear]
    assert sum(map(nfe, got[::2])) < sum(map(nfe, got[1::2]))  # of the same profile, without leaps
