"""Who makes and who uses a profile: rounds of calibrating requests, replacement, staleness, pins."""

import threading
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from tests.calibration.records import KEY, MODEL, flat, of_task, one_recording, recorded, same
from vllm_osdt.calibration.profile import CalibrationProfile, stack
from vllm_osdt.calibration.registry import ProfileRegistry
from vllm_osdt.calibration.store import ProfileStore

OTHER = of_task("code")


def calibrate(registry, key=KEY, num_requests=1, first=0, flush=True):
    """Have a round of requests make a profile."""
    ids = [f"{key.task} {first + index}" for index in range(num_requests)]
    assert all(registry.claim(key, req_id, num_requests) for req_id in ids)
    made = [
        registry.deliver(key, req_id, one_recording(key.block_length, seed=first + index), num_requests)
        for index, req_id in enumerate(ids)
    ]
    assert made[:-1] == [None] * (num_requests - 1)
    if flush:
        registry.flush()
    return made[-1]


@pytest.fixture
def store(tmp_path):
    return ProfileStore(tmp_path, MODEL)


@pytest.fixture
def engines(tmp_path):
    """Two engines that share a folder."""
    return [ProfileRegistry(store=ProfileStore(tmp_path, MODEL)) for _ in range(2)]


@pytest.mark.parametrize("num_requests", [1, 3])
def test_only_as_many_requests_calibrate_a_key_as_it_needs(num_requests):
    registry = ProfileRegistry()
    claims = [registry.claim(KEY, f"{index}", num_requests) for index in range(num_requests + 2)]
    assert claims == [True] * num_requests + [False] * 2
    assert registry.num_calibrating == num_requests
    assert registry.claim(OTHER, "other", num_requests) and registry.num_calibrating == num_requests + 1


def test_a_request_that_claims_twice_counts_once():
    registry = ProfileRegistry()
    assert [registry.claim(KEY, req_id, 2) for req_id in ("a", "a", "b", "a", "c")] == [True] * 4 + [False]
    assert registry.num_calibrating == 2


def test_recordings_and_requests_under_way_count_together():
    registry = ProfileRegistry()
    registry.claim(KEY, "a", 3)
    registry.deliver(KEY, "a", one_recording(), 3)
    assert [registry.claim(KEY, req_id, 3) for req_id in "bcd"] == [True, True, False]
    assert registry.num_calibrating == 2


@pytest.mark.parametrize("order", ["abc", "cab", "bca"])
def test_a_profile_is_published_after_the_last_delivery_whatever_the_order(order, store):
    registry = ProfileRegistry(store=store)
    recordings = {req_id: one_recording(seed=seed) for seed, req_id in enumerate("abc")}
    for req_id in "abc":
        assert registry.claim(KEY, req_id, 3)
    for req_id in order[:2]:
        assert registry.deliver(KEY, req_id, recordings[req_id], 3) is None
        assert registry.find(KEY) is None and store.load(KEY) is None and not registry.claim(KEY, "late", 3)
    profile = registry.deliver(KEY, order[2], recordings[order[2]], 3)
    registry.flush()
    assert profile is registry.find(KEY, 3) and same(store.load(KEY), profile)
    # Whose records it holds does not depend on the order.
    found = {row.tobytes() for row in profile.record.confidence}
    assert found == {row.tobytes() for row in stack(list(recordings.values())).confidence}
    assert registry.num_calibrating == 0 and registry.counts == Counter(made=1)


def test_early_thresholds_are_of_requests_that_began_before_all_that_still_run():
    registry = ProfileRegistry()
    recordings = {req_id: one_recording(KEY.block_length, seed=index) for index, req_id in enumerate("abcd")}
    for req_id in "abcd":
        registry.claim(KEY, req_id, 8)
    known = []
    for req_id in "cbad":  # the surest end first
        registry.deliver(KEY, req_id, recordings[req_id], 8)
        early = registry.early(KEY)
        known.append(0 if early is None else early.num_requests)
    assert known == [0, 0, 3, 4]
    in_order = CalibrationProfile(KEY, stack([recordings[req_id] for req_id in "abcd"]))
    assert registry.early(KEY).profile_id == in_order.profile_id
    registry.claim(KEY, "e", 8)
    registry.claim(KEY, "f", 8)
    registry.deliver(KEY, "f", recordings["a"], 8)
    assert registry.early(KEY).num_requests == 4
    registry.release(KEY, "e")
    assert registry.early(KEY).num_requests == 5


