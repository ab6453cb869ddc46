"""Audits: requests decoded once more with the static threshold, on the bundled model and its tasks."""

import logging
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from tests.e2e.engine import assert_idle, drive, generate, registry, sampling, scheduler, submit, tokens
from vllm_osdt.mini import model_path
from vllm_osdt.mini.tasks import check
from vllm_osdt.mini.tasks import generate as problems_of

pytestmark = pytest.mark.e2e

OPTIONS = {"num_calibration_requests": 10, "risk": 0.1, "early": False}
STATIC = {"policy": "static_threshold"}
MAX_NUM_SEQS = 4


@pytest.fixture(scope="module")
def llm(start_llm):
    return start_llm(
        model_path("llada-mini"),
        tokenizer=model_path("llada-mini"),
        max_num_seqs=MAX_NUM_SEQS,
        max_num_batched_tokens=2048,
        disable_log_stats=False,
        additional_config={"osdt": {"profile_dir": "", "audit": 1.0}},
    )


def decode(llm: Any, problems: list[Any], **options: Any) -> list[Any]:
    """The completion of every problem."""
    prompts = [llm.get_tokenizer().encode(problem.prompt) for problem in problems]
    return generate(llm, prompts, sampling(96, ignore_eos=False, **options))


def finish_audits(llm: Any) -> int:
    """Run the engine until no audit is left; how many steps that took. No client is told anything."""
    steps = 0
    while scheduler(llm).has_unfinished_requests():
        assert llm.llm_engine.step() == []
        steps += 1
        assert steps < 2000
    return steps


def share_right(problems: list[Any], completions: list[Any]) -> float:
    return float(np.mean([check(p, c.text) for p, c in zip(problems, completions, strict=True)]))


def audits(**labels: str) -> float:
    """The counter's value."""
    from prometheus_client import REGISTRY

    samples = [sample for metric in REGISTRY.collect() for sample in metric.samples]
    return sum(s.value for s in samples if s.name == "vllm:osdt_audits_total" and labels.items() <= s.labels.items())


def calibrate(llm: Any, name: str, task: str = "code") -> Any:
    """Have a task calibrate; its profile."""
    decode(llm, problems_of(task, "held_out", OPTIONS["num_calibration_requests"], seed=1000), task=name, **OPTIONS)
    [profile] = [profile for key, profile in registry(llm).profiles.items() if key.task == name]
    return profile


def count_news(llm: Any) -> None:
    """Statistics travel with a step's outputs to clients."""
    decode(llm, problems_of("code", "held_out", 1, seed=5), **STATIC)


def test_a_good_profile_agrees(llm):
    profile = calibrate(llm, "agrees")
    problems = problems_of("code", "held_out", 8, seed=7)
    count_news(llm)
    before = {outcome: audits(outcome=outcome) for outcome in ("same", "changed", "dropped")}
    for first in range(0, 8, 4):
        decode(llm, problems[first : first + 4], task="agrees", **OPTIONS)
        finish_audits(llm)
    count_news(llm)
    assert {outcome: audits(outcome=outcome) - before[outcome] for outcome in before} == {
        "same": 8, "changed": 0, "dropped": 0,
    }  # fmt: skip
    assert registry(llm).profiles[profile.key] is profile
    assert_idle(llm)


def test_traced_requests_are_audited_without_a_trace(llm):
    """An audit takes no place of theirs, with as many of them as fit."""
    calibrate(llm, "traced")
    for wave in range(3):
        problems = problems_of("code", "held_out", 2 * MAX_NUM_SEQS, seed=20 + wave)
        prompts = [llm.get_tokenizer().encode(problem.prompt) for problem in problems]
        asked = sampling(96, ignore_eos=False, task="traced", return_trace=True, logprobs=0, **OPTIONS)
        ids = [submit(llm, prompt, asked) for prompt in prompts[: MAX_NUM_SEQS - 1]]
        for _ in range(200):
            llm.llm_engine.step()
            if scheduler(llm)._auditor.running:  # one has begun: now more come than there are places
                break
        ids += [submit(llm, prompt, asked) for prompt in prompts[MAX_NUM_SEQS - 1 :]]
        drive(llm)
        finish_audits(llm)
    assert_idle(llm)


