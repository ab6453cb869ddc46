"""What the calibrator decides about a request's profile, and what it reports; without an engine."""

import logging
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from tests.calibration.records import KEY, MODEL, chosen, flat, same
from vllm_osdt.calibration.guard import DriftGuard
from vllm_osdt.calibration.registry import ProfileRegistry
from vllm_osdt.calibration.store import ProfileStore
from vllm_osdt.calibration.thresholds import Fallback
from vllm_osdt.cli.tuning.candidates import CANDIDATES, candidates_of
from vllm_osdt.engine.calibrator import Calibrator
from vllm_osdt.geometry import Canvas
from vllm_osdt.messages import RecordedStep, RequestSpec, StepReport
from vllm_osdt.models.traits import Traits
from vllm_osdt.options import UNDECIDED_TASK, DecodingOptions, policies_of
from vllm_osdt.policies import POLICIES

LENGTH, PROMPT_LENGTH = KEY.block_length, 3
WINDOW = 8


def make_calibrator(registry=None, guard=None, is_strict=False, is_block_causal=False):
    traits = Traits(
        block_length=LENGTH, mask_token_id=99, is_threshold_strict=is_strict, is_block_causal=is_block_causal
    )
    return Calibrator(registry or ProfileRegistry(), guard, traits)


def start(calibrator, req_id, max_tokens=2 * LENGTH, follows_choice=False, is_kept=False, barred=(), **options):
    """Plan a request of two blocks for the first time; returns what is decided."""
    canvas = Canvas(PROMPT_LENGTH, PROMPT_LENGTH + 2 * LENGTH, PROMPT_LENGTH + max_tokens, LENGTH)
    defaults = {"task": "gsm", "statistic": "q1", "num_calibration_requests": 1}
    options = DecodingOptions(**defaults | {"block_length": LENGTH, "gen_length": 2 * LENGTH} | options)
    spec = RequestSpec(options, canvas, follows_choice, barred=barred)
    assignment = calibrator.assign(req_id, spec, max_tokens, is_kept=is_kept)
    decided = calibrator._decodings[req_id]
    assert assignment is decided.assignment and assignment.is_recorded == (decided.recorder is not None)
    return decided


def see_step(calibrator, req_id, value):
    """A worker reports the first step of a request's first block, which unmasked everything."""
    grid = np.ones((1, LENGTH), dtype=bool)
    tokens = np.arange(LENGTH)[None]
    first = np.zeros(1, dtype=np.int64)
    confidence = np.full((1, LENGTH), value, dtype=np.float32)
    recorded = RecordedStep([req_id], first, first, confidence, tokens, grid, ~grid, tokens)
    calibrator.hear(StepReport(recorded=recorded))


def enter_blocks(calibrator, req_id, value):
    """A worker reports the mean confidence at the entry of both blocks."""
    calibrator.hear(StepReport(entries=[(req_id, block, value) for block in range(2)]))


def end(calibrator, *req_ids, failed=()):
    for req_id in req_ids:
        calibrator.finish_request(req_id, ended_well=req_id not in failed)


def calibrate(calibrator, req_id, value=0.5, **options):
    """Have a request record one step, and end."""
    start(calibrator, req_id, **options)
    see_step(calibrator, req_id, value)
    end(calibrator, req_id)


def take(calibrator):
    """What is told since the last call: counts by (metric, label), and thresholds by task."""
    news = calibrator.take_statistics()
    return sorted(news.get("counts", [])), news.get("thresholds", {})


def counts(calibrator, metric):
    """What was counted of a metric since the last call, by label."""
    return {label: number for name, label, number in take(calibrator)[0] if name == metric}


def static(decided):
    return POLICIES["static_threshold"].schedule(decided.options, decided.shape).parameters


