"""Batches, checkpoints and the bundled model."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from vllm_osdt.mini import model_path
from vllm_osdt.mini.evaluate import evaluate, static_rule
from vllm_osdt.mini.model import MiniLLaDA
from vllm_osdt.mini.tasks import TASKS, generate
from vllm_osdt.mini.train import NUM_EOS, PADDING_WEIGHT, draw_batch, encode_pool, train

BLOCK_LENGTH = 32
MAX_CHECKPOINT_BYTES = 9.5e6
NUM_PROBLEMS = 8


def test_importing_the_package_loads_no_torch():
    code = "import sys, vllm_osdt.mini; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_model_path_names_the_known_models():
    assert Path(model_path("llada-mini")).name == "llada-mini"
    with pytest.raises(ValueError, match="known models: llada-mini"):
        model_path("llada-maxi")


@pytest.mark.parametrize("task", TASKS)
def test_batches_mask_only_the_canvas_and_weigh_the_answer(task):
    groups = encode_pool(task, 100, 0)
    rng = np.random.default_rng(0)
    for _ in range(20):
        clear, masked, weights = draw_batch(rng, groups, 8, BLOCK_LENGTH)
        prompt_length = next(p.shape[1] for p, _, _ in groups if (clear.shape[1] - p.shape[1]) % BLOCK_LENGTH == 0)
        assert not masked[:, :prompt_length].any()
        assert masked.any()
        assert (weights[:, :prompt_length] == 0).all()
        padding = clear[:, prompt_length:] == 0
        assert padding[:, -1].all() or clear.shape[1] == prompt_length + BLOCK_LENGTH * 2
        late = padding.cumsum(1) > NUM_EOS
        assert (weights[:, prompt_length:][late] <= PADDING_WEIGHT).all()


def test_training_writes_a_checkpoint_and_continues_it(tmp_path):
    options = argparse.Namespace(
        out=tmp_path, steps=2, seed=0, device="cpu", batch=6, learning_rate=2e-3, pool=30, log_every=1,
        evaluate_every=2, evaluate_problems=1,
    )  # fmt: skip
    train(options)
    first = MiniLLaDA.load(tmp_path)
    options.steps = 3
    train(options)
    second = MiniLLaDA.load(tmp_path)
    assert not torch.equal(*(model.state_dict()["model.transformer.wte.weight"] for model in (first, second)))
    curve = [json.loads(line) for line in (tmp_path / "learning_curve.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in curve] == [1, 2, 3]


def test_bundled_checkpoint_is_small_and_solves_its_tasks():
    folder = Path(model_path("llada-mini"))
    assert sum(path.stat().st_size for path in folder.iterdir()) <= MAX_CHECKPOINT_BYTES
    model = MiniLLaDA.load(folder)
    for task in TASKS:
        score = evaluate(model, generate(task, "held_out", NUM_PROBLEMS, 11), static_rule(0.9))
        assert score.num_right >= NUM_PROBLEMS - 1, task