def test_what_clients_get_and_how_long_they_wait_for_a_place_is_as_without(llm, monkeypatch):
    calibrate(llm, "busy")
    problems = problems_of("code", "held_out", 24, seed=9)
    sched, running, stopped = scheduler(llm), [], []
    schedule, put_back = sched.schedule, sched._auditor.put_back

    def recording(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        ids = [request.request_id for request in sched.running]
        running.append((ids, sched._auditor.running, len(sched.waiting)))
        return output

    monkeypatch.setattr(sched, "schedule", recording)
    monkeypatch.setattr(sched._auditor, "put_back", lambda: stopped.append(put_back()) or stopped[-1])
    prompts = [llm.get_tokenizer().encode(problem.prompt) for problem in problems]
    params = sampling(96, ignore_eos=False, task="busy", **OPTIONS)
    waves = [prompts[first : first + size] for first, size in ((0, 2), (2, 10), (12, 1), (13, 11))]
    ids, finished = [], {}

    def send(step: int) -> None:
        if step % 5 == 0 and step // 5 < len(waves):
            ids.extend(submit(llm, prompt, params) for prompt in waves[step // 5])

    finished = drive(llm, send)
    finish_audits(llm)
    assert set(finished) == set(ids)  # nobody is told of another request
    assert any(stopped)  # it had begun when the next wave came
    assert any(audited and len(requests) > 1 for requests, audited, _ in running)
    for (requests, audited, num_waiting), (_, audited_next, _) in pairwise(running):
        assert len(audited) <= 1 and requests[len(requests) - len(audited) :] == list(audited)
        assert not (num_waiting and audited and audited_next)  # nobody waits longer than a step for it
    monkeypatch.undo()
    alone = [generate(llm, [prompt], params)[0] for prompt in prompts]
    assert tokens(finished[req_id] for req_id in ids) == tokens(alone)
    finish_audits(llm)
    assert_idle(llm)


def test_audits_end_beside_steady_traffic(llm):
    """Whenever a request ends another one comes, and fewer run than may."""
    calibrate(llm, "steady")
    params = sampling(96, ignore_eos=False, task="steady", **OPTIONS)
    prompts = [llm.get_tokenizer().encode(problem.prompt) for problem in problems_of("code", "held_out", 32, seed=17)]
    count_news(llm)
    before, waiting, running, finished = audits(outcome="same"), list(prompts), set(), {}
    while waiting or running:
        while waiting and len(running) < MAX_NUM_SEQS - 1:
            running.add(submit(llm, waiting.pop(), params))
        for output in llm.llm_engine.step():
            if output.finished:
                running.discard(output.request_id)
                finished[output.request_id] = output
    assert len(finished) == len(prompts) and audits(outcome="same") - before >= 2
    finish_audits(llm)
    assert_idle(llm)


def test_an_audit_goes_on_while_a_request_begins_its_answer(llm, monkeypatch):
    """The request waits for one step, but its place is its own; the audit stays the first to be preempted."""
    calibrate(llm, "beside")
    sched, [problem, other] = scheduler(llm), problems_of("code", "held_out", 2, seed=15)
    finish_audits(llm)
    prompt = llm.get_tokenizer().encode(problem.prompt)
    [plain] = generate(llm, [prompt], sampling(96, threshold=0.99, **STATIC))
    latest = max(plain.token_ids, key=list(plain.token_ids).index)
    own = {"threshold": 0.99, "answer_block_length": 1, "think_end_token": latest}
    params = sampling(96, **STATIC, **own)
    [expected] = generate(llm, [prompt], params)
    decode(llm, [other], task="beside", **OPTIONS)
    req_id, beside, begin_answer = submit(llm, prompt, params), [], sched._begin_answer
    monkeypatch.setattr(sched, "_begin_answer", lambda one: beside.append(sched._auditor.running) or begin_answer(one))

    def look(step):
        if beside and req_id in {one.request_id.rpartition("-")[0] for one in sched.running}:
            beside.append([one.request_id for one in sched.running])

    finished = drive(llm, look)
    assert list(finished[req_id].token_ids) == list(expected.token_ids)
    [audit] = beside[0]  # it has begun, while the request thinks
    assert beside[1][-1] == audit and len(beside[1]) == 2
    finish_audits(llm)
    assert_idle(llm)


def test_answers_that_get_worse_without_a_change_of_confidence_are_noticed(llm, caplog):
    profile = calibrate(llm, "unseen", "multiple_choice")
    # What these requests did not show: as if none of them had had a wrong proposal.
    blind = replace(profile, record=profile.record._replace(wrong=np.zeros_like(profile.record.wrong)), _thresholds={})
    registry(llm).profiles[profile.key] = blind
    problems = problems_of("multiple_choice", "held_out", 60, seed=11)
    worse = []
    with caplog.at_level(logging.WARNING, logger="vllm"):
        for first in range(0, 60, 4):
            worse += decode(llm, problems[first : first + 4], task="unseen", **OPTIONS)
            finish_audits(llm)
            if caplog.records:
                break
    [warning] = [record.message for record in caplog.records]
    assert "no longer has the answers of the static threshold" in warning and "It calibrates again" in warning
    static = decode(llm, problems[: len(worse)], **STATIC)
    asked = problems[: len(worse)]
    assert share_right(asked, worse) <= share_right(asked, static) - 0.25
    renewed = calibrate(llm, "unseen", "multiple_choice")
    assert renewed.profile_id == profile.profile_id  # made of the same requests
    assert share_right(asked, decode(llm, asked, task="unseen", **OPTIONS)) >= share_right(asked, worse) + 0.1


@pytest.mark.parametrize("is_seen_at_once", [True, False])
def test_answers_of_other_weights_are_not_audited(llm, is_seen_at_once):
    calibrate(llm, "trained")
    finish_audits(llm)
    decode(llm, problems_of("code", "held_out", 3, seed=13), task="trained", **OPTIONS)
    assert llm.llm_engine.step() == [] and scheduler(llm)._auditor.running
    runner = llm.llm_engine.model_executor.driver_worker.model_runner
    if is_seen_at_once:
        llm.collective_rpc(lambda worker: worker.model_runner.reload_weights())
    else:
        runner.reload_weights()
        assert llm.llm_engine.step() == []
    count_news(llm)
    before = audits()
    assert not scheduler(llm)._auditor.running and finish_audits(llm) == 0
    count_news(llm)
    assert audits() == before
    assert_idle(llm)