def test_a_task_is_calibrated_by_as_many_requests_as_it_needs():
    calibrator = make_calibrator()
    options = {"num_calibration_requests": 2}
    first, second, third = (start(calibrator, req_id, **options) for req_id in "abc")
    assert [record.recorder is not None for record in (first, second, third)] == [True, True, False]
    for record in (first, second, third):
        assert np.array_equal(record.assignment.schedule.parameters, static(record))
    see_step(calibrator, "a", 0.2)
    see_step(calibrator, "b", 0.4)
    end(calibrator, "a", "b", "c")
    calibrated = start(calibrator, "d", statistic="mean", **options)
    assert calibrated.recorder is None and calibrated.profile.num_requests == 2
    assert calibrated.assignment.schedule.parameters == pytest.approx(0.3, abs=1e-6)
    assert (calibrated.assignment.schedule.fallback == [[Fallback.NONE] * LENGTH, [Fallback.BLOCK] * LENGTH]).all()
    told, thresholds = take(calibrator)
    assert told == [
        ["calibrations", "made", 1], ["requests", "calibrated", 1], ["requests", "calibrating", 2],
        ["requests", "static", 1],
    ]  # fmt: skip
    decided = (first, second, third, calibrated)
    assert [record.about.calibrating for record in decided] == [True, True, False, False]
    assert [record.about.profile for record in (first, calibrated)] == [None, calibrated.profile.profile_id]
    assert thresholds == {"gsm": pytest.approx(0.3, abs=1e-6)}
    assert calibrator.take_statistics() == {}


EARLY = {"statistic": "conformal", "num_calibration_requests": 24}


def test_while_a_task_calibrates_every_other_request_has_early_thresholds():
    calibrator = make_calibrator()
    used = []
    for number in range(8):
        record = start(calibrator, f"{number}", **EARLY)
        if record.recorder is not None:
            see_step(calibrator, f"{number}", 0.5)
        else:
            assert record.profile is not None and not record.assignment.is_watched
            used.append((record.profile.num_requests, float(record.assignment.schedule.parameters.max())))
            assert record.about.profile == record.profile.profile_id
        end(calibrator, f"{number}")
    assert counts(calibrator, "requests") == {"calibrating": 4, "early": 4}
    assert [number for number, _ in used] == [1, 2, 3, 4]
    assert KEY.threshold > used[0][1] > used[1][1] > used[2][1] > used[3][1]
    assert calibrator.profiles() == []  # nothing is published before the round ends


@pytest.mark.parametrize("options", [EARLY | {"early": False}, {"num_calibration_requests": 2}])
def test_without_early_thresholds_all_requests_record_until_the_round_ends(options):
    calibrator = make_calibrator()
    calibrate(calibrator, "a", **options)
    record = start(calibrator, "b", **options)
    assert record.recorder is not None and np.array_equal(record.assignment.schedule.parameters, static(record))


@pytest.mark.parametrize("policy", policies_of("calibrated"))
def test_a_calibrated_policy_calibrates_with_the_static_threshold_and_shares_the_tasks_profile(policy):
    calibrator = make_calibrator()
    own = {"dimple": {"steps": 2 * LENGTH}, "freedave": {"freedave_base": "threshold"}}
    options = {"policy": policy, "calibrated": True, **own.get(policy, {})}
    first = start(calibrator, "a", **options)
    assert first.recorder is not None and first.assignment.policy == "osdt"
    assert np.array_equal(first.assignment.schedule.parameters, static(first))
    waiting = start(calibrator, "b", **options)
    assert waiting.recorder is None and waiting.assignment.policy == "osdt"
    see_step(calibrator, "a", 0.5)
    end(calibrator, "a")
    with_profile, plain = start(calibrator, "c", **options), start(calibrator, "d")
    assert with_profile.assignment.policy == policy and with_profile.profile is plain.profile is not None
    assert np.array_equal(with_profile.assignment.schedule.parameters, plain.assignment.schedule.parameters)
    schedule = with_profile.assignment.schedule
    assert (schedule.constants or schedule.drafts) and with_profile.about.policy == policy
    other = start(calibrator, "e", credit=True)  # whose confidences are others
    assert other.recorder is not None and other.key != plain.key
    assert calibrator.subject("c").allowed is None  # it unmasks more than the thresholds allow


