"""Decodes held-out problems without vLLM: `python -m examples.mini.evaluate`."""

import argparse
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from examples.mini.model import MiniLLaDA, beside_stale_cache, block_causal
from vllm_osdt.mini import model_path
from vllm_osdt.mini.tasks import ALL_TASKS, TASKS, check, generate, tasks_beside
from vllm_osdt.mini.tasks.base import Problem, tokenize
from vllm_osdt.mini.tokenizer import build_tokenizer

# No confidence reaches it, so every denoising step unmasks the single best position.
ONE_PER_STEP = 2.0
THRESHOLDS = (ONE_PER_STEP, 0.9, 0.8, 0.7, 0.6, 0.5)
CANVAS_LENGTH = 96
CACHES = ("none", "prefix", "dual")
# OSDT: threshold of the calibration, cap and slack of the rule after it.
CALIBRATION_THRESHOLD, CAP, SLACK = 0.9, 0.9, 0.1
MAX_BATCH = 64

# (confidences, block) -> which positions pass, whatever the shape.
Rule = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Score:
    """Outcome of one task under one rule."""

    num_right: int
    num_problems: int
    nfe: float  # mean of a problem, as num_tokens
    num_tokens: float = 0.0  # up to the end of the answer

    @property
    def accuracy(self) -> float:
        """Share of the problems answered right, in [0, 1]."""
        return self.num_right / self.num_problems

    @property
    def tokens_per_forward(self) -> float:
        """Tokens up to the end of the answer by forward pass."""
        return self.num_tokens / self.nfe

    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the accuracy."""
        z, n, p = 1.96, self.num_problems, self.accuracy
        center = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        return max(0.0, center - half), min(1.0, center + half)


def static_rule(threshold: float) -> Rule:
    """Passes what reaches a fixed threshold."""
    return lambda confidence, block: confidence >= threshold


def osdt_rule(table: Sequence[float]) -> Rule:
    """Passes what exceeds the capped and loosened threshold of the block; blocks past the table use its last."""
    return lambda confidence, block: confidence > min(table[min(block, len(table) - 1)], CAP) * (1 - SLACK)


@torch.no_grad()
def decode(
    model: MiniLLaDA,
    prompts: Tensor,
    rule: Rule,
    canvas_length: int,
    recorded: dict[int, list[float]] | None = None,
    cache: str = "dual",
) -> tuple[Tensor, Tensor]:
    """Decodes prompts of one length block by block.

    Args:
        prompts: `[batch, prompt_length]` ids.
        canvas_length: Of a block-causal model, a lower bound.
        recorded: Collects the confidences of all masked positions by block.
        cache: One of CACHES. What the cache modes compute, without their speed.

    Returns:
        Canvases `[batch, canvas_length]`, where blocks after the one that ends the answer stay masked, and the
        forward passes each request took, `[batch]`.
    """
    config = model.config
    num_prompts, prompt_length = prompts.shape
    first_start = prompt_length
    if config.is_block_causal:  # blocks lie on a grid; the prompt's last, incomplete one is the first to be decoded
        first_start = prompt_length // config.block_length * config.block_length
        canvas_length = -(-(prompt_length + canvas_length) // config.block_length) * config.block_length - prompt_length
    masks = prompts.new_full((num_prompts, canvas_length), config.mask_token_id)
    token_ids = torch.cat((prompts, masks), dim=1)
    nfe = torch.zeros(num_prompts, dtype=torch.long, device=prompts.device)
    running = torch.arange(num_prompts, device=prompts.device)
    for block, start in enumerate(range(first_start, prompt_length + canvas_length, config.block_length)):
        active = slice(start, start + config.block_length)
        rows, entered = running, token_ids.clone()
        while rows.numel():
            nfe[rows] += 1
            logits = block_logits(model, token_ids[rows], entered[rows], active, cache).float()
            logits[..., config.mask_token_id] = -torch.inf
            confidence, proposal = logits.softmax(-1).max(-1)
            canvas = token_ids[rows, active]
            masked = canvas == config.mask_token_id
            if recorded is not None:
                recorded[block].extend(confidence[masked].tolist())
            accepted = masked & rule(confidence, block)
            best = confidence.masked_fill(~masked, -1.0).argmax(-1, keepdim=True)
            accepted.scatter_(1, best, True)
            token_ids[rows, active] = torch.where(accepted, proposal, canvas)
            rows = rows[(masked & ~accepted).any(-1)]
        answer = slice(max(start, prompt_length), active.stop)
        running = running[~(token_ids[running, answer] == config.eos_token_id).any(-1)]
    return token_ids[:, prompt_length:], nfe


def block_logits(model: MiniLLaDA, token_ids: Tensor, entered: Tensor, active: slice, cache: str) -> Tensor:
    """Computes the logits of the active block.

    Args:
        entered: What the sequences were when the block became active, `[batch, length]`.
        cache: One of CACHES. A block-causal model has one exact cache, which is the same as none.

    Returns:
        `[batch, block_length, vocab_size]`.
    """
    if model.config.is_block_causal:
        block = torch.arange(active.stop, device=token_ids.device) // model.config.block_length
        return model(token_ids[:, : active.stop], visible=block_causal(block))[:, active]
    if cache == "none":
        return model(token_ids)[:, active]
    computed = active if cache == "dual" else slice(active.start, token_ids.shape[1])
    starts = torch.full(token_ids.shape[:1], active.start, device=token_ids.device)
    logits = model(*beside_stale_cache(entered, starts, token_ids[:, None, computed]))
    return logits[:, token_ids.shape[1] :][:, : active.stop - active.start]


def evaluate(
    model: MiniLLaDA,
    problems: Sequence[Problem],
    rule: Rule,
    canvas_length: int = CANVAS_LENGTH,
    cache: str = "dual",
) -> Score:
    """Decodes problems in batches of equal prompt length and checks the answers."""
    tokenizer = build_tokenizer(tasks_beside(problems[0].task))
    device = next(model.parameters()).device
    by_length = defaultdict(list)
    for problem in problems:
        prompt = tokenizer.encode(problem.prompt).ids
        by_length[len(prompt)].append((problem, prompt))
    num_right, total_nfe, num_tokens = 0, 0, 0
    for group in by_length.values():
        for first in range(0, len(group), MAX_BATCH):
            batch = group[first : first + MAX_BATCH]
            prompts = torch.tensor([prompt for _, prompt in batch], device=device)
            canvases, nfe = decode(model, prompts, rule, canvas_length, cache=cache)
            total_nfe += int(nfe.sum())
            for (problem, _), canvas in zip(batch, canvases.tolist(), strict=True):
                answer = answer_text(tokenizer, canvas, model.config.eos_token_id)
                num_right += check(problem, answer)
                num_tokens += len(tokenize(answer))
    return Score(num_right, len(problems), total_nfe / len(problems), num_tokens / len(problems))


def answer_text(tokenizer: Tokenizer, canvas: list[int], eos_token_id: int) -> str:
    """The text before the end of the answer."""
    end = canvas.index(eos_token_id) if eos_token_id in canvas else len(canvas)
    return tokenizer.decode(canvas[:end])


def calibrate(
    model: MiniLLaDA, problem: Problem, canvas_length: int = CANVAS_LENGTH, cache: str = "dual"
) -> list[float]:
    """OSDT's table from one request: by block, the lower quartile of the confidences of all masked positions."""
    recorded: dict[int, list[float]] = defaultdict(list)
    prompt = torch.tensor(
        [build_tokenizer(tasks_beside(problem.task)).encode(problem.prompt).ids], device=next(model.parameters()).device
    )
    decode(model, prompt, static_rule(CALIBRATION_THRESHOLD), canvas_length, recorded, cache)
    return [torch.tensor(recorded[block]).quantile(0.25).item() for block in sorted(recorded)]


