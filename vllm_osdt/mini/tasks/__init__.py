"""Synthetic tasks with exact checkers, and their problems by split."""

import random
import zlib

from vllm_osdt.mini.tasks import code, lists, multiple_choice, stories, word_problems
from vllm_osdt.mini.tasks.base import Problem

# Task name -> draw(rng, free).
TASKS = {"word_problems": word_problems.draw, "code": code.draw, "multiple_choice": multiple_choice.draw}
# The task with the statistics of text, which has a vocabulary and a model of its own.
TEXT_TASKS = {"stories": stories.draw}
# Tasks whose tokens hang together, which have a vocabulary and a model of their own; name -> draw(rng).
LIST_TASKS = lists.DRAWS
FAMILIES = (TASKS, TEXT_TASKS, LIST_TASKS)
ALL_TASKS = (*TASKS, *TEXT_TASKS, *LIST_TASKS)
# Share of problems with a free choice that ties several tokens together; training sees more of them.
FREE_SHARE = {"train": 0.5, "held_out": 0.2}
TEXT_FREE_SHARE = {"train": 0.8, "held_out": 0.06}
# One prompt in so many is held out.
HELD_OUT_MODULUS = 10


def split_of(prompt: str) -> str:
    """The split a prompt belongs to, by its hash."""
    return "train" if zlib.crc32(prompt.encode()) % HELD_OUT_MODULUS else "held_out"


def tasks_beside(task: str) -> tuple[str, ...]:
    """The tasks that share a vocabulary, and a model, with this one."""
    return next(tuple(family) for family in FAMILIES if task in family)


def generate(task: str, split: str, count: int, seed: int) -> list[Problem]:
    """Draws problems of one task; a prompt may repeat within a split and never occurs in both.

    Raises:
        ValueError: The task or split is unknown.
    """
    if task not in ALL_TASKS:
        raise ValueError(f"unknown task {task!r}; known tasks: {', '.join(ALL_TASKS)}")
    if split not in FREE_SHARE:
        raise ValueError(f"unknown split {split!r}; known splits: {', '.join(FREE_SHARE)}")
    rng = random.Random(f"{task} {split} {seed}")
    problems: list[Problem] = []
    while len(problems) < count:
        problem = draw(task, split, rng)
        if split_of(problem.prompt) == split:
            problems.append(problem)
    return problems


def draw(task: str, split: str, rng: random.Random) -> Problem:
    """Draws one problem of a task, with the split's share of free choices."""
    if task in LIST_TASKS:
        return LIST_TASKS[task](rng)
    if task in TEXT_TASKS:
        return TEXT_TASKS[task](rng, rng.random() < TEXT_FREE_SHARE[split])
    return TASKS[task](rng, rng.random() < FREE_SHARE[split])


def check(problem: Problem, answer: str) -> bool:
    """Whether an answer is valid; space around it is not looked at (a completion of words starts with one)."""
    return problem.accepts(answer.strip())
