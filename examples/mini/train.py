"""Trains a bundled model from scratch: `python -m examples.mini.train --model NAME --out DIR`."""

import argparse
import functools
import json
import math
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from examples.mini.evaluate import CALIBRATION_THRESHOLD, evaluate, static_rule
from examples.mini.model import MiniConfig, MiniLLaDA, beside_clean_blocks, beside_stale_cache
from vllm_osdt.mini import gen_length_of, tasks_of
from vllm_osdt.mini.tasks import LIST_TASKS, TEXT_TASKS, generate, tasks_beside
from vllm_osdt.mini.tasks.base import tokenize
from vllm_osdt.mini.tasks.lists import ITEMS
from vllm_osdt.mini.tasks.multiple_choice import LETTERS
from vllm_osdt.mini.tasks.stories import KINDS
from vllm_osdt.mini.tokenizer import EOS_ID, MASK_ID, build_tokenizer, build_vocabulary, save_tokenizer

# Padding tokens right after the answer that count fully, and the weight of those behind them.
NUM_EOS = 4
PADDING_WEIGHT = 0.1
# Weight of numbers, verdicts and letters, which depend on other tokens, and of the parts of a split, which follow one
# of two words, and the kinds of things in a story. Only such a token can stand in such a place, so the weights leave
# the confidences calibrated.
DEPENDENT_WEIGHT, PART_WEIGHT, KIND_WEIGHT = 3.0, 6.0, 12.0
DEPENDENT_WORDS = ("no", "skip", "pick", *LETTERS)
BEFORE_PARTS = ("gets", "+")
# Share of masked blocks in which only dependent tokens are masked: decoding leaves them for last.
DEPENDENT_SHARE = 0.4
# Of a list task: share of masked blocks in which neighbours are masked, as the row of a square.
SPAN_SHARE = 0.4
# What a batch shows the model: masks anywhere; what decoding meets without a cache (clear blocks, the active one,
# masked blocks); the same with a stale cache, and how many states of the active block stand beside it.
VIEWS = {"anywhere": 0.25, "exact": 0.25, "stale": 0.5}
LIST_VIEWS = {"anywhere": 0.05, "exact": 0.15, "stale": 0.8}
NUM_STATES = 2
# Masked states of each block that a block-causal model sees at once.
NUM_BLOCK_STATES = 1
# Share of each task in a step.
TASK_SHARES = {"word_problems": 0.4, "code": 0.4, "multiple_choice": 0.2, "stories": 1.0}
# Most lists are learnt soon.
TASK_SHARES |= dict.fromkeys(LIST_TASKS, 0.02) | {"reverse": 0.05, "sort": 0.05}
TASK_SHARES |= {"insert_random": 0.08, "replace_random": 0.22, "shuffle": 0.1, "latin_square": 0.4}
# The same of a block-causal model, whose training has no earlier part with even shares.
BLOCK_CAUSAL_LIST_SHARES = dict.fromkeys(LIST_TASKS, 0.05) | {"copy": 0.04, "remove": 0.04, "reverse": 0.07}
BLOCK_CAUSAL_LIST_SHARES |= {"sort": 0.07, "insert_random": 0.1, "remove_random": 0.06, "replace_random": 0.17}
BLOCK_CAUSAL_LIST_SHARES |= {"shuffle": 0.1, "latin_square": 0.25}
# Weight of the blocks behind the active one, which stay fully masked.
LATER_WEIGHT = 0.3
# Canvas lengths beside the shortest that fits, and the chance of each.
CANVAS_LENGTHS = {96: 0.35, 128: 0.15}
TEXT_CANVAS_LENGTHS = {96: 0.15}
LIST_CANVAS_LENGTHS = {32: 0.1}
EMA_DECAY = 0.99
# Of the learning rate, for each of make_optimizers.
LEARNING_RATE_SHARES = (1.0, 0.5)
WARMUP_STEPS = 100
FINAL_LEARNING_RATE = 0.02  # of the peak
MAX_GRADIENT_NORM = 1.0

Group = tuple[np.ndarray, np.ndarray, np.ndarray]  # prompts [n, P], answers [n, max length], answer lengths [n]


