"""OSDT as a service, on the bundled model and its tasks.

Default options, what a response says, pins, guard, tasks without a name.
"""

import logging
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import vllm_osdt
from tests.e2e.engine import drive, nfe, registry, sampling, submit, tokens
from vllm_osdt.calibration.profile import Setting
from vllm_osdt.cli.tuning.decoders import EngineDecoder
from vllm_osdt.cli.tuning.judge import Judge
from vllm_osdt.cli.tuning.plan import Plan, name_run
from vllm_osdt.cli.tuning.run import Tuning
from vllm_osdt.cli.tuning.state import State
from vllm_osdt.mini import model_path
from vllm_osdt.mini.tasks import TASKS, check, generate
from vllm_osdt.options import UNDECIDED_TASK, DecodingOptions

pytestmark = pytest.mark.e2e

CALIBRATIONS = DecodingOptions().num_calibration_requests
CALIBRATING = {task: generate(task, "held_out", CALIBRATIONS, seed=1000) for task in TASKS}
PROBLEMS = {task: generate(task, "held_out", 48, seed=7) for task in TASKS}
ONE_SHOT = {"num_calibration_requests": 1, "statistic": "q1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("profiles")


@pytest.fixture(scope="module")
def llm(start_llm, folder):
    return start_llm(
        model_path("llada-mini"),
        tokenizer=model_path("llada-mini"),
        max_num_seqs=64,
        max_num_batched_tokens=8192,
        disable_log_stats=False,
        additional_config={"osdt": {"profile_dir": str(folder)}},
    )


def decode(llm: Any, problems: list[Any], **options: Any) -> list[Any]:
    """The completion of every problem."""
    params = sampling(96, ignore_eos=False, **options)
    outputs = llm.generate([problem.prompt for problem in problems], params, use_tqdm=False)
    return [output.outputs[0] for output in outputs]


def share_right(problems: list[Any], completions: list[Any]) -> float:
    return float(np.mean([check(p, c.text) for p, c in zip(problems, completions, strict=True)]))


def mean_nfe(completions: list[Any]) -> float:
    return float(np.mean([nfe(completion) for completion in completions]))


@pytest.fixture(scope="module")
def calibrated(llm):
    """By task: its name, after its calibration with default options."""
    for task in TASKS:
        decode(llm, CALIBRATING[task], task=task)
    assert {profile["task"] for profile in vllm_osdt.profiles(llm)} >= set(TASKS)
    return {task: task for task in TASKS}


@pytest.mark.parametrize("task", TASKS)
def test_default_options_save_forwards_at_equal_accuracy(llm, calibrated, task):
    static = decode(llm, PROBLEMS[task], policy="static_threshold")
    osdt = decode(llm, PROBLEMS[task], task=task)
    assert share_right(PROBLEMS[task], static) == 1.0
    # One of 48 is within the risk; two or more have a probability of 10 % at the most if 1 % of requests are lost.
    assert share_right(PROBLEMS[task], osdt) >= 46 / 48
    assert mean_nfe(osdt) < 0.5 * mean_nfe(static)


def test_calibrating_requests_decode_statically_and_say_so(llm, caplog):
    problems = CALIBRATING["code"][:6]
    static = decode(llm, problems, policy="static_threshold")
    with caplog.at_level(logging.INFO, logger="vllm"):
        first = decode(llm, problems, task="says so", statistic="q1", num_calibration_requests=4)
        vllm_osdt.profiles(llm)
    [message] = [record.message for record in caplog.records if "Calibrated task 'says so'" in record.message]
    assert "on 4 requests" in message and "forwards a request expected" in message
    assert tokens(first) == tokens(static)
    found = [vllm_osdt.describe(completion) for completion in first]
    assert [about["calibrating"] for about in found] == [True] * 4 + [False] * 2
    assert {about["profile"] for about in found} == {None}
    assert [about["nfe"] for about in found] == [nfe(completion) for completion in static]
    [profile] = [profile for profile in vllm_osdt.profiles(llm) if profile["task"] == "says so"]
    assert profile["num_requests"] == 4


def test_a_response_says_how_it_was_decoded(llm, calibrated):
    [profile] = [profile for profile in vllm_osdt.profiles(llm) if profile["task"] == "code"]
    [completion] = decode(llm, PROBLEMS["code"][:1], task="code")
    about = vllm_osdt.describe(completion)
    assert (
        completion.osdt
        == about
        == {
            "policy": "osdt",
            "task": "code",
            "profile": profile["id"],
            "calibrating": False,
            "nfe": nfe(completion),
            "tokens_per_forward": len(completion.token_ids) / nfe(completion),
            "weights_version": 0,
            "weights_version_at_start": 0,
        }
    )
    [static] = decode(llm, PROBLEMS["code"][:1], policy="static_threshold")
    assert vllm_osdt.describe(static)["policy"] == "static_threshold"
    assert vllm_osdt.describe(static)["profile"] is None


def test_a_request_that_ends_at_a_stop_string_says_so_too(llm, calibrated):
    params = sampling(96, ignore_eos=False, task="code", stop=["="])
    [output] = llm.generate([PROBLEMS["code"][0].prompt], params, use_tqdm=False)
    assert output.outputs[0].stop_reason == "="
    about = vllm_osdt.describe(output.outputs[0])
    assert about["profile"] is not None and about["nfe"] >= 1


def test_several_samples_of_one_prompt_say_so_each(llm, calibrated):
    params = sampling(96, ignore_eos=False, task="code", n=2, temperature=0.5, seed=3)
    [output] = llm.generate([PROBLEMS["code"][0].prompt], params, use_tqdm=False)
    assert [vllm_osdt.describe(completion)["task"] for completion in output.outputs] == ["code"] * 2


def test_a_pinned_profile_decodes_as_it_did_before_it_was_replaced(llm):
    prompts = PROBLEMS["multiple_choice"]
    loose = {"task": "pinned", "threshold_cap": 0.5, **ONE_SHOT}
    decode(llm, prompts[:1], **loose)
    before = decode(llm, prompts, **loose)
    pin = vllm_osdt.describe(before[0])["profile"]
    decode(llm, CALIBRATING["multiple_choice"][:1], recalibrate=True, **loose)
    after = decode(llm, prompts, **loose)
    assert vllm_osdt.describe(after[0])["profile"] != pin
    again = decode(llm, prompts, profile=pin, **loose)
    assert tokens(again) == tokens(before)
    assert [nfe(completion) for completion in again] == [nfe(completion) for completion in before]
    assert {vllm_osdt.describe(completion)["profile"] for completion in again} == {pin}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"task": "code", "profile": "0" * 16}, ["0" * 16, "'code'", "profiles list"]),
        ({"task": "code", "profile": "xyz"}, ["'xyz'", "16 hexadecimal"]),
        ({"task": "code", "profile": "PIN", "cache_mode": "none"}, ["cache", "'dual'"]),
        ({"task": "code", "profile": "PIN", "policy": "factor"}, ["policy 'factor'"]),
        ({"task": "code", "profile": "PIN", "recalibrate": True}, ["recalibrate"]),
        ({"task": "auto", "profile": "PIN"}, ["'auto'"]),
    ],
)
def test_a_pin_that_cannot_hold_is_refused_with_the_reason(llm, calibrated, options, words):
    [profile] = [profile for profile in vllm_osdt.profiles(llm) if profile["task"] == "code"]
    options = {name: profile["id"] if value == "PIN" else value for name, value in options.items()}
    with pytest.raises(ValueError) as refusal:  # noqa: PT011  its words are looked at below
        decode(llm, PROBLEMS["code"][:1], **options)
    assert all(word in str(refusal.value) for word in words), refusal.value
    assert len(decode(llm, PROBLEMS["code"][:1], task="code")) == 1


