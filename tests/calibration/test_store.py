"""Profiles on disk: what comes back, what is set aside, several writers, and the bound on memory."""

import json
import logging
import multiprocessing
import os
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_osdt.calibration.fingerprint import PIECE_BYTES, ModelFingerprint, hash_weights
from vllm_osdt.calibration.profile import CalibrationProfile, ProfileKey
from vllm_osdt.calibration.registry import ProfileRegistry
from vllm_osdt.calibration.store import ProfileStore, default_folder, from_stored, to_stored

MODEL = ModelFingerprint("abc", "none", "float32", 100, 99)
KEY = ProfileKey("gsm", 4, "dual", 0.9)


def recorded(key=KEY, seed=0, num_blocks=2):
    """A profile as the recorder makes it: fewer positions are masked from step to step, unused steps are empty."""
    rng = np.random.default_rng(seed)
    shape = (num_blocks, key.block_length, key.block_length)
    confidence, committed = np.full(shape, np.nan, np.float32), np.zeros(shape, bool)
    for block in range(num_blocks):
        masked = np.ones(key.block_length, bool)
        for step in range(key.block_length):
            if not masked.any():
                break
            confidence[block, step, masked] = rng.random(masked.sum(), dtype=np.float32)
            committed[block, step] = masked & (rng.random(key.block_length) < 0.7)
            masked &= ~committed[block, step]
    return CalibrationProfile(key, confidence, committed)


def same(left, right):
    """Whether two profiles hold the same."""
    return (
        (left.key, left.created, left.versions, left.profile_id)
        == (right.key, right.created, right.versions, right.profile_id)
        and np.array_equal(left.confidence, right.confidence, equal_nan=True)
        and np.array_equal(left.committed, right.committed)
    )


@pytest.fixture
def store(tmp_path):
    return ProfileStore(tmp_path, MODEL)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 8), st.integers(1, 4))
def test_the_stored_form_loses_nothing(seed, block_length, num_blocks):
    profile = recorded(replace(KEY, block_length=block_length), seed, num_blocks)
    assert same(from_stored("gsm", to_stored(profile)), profile)


def test_what_was_saved_comes_back(store):
    profile = recorded()
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
        store.save(recorded(replace(KEY, task=task), seed))
    ids = [store.load(replace(KEY, task=task)).profile_id for task in tasks]
    assert len(set(ids)) == len(tasks)
    other = ProfileStore(tmp_path, replace(MODEL, dtype="bfloat16"))
    assert other.load(replace(KEY, task="a b")) is None
    assert all(path.parent == store.folder for path in tmp_path.rglob("*.json"))


def damaged(content, change):
    """File content with one field changed."""
    *path, last = change[0]
    inner = content
    for part in path:
        inner = inner[part]
    inner[last] = change[1]
    return json.dumps(content)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ((["schema_version"], 2), "schema_version"),
        ((["fingerprint", "weights"], "xyz"), "fingerprint"),
        ((["task"], "other"), "task"),
        ((["surprise"], 1), "surprise"),
        ((["profiles", 0, "cache"], "half"), "profiles.0.cache"),
        ((["profiles", 0, "threshold"], 1.5), "profiles.0.threshold"),
        ((["profiles", 0, "num_steps"], 1), "blocks.0"),
        ((["profiles", 0, "blocks", 0, 0, "confidence", 1], 2.0), "blocks.0.0.confidence"),
        ((["profiles", 0, "blocks", 0, 0, "confidence"], [0.5]), "blocks.0.0.confidence"),
        ((["profiles", 0, "blocks", 0, 0, "confidence", 0], "high"), "profiles.0.blocks.0.0.confidence.0"),
        ((["profiles", 0, "blocks", 0, 0, "confidence", 0], 0.123), "profiles.0.id"),
        ((["profiles", 0, "blocks", 0, 0, "committed"], [4]), "blocks.0.0.committed"),
        ((["profiles", 0, "blocks"], []), "blocks.0"),
    ],
)
def test_a_file_that_cannot_be_used_is_set_aside_and_its_field_named(store, caplog, change, field):
    store.save(recorded())
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


def test_an_evicted_profile_comes_back_without_calibrating(store):
    registry = ProfileRegistry(max_profiles=2, store=store)
    keys = [replace(KEY, task=task) for task in "abc"]
    for seed, key in enumerate(keys):
        registry.publish(recorded(key, seed), "x")
    assert list(registry.profiles) == keys[1:]
    assert registry.find(keys[1]) is not None  # now the least recently used one is c
    assert registry.find(keys[0]).profile_id == recorded(keys[0], 0).profile_id
    assert list(registry.profiles) == [keys[1], keys[0]]


def test_a_second_engine_finds_what_the_first_has_made(tmp_path):
    first, second = (ProfileRegistry(store=ProfileStore(tmp_path, MODEL)) for _ in range(2))
    assert second.find(KEY) is None
    first.claim(KEY, "a")
    first.publish(recorded(), "a")
    assert same(second.find(KEY), first.find(KEY))


def test_a_rank_that_does_not_read_takes_what_it_is_given(tmp_path):
    given_profile = recorded()
    other = ProfileRegistry(store=ProfileStore(tmp_path, MODEL), is_writer=False, share=lambda found: given_profile)
    assert other.find(KEY) is given_profile
    other.publish(recorded(seed=1), "a")
    assert not list(tmp_path.rglob("*.json"))


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