def test_a_released_place_is_taken_by_the_next_request():
    registry = ProfileRegistry()
    assert [registry.claim(KEY, req_id, 2) for req_id in "abc"] == [True, True, False]
    registry.release(KEY, "c")  # it did not hold a place
    assert registry.counts == Counter() and not registry.claim(KEY, "c", 2)
    registry.release(KEY, "a")
    registry.release(KEY, "a")
    assert registry.counts == Counter(failed=1)
    assert registry.claim(KEY, "c", 2) and not registry.claim(KEY, "d", 2)


def test_what_was_delivered_outlives_the_failure_of_others():
    registry = ProfileRegistry()
    for req_id in "ab":
        registry.claim(KEY, req_id, 2)
    registry.deliver(KEY, "a", one_recording(seed=1), 2)
    registry.release(KEY, "b")
    assert registry.claim(KEY, "c", 2) and not registry.claim(KEY, "d", 2)
    profile = registry.deliver(KEY, "c", one_recording(seed=2), 2)
    assert profile.num_requests == 2


def test_a_key_whose_only_request_failed_is_calibrated_by_the_next():
    registry = ProfileRegistry()
    registry.claim(KEY, "a")
    registry.release(KEY, "b")
    assert not registry.claim(KEY, "b")  # b did not hold it
    registry.release(KEY, "a")
    assert registry.find(KEY) is None and registry.claim(KEY, "b")


def test_a_published_profile_is_used_until_it_is_replaced():
    registry = ProfileRegistry()
    first, second = flat(0.5), flat(0.7)
    registry.publish(first)
    assert registry.find(KEY) is first
    assert registry.claim(KEY, "c", 2) and registry.claim(KEY, "d", 2)
    registry.deliver(KEY, "c", one_recording(), 2)
    assert registry.find(KEY) is first
    registry.publish(second)
    assert registry.find(KEY) is second
    last = registry.deliver(KEY, "d", one_recording(), 2)
    assert registry.find(KEY) is last and last.num_requests == 2


def test_a_second_round_starts_from_nothing():
    registry = ProfileRegistry()
    assert calibrate(registry, num_requests=2).num_requests == 2
    again = calibrate(registry, num_requests=2, first=2)
    assert again.num_requests == 2
    assert np.array_equal(again.record.confidence, stack([one_recording(seed=seed) for seed in (2, 3)]).confidence,
                          equal_nan=True)  # fmt: skip


def test_requests_may_ask_for_different_numbers_and_no_recording_counts_twice():
    registry = ProfileRegistry()
    assert all(registry.claim(KEY, req_id, 3) for req_id in "abc")
    few = registry.deliver(KEY, "a", one_recording(seed=1), 1)
    assert registry.find(KEY) is few and few.num_requests == 1
    assert registry.deliver(KEY, "b", one_recording(seed=2), 2) is None
    both = registry.deliver(KEY, "c", one_recording(seed=3), 2)
    assert registry.find(KEY, 2) is both and both.num_requests == 2


@pytest.mark.parametrize("change", [{"task": "b"}, {"block_length": 8}, {"cache": "none"}, {"threshold": 0.8}])
def test_profiles_apply_to_exactly_their_key(change):
    registry = ProfileRegistry()
    registry.publish(recorded())
    assert registry.find(replace(KEY, **change)) is None


@pytest.mark.parametrize("is_in_memory", [True, False])
def test_a_profile_of_fewer_requests_than_asked_for_is_not_found(store, is_in_memory):
    registry = ProfileRegistry(store=store)
    profile = recorded(num_requests=3)
    if is_in_memory:
        registry.publish(profile)
    else:
        store.save(profile)
    assert registry.find(KEY, 4) is None and registry.claim(KEY, "a", 4)
    assert same(registry.find(KEY, 3), profile) and same(registry.find(KEY, 1), profile)