def test_wrong_proposals_are_those_that_were_not_chosen(llm, calibrated):
    profile = next(profile for key, profile in registry(llm).profiles.items() if key.task == "word_problems")
    confidence, committed, wrong = profile.record
    assert wrong.any() and not (wrong & committed).any() and not (wrong & np.isnan(confidence)).any()
    # A static threshold of 0.9 commits whatever reaches it, so nothing wrong is that sure but where a step's best is.
    assert (confidence[wrong] < 0.9).all()
    table = profile.thresholds(Setting()).values
    highest = np.where(wrong, confidence, 0.0).max(axis=(0, 2, 3))
    assert table[:, 0] == pytest.approx(highest)


def test_another_tasks_prompts_are_noticed_once_and_calibrated_once(llm, caplog):
    decode(llm, CALIBRATING["code"], task="drifts")
    assert len(named(llm, "drifts")) == 1
    before = named(llm, "drifts")[0]
    problems = generate("multiple_choice", "held_out", 320, seed=3)
    wrong_profile = decode(llm, problems[:32], task="drifts")
    with caplog.at_level(logging.WARNING, logger="vllm"):
        ids = []
        for first in range(32, 320, 32):
            batch = decode(llm, problems[first : first + 32], task="drifts", early=False)
            ids += [vllm_osdt.describe(completion)["profile"] for completion in batch]
    assert sum("no longer looks like its profile" in record.message for record in caplog.records) == 1
    # What the requests used: the stale profile at most until it was noticed, none while calibrating, then one new one.
    [after] = named(llm, "drifts")
    assert after != before and {*ids} <= {before, None, after}
    assert ids[-160:] == [after] * 160
    recovered = decode(llm, problems[:160], task="drifts")
    assert share_right(problems[:160], recovered) >= 0.97 > share_right(problems[:32], wrong_profile)


