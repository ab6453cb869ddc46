"""Profiles on disk: what comes back, what is set aside, how many are kept, several writers."""

import json
import logging
import multiprocessing
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.calibration.records import KEY, MODEL, chosen, of_task, recorded, same
from vllm_osdt.calibration.fingerprint import PIECE_BYTES, hash_weights
from vllm_osdt.calibration.store import MAX_VERSIONS, ProfileStore, default_folder, from_stored, read_file, to_stored


@pytest.fixture
def store(tmp_path):
    return ProfileStore(tmp_path, MODEL)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 8), st.integers(1, 4), st.integers(1, 5))
def test_the_stored_form_loses_nothing(seed, block_length, num_blocks, num_requests):
    profile = recorded(replace(KEY, block_length=block_length), seed, num_blocks, num_requests)
    assert same(from_stored("gsm", to_stored(profile)), profile)


def test_a_record_of_blocks_of_many_lengths_comes_back(store):
    """It has twice the positions."""
    profile = recorded(replace(KEY, cache="dual:adablock0.3,8,14"), num_requests=3)
    assert profile.record.confidence.shape[3] == 2 * KEY.block_length
    store.save(profile)
    assert same(store.load(profile.key), profile) and store.load(KEY) is None


def test_what_was_saved_comes_back(store):
    profile = recorded(num_requests=3)
    assert store.load(KEY) is None
    store.save(profile)
    assert same(store.load(KEY), profile)
    assert profile.versions.keys() == {"vllm", "vllm-osdt"}
    assert [path.suffix for path in sorted(store.folder.iterdir())] == [".json", ".lock"]


def test_a_task_has_one_file_with_an_entry_for_each_way_of_decoding(store):
    other_key = replace(KEY, cache="none")
    store.save(recorded(KEY, 0))
    store.save(recorded(other_key, 1))
    renewed = recorded(KEY, 2)
    store.save(renewed)
    assert same(store.load(KEY), renewed)
    assert same(store.load(other_key), replace(recorded(other_key, 1), created=store.load(other_key).created))
    assert len(list(store.folder.glob("*.json"))) == 1


def test_tasks_with_like_names_and_other_models_do_not_meet(tmp_path, store):
    tasks = ["a b", "a-b", "a/b", "A b", "..", "ä" * 200]
    for seed, task in enumerate(tasks):
        store.save(recorded(of_task(task), seed))
    ids = [store.load(of_task(task)).profile_id for task in tasks]
    assert len(set(ids)) == len(tasks)
    other = ProfileStore(tmp_path, replace(MODEL, dtype="bfloat16"))
    assert other.load(of_task("a b")) is None
    assert all(path.parent == store.folder for path in tmp_path.rglob("*.json"))


def damaged(content, change):
    """File content with one field changed."""
    *path, last = change[0]
    inner = content
    for part in path:
        inner = inner[part]
    inner[last] = change[1]
    return json.dumps(content)


STEP = ["profiles", 0, "requests", 1, 0, 0]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ((["schema_version"], 4), "schema_version"),
        ((["fingerprint", "weights"], "xyz"), "fingerprint"),
        ((["task"], "other"), "task"),
        ((["surprise"], 1), "surprise"),
        ((["profiles", 0, "cache"], "half"), "profiles.0.cache"),
        ((["profiles", 0, "threshold"], 1.5), "profiles.0.threshold"),
        ((["profiles", 0, "block_length"], 1), "requests: a block of"),
        ((["profiles", 0, "requests"], []), "profiles.0.requests"),
        ((["profiles", 0, "requests"], [[], []]), "requests: nothing is recorded in the first block"),
        ((["profiles", 0, "requests", 1], 7), "profiles.0.requests.1"),
        ((["profiles", 0, "requests", 1], []), "profiles.0.id"),
        (([*STEP, "confidence", 1], 2.0), "requests.1.0.0.confidence"),
        (([*STEP, "confidence"], [0.5]), "requests.1.0.0.confidence"),
        (([*STEP, "confidence", 0], "high"), "profiles.0.requests.1.0.0.confidence.0"),
        (([*STEP, "confidence", 0], 0.123), "profiles.0.id"),
        (([*STEP, "committed"], [4]), "requests.1.0.0.committed"),
        (([*STEP, "wrong"], [-1]), "requests.1.0.0.wrong"),
        (([*STEP, "wrong"], None), "profiles.0.requests.1.0.0.wrong"),
        (([*STEP, "tokens"], [1, 2]), "profiles.0.requests.1.0.0.tokens"),
    ],
)
def test_a_file_that_cannot_be_used_is_set_aside_and_its_field_named(store, caplog, change, field):
    store.save(recorded(num_requests=2))
    path = store.path("gsm")
    content = damaged(json.loads(path.read_text()), change)
    path.write_text(content)
    with caplog.at_level(logging.WARNING):
        assert store.load(KEY) is None
    assert field in caplog.text and str(path) in caplog.text
    assert store.num_set_aside == 1
    [aside] = store.folder.glob("*.aside-*")
    assert aside.read_text() == content and not path.exists()
    store.save(recorded(seed=5))
    assert store.load(KEY).profile_id == recorded(seed=5).profile_id


