"""What the worker decides about a request's profile, and what it reports; without an engine."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm import SamplingParams

from tests.calibration.records import KEY, MODEL, NAN, flat, same
from vllm_osdt.calibration.calibrate import Fallback
from vllm_osdt.calibration.guard import DriftGuard
from vllm_osdt.calibration.registry import ProfileRegistry
from vllm_osdt.calibration.store import ProfileStore
from vllm_osdt.config import RESOLVED_KEY, UNDECIDED_TASK, DecodingOptions
from vllm_osdt.policies import POLICIES
from vllm_osdt.policies.static_threshold import static_threshold
from vllm_osdt.worker.denoise_batch import plan_step, step_rows
from vllm_osdt.worker.request_states import CanvasStates

LENGTH, PROMPT = KEY.block_length, [5, 6, 7]
ALL, NONE = torch.ones(LENGTH, dtype=torch.bool), torch.zeros(LENGTH, dtype=torch.bool)
WINDOW = 8


def make_states(registry=None, guard=None):
    return CanvasStates(4, 32, 99, torch.device("cpu"), registry, guard)


def start(states, req_id, slot=0, max_tokens=2 * LENGTH, **options):
    """Admit a request of two blocks to a slot; returns its record."""
    options = DecodingOptions(
        **{"task": "gsm", "metric": "q1", "calibrations": 1, "block_length": LENGTH, "gen_length": 2 * LENGTH} | options
    )
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, extra_args={RESOLVED_KEY: options.as_dict()})
    states.add(
        slot,
        SimpleNamespace(req_id=req_id, sampling_params=params, prefill_token_ids=PROMPT, prompt_len=len(PROMPT)),
    )
    return states.records[req_id]


def end(states, *req_ids, failed=()):
    for req_id in req_ids:
        states.free_slot(req_id)
    states.end(req_ids, failed)


def calibrate(states, req_id, value=0.5, **options):
    """Have a request record one step, and end."""
    record = start(states, req_id, **options)
    record.recorder.add(0, 0, torch.full((LENGTH,), value), torch.arange(LENGTH), ALL, NONE, torch.arange(LENGTH))
    end(states, req_id)


def counts(states, metric):
    """What was reported of a metric since the last call, by label."""
    report = states.take_report()
    told = report["counts"] if report is not None else []
    return {label: number for name, label, number in told if name == metric}


def test_a_task_is_calibrated_by_as_many_requests_as_it_needs():
    states = make_states()
    options = {"calibrations": 2}
    first, second, third = (start(states, req_id, slot, **options) for slot, req_id in enumerate("abc"))
    assert [record.recorder is not None for record in (first, second, third)] == [True, True, False]
    for record in (first, second, third):
        assert np.array_equal(record.schedule.parameters, static_threshold(record.options).parameters)
    for record, value in ((first, 0.2), (second, 0.4)):
        record.recorder.add(0, 0, torch.full((LENGTH,), value), torch.arange(LENGTH), ALL, NONE, torch.arange(LENGTH))
    end(states, "a", "b", "c")
    calibrated = start(states, "d", metric="mean", **options)
    assert calibrated.recorder is None and calibrated.profile.num_requests == 2
    assert calibrated.schedule.parameters == pytest.approx(0.3, abs=1e-6)
    assert (calibrated.schedule.fallback == [[Fallback.NONE] * LENGTH, [Fallback.BLOCK] * LENGTH]).all()
    report = states.take_report()
    assert sorted(report["counts"]) == [
        ["calibrations", "made", 1], ["requests", "calibrated", 1], ["requests", "calibrating", 2],
        ["requests", "static", 1],
    ]  # fmt: skip
    assert [report["requests"][req_id]["calibrating"] for req_id in "abcd"] == [True, True, False, False]
    assert [report["requests"][req_id]["profile"] for req_id in "ad"] == [None, calibrated.profile.profile_id]
    assert report["thresholds"] == {"gsm": pytest.approx(0.3, abs=1e-6)}
    assert states.take_report() is None


@pytest.mark.parametrize("policy", [policy for policy in POLICIES if policy != "osdt"])
def test_other_policies_take_no_part_in_calibration(policy):
    states = make_states()
    calibrate(states, "a")
    states.take_report()
    record = start(states, "b", policy=policy, steps=2 * LENGTH)
    assert record.profile is None and record.recorder is None
    report = states.take_report()
    assert report["counts"] == [] and report["requests"]["b"]["policy"] == policy


@pytest.mark.parametrize("options", [{"task": UNDECIDED_TASK}, {"max_tokens": LENGTH - 1}])
def test_requests_that_say_too_little_of_a_task_do_not_calibrate_it(options):
    states = make_states()
    assert start(states, "a", **options).recorder is None
    assert states.registry.num_calibrating == 0 and counts(states, "requests") == {"static": 1}


@pytest.mark.parametrize("failed", [("a",), ()])
def test_a_request_that_fails_or_records_nothing_leaves_its_place_to_the_next(failed):
    states = make_states()
    record = start(states, "a")
    if failed:
        record.recorder.add(0, 0, torch.full((LENGTH,), 0.5), torch.arange(LENGTH), ALL, NONE, torch.arange(LENGTH))
    end(states, "a", failed=failed)
    assert states.registry.profiles == {} and counts(states, "calibrations") == {"failed": 1}
    assert start(states, "b").recorder is not None


def test_a_profile_of_fewer_requests_than_asked_for_is_made_anew():
    states = make_states()
    calibrate(states, "a")
    assert start(states, "b").profile is not None
    more = start(states, "c", slot=1, calibrations=3)
    assert more.profile is None and more.recorder is not None


def test_recalibration_replaces_a_profile_that_others_use_meanwhile():
    states = make_states()
    calibrate(states, "a", 0.2)
    again = start(states, "b", recalibrate=True)
    assert again.recorder is not None and again.profile is None
    assert start(states, "c", slot=1).profile is not None
    again.recorder.add(0, 0, torch.full((LENGTH,), 0.6), torch.arange(LENGTH), ALL, NONE, torch.arange(LENGTH))
    end(states, "b")
    assert start(states, "d", slot=2).schedule.parameters[0, 0] == pytest.approx(0.6, abs=1e-6)


def test_a_pinned_request_uses_its_profile_and_one_that_is_gone_decodes_statically(tmp_path):
    states = make_states(ProfileRegistry(store=ProfileStore(tmp_path, MODEL)))
    calibrate(states, "a", 0.2)
    old = start(states, "b").profile
    calibrate(states, "c", 0.6, recalibrate=True)
    pinned = start(states, "d", profile=old.profile_id)
    assert same(pinned.profile, old) and pinned.recorder is None
    assert pinned.schedule.parameters[0, 0] == pytest.approx(0.2, abs=1e-6)
    states.take_report()
    gone = start(states, "e", slot=1, profile="0" * 16, task="other")
    assert gone.profile is None and gone.recorder is None  # nor does it calibrate: it asked for one profile
    assert np.array_equal(gone.schedule.parameters, static_threshold(gone.options).parameters)
    report = states.take_report()
    assert sorted(report["counts"]) == [["fallbacks", "pin", 1], ["requests", "static", 1]]


def step(states, slot, block=0):
    """Plan one denoising step of a request."""
    slots = np.array([slot])
    first, num_drafts = np.array([len(PROMPT) + block * LENGTH]), np.array([LENGTH], dtype=np.int32)
    return plan_step(states, step_rows(states, slots, first, np.array([LENGTH]), num_drafts, np.array([False])))


def test_fallbacks_are_counted_by_denoising_step_and_survive_preemption():
    states = make_states()
    states.registry.publish(flat(0.5))  # one block, one step
    start(states, "a", mode="step_block")
    for block in (0, 0, 0, 1):
        step(states, 0, block)
    states.free_slot("a")  # preempted: its slot is another's before it comes back
    start(states, "b", mode="block")
    step(states, 0)
    start(states, "a", slot=1)
    for _ in range(2):
        step(states, 1, 1)
    assert counts(states, "fallbacks") == {}
    end(states, "a")
    assert counts(states, "fallbacks") == {"step": 2, "block": 3}
    end(states, "b")
    assert counts(states, "fallbacks") == {}


def test_cells_without_a_threshold_are_counted_too():
    states = make_states()
    states.registry.publish(flat(0.5, num_requests=32))
    start(states, "a", metric="conformal", risk=0.01)
    for _ in range(3):
        step(states, 0)
    end(states, "a")
    assert counts(states, "fallbacks") == {"cell": 3}


def test_the_mean_confidence_of_every_step_is_kept_by_request_block_and_step():
    states = make_states(guard=DriftGuard("warn", WINDOW, 0.03, 0.95))
    start(states, "a", slot=1), start(states, "b", slot=2)
    slots, drafts = np.array([2, 1]), np.array([LENGTH] * 2, dtype=np.int32)
    expected = np.full((3, 4, LENGTH), NAN)
    for number, (block, masks) in enumerate([(0, [4, 4]), (0, [3, 1]), (1, [4, 4])]):
        first = np.full(2, len(PROMPT) + block * LENGTH)
        rows = step_rows(states, slots, first, np.array([LENGTH] * 2), drafts, np.zeros(2, dtype=bool))
        for slot, num_masked in zip(slots, masks, strict=True):
            states.host.masked[slot, :LENGTH] = np.arange(LENGTH) < num_masked
        plan = plan_step(states, rows)
        confidence = torch.rand(plan.cells.size, generator=torch.Generator().manual_seed(number))
        states.note_confidence(
            torch.from_numpy(plan.step_cell), torch.from_numpy(plan.cells), plan.canvas_index.shape[1], confidence
        )
        parts = confidence.split(masks)
        for slot, part in zip(slots, parts, strict=True):
            expected[slot, block, int(states.host.step[slot])] = part.mean()
    got = states.mean_confidence[:, : 4 * LENGTH].view(4, 4, LENGTH).numpy()[:3]
    assert got == pytest.approx(expected, nan_ok=True, abs=1e-6)
    start(states, "c", slot=2)
    assert torch.isnan(states.mean_confidence[2]).all()  # a slot starts with nothing of the last request


def test_without_a_guard_no_confidence_is_kept():
    states = make_states()
    start(states, "a")
    plan = step(states, 0)
    states.note_confidence(torch.from_numpy(plan.step_cell), torch.from_numpy(plan.cells), LENGTH, torch.ones(LENGTH))
    assert torch.isnan(states.mean_confidence).all()


def see(states, number, value, **options):
    """Requests whose blocks all begin with a mean confidence."""
    for index in range(number):
        start(states, f"{value} {index}", **options)
        states.mean_confidence[0, : 2 * LENGTH] = value
        end(states, f"{value} {index}")


@pytest.mark.parametrize("action", ["recalibrate", "warn"])
def test_a_task_that_drifts_is_reported_and_calibrated_again_only_where_asked_for(action, caplog):
    states = make_states(guard=DriftGuard(action, WINDOW, 0.03, 0.95))
    calibrate(states, "a", 0.5)
    see(states, 2 * WINDOW, 0.5)
    assert counts(states, "drift") == {}
    see(states, WINDOW - 1, 0.1)
    assert counts(states, "drift") == {} and "no longer looks" not in caplog.text
    see(states, 1, 0.1)
    assert counts(states, "drift") == {action: 1}
    assert caplog.text.count("no longer looks") == 1 and ("calibrates again" in caplog.text) == (
        action == "recalibrate"
    )
    assert (start(states, "next").recorder is not None) == (action == "recalibrate")
    end(states, "next", failed=["next"])
    if action == "warn":
        see(states, 3 * WINDOW, 0.1)
        assert counts(states, "drift") == {}  # once for each profile


def test_requests_that_failed_or_calibrate_are_not_watched():
    states = make_states(guard=DriftGuard("warn", WINDOW, 0.03, 0.95))
    calibrate(states, "a", 0.5)
    for index in range(2 * WINDOW):
        start(states, f"failed {index}")
        states.mean_confidence[0, : 2 * LENGTH] = 0.1
        end(states, f"failed {index}", failed=[f"failed {index}"])
        calibrate(states, f"again {index}", 0.5, recalibrate=True)
        states.mean_confidence[0, : 2 * LENGTH] = 0.1
    assert counts(states, "drift") == {}


def test_events_of_the_registry_are_reported_once():
    states = make_states()
    states.registry.counts.update({"loaded": 2, "rejected": 0})
    assert states.take_report()["counts"] == [["calibrations", "loaded", 2]]
    assert states.take_report() is None and +states.registry.counts == Counter()


def test_pinned_requests_do_not_speak_for_the_task(tmp_path):
    states = make_states(
        ProfileRegistry(store=ProfileStore(tmp_path, MODEL)), DriftGuard("recalibrate", WINDOW, 0.03, 0.95)
    )
    calibrate(states, "a", 0.5)
    pin = states.registry.find(KEY).profile_id
    see(states, 2 * WINDOW, 0.1, profile=pin)
    assert counts(states, "drift") == {}
    see(states, WINDOW, 0.1)
    assert counts(states, "drift") == {"recalibrate": 1}


def test_a_request_that_ends_after_it_lost_its_slot_to_another_is_not_watched():
    states = make_states(guard=DriftGuard("warn", WINDOW, 0.03, 0.95))
    calibrate(states, "a", 0.5)
    for index in range(2 * WINDOW):
        start(states, f"preempted {index}")
        states.free_slot(f"preempted {index}")
        start(states, f"other {index}", policy="static_threshold")
        states.mean_confidence[0, : 2 * LENGTH] = 0.1
        end(states, f"preempted {index}", f"other {index}")
    assert counts(states, "drift") == {}


@pytest.mark.parametrize("policy", ["static_threshold", "osdt"])
def test_what_equals_a_strict_threshold_does_not_pass(policy):
    states = make_states()
    loose = start(states, "a", policy=policy, task="loose")
    states.is_strict = True
    strict = start(states, "b", slot=1, policy=policy, task="strict")
    assert strict.key.threshold == loose.key.threshold == 0.9
    assert (loose.schedule.parameters == np.float32(0.9)).all()
    assert (strict.schedule.parameters == np.nextafter(np.float32(0.9), np.float32(1))).all()


def test_what_a_device_copies_for_the_guard_is_compared_one_step_later_on_every_rank(monkeypatch):
    """By the count of steps and not by the device's pace, which ranks do not share."""
    from vllm_osdt.worker.request_states import _Observed

    states, compared, waited = make_states(guard=DriftGuard("warn", WINDOW, 0.03, 0.95)), [], []
    monkeypatch.setattr(states, "_compare", lambda records, seen: compared.append((records, seen.tolist())))
    none, copied = np.empty(0, dtype=np.int64), SimpleNamespace(synchronize=lambda: waited.append(1))

    def step():
        states.begin_step(none, none, none)
        return list(compared)

    states._watch_pending.append(_Observed(["one"], torch.ones(1), copied))
    assert step() == [] and not waited
    states._watch_pending.append(_Observed(["two"], torch.zeros(1), copied))
    assert step() == [(["one"], [1.0])]
    assert step() == [(["one"], [1.0]), (["two"], [0.0])] == step() and len(waited) == 2