@pytest.mark.parametrize("task", TASKS)
def test_stationary_traffic_triggers_nothing(llm, calibrated, caplog, task):
    [before] = named(llm, task)
    with caplog.at_level(logging.WARNING, logger="vllm"):
        decode(llm, generate(task, "held_out", 500, seed=11), task=task)
    assert named(llm, task) == [before]
    assert not [record for record in caplog.records if "no longer looks" in record.message]


def named(llm, task):
    """Ids of a task's profiles in memory."""
    return [profile["id"] for profile in vllm_osdt.profiles(llm) if profile["task"] == task]


def test_a_task_profits_while_it_calibrates(llm):
    options = {"task": "early", "risk": 0.2, "num_calibration_requests": 4}
    problems = generate("code", "held_out", 9, seed=41)
    told = []
    for problem in problems:
        [completion] = decode(llm, [problem], **options)
        about = vllm_osdt.describe(completion)
        told.append((about["calibrating"], about["profile"] is not None))
        is_complete = bool(named(llm, "early"))
        assert is_complete == (sum(calibrating for calibrating, _ in told) == 4)
        static = decode(llm, [problem], policy="static_threshold")
        assert about["nfe"] == mean_nfe(static) if about["calibrating"] else about["nfe"] <= mean_nfe(static)
        assert check(problem, completion.text)
    records, profits = (True, False), (False, True)
    assert told == [records, profits] * 3 + [records, profits, profits]


def test_tasks_without_a_name_are_told_apart_and_gain_as_much(llm, calibrated):
    short = {"num_calibration_requests": 32, "risk": 0.04, "early": False}  # soon done: code is three tasks for auto
    rng = random.Random(0)
    stream = [(task, problem) for task in TASKS for problem in generate(task, "held_out", 240, seed=21)]
    rng.shuffle(stream)
    names = []
    for first in range(0, len(stream), 48):
        batch = decode(llm, [problem for _, problem in stream[first : first + 48]], task="auto", **short)
        names += [vllm_osdt.describe(completion)["task"] for completion in batch]
    assert names[0] == UNDECIDED_TASK
    last = list(zip(stream, names, strict=True))[-96:]
    by_task = {task: {name for (own, _), name in last if own == task} for task in TASKS}
    for task, own in by_task.items():
        assert own and not own & set.union(*(by_task[other] for other in TASKS if other != task))
    mixed = [(task, problem) for task in TASKS for problem in PROBLEMS[task]]
    rng.shuffle(mixed)
    auto = decode(llm, [problem for _, problem in mixed], task="auto", **short)
    static = decode(llm, [problem for _, problem in mixed], policy="static_threshold")
    named_nfe = np.mean([mean_nfe(decode(llm, PROBLEMS[task], task=task)) for task in TASKS])
    gain = {"auto": mean_nfe(static) / mean_nfe(auto) - 1, "named": mean_nfe(static) / named_nfe - 1}
    assert gain["auto"] >= 0.95 * gain["named"], gain
    assert share_right([problem for _, problem in mixed], auto) >= 0.96