@pytest.mark.parametrize("policy", [policy for policy in POLICIES if policy != "osdt"])
def test_other_policies_take_no_part_in_calibration(policy):
    calibrator = make_calibrator()
    calibrate(calibrator, "a")
    calibrator.take_statistics()
    record = start(calibrator, "b", policy=policy, steps=2 * LENGTH)
    assert record.profile is None and record.recorder is None
    assert calibrator.take_statistics() == {} and calibrator.about("b").policy == policy


@pytest.mark.parametrize("options", [{"task": UNDECIDED_TASK}, {"max_tokens": LENGTH - 1}])
def test_requests_that_say_too_little_of_a_task_do_not_calibrate_it(options):
    calibrator = make_calibrator()
    assert start(calibrator, "a", **options).recorder is None
    assert calibrator.registry.num_calibrating == 0 and counts(calibrator, "requests") == {"static": 1}


@pytest.mark.parametrize("failed", [("a",), ()])
def test_a_request_that_fails_or_records_nothing_leaves_its_place_to_the_next(failed):
    calibrator = make_calibrator()
    start(calibrator, "a")
    if failed:
        see_step(calibrator, "a", 0.5)
    end(calibrator, "a", failed=failed)
    assert calibrator.registry.profiles == {} and counts(calibrator, "calibrations") == {"failed": 1}
    assert start(calibrator, "b").recorder is not None


def test_a_profile_of_fewer_requests_than_asked_for_is_made_anew():
    calibrator = make_calibrator()
    calibrate(calibrator, "a")
    assert start(calibrator, "b").profile is not None
    more = start(calibrator, "c", num_calibration_requests=3)
    assert more.profile is None and more.recorder is not None


def test_recalibration_replaces_a_profile_that_others_use_meanwhile():
    calibrator = make_calibrator()
    calibrate(calibrator, "a", 0.2)
    again = start(calibrator, "b", recalibrate=True)
    assert again.recorder is not None and again.profile is None
    assert start(calibrator, "c").profile is not None
    see_step(calibrator, "b", 0.6)
    end(calibrator, "b")
    assert start(calibrator, "d").assignment.schedule.parameters[0, 0] == pytest.approx(0.6, abs=1e-6)


def test_a_pinned_request_uses_its_profile_and_one_that_is_gone_decodes_statically(tmp_path):
    calibrator = make_calibrator(ProfileRegistry(store=ProfileStore(tmp_path, MODEL)))
    calibrate(calibrator, "a", 0.2)
    old = start(calibrator, "b").profile
    calibrate(calibrator, "c", 0.6, recalibrate=True)
    pinned = start(calibrator, "d", profile=old.profile_id)
    assert same(pinned.profile, old) and pinned.recorder is None
    assert pinned.assignment.schedule.parameters[0, 0] == pytest.approx(0.2, abs=1e-6)
    calibrator.take_statistics()
    gone = start(calibrator, "e", profile="0" * 16, task="other")
    assert gone.profile is None and gone.recorder is None  # nor does it calibrate: it asked for one profile
    assert np.array_equal(gone.assignment.schedule.parameters, static(gone))
    assert take(calibrator)[0] == [["fallbacks", "pin", 1], ["requests", "static", 1]]


def test_fallbacks_are_counted_by_kind():
    calibrator = make_calibrator()
    kinds = np.zeros(len(Fallback), dtype=np.int64)
    kinds[[Fallback.NONE, Fallback.STEP, Fallback.BLOCK]] = [7, 2, 3]
    calibrator.hear(StepReport(num_fallbacks=kinds))
    calibrator.hear(StepReport())
    assert counts(calibrator, "fallbacks") == {"step": 2, "block": 3}
    assert counts(calibrator, "fallbacks") == {}


def test_a_request_that_is_planned_again_keeps_what_was_decided():
    calibrator = make_calibrator()
    first = start(calibrator, "a")
    assert start(calibrator, "a") is first and calibrator.registry.num_calibrating == 1
    see_step(calibrator, "a", 0.2)
    see_step(calibrator, "a", 0.6)  # preempted: its block starts again
    end(calibrator, "a")
    assert calibrator.registry.find(KEY).mean_confidence[0, 0] == pytest.approx(0.6)


