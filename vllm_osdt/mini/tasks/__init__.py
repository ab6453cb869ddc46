"""Three synthetic tasks with exact checkers, and their problems by split."""

import random
import zlib

from vllm_osdt.mini.tasks import code, multiple_choice, word_problems
from vllm_osdt.mini.tasks.base import Problem

# Task name -> draw(rng, free).
TASKS = {"word_problems": word_problems.draw, "code": code.draw, "multiple_choice": multiple_choice.draw}
# Share of problems with a free choice that ties several tokens together; training sees more of them.
FREE_SHARE = {"train": 0.5, "held_out": 0.2}
# One prompt in so many is held out.
HELD_OUT_MODULUS = 10


def split_of(prompt: str) -> str:
    """The split a prompt belongs to, by its hash."""
    return "train" if zlib.crc32(prompt.encode()) % HELD_OUT_MODULUS else "held_out"


def generate(task: str, split: str, count: int, seed: int) -> list[Problem]:
    """Draws problems of one task; a prompt may repeat within a split and never occurs in both.

    Raises:
        ValueError: The task or split is unknown.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; known tasks: {', '.join(TASKS)}")
    if split not in FREE_SHARE:
        raise ValueError(f"unknown split {split!r}; known splits: {', '.join(FREE_SHARE)}")
    rng = random.Random(f"{task} {split} {seed}")
    problems: list[Problem] = []
    while len(problems) < count:
        problem = TASKS[task](rng, rng.random() < FREE_SHARE[split])
        if split_of(problem.prompt) == split:
            problems.append(problem)
    return problems


def check(problem: Problem, answer: str) -> bool:
    """Whether an answer is valid; space around it is not looked at (a completion of words starts with one)."""
    return problem.accepts(answer.strip())