def test_an_evicted_profile_comes_back_without_calibrating(store):
    registry = ProfileRegistry(max_profiles=2, store=store)
    keys = [of_task(task) for task in "abc"]
    for seed, key in enumerate(keys):
        registry.publish(recorded(key, seed))
    assert list(registry.profiles) == keys[1:]
    assert registry.find(keys[1]) is not None  # now the least recently used one is c
    assert registry.find(keys[0]).profile_id == recorded(keys[0], 0).profile_id
    assert list(registry.profiles) == [keys[1], keys[0]]
    assert registry.counts == Counter(made=3, loaded=1)


def test_a_second_engine_finds_what_the_first_has_made(engines):
    first, second = engines
    assert second.find(KEY) is None
    made = calibrate(first)
    assert same(second.find(KEY), made)
    assert first.counts == Counter(made=1) and second.counts == Counter(loaded=1)
    second.find(KEY)
    assert second.counts == Counter(loaded=1)


def test_an_engine_that_calibrates_takes_up_what_another_finished_sooner(engines):
    first, second = engines
    for engine in engines:
        assert engine.find(KEY, 2) is None and engine.claim(KEY, "a", 2) and engine.claim(KEY, "b", 2)
        assert engine.find(KEY, 2) is None
    first.deliver(KEY, "a", one_recording(seed=1), 2)
    made = first.deliver(KEY, "b", one_recording(seed=2), 2)
    first.flush()
    assert second.find(KEY, 2) is None  # asked once per recording, not once per request
    second.deliver(KEY, "a", one_recording(seed=3), 2)
    assert same(second.find(KEY, 2), made)


def test_a_profile_is_written_beside_the_caller_and_is_there_when_it_is_asked_for(store, monkeypatch):
    """The engine's step goes on while a slow disk syncs; whoever reads the task's file waits for it."""
    may_write, save = threading.Event(), store.save
    monkeypatch.setattr(store, "save", lambda profile: may_write.wait(60) and save(profile))
    registry = ProfileRegistry(max_profiles=1, store=store)
    made = calibrate(registry, flush=False)
    assert registry.find(KEY) is made and not store.path(KEY.task).exists()
    threading.Timer(0.1, may_write.set).start()
    calibrate(registry, OTHER, flush=False)  # the first one leaves the memory
    assert same(registry.find(KEY), made)
    registry.flush()
    assert store.load(OTHER) is not None


def test_a_file_that_cannot_be_used_is_counted(store):
    registry = ProfileRegistry(store=store)
    store.save(recorded())
    store.path("gsm").write_text("{")
    assert registry.find(KEY) is None
    assert registry.counts == Counter(rejected=1)


def test_a_stale_profile_is_used_no_more_though_it_is_on_disk(store):
    registry = ProfileRegistry(store=store)
    stale = calibrate(registry)
    registry.mark_stale(stale)
    assert store.load(KEY) is not None
    assert registry.find(KEY) is None and registry.claim(KEY, "a") and registry.find(KEY) is None
    fresh = registry.deliver(KEY, "a", one_recording(seed=9))
    assert registry.find(KEY) is fresh
    registry.mark_stale(stale)  # a request that used it ends late
    assert registry.find(KEY) is fresh


def test_instead_of_a_stale_profile_another_engines_newer_one_is_loaded(engines):
    first, second = engines
    stale = calibrate(first)
    assert same(second.find(KEY), stale)
    second.mark_stale(second.find(KEY))
    assert second.find(KEY) is None
    newer = calibrate(first, first=5)
    assert same(second.find(KEY), newer)


def test_a_profile_that_another_process_writes_replaces_that_in_memory(engines, monkeypatch):
    monkeypatch.setattr("vllm_osdt.calibration.registry.LOOK_INTERVAL_S", 3600.0)
    one, other = engines
    old = calibrate(one)
    assert one.find(KEY) is old and one.counts["loaded"] == 0
    newer = replace(recorded(seed=5), created="9999-01-01T00:00:00+00:00")
    other.publish(newer)
    other.flush()
    assert one.find(KEY) is old  # looked at just now
    monkeypatch.setattr("vllm_osdt.calibration.registry.LOOK_INTERVAL_S", 0.0)
    assert one.find(KEY).profile_id == newer.profile_id != old.profile_id
    assert one.find(KEY) is one.find(KEY) and one.counts["loaded"] == 1