def encode_pool(task: str, count: int, seed: int) -> list[Group]:
    """Draws training problems with one answer each and groups them by prompt length."""
    vocabulary = build_vocabulary(tasks_beside(task))
    rng = random.Random(seed)
    encoded = defaultdict(list)
    for problem in generate(task, "train", count, seed):
        prompt, answer = (
            [vocabulary[token] for token in tokenize(text)] for text in (problem.prompt, problem.sample_answer(rng))
        )
        encoded[len(prompt)].append((prompt, answer))
    groups = []
    for pairs in encoded.values():
        prompts, answers = zip(*pairs, strict=True)
        lengths = np.array([len(answer) for answer in answers])
        padded = np.full((len(answers), lengths.max()), EOS_ID, dtype=np.int64)
        for row, answer in zip(padded, answers, strict=True):
            row[: len(answer)] = answer
        groups.append((np.array(prompts, dtype=np.int64), padded, lengths))
    return groups


@functools.cache
def dependent_ids(task: str) -> np.ndarray:
    """Ids of the tokens of a task that depend on others."""
    if task in LIST_TASKS:
        vocabulary = build_vocabulary(tuple(LIST_TASKS))
        return np.array([vocabulary[item] for item in ITEMS])
    if task in TEXT_TASKS:
        vocabulary = build_vocabulary(tuple(TEXT_TASKS))
        return np.array([vocabulary[word] for kind in KINDS for word in (kind.usual, kind.odd)])
    numbers = [token for token in build_vocabulary() if token.isdigit()]
    return np.array([build_vocabulary()[token] for token in (*numbers, *DEPENDENT_WORDS)])