FIRST_SCHEMA = {
    "schema_version": 1,
    "fingerprint": {
        "weights": "abc",
        "quantization": "none",
        "dtype": "float32",
        "vocab_size": 100,
        "mask_token_id": 99,
    },
    "task": "gsm",
    "profiles": [
        {
            "id": "0123456789abcdef",
            "block_length": 4,
            "cache": "dual",
            "threshold": 0.9,
            "created": "2026-01-01T00:00:00+00:00",
            "versions": {"vllm": "0.32.0", "vllm-osdt": "0.1.0"},
            "num_steps": 4,
            "blocks": [[{"confidence": [0.5, 0.5, 0.5, 0.5], "committed": [0, 1, 2, 3]}]],
        }
    ],
}


def test_a_file_of_the_first_schema_is_set_aside_and_the_task_calibrates_again(store, caplog):
    store.folder.mkdir(parents=True)
    store.path("gsm").write_text(json.dumps(FIRST_SCHEMA))
    with caplog.at_level(logging.WARNING):
        assert store.load(KEY) is None
    assert "schema_version" in caplog.text and "calibrates again" in caplog.text
    [aside] = store.folder.glob("*.aside-*")
    assert json.loads(aside.read_text()) == FIRST_SCHEMA
    store.save(recorded())
    assert same(store.load(KEY), replace(recorded(), created=store.load(KEY).created))


def test_the_last_profiles_of_a_key_are_kept_and_the_newest_is_loaded(store):
    history = [recorded(seed=seed) for seed in range(MAX_VERSIONS + 3)]
    other = recorded(replace(KEY, cache="none"), 50)
    store.save(other)
    for number, profile in enumerate(history, 1):
        store.save(profile)
        assert same(store.load(KEY), profile)
        kept = [store.load_id("gsm", old.profile_id) for old in history[:number]]
        assert [old is not None for old in kept] == [number - i <= MAX_VERSIONS for i in range(number)]
        assert all(found is None or same(found, old) for found, old in zip(kept, history, strict=False))
    assert same(store.load(other.key), other)  # another key's do not count
    assert store.load_id("gsm", "0" * 16) is None and store.load_id("code", history[-1].profile_id) is None


def test_a_profile_that_is_saved_again_is_the_newest_and_there_once(store):
    first, second = recorded(seed=1), recorded(seed=2)
    for profile in (first, second, first):
        store.save(profile)
    assert same(store.load(KEY), first)
    content = json.loads(store.path("gsm").read_text())
    assert [entry["id"] for entry in content["profiles"]] == [second.profile_id, first.profile_id]


def test_a_removed_profile_leaves_the_earlier_one_in_its_place(store):
    profiles = [recorded(seed=seed) for seed in (1, 2)]
    for profile in profiles:
        store.save(profile)
    store.remove(profiles[1])
    assert same(store.load(KEY), profiles[0])
    store.remove(profiles[1])  # it is gone already
    store.remove(profiles[0])
    assert store.load(KEY) is None and not store.path("gsm").exists()


def test_a_file_holds_no_tokens(store):
    """Confidences, and positions below the block length: prompts and answers cannot be read from it."""
    store.save(recorded(num_requests=3))
    content = json.loads(store.path("gsm").read_text())
    [profile] = content.pop("profiles")
    assert content.keys() == {"schema_version", "fingerprint", "task", "model"}
    assert profile.keys() == {"id", "block_length", "cache", "threshold", "created", "versions", "requests"}
    for step in (step for request in profile["requests"] for block in request for step in block):
        assert step.keys() == {"confidence", "committed", "wrong"}
        assert all(value is None or 0 <= value <= 1 for value in step["confidence"])
        assert {*step["committed"], *step["wrong"]} <= set(range(KEY.block_length))