def main() -> None:
    """Prints accuracy and forward passes for every task and threshold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path(model_path("llada-mini")), help="folder of a checkpoint")
    parser.add_argument("--tasks", nargs="*", choices=ALL_TASKS, default=TASKS)
    parser.add_argument("--problems", type=int, default=300, help="held-out problems per task")
    parser.add_argument("--seed", type=int, default=7, help="seed of the held-out problems")
    parser.add_argument("--canvas-length", type=int, default=CANVAS_LENGTH)
    parser.add_argument("--thresholds", type=float, nargs="*", default=THRESHOLDS, help="above 1: one token per step")
    parser.add_argument("--cache", choices=CACHES, default="dual", help="which keys and values a step sees")
    parser.add_argument("--osdt", type=int, default=0, help="simulate OSDT calibrated on this many requests")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    options = parser.parse_args()
    model = MiniLLaDA.load(options.model).to(options.device)
    print(
        f"{'task':<16}{'rule':<22}{'accuracy':>9}  {'95 % interval':<16}{'n':>5}{'forwards':>10}{'tokens/forward':>16}"
    )
    for task in options.tasks:
        problems = generate(task, "held_out", options.problems, options.seed)
        rules = {
            f"static {threshold}" if threshold <= 1 else "one per step": static_rule(threshold)
            for threshold in options.thresholds
        }
        for first in range(options.osdt):
            table = calibrate(model, problems[first], options.canvas_length, options.cache)
            rules["osdt " + " ".join(f"{threshold:.2f}" for threshold in table) + f" #{first}"] = osdt_rule(table)
        for name, rule in rules.items():
            score = evaluate(model, problems, rule, options.canvas_length, options.cache)
            low, high = score.interval()
            print(
                f"{task:<16}{name:<22}{score.accuracy:>9.1%}  {f'{low:.1%} - {high:.1%}':<16}"
                f"{score.num_problems:>5}{score.nfe:>10.2f}{score.tokens_per_forward:>16.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
