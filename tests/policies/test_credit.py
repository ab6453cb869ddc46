"""Credits against their definition, step by step and in an engine, alone and with thresholds of a profile."""

import math
import re

import pytest
import torch

from tests.e2e.engine import canvas_states, drive, generate, nfe, sampling, scheduler, submit
from tests.reference.decode import ThresholdRule, calibrate, decode, osdt, static_threshold
from vllm_osdt.calibration.profile import CACHE_KEY
from vllm_osdt.errors import InvalidOptionError
from vllm_osdt.options import DecodingOptions
from vllm_osdt.options.parsing import parse_options
from vllm_osdt.policies import MODIFIERS, POLICIES, Policy
from vllm_osdt.policies.credit import Credit
from vllm_osdt.policies.modifier import ModifiedRows

MIN_MARGIN = 1e-5
CANVAS = {"gen_length": 48, "block_length": 16, "cache_mode": "dual"}


class WithCredit:
    """A rule that sees what credits make of the logits; one number for each position and token."""

    def __init__(self, rule: ThresholdRule, alpha=0.7, gamma=0.2, beta=0.8):
        self.rule, self.alpha, self.gamma, self.beta = rule, alpha, gamma, beta
        self.credit, self.closest, self.num_changed = {}, math.inf, 0

    @property
    def margin(self):
        return min(self.rule.margin, self.closest)

    def begin_block(self, first=0):
        self.credit = {}

    def see(self, step, rows, proposal, masked, left):
        found = {}
        for place, logits in rows.items():
            credit = self.credit.setdefault(place, torch.zeros(logits.shape[0], dtype=torch.float64))
            credit *= self.beta
            credit[proposal[place]] += masked[place] ** self.gamma
            # The model's own probabilities, among which the mask token has its share.
            share = (logits.double() - logits[proposal[place]].double()).exp() * masked[place]
            gain = (1 + credit) ** self.alpha
            scores = share * gain / (1 + (share * (gain - 1)).sum())
            best, second = scores.topk(2)[0].tolist()
            self.closest = min(self.closest, best - second)
            found[place] = scores.argmax().item(), best
            self.num_changed += found[place][0] != proposal[place]
        return found

    def __call__(self, block, step, masked):
        return self.rule(block, step, masked)


@pytest.mark.parametrize("seed", range(5))
def test_what_is_added_is_what_a_number_for_every_token_adds(seed):
    generator = torch.Generator().manual_seed(seed)
    options = DecodingOptions(credit=True, credit_alpha=0.9, credit_gamma=0.5, credit_beta=0.6)
    [credit] = [one for one in MODIFIERS if one.name == "credit"]
    num_rows, vocabulary, num_steps = 6, 5, 12
    constants = torch.zeros(num_rows, 8)
    constants[:, :3] = torch.tensor(credit.constants(options))
    memory = torch.zeros(num_rows, credit.memory_size(num_steps) + 4)  # room that another request needs
    dense = torch.zeros(num_rows, vocabulary, dtype=torch.float64)
    for step in range(num_steps):
        token = torch.randint(vocabulary, (num_rows,), generator=generator)
        probability = torch.rand(num_rows, generator=generator)
        steps = torch.full((num_rows,), step)
        got = credit.additions(ModifiedRows(token, probability, constants, memory, steps))
        added = torch.zeros(num_rows, vocabulary).scatter_add_(1, *got)
        dense *= 0.6
        for row in range(num_rows):
            dense[row, token[row]] += probability[row].item() ** 0.5
        assert torch.allclose(added.double(), 0.9 * dense.log1p(), atol=1e-6)
    assert (memory.view(num_rows, -1, 2)[:, :, 0] > 0).sum(dim=1).max() <= vocabulary
    no_row = torch.zeros(0, dtype=torch.long)  # of a block that a template gives whole
    got = credit.additions(ModifiedRows(no_row, torch.zeros(0), constants[:0], memory[:0], no_row))
    assert [len(one) for one in got] == [0, 0]


def test_profiles_with_credits_are_profiles_of_their_own():
    plain = DecodingOptions(refresh_interval=2)
    credits = DecodingOptions(refresh_interval=2, credit=True)
    weak = DecodingOptions(refresh_interval=2, credit=True, credit_alpha=1e-7)
    keys = [one.cache_key for one in (plain, credits, weak)]
    assert keys == ["dual:r2", "dual:r2:credit0.7,0.2,0.8", "dual:r2:credit1e-07,0.2,0.8"]
    assert all(re.fullmatch(CACHE_KEY, key) for key in keys)


def test_numbers_of_credits_without_credits_are_refused():
    with pytest.raises(
        InvalidOptionError, match=r"osdt_credit_beta is 0.5, which says nothing without osdt_credit = True"
    ):
        parse_options({"osdt_credit_beta": 0.5}, base=DecodingOptions(), prefix="osdt_")


def test_policies_that_compare_the_logits_of_two_steps_go_without(monkeypatch):
    class Compares(type(POLICIES["factor"])):
        reads_step_before = True

    monkeypatch.setitem(POLICIES, "factor", Compares())
    with pytest.raises(InvalidOptionError, match="policy 'factor' compares the model's distributions of two steps"):
        parse_options({"osdt_policy": "factor", "osdt_credit": True}, base=DecodingOptions(), prefix="osdt_")
    operator = DecodingOptions(credit=True)
    assert not parse_options({"osdt_policy": "factor"}, base=operator, prefix="osdt_").credit
    assert parse_options({"osdt_policy": "static_threshold"}, base=operator, prefix="osdt_").credit
    assert isinstance(POLICIES["factor"], Policy) and not Credit().goes_with(POLICIES["factor"])


