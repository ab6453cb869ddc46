"""Batches, checkpoints and the bundled model."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from examples.mini import train as training
from examples.mini.evaluate import evaluate, static_rule
from examples.mini.model import MiniLLaDA
from examples.mini.train import (
    CONFIGS,
    NUM_EOS,
    NUM_STATES,
    PADDING_WEIGHT,
    VIEWS,
    draw_batch,
    draw_block_causal_batch,
    encode_pool,
    item_factors,
    task_shares,
    train,
)
from vllm_osdt.mini import MODELS, gen_length_of, model_path, tasks_of
from vllm_osdt.mini.tasks import TASKS, generate
from vllm_osdt.mini.tokenizer import EOS_ID, MASK_ID

BLOCK_LENGTH = 32
MAX_CHECKPOINT_BYTES = 9.5e6
NUM_PROBLEMS = 8


def test_importing_the_package_loads_no_torch():
    code = "import sys, vllm_osdt.mini; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_model_path_names_the_known_models():
    assert Path(model_path("llada-mini")).name == "llada-mini"
    with pytest.raises(ValueError, match="known models: llada-mini, sdar-mini, text-mini, lists-mini, sdar-lists-mini"):
        model_path("llada-maxi")


@pytest.fixture(params=[*TASKS, "insert_random"])
def task_and_groups(request):
    return request.param, encode_pool(request.param, 100, 0)


@pytest.mark.parametrize("view", VIEWS)
def test_batches_ask_only_for_masked_tokens_of_the_canvas_and_weigh_the_answer(task_and_groups, view, monkeypatch):
    task, groups = task_and_groups
    monkeypatch.setattr(training, "VIEWS", {view: 1.0})
    monkeypatch.setattr(training, "LIST_VIEWS", {view: 1.0})
    rng = np.random.default_rng(0)
    for _ in range(10):
        batch = draw_batch(rng, groups, 8, BLOCK_LENGTH, task)
        asked = batch.weights > 0
        assert asked.any()
        assert (batch.token_ids[asked] == MASK_ID).all()
        assert torch.equal(batch.token_ids[~asked], batch.targets[~asked])
        num_states = NUM_STATES if view == "stale" else 0
        length = asked.shape[1] - num_states * BLOCK_LENGTH
        prompt_length = max(p.shape[1] for p, _, _ in groups if (length - p.shape[1]) % BLOCK_LENGTH == 0)
        assert not asked[:, :prompt_length].any()
        late = (batch.targets[:, prompt_length:length] == EOS_ID).cumsum(1) > NUM_EOS
        assert (batch.weights[:, prompt_length:length][late] <= PADDING_WEIGHT).all()


def test_later_states_stand_for_the_active_block(monkeypatch):
    monkeypatch.setattr(training, "VIEWS", {"stale": 1.0})
    batch = draw_batch(np.random.default_rng(0), encode_pool("code", 100, 0), 8, BLOCK_LENGTH, "code")
    length = batch.token_ids.shape[1] - NUM_STATES * BLOCK_LENGTH
    rows = torch.arange(8)
    for state in range(NUM_STATES):
        own = slice(length + state * BLOCK_LENGTH, length + (state + 1) * BLOCK_LENGTH)
        positions = batch.positions[:, own]
        assert torch.equal(batch.targets[:, own], batch.targets[:, :length].gather(1, positions))
        assert (batch.token_ids.gather(1, positions) == MASK_ID).all()
        seen = batch.visible[rows, length + state * BLOCK_LENGTH]
        assert seen[:, own].all()
        assert (seen.sum(1) == length).all()
        assert not seen.gather(1, positions).any()
    assert not batch.visible[:, :length, length:].any()


def test_a_block_causal_batch_asks_for_masked_tokens_of_blocks_that_see_finished_ones(task_and_groups):
    task, groups = task_and_groups
    rng = np.random.default_rng(0)
    for _ in range(10):
        batch = draw_block_causal_batch(rng, groups, 6, 8, task)
        asked = batch.weights > 0
        assert asked.any() and (batch.token_ids[asked] == MASK_ID).all()
        assert torch.equal(batch.token_ids[~asked], batch.targets[~asked])
        is_clean = ~(batch.token_ids == MASK_ID).any(0).cummax(0).values
        length = int((batch.positions[0].diff() < 0).nonzero()[0]) + 1  # the noised part begins further left
        assert (batch.token_ids[:, :length] == batch.targets[:, :length]).all() and is_clean[: length // 2].all()
        position, visible = batch.positions[0], batch.visible[0]
        block, is_noised = position // 8, torch.arange(len(position)) >= length
        for row in range(0, len(position), 5):
            own = (block == block[row]) & (is_noised == is_noised[row])
            assert torch.equal(visible[row], own | ~is_noised & (block < block[row]))


def test_the_last_items_of_a_list_weigh_as_much_as_all_of_them_together():
    is_dependent = np.array([[True] * 4 + [False] * 2] * 3)
    masked = np.array([[True] * 6, [False, True, False, False, True, True], [False] * 6])
    factors = item_factors(masked, is_dependent, "shuffle")
    assert (factors * masked * is_dependent).sum(1).tolist() == [4.0, 4.0, 0.0]
    assert (factors[:, 4:] == 1.0).all()
    assert (item_factors(masked, is_dependent, "code") == 1.0).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_the_shares_of_a_models_tasks_add_up_to_one(name):
    shares = task_shares(name)
    assert tuple(shares) == tasks_of(name)
    assert sum(shares.values()) == pytest.approx(1.0)


@pytest.mark.parametrize("model", CONFIGS)
def test_training_writes_a_checkpoint_and_continues_it(tmp_path, model):
    options = argparse.Namespace(
        model=model, out=tmp_path, steps=2, seed=0, device="cpu", batch=6, learning_rate=2e-3, pool=30, log_every=1,
        evaluate_every=2, evaluate_problems=1, snapshots=True,
    )  # fmt: skip
    train(options)
    first = MiniLLaDA.load(tmp_path)
    options.steps = 4
    train(options)
    continued = MiniLLaDA.load(tmp_path)
    assert not torch.equal(*(model.state_dict()["model.transformer.wte.weight"] for model in (first, continued)))
    curve = [json.loads(line) for line in (tmp_path / "learning_curve.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in curve] == [1, 2, 3, 4]
    assert sorted(path.name for path in (tmp_path / "snapshots").iterdir()) == ["00002", "00004"]


@pytest.mark.parametrize("name", MODELS)
def test_bundled_checkpoint_is_small_and_solves_its_tasks(name):
    folder = Path(model_path(name))
    assert sum(path.stat().st_size for path in folder.iterdir()) <= MAX_CHECKPOINT_BYTES
    model = MiniLLaDA.load(folder)
    for task in tasks_of(name):
        score = evaluate(model, generate(task, "held_out", NUM_PROBLEMS, 11), static_rule(0.9), gen_length_of(name))
        assert score.num_right >= NUM_PROBLEMS - 1, task