def test_a_file_that_was_written_before_or_is_gone_or_damaged_replaces_nothing(engines, store, monkeypatch):
    monkeypatch.setattr("vllm_osdt.calibration.registry.LOOK_INTERVAL_S", 0.0)
    one, other = engines
    profile = calibrate(one)
    other.publish(replace(recorded(seed=5), created="2000-01-01T00:00:00+00:00"))
    other.flush()
    assert one.find(KEY) is profile
    store.path(KEY.task).write_text("{")
    assert one.find(KEY) is profile and one.counts["rejected"] == 1
    assert not store.path(KEY.task).exists()
    assert one.find(KEY) is profile


def test_a_stale_profile_of_one_task_leaves_the_others(store):
    registry = ProfileRegistry(store=store)
    stale, other = calibrate(registry), calibrate(registry, OTHER)
    registry.mark_stale(stale)
    assert registry.find(OTHER) is other


def test_a_replaced_or_stale_profile_can_be_pinned(store):
    registry = ProfileRegistry(store=store)
    replaced = calibrate(registry)
    stale = calibrate(registry, first=5)
    registry.mark_stale(stale)
    current = calibrate(registry, first=7)
    for profile in (replaced, stale, current):
        assert same(registry.find_pinned("gsm", profile.profile_id), profile)
    assert registry.find(KEY) is current
    assert registry.find_pinned("gsm", "0" * 16) is None
    store.remove(replaced)
    assert same(registry.find_pinned("gsm", replaced.profile_id), replaced)  # this process has it


def test_without_a_store_the_memory_is_searched_for_a_pin():
    registry = ProfileRegistry()
    profile = calibrate(registry)
    assert registry.find_pinned("gsm", profile.profile_id) is profile
    assert registry.find_pinned("gsm", "0" * 16) is None


def test_unfinished_rounds_of_many_tasks_are_bounded_and_running_ones_kept():
    registry = ProfileRegistry(max_profiles=3)
    registry.claim(KEY, "runs", 2)
    for index in range(20):
        key = of_task(f"task {index}")
        registry.claim(key, "a", 2)
        registry.deliver(key, "a", one_recording(), 2)
    assert len(registry._rounds) <= 4  # those idle, and one that runs
    assert registry.num_calibrating == 1 and not (registry.claim(KEY, "b", 2) and registry.claim(KEY, "c", 2))
    registry.deliver(KEY, "runs", one_recording(), 2)
    assert isinstance(registry.deliver(KEY, "b", one_recording(seed=1), 2), CalibrationProfile)


def test_pins_and_stale_marks_are_bounded(store):
    registry = ProfileRegistry(max_profiles=2, store=store)
    profiles = [calibrate(registry, of_task(f"task {index}")) for index in range(6)]
    for profile in profiles:
        registry.mark_stale(profile)
        assert same(registry.find_pinned(profile.key.task, profile.profile_id), profile)
    assert len(registry._stale) == len(registry._pinned) == 2 and not registry.profiles


def test_other_weights_find_no_profile_and_write_none(tmp_path):
    registry = ProfileRegistry(store=ProfileStore(tmp_path, MODEL))
    old = calibrate(registry)
    assert registry.claim(OTHER, "under way")
    registry.forget()
    files = sorted(tmp_path.rglob("*"))
    assert registry.find(KEY) is registry.find_pinned(KEY.task, old.profile_id) is registry.early(OTHER) is None
    assert registry.num_calibrating == 0
    new = calibrate(registry, first=5)
    assert registry.find(KEY) is new and sorted(tmp_path.rglob("*")) == files


def test_weights_that_come_back_find_the_profiles_of_their_files(tmp_path):
    stores = [ProfileStore(tmp_path, replace(MODEL, weights=name)) for name in ("old", "new")]
    registry = ProfileRegistry(store=stores[0])
    old = calibrate(registry)
    registry.forget(stores[1])
    assert registry.find(KEY) is None
    new = calibrate(registry, first=5)
    registry.forget(stores[0])
    assert registry.find(KEY).profile_id == old.profile_id
    assert registry.find_pinned(KEY.task, new.profile_id) is None
    registry.forget(stores[1])
    assert registry.find(KEY).profile_id == new.profile_id