def clear(expected):
    """Which decodings come close to no cutoff and no tie."""
    return [i for i, one in enumerate(expected) if min(one.rule_margin, one.proposal_margin) > MIN_MARGIN]


@pytest.mark.e2e
def test_an_engine_decodes_as_the_plain_loop_also_after_preemption(tasks_llm, tasks_twin, golden_tasks):
    prompts = [case["prompt_token_ids"] for case in golden_tasks.cases[:16]]
    numbers = {"alpha": 2.0, "gamma": 0.5, "beta": 0.9}
    rules = [WithCredit(static_threshold(0.8), **numbers) for _ in prompts]
    expected = [decode(tasks_twin, prompt, rule, **CANVAS) for prompt, rule in zip(prompts, rules, strict=True)]
    told = clear(expected)
    assert len(told) >= 10 and sum(rule.num_changed for rule in rules) > 0
    options = {"policy": "static_threshold", "threshold": 0.8, **CANVAS}
    plain = sampling(48, **options)
    params = sampling(48, **options, credit=True, **{f"credit_{name}": value for name, value in numbers.items()})
    got = generate(tasks_llm, [prompt for prompt in prompts for _ in range(2)], [params, plain] * len(prompts))
    assert [list(got[2 * i].token_ids) for i in told] == [expected[i].tokens for i in told]
    assert [nfe(got[2 * i]) for i in told] == [expected[i].nfe for i in told]
    assert list(map(nfe, got[::2])) != list(map(nfe, got[1::2]))  # beside requests without
    alone = generate(tasks_llm, prompts[1::2], plain)
    assert [list(one.token_ids) for one in got[3::4]] == [list(one.token_ids) for one in alone]

    ids = {submit(tasks_llm, prompts[i], params): i for i in told[:8]}

    def preempt(step):
        if step == 4:  # in the middle of a block, whose credits begin again with it
            assert scheduler(tasks_llm).reset_prefix_cache(reset_running_requests=True)

    finished = drive(tasks_llm, preempt)
    assert {i: list(finished[req_id].token_ids) for req_id, i in ids.items()} == {
        i: expected[i].tokens for i in ids.values()
    }


@pytest.mark.e2e
def test_a_task_calibrates_with_credits_on_and_uses_its_profile_with_them(tasks_llm, tasks_twin, golden_tasks):
    prompts = [case["prompt_token_ids"] for case in golden_tasks.cases[:16]]
    first = decode(tasks_twin, prompts[0], WithCredit(static_threshold(0.9)), **CANVAS)
    assert clear([first])
    table = calibrate(first.record, "step_block", "q1", False)
    expected = [decode(tasks_twin, prompt, WithCredit(osdt(table, 1.0, 0.1)), **CANVAS) for prompt in prompts]
    told = clear(expected)
    assert len(told) >= 8
    one_shot = {"num_calibration_requests": 1, "statistic": "q1", "slack": 0.1, "threshold_cap": 1.0}
    options = {"task": "credits", "credit": True, "granularity": "step_block", **one_shot, **CANVAS}
    [calibrating] = generate(tasks_llm, prompts[:1], sampling(48, **options))
    assert list(calibrating.token_ids) == first.tokens and nfe(calibrating) == first.nfe
    got = generate(tasks_llm, prompts, sampling(48, **options))
    assert [list(got[i].token_ids) for i in told] == [expected[i].tokens for i in told]
    assert [nfe(got[i]) for i in told] == [expected[i].nfe for i in told]
    keys = {key.cache for key in scheduler(tasks_llm).calibrator.registry.profiles if key.task == "credits"}
    assert keys == {"dual:credit0.7,0.2,0.8"}


@pytest.mark.e2e
def test_credits_reach_sampled_and_filtered_proposals(tasks_llm, golden_tasks):
    prompts = [case["prompt_token_ids"] for case in golden_tasks.cases[:6]]
    options = {"policy": "static_threshold", "threshold": 0.8, **CANVAS}
    strong = {"credit": True, "credit_alpha": 100.0, "credit_gamma": 0.0, "credit_beta": 1.0}
    found = {}
    for name, credits in (("with", strong), ("without", {})):
        params = [
            sampling(48, **options, **credits, temperature=0.9, seed=3),
            sampling(48, **options, **credits, top_k=5, temperature=0.9, seed=3, filtered_confidence=True),
            sampling(48, **options, **credits, allowed_token_ids=list(range(20))),  # whose best token has the credit
        ]
        found[name] = generate(tasks_llm, [prompt for prompt in prompts for _ in params], params * len(prompts))
    for kind in range(2):
        # The first step's best token is all but certain: a block takes one step, and greedy tokens whatever the noise.
        assert {nfe(one) for one in found["with"][kind::3]} == {3}
        assert min(map(nfe, found["without"][kind::3])) > 3
    greedy = generate(tasks_llm, prompts, sampling(48, policy="static_threshold", threshold=1e-6, **CANVAS))
    assert [list(one.token_ids) for one in found["with"][::3]] == [list(one.token_ids) for one in greedy]
    assert all(token < 20 for one in found["with"][2::3] for token in one.token_ids)


@pytest.mark.e2e
def test_memory_is_there_only_for_who_asks(tasks_llm):
    states = canvas_states(tasks_llm)
    assert [memory.shape[2] for memory in states.modifier_memory] in ([0], [32])
    generate(tasks_llm, [[5, 6]], sampling(16, policy="static_threshold", credit=True, **{**CANVAS, "gen_length": 16}))
    assert [memory.shape[2] for memory in states.modifier_memory] == [32]
