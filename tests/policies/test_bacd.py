"""BACD against its definition, step by step and in an engine."""

import pytest
import torch

from tests.e2e.engine import drive, generate, nfe, sampling, scheduler, submit
from tests.policies.adjusted import make_step, next_step
from tests.policies.test_policies import schedule_of
from tests.reference.decode import best_first, decode
from tests.reference.llada import ReferenceLLaDA
from vllm_osdt.errors import InvalidOptionError
from vllm_osdt.options import DecodingOptions
from vllm_osdt.options.parsing import parse_options
from vllm_osdt.policies import POLICIES

CANVAS = {"gen_length": 48, "block_length": 16, "cache_mode": "dual"}


class PlainBACD:
    """The published rule, with the history of one request."""

    def __init__(self, low=0.6, high=0.9):
        self.low, self.high, self.committed, self.margin = low, high, [], float("inf")

    def begin_block(self, first=0):
        self.committed = []

    def __call__(self, block, step, masked):
        level = sum(self.committed) / len(self.committed) if self.committed else max(masked.values())
        tau = min(max(level, self.low), self.high)
        self.margin = min([self.margin, *(abs(c - tau) for c in masked.values() if c != level)])
        chosen = [i for i, c in masked.items() if c >= tau] or [best_first(masked)[0]]
        self.committed += [masked[i] for i in chosen]
        return chosen


@pytest.mark.parametrize("seed", range(20))
def test_the_threshold_follows_what_the_block_has_committed(seed):
    generator, policy = torch.Generator().manual_seed(seed), POLICIES["bacd"]
    schedule = schedule_of("bacd", DecodingOptions(block_length=9, gen_length=9))
    rules, masked = [PlainBACD(), PlainBACD()], torch.ones(2, 9, dtype=torch.bool)
    step = make_step(torch.empty(2, 9), schedule, rows=2)
    for number in range(9):
        score = torch.rand(2, 9, generator=generator).masked_fill(~masked, -2.0)
        high = torch.full((2,), float(schedule.parameters[0, number]))
        step = next_step(step, score, step_index=torch.full((2,), number), parameter=high)
        policy.adjust(step)
        unmasked = torch.zeros(2, 9, dtype=torch.bool)
        for row, rule in enumerate(rules):
            left = {i: c for i, c in enumerate(score[row].tolist()) if masked[row, i]}
            if left:
                chosen = rule(0, number, left)
                got = {i for i, c in left.items() if c >= step.parameter[row].item()} or {best_first(left)[0]}
                assert got == set(chosen)
                unmasked[row, chosen] = True
        policy.observe(step, unmasked)
        masked &= ~unmasked
    assert step.state[:, 1].tolist() == [9, 9] or not masked.logical_not().all()


def test_bounds_that_leave_no_room_are_refused():
    with pytest.raises(InvalidOptionError, match=r"min_threshold is 0.95, above max_threshold 0.9; lower it"):
        parse_options({"osdt_policy": "bacd", "osdt_min_threshold": 0.95}, base=DecodingOptions(), prefix="osdt_")


@pytest.mark.e2e
def test_an_engine_decodes_as_the_plain_loop_also_after_preemption(tasks_llm, golden_tasks):
    network = ReferenceLLaDA.load(golden_tasks.folder)
    prompts = [case["prompt_token_ids"] for case in golden_tasks.cases[:32]]
    bounds = {"min_threshold": 0.2, "max_threshold": 0.95}
    expected = [decode(network, prompt, PlainBACD(0.2, 0.95), **CANVAS) for prompt in prompts]
    clear = [i for i, one in enumerate(expected) if min(one.rule_margin, one.proposal_margin) > 1e-5]
    assert len(clear) >= 20
    params = sampling(48, policy="bacd", **bounds, **CANVAS)
    got = generate(tasks_llm, prompts, params)
    assert [list(got[i].token_ids) for i in clear] == [expected[i].tokens for i in clear]
    assert [nfe(got[i]) for i in clear] == [expected[i].nfe for i in clear]

    ids = {submit(tasks_llm, prompts[i], params): i for i in clear[:8]}

    def preempt(step):
        if step == 4:  # in the middle of a block: its history starts again with it
            assert scheduler(tasks_llm).reset_prefix_cache(reset_running_requests=True)

    finished = drive(tasks_llm, preempt)
    assert {i: list(finished[req_id].token_ids) for req_id, i in ids.items()} == {
        i: expected[i].tokens for i in ids.values()
    }