def test_a_tuned_task_is_decoded_by_its_choice_without_naming_it(llm, folder, tmp_path):
    tuned = generate("multiple_choice", "held_out", 96, seed=31)
    by_prompt = {problem.prompt: problem for problem in tuned}
    judge = Judge(list(by_prompt), checker=lambda prompt, text: check(by_prompt[prompt], text))
    policies = ("static_threshold", "bacd")
    plan = Plan("tuned", "llada-mini", list(by_prompt), judge, policies, CALIBRATIONS, 96, {}, risk=0.1)
    plan.check()
    tuning = Tuning(plan, EngineDecoder(llm, folder), State(tmp_path / "state.jsonl", name_run("mini", None, plan)))
    row, profile = tuning.write(tuning.run(), folder)
    tuning.clean_up()
    assert row.status == "accepted" and row.nfe < 0.7 * row.reference_nfe
    problems = PROBLEMS["multiple_choice"]
    static = decode(llm, problems, policy="static_threshold")
    open_ = decode(llm, problems, task="tuned")
    about = [vllm_osdt.describe(completion) for completion in open_]
    assert {(one["policy"], one["profile"]) for one in about} == {(row.policy, profile.profile_id)}
    named = decode(llm, problems, policy=row.policy, **profile.choice.options)
    assert tokens(open_) == tokens(named) and [nfe(one) for one in open_] == [nfe(one) for one in named]
    assert mean_nfe(open_) < 0.7 * mean_nfe(static)
    assert share_right(problems, open_) >= 0.9  # the risk; the seed's prompts are fixed
    own = decode(llm, problems, task="tuned", policy="static_threshold")
    assert tokens(own) == tokens(static)
    options = {"freedave_base": "threshold", "threshold": 0.8}
    choice = replace(profile.choice, policy="freedave", options=options)
    registry(llm).publish(replace(profile, key=replace(profile.key, task="drafted"), choice=choice))
    drafted = decode(llm, problems[:8], task="drafted")
    assert {vllm_osdt.describe(completion)["policy"] for completion in drafted} == {"freedave"}
    named = decode(llm, problems[:8], policy="freedave", **options)
    assert tokens(drafted) == tokens(named) and [nfe(one) for one in drafted] == [nfe(one) for one in named]


def test_events_reach_the_engines_stats(llm):
    """Counted from engine to Prometheus; the HTTP test reads the same through /metrics."""
    value = prometheus
    before = {
        kind: value("vllm:osdt_requests_total", kind=kind) for kind in ("calibrating", "calibrated", "static")
    } | {"failed": value("vllm:osdt_calibrations_total", outcome="failed")}
    made = value("vllm:osdt_calibrations_total", outcome="made")
    count = value("vllm:osdt_request_forward_passes_count", policy="osdt")
    total = value("vllm:osdt_request_forward_passes_sum", policy="osdt")
    first = decode(llm, PROBLEMS["code"][:3], task="counted", statistic="q1", num_calibration_requests=2)
    later = decode(llm, PROBLEMS["code"][:3], task="counted", statistic="q1", num_calibration_requests=2)
    params = sampling(96, ignore_eos=False, task="aborted", statistic="q1", num_calibration_requests=2)
    req_id = submit(llm, llm.get_tokenizer().encode(PROBLEMS["code"][0].prompt), params)
    drive(llm, lambda step: llm.llm_engine.abort_request([req_id]) if step == 2 else None)
    decode(llm, PROBLEMS["code"][:1], policy="static_threshold")  # the worker hears of the abort with a further step
    assert value("vllm:osdt_requests_total", kind="calibrating") == before["calibrating"] + 3
    assert value("vllm:osdt_requests_total", kind="static") == before["static"] + 1
    assert value("vllm:osdt_requests_total", kind="calibrated") == before["calibrated"] + 3
    assert value("vllm:osdt_calibrations_total", outcome="made") == made + 1
    assert value("vllm:osdt_calibrations_total", outcome="failed") == before["failed"] + 1
    assert value("vllm:osdt_request_forward_passes_count", policy="osdt") == count + 6
    assert value("vllm:osdt_request_forward_passes_sum", policy="osdt") == total + sum(map(nfe, first + later))
    assert 0 < value("vllm:osdt_threshold", task="counted") < 1


def test_fallbacks_are_counted_by_kind(llm):
    one_block = {**ONE_SHOT, "granularity": "step_block", "threshold_cap": 1.0}
    prompt = PROBLEMS["word_problems"][0].prompt
    for gen_length in (32, 96):
        before = prometheus("vllm:osdt_fallbacks_total", kind="block")
        params = sampling(gen_length, ignore_eos=True, task="falls back", gen_length=gen_length, **one_block)
        [output] = llm.generate([prompt], params, use_tqdm=False)
        decode(llm, PROBLEMS["code"][:1], policy="static_threshold")  # the worker tells with a further step
    in_later_blocks = prometheus("vllm:osdt_fallbacks_total", kind="block") - before
    assert 2 <= in_later_blocks < nfe(output.outputs[0])


def prometheus(name, **labels):
    """The sum of a metric's samples with these labels in vLLM's registry."""
    from prometheus_client import REGISTRY

    samples = [sample for metric in REGISTRY.collect() for sample in metric.samples if sample.name == name]
    return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())
