"""Policies whose threshold is a profile's, against their definitions with a threshold for every block and step."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from csrc_triton import Rule
from csrc_triton.types import NO_CONFIDENCE
from tests.e2e.engine import generate, nfe, sampling
from tests.policies.adjusted import chosen, make_step, next_step
from tests.policies.test_bacd import PlainBACD
from tests.policies.test_policies import known, schedule_of
from tests.policies.test_selection import Adaptive, Dimple, Hierarchical, Nemotron, Product, Streaming
from tests.policies.test_several_at_once import PlainETE
from tests.policies.test_stability import PlainKLASS, PlainLESS, PlainStable, assert_equal_but_for_near_ties, read, walk
from tests.reference.decode import calibrate, decode, enter, osdt, static_threshold
from vllm_osdt.errors import InvalidOptionError
from vllm_osdt.options import DecodingOptions, policies_of
from vllm_osdt.options.parsing import parse_options
from vllm_osdt.policies import POLICIES

WIDTH, VOCABULARY = 16, 13
CANVAS = {"gen_length": 32, "block_length": WIDTH, "cache_mode": "dual"}
# The thresholds are the table's as they are: no cap, no slack.
OF_TABLE = {"calibrated": True, "statistic": "q1", "granularity": "step_block", "threshold_cap": 1.0}


class Composed:
    """The rule of one policy, whose threshold is another one in every block and step."""

    def __init__(self, rule: Any, cutoff: Callable[[int, int], float], name: str = "tau") -> None:
        self.rule, self.cutoff, self.name, self.thresholds = rule, cutoff, name, set()

    @property
    def margin(self) -> float:
        """How near it was to another choice."""
        return self.rule.margin

    def begin_block(self, first=0):
        enter(self.rule)

    def see(self, step, rows, proposals, masked, left):
        return self.rule.see(step, rows, proposals, masked, left) if hasattr(self.rule, "see") else {}

    def __call__(self, block, step, masked):
        tau = self.cutoff(block, step)
        self.thresholds.add(tau)
        setattr(self.rule, self.name, tau)
        return self.rule(block, step, masked)


class BoundedAbove(PlainBACD):
    """BACD, whose lower bound is no higher than the one above."""

    def __call__(self, block, step, masked):
        own, self.low = self.low, min(self.low, self.high)
        found = super().__call__(block, step, masked)
        self.low = own
        return found


# Options, the rule with any threshold, and what the rule calls that.
CASES: dict[str, tuple[dict[str, Any], Callable[[], Any], str]] = {
    "adaptive": ({"policy": "confidence_adaptive", "max_unmask": 3, "end_after": 0.0}, lambda: Adaptive(1, 3), "tau"),
    "dimple": ({"policy": "dimple", "steps_per_block": 6}, lambda: Dimple(1, 6), "tau"),
    "hierarchical": ({"policy": "hierarchical", "run_threshold": 0.5}, lambda: Hierarchical(1, 0.5), "tau"),
    "nemotron": ({"policy": "nemotron_bound", "bound_factor": 1.3}, lambda: Nemotron(1, factor=1.3), "tau"),
    "product": ({"policy": "nemotron_bound", "bound_form": "product"}, lambda: Product(1), "tau"),
    "streaming": ({"policy": "streaming", "relaxation": 0.3}, lambda: Streaming(1, 0.3), "tau"),
    "ete": ({"policy": "ete", "explore_below": 3, "explore_rank": 0.5}, lambda: PlainETE(1, 3, 0.5), "tau"),
    "bacd": ({"policy": "bacd", "min_threshold": 0.5}, lambda: BoundedAbove(0.5, 1), "high"),
    "klass": ({"policy": "klass", "kl_threshold": 0.3, "kl_steps": 1}, lambda: PlainKLASS(1, 0.3, 1), "confidence"),
    "klass steps": (
        {"policy": "klass", "kl_threshold": 0.3, "kl_steps": 1, "steps_per_block": 8},
        lambda: PlainKLASS(1, 0.3, 1, quota=2),
        "confidence",
    ),
    "less": ({"policy": "less", "js_threshold": 0.1, "persistence": 1}, lambda: PlainLESS(1, 0.1, 1), "confidence"),
    "stable": ({"policy": "stable"}, lambda: PlainStable(1, 1), "confidence"),
}
IN_THEIR_MODULES = {"freedave", "local_leap", "prophet", "sched"}  # have tests of their own with a profile


def test_every_policy_that_takes_a_profiles_thresholds_is_tested():
    assert {options["policy"] for options, *_ in CASES.values()} | IN_THEIR_MODULES == set(policies_of("calibrated"))


@pytest.mark.parametrize("name", CASES)
def test_each_step_has_the_threshold_of_its_place_in_the_table(name):
    asked, make, attribute = CASES[name]
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        table = 0.2 + 0.75 * torch.rand(1, WIDTH, generator=generator)
        options = DecodingOptions(**{**asked, **OF_TABLE, "block_length": WIDTH, "gen_length": WIDTH})
        steps = options.steps_per_block
        options = DecodingOptions(**{**options.as_dict(), "steps": steps, "steps_per_block": None})
        policy, schedule = POLICIES[options.policy], schedule_of(options.policy, options, known(table.tolist()))
        assert schedule.rule == Rule.THRESHOLD and schedule.fallback is not None
        cells = table.tolist()
        rules = [Composed(make(), lambda block, step, cells=cells: cells[block][step], attribute) for _ in range(3)]
        masked = torch.ones(3, WIDTH, dtype=torch.bool)
        masked[2, ::3] = False
        source, before = walk(generator, (3, WIDTH, VOCABULARY)), torch.zeros(2, 3, WIDTH, VOCABULARY)
        step = make_step(torch.empty(3, WIDTH), schedule, 3, memory_size=policy.memory_size)
        for number in range(WIDTH):
            logits = next(source).clone()
            logits[..., 0] = -torch.inf  # the mask token
            share, token = logits.softmax(dim=-1).max(dim=-1)
            score = share.masked_fill(~masked, NO_CONFIDENCE)
            step = next_step(
                step, score, step_index=torch.full((3,), number), token=token.masked_fill(~masked, 0),
                parameter=torch.full((3,), float(schedule.parameters[0, number])),
                reading=torch.zeros_like(step.reading),
            )  # fmt: skip
            if policy.needs_logits(options):
                step = read(policy, step, logits, *before)
            policy.adjust(step)
            unmasked = torch.zeros_like(masked)
            for row, (rule, got) in enumerate(zip(rules, chosen(step), strict=True)):
                left = {i: score[row, i].item() for i in range(WIDTH) if masked[row, i]}
                if left:
                    proposals = {i: int(token[row, i]) for i in left}
                    rule.see(number, {i: logits[row, i] for i in left}, proposals, left, len(left))
                    assert got == set(rule(0, number, left)), (seed, number, row)
                    unmasked[row, list(got)] = True
            policy.observe(step, unmasked)
            masked &= ~unmasked
            before = torch.stack([logits, before[0]])
        assert not masked.any()


def parse(base=None, **values):
    """A request's options."""
    named = {f"osdt_{name}": value for name, value in values.items()}
    return parse_options(named, base=base or DecodingOptions(), prefix="osdt_")