@dataclass(frozen=True)
class Batch:
    """Inputs of one forward pass and what it should predict."""

    token_ids: Tensor  # [size, length], masked
    targets: Tensor  # [size, length]
    weights: Tensor  # [size, length] float32, 0 where nothing is to be predicted
    positions: Tensor | None = None  # as MiniLLaDA.forward takes them
    visible: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device."""
        return Batch(**{name: part.to(device) for name, part in vars(self).items() if part is not None})


def draw_masks(rng: np.random.Generator, is_dependent: np.ndarray, task: str) -> np.ndarray:
    """Draws masked positions at a rate that differs by row; in some rows only dependent tokens, or neighbours."""
    masked = rng.random(is_dependent.shape) < 1.0 - rng.random((len(is_dependent), 1))
    if task in LIST_TASKS:
        is_answer = is_dependent[:, ::-1].cumsum(1)[:, ::-1] > 0
        edges = np.sort(rng.random((len(is_dependent), 2)) * is_answer.sum(1, keepdims=True)).astype(int)
        places = np.arange(is_dependent.shape[1])
        spans = (places >= edges[:, :1]) & (places <= edges[:, 1:])
        masked = np.where(rng.random((len(is_dependent), 1)) < SPAN_SHARE, spans, masked)
    return masked & (is_dependent | (rng.random((len(is_dependent), 1)) >= DEPENDENT_SHARE))


def item_factors(masked: np.ndarray, is_dependent: np.ndarray, task: str) -> np.ndarray:
    """Factor of every weight, `[rows, length]`; of items in a list task their number in the row over the masked ones.

    So the last items of a list, which follow from all others, count as much as the first ones, which follow from none.

    Source:
        The weight 1/t of masked diffusion's likelihood bound (arXiv 2406.07524), with the share that was drawn for t.
    """
    if task not in LIST_TASKS:
        return np.ones(masked.shape)
    number, asked = is_dependent.sum(1, keepdims=True), (masked & is_dependent).sum(1, keepdims=True)
    return np.where(masked & is_dependent, number / np.maximum(asked, 1), 1.0)


def weights_of(canvas: np.ndarray, lengths: np.ndarray, task: str) -> tuple[np.ndarray, np.ndarray]:
    """Loss weight of every position of answers with these lengths, and which tokens are dependent."""
    weights = np.where(np.arange(canvas.shape[1]) < lengths[:, None] + NUM_EOS, 1.0, PADDING_WEIGHT)
    is_dependent = np.isin(canvas, dependent_ids(task))
    weights = np.where(is_dependent, KIND_WEIGHT if task in TEXT_TASKS else DEPENDENT_WEIGHT, weights)
    if task in TEXT_TASKS or task in LIST_TASKS:
        return weights, is_dependent
    weights[:, 1:][np.isin(canvas[:, :-1], [build_vocabulary()[word] for word in BEFORE_PARTS])] = PART_WEIGHT
    return weights, is_dependent


def longer_canvases(task: str) -> dict[int, float]:
    """Canvas lengths beside the shortest that fits, and the chance of each."""
    if task in LIST_TASKS:
        return LIST_CANVAS_LENGTHS
    return TEXT_CANVAS_LENGTHS if task in TEXT_TASKS else CANVAS_LENGTHS


def draw_batch(rng: np.random.Generator, groups: list[Group], size: int, block_length: int, task: str) -> Batch:
    """Draws problems of one prompt length and a view of them."""
    sizes = np.array([len(lengths) for _, _, lengths in groups])
    prompts, answers, lengths = groups[rng.choice(len(groups), p=sizes / sizes.sum())]
    rows = rng.integers(len(lengths), size=size)
    prompts, answers, lengths = prompts[rows], answers[rows], lengths[rows]
    fitting = -(-int(lengths.max()) // block_length) * block_length
    longer = longer_canvases(task)
    wanted = rng.choice([fitting, *longer], p=[1 - sum(longer.values()), *longer.values()])
    canvas_length = max(fitting, int(wanted))
    canvas = np.full((size, canvas_length), EOS_ID, dtype=np.int64)
    canvas[:, : answers.shape[1]] = answers[:, :canvas_length]
    weights, is_dependent = weights_of(canvas, lengths, task)
    views = LIST_VIEWS if task in LIST_TASKS else VIEWS
    view = rng.choice(list(views), p=list(views.values()))
    blocks = np.arange(canvas_length) // block_length
    active = rng.integers(lengths // block_length + 1)
    if view == "anywhere":
        masked = rng.random(canvas.shape) < 1.0 - rng.random((size, 1))
    else:
        weights = weights * np.where(blocks > active[:, None], LATER_WEIGHT, 1.0)
        masked = draw_masks(rng, is_dependent, task) if view == "exact" else np.ones(canvas.shape, dtype=bool)
        masked = (blocks == active[:, None]) & masked | (blocks > active[:, None])

    prompt_length = prompts.shape[1]
    token_ids = torch.from_numpy(np.concatenate((prompts, np.where(masked, MASK_ID, canvas)), axis=1))
    targets = torch.from_numpy(np.concatenate((prompts, canvas), axis=1))
    weights = weights * masked * item_factors(masked, is_dependent, task)
    asked = F.pad(torch.from_numpy(weights).float(), (prompt_length, 0))
    if view != "stale":
        return Batch(token_ids, targets, asked)
    inside = np.where(blocks == active[:, None])[1].reshape(size, 1, block_length).repeat(NUM_STATES, axis=1)
    state_is_dependent = np.take_along_axis(is_dependent[:, None], inside, axis=2).reshape(-1, block_length)
    drawn = draw_masks(rng, state_is_dependent, task)
    state_factors = torch.from_numpy(drawn * item_factors(drawn, state_is_dependent, task)).float()
    state_masks = torch.from_numpy(drawn.reshape(inside.shape))
    states = torch.from_numpy(np.take_along_axis(canvas[:, None], inside, axis=2))
    starts = torch.from_numpy(prompt_length + active * block_length)
    token_ids, positions, visible = beside_stale_cache(token_ids, starts, states.masked_fill(state_masks, MASK_ID))
    state_asked = asked.gather(1, positions[:, targets.shape[1] :]) * state_factors.view(size, -1)
    return Batch(
        token_ids,
        torch.cat((targets, states.flatten(1)), dim=1),
        torch.cat((asked, state_asked), dim=1),
        positions,
        visible,
    )


def draw_block_causal_batch(
    rng: np.random.Generator, groups: list[Group], size: int, block_length: int, task: str
) -> Batch:
    """Draws problems of one prompt length and masked states of their blocks.

    Every block from the prompt's last one on has NUM_BLOCK_STATES of them.
    """
    sizes = np.array([len(lengths) for _, _, lengths in groups])
    prompts, answers, lengths = groups[rng.choice(len(groups), p=sizes / sizes.sum())]
    rows = rng.integers(len(lengths), size=size)
    prompts, answers, lengths = prompts[rows], answers[rows], lengths[rows]
    prompt_length = prompts.shape[1]
    start = prompt_length // block_length * block_length
    length = (prompt_length + int(lengths.max())) // block_length * block_length + block_length
    canvas = np.full((size, length), EOS_ID, dtype=np.int64)
    canvas[:, :prompt_length] = prompts
    canvas[:, prompt_length:][:, : answers.shape[1]] = answers[:, : length - prompt_length]
    weights, is_dependent = np.zeros(canvas.shape), np.zeros(canvas.shape, dtype=bool)
    weights[:, prompt_length:], is_dependent[:, prompt_length:] = weights_of(canvas[:, prompt_length:], lengths, task)

    shape = (size, NUM_BLOCK_STATES, length - start)
    of_blocks = np.broadcast_to(is_dependent[:, None, start:], shape).reshape(-1, block_length)
    drawn = draw_masks(rng, of_blocks, task)
    factors = item_factors(drawn, of_blocks, task).reshape(shape)
    masked = torch.from_numpy(drawn.reshape(shape))
    masked[..., : prompt_length - start] = False
    clean = torch.from_numpy(canvas)
    targets = clean[:, None, start:].expand(shape)
    states = targets.masked_fill(masked, MASK_ID)
    token_ids, positions, visible = beside_clean_blocks(states, clean, start, block_length)
    asked = torch.from_numpy(weights[:, None, start:] * factors).float() * masked
    return Batch(
        token_ids,
        torch.cat((clean, targets.flatten(1)), dim=1),
        torch.cat((torch.zeros(clean.shape), asked.flatten(1)), dim=1),
        positions,
        visible,
    )


DRAW = {"llada": draw_batch, "sdar": draw_block_causal_batch}
SMALL = functools.partial(MiniConfig, d_model=128, n_layers=3, n_heads=4, mlp_hidden_size=352)
CONFIGS = {
    "llada-mini": functools.partial(MiniConfig),
    "sdar-mini": functools.partial(MiniConfig, family="sdar", block_length=8),
    "text-mini": SMALL,
    "lists-mini": functools.partial(SMALL, block_length=16),
    "sdar-lists-mini": functools.partial(SMALL, family="sdar", block_length=8),
}


def task_shares(name: str) -> dict[str, float]:
    """Share of each task of a model in a step and in its loss."""
    is_block_causal = CONFIGS[name](vocab_size=0, eos_token_id=EOS_ID, mask_token_id=MASK_ID).is_block_causal
    shares = TASK_SHARES | BLOCK_CAUSAL_LIST_SHARES if is_block_causal else TASK_SHARES
    return {task: shares[task] for task in tasks_of(name)}


def loss_of(model: MiniLLaDA, batch: Batch) -> tuple[Tensor, float]:
    """Weighted cross-entropy of the masked positions, and the share of fully weighted ones predicted right."""
    with torch.autocast(batch.token_ids.device.type, dtype=torch.bfloat16):
        logits = model(batch.token_ids, batch.positions, batch.visible)
    asked = batch.weights > 0
    logits, targets, weights = logits[asked].float(), batch.targets[asked], batch.weights[asked]
    losses = F.cross_entropy(logits, targets, reduction="none")
    counted = weights >= 1.0
    is_right = logits.detach()[counted].argmax(-1) == targets[counted]
    return (losses * weights).sum() / weights.sum(), is_right.float().mean().item()


def learning_rate_factor(step: int, num_steps: int) -> float:
    """Linear warm-up, then a cosine down to FINAL_LEARNING_RATE."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / max(1, num_steps - WARMUP_STEPS)
    return FINAL_LEARNING_RATE + (1 - FINAL_LEARNING_RATE) * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizers(model: MiniLLaDA) -> tuple[torch.optim.Optimizer, ...]:
    """Muon for the matrices inside the layers, which needs half the steps of AdamW here, and AdamW for the rest."""
    matrices = {name: weight for name, weight in model.named_parameters() if ".blocks." in name and weight.dim() == 2}
    rest = [weight for name, weight in model.named_parameters() if name not in matrices]
    return (
        torch.optim.Muon(list(matrices.values()), weight_decay=0.02, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    )


def export(model: MiniLLaDA, averages: dict[str, Tensor], folder: Path, name: str) -> MiniLLaDA:
    """Writes a loadable checkpoint of the averaged weights of the model of this name."""
    averaged = MiniLLaDA(model.config)
    averaged.load_state_dict(averages)
    averaged.save(folder)
    save_tokenizer(build_tokenizer(tasks_of(name)), folder, model.config.max_sequence_length)
    generation = {"eos_token_id": EOS_ID, "pad_token_id": EOS_ID}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    return averaged.eval()


def log_curve(folder: Path, entry: dict[str, float | int | dict[str, float]]) -> None:
    """Appends one line to the learning curve."""
    with (folder / "learning_curve.jsonl").open("a") as curve:
        curve.write(json.dumps(entry) + "\n")
    print(json.dumps(entry), flush=True)


def train(options: argparse.Namespace) -> None:
    """Runs the training; a `state.pt` in the output folder is continued."""
    torch.manual_seed(options.seed)
    device, folder = torch.device(options.device), options.out
    folder.mkdir(parents=True, exist_ok=True)
    tasks, gen_length = tasks_of(options.model), gen_length_of(options.model)
    model = MiniLLaDA(CONFIGS[options.model](len(build_vocabulary(tasks)), EOS_ID, MASK_ID))
    draw = DRAW[model.config.family]
    shares = task_shares(options.model)
    model.initialize()
    model.to(device)
    optimizers = make_optimizers(model)
    averages = {name: weight.clone() for name, weight in model.state_dict().items()}
    first_step, rng = 0, np.random.default_rng(options.seed)
    if (folder / "state.pt").exists():
        state = torch.load(folder / "state.pt", map_location=device)
        model.load_state_dict(state["model"])
        for optimizer, optimizer_state in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(optimizer_state)
        averages, first_step, rng.bit_generator.state = state["averages"], state["step"], state["rng"]
    pools = {task: encode_pool(task, options.pool, options.seed) for task in tasks}
    for step in range(first_step, options.steps):
        started = time.perf_counter()
        for optimizer, share in zip(optimizers, LEARNING_RATE_SHARES, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = share * options.learning_rate * learning_rate_factor(step, options.steps)
        total_loss, token_accuracy = 0.0, {}
        for task, groups in pools.items():
            size = max(1, round(options.batch * shares[task]))
            batch = draw(rng, groups, size, model.config.block_length, task)
            loss, share = loss_of(model, batch.to(device))
            token_accuracy[task] = round(share, 4)
            (loss * shares[task]).backward()
            total_loss += loss.item() * shares[task]
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        decay = min(EMA_DECAY, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(averages.values()), list(model.state_dict().values()), 1 - decay)
        is_last = step + 1 == options.steps
        entry: dict[str, float | dict[str, float]] = {"step": step + 1, "loss": round(total_loss, 4)}
        entry |= {"seconds": round(time.perf_counter() - started, 3), "token_accuracy": token_accuracy}
        if (step + 1) % options.evaluate_every == 0 or is_last:
            averaged = export(model, averages, folder, options.model).to(device)
            if options.snapshots:
                export(model, averages, folder / "snapshots" / f"{step + 1:05d}", options.model)
            held_out = {task: generate(task, "held_out", options.evaluate_problems, seed=1) for task in tasks}
            entry["decoded_accuracy"] = {
                task: evaluate(averaged, problems, static_rule(CALIBRATION_THRESHOLD), gen_length).accuracy
                for task, problems in held_out.items()
            }
            state = {"model": model.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in optimizers]}
            state |= {"averages": averages, "step": step + 1, "rng": rng.bit_generator.state}
            torch.save(state, folder / "state.pt")
        if (step + 1) % options.log_every == 0 or "decoded_accuracy" in entry:
            log_curve(folder, entry)


def read_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of a training, by default those of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=CONFIGS, default="llada-mini")
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint; a run in it is continued")
    parser.add_argument("--steps", type=int, default=3600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--batch", type=int, default=96, help="sequences per step, all tasks together")
    parser.add_argument("--learning-rate", type=float, default=4e-3, help="peak learning rate")
    parser.add_argument("--pool", type=int, default=150_000, help="training problems per task")
    parser.add_argument("--log-every", type=int, default=20, help="steps between lines of the learning curve")
    parser.add_argument("--evaluate-every", type=int, default=300, help="steps between checkpoints and evaluations")
    parser.add_argument("--evaluate-problems", type=int, default=40, help="held-out problems per task and evaluation")
    parser.add_argument("--snapshots", action="store_true", help="keep the checkpoint of every evaluation")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    train(read_options())