def test_reports_of_requests_that_have_ended_are_passed_over():
    calibrator = make_calibrator(guard=DriftGuard("warn", WINDOW, 0.03, 0.95))
    start(calibrator, "a")
    end(calibrator, "a", failed=["a"])
    see_step(calibrator, "a", 0.5)
    enter_blocks(calibrator, "a", 0.5)
    assert calibrator.registry.profiles == {} and calibrator.about("a").policy is None


def test_without_a_guard_nothing_is_watched():
    calibrator = make_calibrator()
    calibrate(calibrator, "a")
    assert not start(calibrator, "b").assignment.is_watched
    calibrator.guard = DriftGuard("warn", WINDOW, 0.03, 0.95)
    assert start(calibrator, "c").assignment.is_watched


def see(calibrator, number, value, **options):
    """Requests whose blocks all begin with a mean confidence."""
    for index in range(number):
        start(calibrator, f"{value} {index}", **options)
        enter_blocks(calibrator, f"{value} {index}", value)
        end(calibrator, f"{value} {index}")


@pytest.mark.parametrize("action", ["recalibrate", "warn"])
def test_a_task_that_drifts_is_reported_and_calibrated_again_only_where_asked_for(action, caplog):
    calibrator = make_calibrator(guard=DriftGuard(action, WINDOW, 0.03, 0.95))
    calibrate(calibrator, "a", 0.5)
    see(calibrator, 2 * WINDOW, 0.5)
    assert counts(calibrator, "drift") == {}
    see(calibrator, WINDOW - 1, 0.1)
    assert counts(calibrator, "drift") == {} and "no longer looks" not in caplog.text
    see(calibrator, 1, 0.1)
    assert counts(calibrator, "drift") == {action: 1}
    assert caplog.text.count("no longer looks") == 1 and ("calibrates again" in caplog.text) == (
        action == "recalibrate"
    )
    assert (start(calibrator, "next").recorder is not None) == (action == "recalibrate")
    end(calibrator, "next", failed=["next"])
    if action == "warn":
        see(calibrator, 3 * WINDOW, 0.1)
        assert counts(calibrator, "drift") == {}  # once for each profile


def test_requests_that_failed_or_calibrate_are_not_watched():
    calibrator = make_calibrator(guard=DriftGuard("warn", WINDOW, 0.03, 0.95))
    calibrate(calibrator, "a", 0.5)
    for index in range(2 * WINDOW):
        start(calibrator, f"failed {index}")
        enter_blocks(calibrator, f"failed {index}", 0.1)
        end(calibrator, f"failed {index}", failed=[f"failed {index}"])
        start(calibrator, f"again {index}", recalibrate=True)
        see_step(calibrator, f"again {index}", 0.5)
        enter_blocks(calibrator, f"again {index}", 0.1)
        end(calibrator, f"again {index}")
    assert counts(calibrator, "drift") == {}


def test_events_of_the_registry_are_reported_once():
    calibrator = make_calibrator()
    calibrator.registry.counts.update({"loaded": 2, "rejected": 0})
    assert take(calibrator)[0] == [["calibrations", "loaded", 2]]
    assert calibrator.take_statistics() == {} and +calibrator.registry.counts == Counter()


def test_pinned_requests_do_not_speak_for_the_task(tmp_path):
    calibrator = make_calibrator(
        ProfileRegistry(store=ProfileStore(tmp_path, MODEL)), DriftGuard("recalibrate", WINDOW, 0.03, 0.95)
    )
    calibrate(calibrator, "a", 0.5)
    pin = calibrator.registry.find(KEY).profile_id
    see(calibrator, 2 * WINDOW, 0.1, profile=pin)
    assert counts(calibrator, "drift") == {}
    see(calibrator, WINDOW, 0.1)
    assert counts(calibrator, "drift") == {"recalibrate": 1}


def test_a_request_of_another_policy_says_nothing_of_the_task():
    calibrator = make_calibrator(guard=DriftGuard("warn", WINDOW, 0.03, 0.95))
    calibrate(calibrator, "a", 0.5)
    for index in range(2 * WINDOW):
        start(calibrator, f"other {index}", policy="static_threshold")
        enter_blocks(calibrator, f"other {index}", 0.1)
        end(calibrator, f"other {index}")
    assert counts(calibrator, "drift") == {}