@pytest.mark.parametrize("policy", sorted(set(POLICIES) - set(policies_of("calibrated"))))
def test_other_policies_refuse_a_profiles_thresholds_and_say_why(policy):
    with pytest.raises(InvalidOptionError) as refused:
        parse(policy=policy, task="a", calibrated=True)
    reason = POLICIES[policy].with_profile.replace("`", "")
    assert f"osdt_calibrated is True, but policy {policy!r} takes no threshold" in str(refused.value)
    assert f"by it: {reason}. Leave it out" in str(refused.value) and len(reason) > 10
    if policy != "osdt":
        with pytest.raises(InvalidOptionError, match=r"^calibrated is True"):
            parse_options({"policy": policy, "calibrated": True}, base=DecodingOptions())


def test_an_operator_may_set_it_for_requests_that_name_a_policy():
    base = parse_options({"calibrated": True, "policy": "osdt"}, base=DecodingOptions())
    assert parse(base, task="a").calibrates and parse(base, task="a", policy="klass").calibrates
    assert not parse(base, policy="factor").calibrates
    own = parse(base, policy="klass", kl_confidence=0.5)  # the request's own threshold
    assert not own.calibrates and own.kl_confidence == 0.5


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"policy": "confidence_adaptive", "adaptive_entropy": 0.3}, "a profile's thresholds are confidences"),
        ({"policy": "bacd", "max_threshold": 0.8}, "send one of them"),
        ({"policy": "klass", "kl_confidence": 0.5}, "send one of them"),
        ({"policy": "less", "less_confidence": 0.5}, "send one of them"),
        ({"policy": "stable", "stable_confidence": 0.5}, "send one of them"),
    ],
)
def test_what_the_profile_replaces_is_refused_beside_it(values, words):
    with pytest.raises(InvalidOptionError, match=words):
        parse(task="a", calibrated=True, **values)
    assert parse(**values)


def test_bounds_that_the_profile_replaces_need_not_be_in_order():
    assert parse(policy="bacd", task="a", calibrated=True, min_threshold=0.95).min_threshold == 0.95


@pytest.mark.e2e
def test_an_engine_decodes_as_the_plain_loop_with_the_thresholds_of_a_profile(tasks_llm, tasks_twin, golden_tasks):
    prompts = [case["prompt_token_ids"] for case in golden_tasks.cases[:2]]
    first = decode(tasks_twin, prompts[0], static_threshold(0.9), **CANVAS)
    cutoff = osdt(calibrate(first.record, "step_block", "q1", False), 1.0, 0.1).cutoff
    rules = {(name, i): Composed(make(), cutoff, called) for name, (_, make, called) in CASES.items() for i in range(2)}
    expected = {key: decode(tasks_twin, prompts[key[1]], rule, **CANVAS) for key, rule in rules.items()}
    assert all(len(rule.thresholds) > 1 for rule in rules.values())  # not the static one
    profile = {**OF_TABLE, "task": "composed", "num_calibration_requests": 1, "slack": 0.1}
    params = {name: sampling(32, **asked, **profile, **CANVAS) for name, (asked, *_) in CASES.items()}
    [calibrating] = generate(tasks_llm, prompts[:1], params["klass"])
    assert list(calibrating.token_ids) == first.tokens and nfe(calibrating) == first.nfe  # the static threshold alone
    got = generate(tasks_llm, [prompts[i] for _, i in expected], [params[name] for name, _ in expected])
    found = [(list(one.token_ids), nfe(one)) for one in got]
    told = [(one.tokens, one.nfe, min(one.rule_margin, one.proposal_margin)) for one in expected.values()]
    assert_equal_but_for_near_ties(found, told, least=len(found) - 4)
