"""Refreshes at other times and windows of masks: token for token as a plain loop that keeps the same keys."""

import pytest

from tests.e2e.engine import assert_idle, generate, nfe, sampling
from tests.e2e.jobs import MIN_MARGIN
from tests.reference.decode import decode, static_threshold
from tests.reference.dream import ReferenceDream, make_dream_checkpoint
from tests.reference.llada import ReferenceLLaDA

pytestmark = pytest.mark.e2e

CANVAS = {"gen_length": 48, "block_length": 8}
VARIANTS = [
    {"cache_mode": "dual", "refresh_interval": 2},
    {"cache_mode": "dual", "refresh_interval": 6},
    {"cache_mode": "prefix", "refresh_interval": 3},
    {"cache_mode": "dual", "refresh_confidence": 0.6},
    {"cache_mode": "prefix", "refresh_confidence": 0.8},
    {"cache_mode": "dual", "refresh_interval": 3, "refresh_confidence": 0.6},
    {"cache_mode": "none", "suffix_window": 1},
    {"cache_mode": "prefix", "suffix_window": 2},
    {"cache_mode": "dual", "suffix_window": 0},
    {"cache_mode": "dual", "suffix_window": 1, "refresh_interval": 2, "refresh_confidence": 0.6},
    {"cache_mode": "prefix", "suffix_window": 1, "refresh_interval": 3},
]


def expect(network, prompts):
    """What the plain loop makes of each prompt with one of the variants; none whose outcome hangs on rounding."""
    expected = []
    for index, prompt in enumerate(prompts):
        variant = VARIANTS[index % len(VARIANTS)]
        done = decode(network, prompt, static_threshold(0.7), **CANVAS, **variant)
        margins = [done.proposal_margin, done.rule_margin]
        margins += [done.refresh_margin] if "refresh_confidence" in variant else []
        if min(margins) > MIN_MARGIN:
            expected.append((prompt, variant, done))
    return expected


def check(llm, expected):
    """All in one batch, and each alone."""
    params = [sampling(48, policy="static_threshold", threshold=0.7, **CANVAS, **variant) for _, variant, _ in expected]
    got = generate(llm, [prompt for prompt, _, _ in expected], params)
    assert [list(one.token_ids) for one in got] == [done.tokens for _, _, done in expected]
    assert [nfe(one) for one in got] == [done.nfe for _, _, done in expected]
    for index in range(len(VARIANTS)):
        [alone] = generate(llm, [expected[index][0]], [params[index]])
        assert list(alone.token_ids) == expected[index][2].tokens
    assert_idle(llm)


def test_llada_refreshes_as_the_plain_loop(tasks_llm, golden_tasks):
    prompts = [case["prompt_token_ids"] for case in golden_tasks.cases]
    expected = expect(ReferenceLLaDA.load(golden_tasks.folder), prompts)
    assert len(expected) >= 50
    num_refreshes = {str(variant): [] for variant in VARIANTS}
    for _, variant, done in expected:
        num_refreshes[str(variant)].append(done.num_refreshes)
    counts = [sum(some) / len(some) for some in num_refreshes.values()]
    assert counts[:3] == [3, 1, 2] and all(count > 6 for count in counts[3:5])  # of six blocks; after unsure steps too
    check(tasks_llm, expected)


def test_dream_whose_logits_are_shifted_refreshes_as_the_plain_loop(start_llm, tmp_path):
    folder = make_dream_checkpoint(tmp_path / "model", seed=5)
    prompts = [[20 + index, *range(30, 31 + index % 7)] for index in range(24)]
    expected = expect(ReferenceDream.load(folder), prompts)
    assert len(expected) >= 16
    check(start_llm(folder, max_num_seqs=32, max_model_len=128), expected)