@pytest.mark.parametrize("policy", ["static_threshold", "osdt"])
def test_what_equals_a_strict_threshold_does_not_pass(policy):
    calibrator = make_calibrator()
    loose = start(calibrator, "a", policy=policy, task="loose")
    strict = start(make_calibrator(is_strict=True), "b", policy=policy, task="strict")
    assert strict.key.threshold == loose.key.threshold == 0.9
    assert (loose.assignment.schedule.parameters == np.float32(0.9)).all()
    assert (strict.assignment.schedule.parameters == np.nextafter(np.float32(0.9), np.float32(1))).all()


def choosing(choice, guard=None, is_block_causal=False):
    """A calibrator whose task has a profile with a choice."""
    calibrator = make_calibrator(guard=guard, is_block_causal=is_block_causal)
    calibrator.registry.publish(replace(flat(0.5), choice=choice))
    calibrator.take_statistics()
    return calibrator


@pytest.mark.parametrize(
    "choice",
    [chosen("static_threshold", threshold=0.6), chosen("factor", factor=1.5), chosen("bacd", max_threshold=0.7),
     chosen("osdt", threshold_cap=0.3)],
)  # fmt: skip
def test_a_request_that_leaves_it_open_is_decoded_by_its_tasks_choice(choice):
    calibrator = choosing(choice)
    decided = start(calibrator, "a", follows_choice=True)
    asked = start(calibrator, "b", policy=choice.policy, task=None, **choice.options)
    assert decided.options.policy == decided.assignment.policy == decided.about.policy == choice.policy
    assert decided.about.profile == calibrator.registry.find(KEY).profile_id and decided.recorder is None
    assert decided.assignment.schedule.rule == asked.assignment.schedule.rule
    if choice.policy != "osdt":
        assert np.array_equal(decided.assignment.schedule.parameters, asked.assignment.schedule.parameters)
    else:
        assert decided.assignment.schedule.parameters == pytest.approx(0.3, abs=1e-6)
    assert decided.key == KEY  # the calibration's threshold, not the choice's


@pytest.mark.parametrize("policy", CANDIDATES)
def test_whatever_tune_may_choose_decodes_a_request_or_is_passed_over(policy):
    for candidate in candidates_of(policy, 64):
        choice = chosen(**candidate)
        decided = start(choosing(choice), "a", follows_choice=True)
        # No operator has named a file, and the model is not block-causal.
        is_usable = policy not in ("learned_filter", "s2d2")
        assert decided.options.policy == (candidate["policy"] if is_usable else "osdt")
        assert decided.assignment.policy == decided.options.policy


@pytest.mark.parametrize("policy", ["s2d2", "freedave"])
def test_a_choice_that_a_requests_parameters_do_not_go_with_is_passed_over(policy, caplog):
    calibrator = choosing(chosen(policy), is_block_causal=True)
    about = {"follows_choice": True, "gen_length": None}
    with caplog.at_level(logging.WARNING, logger="vllm"):
        decided = start(calibrator, "a", barred=(policy,), **about)
    assert decided.options.policy == decided.assignment.policy == decided.about.policy == "osdt"
    [warning] = caplog.records
    assert f"Policy {policy!r} has no place" in warning.getMessage()
    decided = start(calibrator, "b", **about)
    assert decided.options.policy == decided.assignment.policy == decided.about.policy == policy


def test_a_choice_that_workers_would_read_otherwise_is_passed_over():
    choice = chosen("ccd")
    decided = start(choosing(choice), "a", follows_choice=True, credit=True)
    assert decided.options.policy == "osdt" and decided.options.credit


def test_a_task_tuned_to_blocks_of_many_lengths_is_not_watched():
    guard = DriftGuard("warn", WINDOW, 0.03, 0.95)
    assert start(choosing(chosen("factor", factor=1.5), guard), "a", follows_choice=True).assignment.is_watched
    assert not start(choosing(chosen("cad_llm"), guard), "a", follows_choice=True).assignment.is_watched