def test_among_10_000_tasks_one_is_found_without_listing_the_folder(store, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the folder is listed")

    store.folder.mkdir(parents=True)
    for index in range(10_000):
        store.path(f"task {index}").touch()
    profile = recorded(of_task("the task"))
    for owner, name in ((os, "listdir"), (os, "scandir"), (Path, "glob"), (Path, "rglob"), (Path, "iterdir")):
        monkeypatch.setattr(owner, name, refuse)
    store.save(profile)
    assert same(store.load(profile.key), profile)
    assert same(store.load_id("the task", profile.profile_id), profile)
    assert store.load(of_task("no such task")) is None
    store.remove(profile)
    assert store.load(profile.key) is None and store.num_set_aside == 0


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[1, 2]", b"null"])
def test_torn_files_are_set_aside_by_readers_and_writers(store, content):
    store.save(recorded())
    store.path("gsm").write_bytes(content)
    assert store.load(KEY) is None
    store.path("gsm").write_bytes(content)
    store.save(recorded(seed=3))
    assert store.load(KEY).profile_id == recorded(seed=3).profile_id
    assert store.num_set_aside == 2


def test_a_damaged_file_in_a_folder_that_may_only_be_read_costs_nothing_but_the_profile(store, caplog, monkeypatch):
    def refuse(self, target):
        raise PermissionError(13, "Permission denied")

    store.save(recorded())
    store.path("gsm").write_bytes(b"{")
    monkeypatch.setattr(type(store.path("gsm")), "replace", refuse)
    with caplog.at_level(logging.WARNING):
        assert store.load(KEY) is None
    assert "Permission denied" in caplog.text and str(store.path("gsm")) in caplog.text


def test_a_folder_that_cannot_be_written_to_costs_only_the_file(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    store = ProfileStore(tmp_path / "file", MODEL)
    with caplog.at_level(logging.WARNING):
        store.save(recorded())
    assert "memory only" in caplog.text
    assert store.load(KEY) is None


def write_many(folder, writer):
    store = ProfileStore(folder, MODEL)
    for round_ in range(20):
        store.save(recorded(replace(KEY, cache=("none", "prefix", "dual")[writer]), seed=100 * writer + round_))
        assert store.load(replace(KEY, cache=("none", "prefix", "dual")[writer])) is not None


def test_writers_of_one_file_lose_nothing(tmp_path):
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=write_many, args=(tmp_path, writer)) for writer in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    store = ProfileStore(tmp_path, MODEL)
    for writer, cache in enumerate(("none", "prefix", "dual")):
        key = replace(KEY, cache=cache)
        assert store.load(key).profile_id == recorded(key, seed=100 * writer + 19).profile_id
    assert sorted({path.suffix for path in store.folder.iterdir()}) == [".json", ".lock"]


def test_the_default_folder_is_the_user_data_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "vllm-osdt" / "profiles"
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_folder() == tmp_path / ".local" / "share" / "vllm-osdt" / "profiles"


def test_weights_are_told_apart_by_content_name_and_size(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    assert hash_weights(folder) is None and hash_weights(tmp_path / "absent") is None
    (folder / "config.json").write_text("{}")
    weights = bytearray(os.urandom(20 * PIECE_BYTES))
    seen = set()
    for change in range(4):
        weights[(0, 7 * PIECE_BYTES, len(weights) - 1, 13 * PIECE_BYTES)[change]] ^= 1
        (folder / "model.safetensors").write_bytes(weights)
        seen.add(hash_weights(folder))
    assert len(seen) == 4
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    assert hash_weights(folder) not in seen


def test_the_models_name_is_kept_and_files_without_one_still_load(tmp_path):
    store = ProfileStore(tmp_path, MODEL, "org/LLaDA-8B")
    store.save(recorded(KEY, 1))
    assert read_file(store.path("gsm")).model == "org/LLaDA-8B"
    content = json.loads(store.path("gsm").read_text())
    del content["model"]
    content["schema_version"] = 2
    store.path("gsm").write_text(json.dumps(content))
    assert read_file(store.path("gsm")).model == "" and store.load(KEY).profile_id == recorded(KEY, 1).profile_id
    store.save(recorded(KEY, 2))
    assert read_file(store.path("gsm")).model == "org/LLaDA-8B"


def test_a_choice_is_kept_and_is_part_of_the_profiles_id(store):
    plain = recorded()
    profile = replace(plain, choice=chosen(factor=1.5))
    others = [replace(plain, choice=chosen(factor=2.0)), replace(plain, choice=chosen("bacd")), plain]
    assert len({one.profile_id for one in (profile, *others)}) == 4
    store.save(profile)
    assert same(store.load(KEY), profile)
    content = json.loads(store.path("gsm").read_text())
    content["profiles"][0]["choice"]["options"]["factor"] = 9.0
    store.path("gsm").write_text(json.dumps(content))
    assert store.load(KEY) is None and store.num_set_aside == 1


def test_a_profile_without_a_choice_is_stored_as_it_was_before_there_were_any(store):
    profile = recorded()
    store.save(profile)
    [stored] = json.loads(store.path("gsm").read_text())["profiles"]
    assert "choice" not in stored and None in stored["requests"][0][0][-1]["confidence"]
    assert store.load(KEY).choice is None


@pytest.mark.parametrize("change", [{"policy": 3}, {"options": {"factor": None}}, {"risk": "low"}, {"num_lost": 0.5}])
def test_a_damaged_choice_is_set_aside(store, change):
    store.save(replace(recorded(), choice=chosen(factor=1.5)))
    content = json.loads(store.path("gsm").read_text())
    content["profiles"][0]["choice"] |= change
    store.path("gsm").write_text(json.dumps(content))
    assert store.load(KEY) is None and store.num_set_aside == 1
