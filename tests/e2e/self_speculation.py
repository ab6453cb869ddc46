"""Random requests of ``s2d2`` and what a plain loop makes of them, for every family that can be verified."""

import random
from collections.abc import Callable, Sequence
from typing import Any

from tests.e2e.engine import drive, nfe, sampling, scheduler, submit
from tests.e2e.jobs import MIN_MARGIN, Job, run, wrong
from tests.reference.self_speculation import Settings, View, decode_s2d2

SETTINGS = (
    {"router": "span"},
    {"router": "span", "min_span": 3, "threshold": 0.1},
    {"router": "score", "cost": 1.3, "threshold": 0.2},
    {"router": "score", "estimator": "margin", "margin": 0.06, "score": -0.5},
    {"router": "hysteresis", "on": 1.4, "off": 0.2, "cost": 0.7, "threshold": 0.15},
    {"router": "hysteresis", "cost_per": "confident_position", "threshold": 0.1, "on": 1.0, "off": 0.5},
    {"router": "span", "max_span": 3, "threshold": 0.15},
    {"router": "bandit", "threshold": 0.15},
)


def make_s2d2_jobs(
    view_of: Callable[[int], View],
    variants: Sequence[dict[str, Any]],
    *,
    number: int = 42,
    is_strict: bool = True,
    quotas: bool = False,
) -> list[Job]:
    """Random requests, each of the settings with each of the variants; those that hang on rounding are left out.

    Args:
        view_of: The network with blocks of a length.
        variants: Options of requests, ``block_length`` among them.
        number: How many to draw.
        is_strict: Whether a confidence has to be above the threshold.
        quotas: Whether some ask for steps.
    """
    rng, jobs = random.Random(2), []
    for index in range(number):
        own, variant = SETTINGS[index % len(SETTINGS)], variants[index % len(variants)]
        length = variant["block_length"]
        options = {name if name == "threshold" else f"verify_{name}": value for name, value in own.items()}
        settings = Settings(is_strict=is_strict, **own)
        if quotas and index % 3 == 0:
            settings.quota, options["steps_per_block"] = 2, length // 2
        prompt = [rng.randrange(8, 100) for _ in range(rng.randrange(1, 50))]
        limit, ends = rng.randrange(1, 40), ()
        part = variant.get("sub_block_length")
        decoded = decode_s2d2(view_of(length), prompt, settings, max_tokens=limit, sub_block_length=part)
        if index % 4 == 0:  # it ends where the undisturbed output comes by
            ends = (decoded.tokens[len(decoded.tokens) // 2],)
            decoded = decode_s2d2(
                view_of(length), prompt, settings, max_tokens=limit, sub_block_length=part, end_token_ids=ends
            )
        if min(decoded.proposal_margin, decoded.rule_margin) > MIN_MARGIN:
            params = sampling(limit, policy="s2d2", stop_token_ids=list(ends), **options, **variant)
            jobs.append(Job(prompt, params, decoded))
    assert len(jobs) >= 0.8 * number
    verified = [one for job in jobs for one in job.decoded.taken]
    drafts = sum(job.decoded.nfe for job in jobs) - len(verified)
    assert 0.2 * drafts < len(verified) < 0.9 * drafts  # both happen
    assert sum(0 < taken < length for length, taken in verified) > 5 and any(a == b > 1 for a, b in verified)
    return jobs


def assert_verifies_as_a_plain_loop(llm: Any, jobs: Sequence[Job]) -> None:
    """In one batch, beside other requests one by one, and with preemptions: the same tokens in as many forwards."""
    completions = run(llm, jobs)
    assert wrong(jobs, completions) == []
    assert [nfe(c) for c in completions] == [job.decoded.nfe for job in jobs]
    assert wrong(jobs[:6], [run(llm, [job])[0] for job in jobs[:6]]) == []
    req_ids = [submit(llm, job.prompt, job.params) for job in jobs]

    def preempt(step: int) -> None:
        if step in (1, 2, 5, 8):
            scheduler(llm).reset_prefix_cache(reset_running_requests=True)

    finished = drive(llm, preempt)
    assert wrong(jobs, [finished[req_id] for req_id in req_ids]) == []