def test_a_request_that_says_how_positions_are_chosen_does_not_follow_the_choice():
    calibrator = choosing(chosen("static_threshold", threshold=0.6))
    assert start(calibrator, "a").about.policy == "osdt"
    again = start(calibrator, "b", follows_choice=True, recalibrate=True)
    assert again.about.policy == "osdt" and again.recorder is not None
    see_step(calibrator, "b", 0.5)
    end(calibrator, "b")
    assert calibrator.registry.find(KEY).choice is None  # what was promised was for the profile that is replaced
    assert start(calibrator, "c", follows_choice=True).about.policy == "osdt"


def test_a_pinned_profile_is_followed_with_its_choice(tmp_path, monkeypatch):
    monkeypatch.setattr("vllm_osdt.calibration.registry.LOOK_INTERVAL_S", 3600.0)
    store = ProfileStore(tmp_path, MODEL)
    calibrator = make_calibrator(ProfileRegistry(store=store))
    calibrate(calibrator, "a", 0.2)
    calibrator.registry.flush()
    assert calibrator.registry.find(KEY) is not None
    tuned = replace(flat(0.5), choice=chosen("factor", factor=1.5))
    store.save(tuned)  # by another process: the memory has the old one
    assert start(calibrator, "b", follows_choice=True).about.policy == "osdt"
    pinned = start(calibrator, "c", follows_choice=True, profile=tuned.profile_id)
    assert (pinned.about.policy, pinned.about.profile) == ("factor", tuned.profile_id)
    assert not pinned.assignment.is_watched


def test_requests_without_a_choice_to_follow_are_decoded_as_ever():
    calibrator = make_calibrator()
    calibrate(calibrator, "a", 0.2)
    for follows in (False, True):
        decided = start(calibrator, f"follows {follows}", follows_choice=follows)
        assert decided.assignment.schedule.parameters[0, 0] == pytest.approx(0.2, abs=1e-6)
    other = start(calibrator, "other", follows_choice=True, task="other")
    assert other.recorder is not None and start(calibrator, "none", follows_choice=True, task=None).profile is None


@pytest.mark.parametrize(
    "choice", [chosen("of_another_package"), chosen("factor", gone=1), chosen("factor", factor=-1.0)]
)
def test_a_choice_that_cannot_be_used_here_is_named_once_and_passed_over(choice, caplog):
    calibrator = choosing(choice)
    for req_id in "ab":
        assert start(calibrator, req_id, follows_choice=True).about.policy == "osdt"
    assert caplog.text.count("cannot be used here") == 1


def test_a_task_with_a_choice_drifts_as_others_do_but_entropies_are_not_compared_with_probabilities():
    guard = DriftGuard("recalibrate", WINDOW, 0.03, 0.95)
    calibrator = choosing(chosen("static_threshold", threshold=0.6), guard)
    see(calibrator, WINDOW, 0.1, follows_choice=True)
    assert counts(calibrator, "drift") == {"recalibrate": 1}
    assert start(calibrator, "next", follows_choice=True).recorder is not None
    calibrator = choosing(chosen("entropy_bound", entropy=0.5), guard)
    assert not start(calibrator, "a", follows_choice=True).assignment.is_watched


def test_only_thresholds_are_told_as_thresholds():
    calibrator = choosing(chosen("factor", factor=1.5))
    start(calibrator, "a", follows_choice=True)
    assert take(calibrator) == ([["requests", "calibrated", 1]], {})
    calibrator = choosing(chosen("static_threshold", threshold=0.6))
    start(calibrator, "a", follows_choice=True)
    assert take(calibrator)[1] == {"gsm": pytest.approx(0.6, abs=1e-6)}


CONFORMAL = {"statistic": "conformal", "num_calibration_requests": 2, "risk": 0.4}


def calibrate_two(calibrator, **options):
    """A profile of two requests with CONFORMAL."""
    for req_id in "ab":
        start(calibrator, req_id, **CONFORMAL | options)
        see_step(calibrator, req_id, 0.5)
    end(calibrator, "a", "b")


