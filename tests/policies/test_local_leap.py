"""LocalLeap against its definition, step by step and in an engine."""

import pytest
import torch

from tests.e2e.engine import generate, nfe, sampling
from tests.policies.adjusted import make_step, policy_rule
from tests.policies.test_policies import schedule_of
from tests.reference.decode import best_first, decode
from tests.reference.llada import ReferenceLLaDA
from vllm_osdt.options import DecodingOptions
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
