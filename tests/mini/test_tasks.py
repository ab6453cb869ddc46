"""Problems, their valid answers and their checkers."""

import random

import pytest

from vllm_osdt.mini.tasks import ALL_TASKS, TASKS, TEXT_TASKS, check, generate, split_of
from vllm_osdt.mini.tasks.base import Parts, draw_parts, tokenize
from vllm_osdt.mini.tasks.code import compile_function
from vllm_osdt.mini.tasks.multiple_choice import LETTERS

COUNT = 300
MIN_TOKENS, MAX_TOKENS = 20, 100
UNSAFE = {
    "import": "import os\ndef f ( x ) :\n return x",
    "call": "def f ( x ) :\n return print ( x )",
    "recursion": "def f ( x ) :\n return f ( x )",
    "attribute": "def f ( x ) :\n return x . __class__",
    "endless loop": "def f ( x ) :\n while 1 :\n  x = x + 1\n return x",
    "loop at the top": "while 1 : pass",
    "power": "def f ( x ) :\n return 9 ** 9 ** 9 ** 9",
    "squares": "def f ( x ) :\n" + " x = x * x\n" * 80 + " return x",
    "text": "def f ( x ) :\n return 'a' * 999",
    "large constant": "def f ( x ) :\n return x * 1000000007",
    "lambda": "f = lambda x : x",
    "comprehension": "def f ( x ) :\n return [ y for y in x ]",
    "unknown name at the top": "y = z\ndef f ( x ) :\n return x",
    "long": "def f ( x ) :\n" + " x = x + 1\n" * 200 + " return x",
    "not python": "def f ( x :\n return x",
    "deep nesting": "(" * 400 + ")" * 400,
    "null byte": "def f ( x ) :\n return x\0",
    "no function": "f = 3",
    "other function": "def g ( x ) :\n return x",
}


def answered(task, split="held_out", seed=3):
    rng = random.Random(seed)
    return [(problem, problem.sample_answer(rng)) for problem in generate(task, split, COUNT, seed)]


@pytest.mark.parametrize("split", ["train", "held_out"])
@pytest.mark.parametrize("task", ALL_TASKS)
def test_sampled_answers_are_valid(task, split):
    assert all(check(problem, answer) for problem, answer in answered(task, split))


@pytest.mark.parametrize("task", [*TASKS, *TEXT_TASKS])
def test_answers_have_20_to_100_tokens_of_varied_number(task):
    lengths = {len(tokenize(answer)) for _, answer in answered(task)}
    assert MIN_TOKENS <= min(lengths) < max(lengths) <= MAX_TOKENS


@pytest.mark.parametrize("task", ALL_TASKS)
def test_splits_are_disjoint(task):
    train, held_out = ({p.prompt for p in generate(task, split, 2000, 5)} for split in ("train", "held_out"))
    assert not train & held_out
    assert {split_of(prompt) for prompt in train} == {"train"}


@pytest.mark.parametrize("task", ALL_TASKS)
def test_same_seed_gives_the_same_problems(task):
    assert generate(task, "train", 20, 1) == generate(task, "train", 20, 1) != generate(task, "train", 20, 2)


@pytest.mark.parametrize("task", ALL_TASKS)
def test_another_problems_answer_is_rejected(task):
    (first, answer), *others = answered(task)
    different = [problem for problem, _ in others if problem.prompt != first.prompt]
    # Different code prompts may ask for the same function.
    assert sum(check(problem, answer) for problem in different) <= (len(different) // 20 if task == "code" else 0)


@pytest.mark.parametrize("task", ["word_problems", "code"])
def test_any_changed_number_is_rejected(task):
    for problem, answer in answered(task)[:60]:
        tokens = tokenize(answer)
        for index, token in enumerate(tokens):
            if token.isdigit():
                changed = [*tokens[:index], str(int(token) + 1), *tokens[index + 1 :]]
                assert not check(problem, " ".join(changed))


def test_any_changed_verdict_or_final_letter_is_rejected():
    for problem, answer in answered("multiple_choice")[:60]:
        tokens = tokenize(answer)
        for index, token in enumerate(tokens):
            if token in ("no", "skip", "pick"):
                others = {"no", "skip", "pick"} - {token}
            elif index == len(tokens) - 2:
                others = set(LETTERS) - {token}
            else:
                continue
            for other in others:
                assert not check(problem, " ".join([*tokens[:index], other, *tokens[index + 1 :]]))


@pytest.mark.parametrize("task", ALL_TASKS)
def test_an_answer_that_stops_early_or_repeats_is_rejected(task):
    for problem, answer in answered(task)[:60]:
        tokens = tokenize(answer)
        assert not check(problem, "")
        assert not check(problem, " ".join(tokens[: len(tokens) // 2]))
        assert not check(problem, " ".join([*tokens, tokens[-1]]))


def test_a_variable_used_under_another_name_is_rejected():
    for problem, answer in answered("code")[:60]:
        assert not check(problem, answer.rsplit(" ", 1)[0] + " q")


def test_every_placement_of_the_odd_part_is_a_split_and_the_usual_values_alone_are_none():
    assert Parts(3, 1, 5).splits() == [(1, 2, 2), (2, 1, 2), (2, 2, 1)]
    rng = random.Random(0)
    for _ in range(50):
        free, fixed = draw_parts(rng, True, (1, 2)), draw_parts(rng, False, (1, 2))
        assert len(free.splits()) == free.count
        assert len(fixed.splits()) == 1
        usual = tuple(sorted(column)[free.count // 2] for column in zip(*free.splits(), strict=True))
        assert usual not in free.splits()


@pytest.mark.parametrize("source", UNSAFE.values(), ids=UNSAFE.keys())
def test_unsafe_or_broken_code_is_refused(source):
    assert compile_function(source, "f") is None


def test_code_that_fails_when_run_is_rejected_without_an_error():
    function = compile_function("def f ( x ) :\n return missing", "f")
    assert function(1) is None


def test_unknown_task_and_split_are_refused():
    with pytest.raises(ValueError, match="known tasks: word_problems"):
        generate("poems", "train", 1, 0)
    with pytest.raises(ValueError, match="known splits: train"):
        generate("code", "validation", 1, 0)