@pytest.mark.parametrize(
    ("options", "allowed"),
    [({}, 0.4), ({"risk": 0.05}, 0.1), ({"statistic": "q1"}, None)],
)
def test_what_audits_may_find_follows_from_what_the_request_asks_for(options, allowed):
    calibrator = make_calibrator()
    calibrate_two(calibrator)
    decided = start(calibrator, "c", **CONFORMAL | options)
    subject = calibrator.subject("c")
    assert subject.profile is decided.profile
    assert subject.allowed is None if allowed is None else subject.allowed == pytest.approx(allowed)


@pytest.mark.parametrize(("num_changed", "allowed"), [(0, 0.1), (150, 0.3356), (None, None)])
def test_a_choice_may_change_as_many_texts_as_tuning_saw(num_changed, allowed):
    registry = ProfileRegistry()
    calibrator = make_calibrator(registry)
    calibrate_two(calibrator)
    [profile] = registry.profiles.values()
    registry.profiles[profile.key] = replace(
        profile, choice=replace(chosen("factor", factor=0.5), num_changed=num_changed)
    )
    start(calibrator, "c", follows_choice=True, **CONFORMAL)
    found = calibrator.subject("c").allowed  # of 500 prompts
    assert found is None if allowed is None else found == pytest.approx(allowed, abs=2e-3)


def test_requests_without_a_finished_profile_are_not_audited():
    calibrator = make_calibrator()
    start(calibrator, "a", **EARLY)
    see_step(calibrator, "a", 0.5)
    end(calibrator, "a")
    start(calibrator, "b", **EARLY)
    start(calibrator, "c", policy="static_threshold", task=None)
    assert calibrator._decodings["b"].profile is not None
    assert [calibrator.subject(req_id) for req_id in "bcz"] == [None] * 3


@pytest.mark.parametrize("action", ["recalibrate", "warn", None])
def test_audits_that_disagree_are_the_guards_business(action, caplog):
    guard = None if action is None else DriftGuard(action, WINDOW, 0.03, 0.95)
    calibrator = make_calibrator(guard=guard)
    calibrate_two(calibrator)
    start(calibrator, "c", **CONFORMAL)
    subject = calibrator.subject("c")
    take(calibrator)
    for _ in range(20):
        calibrator.hear_audit(subject, is_same=False)
    calibrator.hear_audit(subject, is_same=True)
    told = take(calibrator)[0]
    events = [] if action is None else [["drift", action, 1]]
    assert told == [["audits", "changed", 20], ["audits", "same", 1], *events]
    assert (start(calibrator, "d", **CONFORMAL).recorder is not None) == (action == "recalibrate")
    assert sum("no longer has the answers" in record.message for record in caplog.records) == len(events)


def test_other_weights_use_nothing_that_was_learned_before():
    calibrator = make_calibrator(guard=DriftGuard("recalibrate", WINDOW, 0.1, 0.9))
    start(calibrator, "first")
    see_step(calibrator, "first", 0.8)
    end(calibrator, "first")
    used = start(calibrator, "watched")
    assert used.profile is not None and used.assignment.is_watched
    start(calibrator, "under way", task="code")
    see_step(calibrator, "under way", 0.8)
    calibrator.forget()
    end(calibrator, "watched", "under way")  # what they saw is of the old weights
    assert not calibrator.registry.profiles and calibrator.registry.num_calibrating == 0
    assert start(calibrator, "anew").recorder is not None
    assert not calibrator.guard._cohorts


def test_a_request_that_two_weights_decode_is_neither_recorded_nor_watched_nor_audited():
    calibrator = make_calibrator(guard=DriftGuard("recalibrate", WINDOW, 0.1, 0.9))
    kept = start(calibrator, "kept", is_kept=True)
    assert kept.recorder is None and kept.profile is None and not kept.about.calibrating
    start(calibrator, "first")
    see_step(calibrator, "first", 0.8)
    end(calibrator, "first")
    kept = start(calibrator, "kept too", is_kept=True)
    assert kept.profile is not None and not kept.assignment.is_watched
    assert calibrator.subject("kept too") is None
    assert start(calibrator, "new").assignment.is_watched and calibrator.subject("new") is not None
    kinds = {kind: number for (name, kind), number in calibrator.statistics.counts.items() if name == "requests"}
    assert kinds == {"calibrating": 1, "calibrated": 1}
