"""List tasks: exact checkers, equal chances, what independent choices break, and what the bundled model does."""

import itertools
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.mini.evaluate import ONE_PER_STEP, evaluate, static_rule
from examples.mini.model import MiniLLaDA
from vllm_osdt.mini import gen_length_of, model_path
from vllm_osdt.mini.tasks import LIST_TASKS, check, generate
from vllm_osdt.mini.tasks.base import tokenize
from vllm_osdt.mini.tasks.lists import (
    ITEMS,
    NUM_ITEMS,
    OPEN_TASKS,
    ROW_END,
    Copy,
    Insert,
    InsertRandom,
    LatinSquare,
    Remove,
    RemoveRandom,
    Replace,
    ReplaceRandom,
    Reverse,
    Shuffle,
    Sort,
    squares_of,
)

CLEAR_TASKS = tuple(task for task in LIST_TASKS if task not in OPEN_TASKS)
MODELS = ("lists-mini", "sdar-lists-mini")
[GEN_LENGTH] = {gen_length_of(name) for name in MODELS}
# Static threshold -> tasks that it breaks; no threshold breaks `remove_random`, whose likeliest tokens are an answer.
BROKEN = {
    ONE_PER_STEP: (),
    0.9: (),
    0.7: ("replace_random",),
    0.3: ("shuffle", "latin_square", "insert_random", "replace_random"),
}
LIST = ("cat", "ant", "dog", "bear")
# Problem, valid answers, answers that are not.
CASES = [
    (Copy("", LIST), ["cat ant dog bear"], ["cat ant dog", "cat ant bear dog", "cat ant dog bear bear"]),
    (Reverse("", LIST), ["bear dog ant cat"], ["cat ant dog bear", "bear dog cat ant"]),
    (Sort("", LIST), ["ant bear cat dog"], ["ant bear dog cat", "dog cat bear ant", "ant bear cat"]),
    (
        Shuffle("", LIST),
        ["ant cat dog bear", "bear dog ant cat"],
        ["cat ant dog bear", "ant ant dog bear", "ant cat dog"],
    ),
    (
        LatinSquare("", LIST, ("ant", "cat", "bear", "dog")),
        ["dog bear cat ant / bear dog ant cat", "bear dog cat ant / dog bear ant cat"],
        [
            "dog bear cat ant / dog bear cat ant",
            "dog bear cat ant / bear dog cat ant",
            "dog bear ant ant / bear dog cat cat",
            "dog bear cat ant bear dog ant cat",
            "dog bear cat ant",
            "ant cat bear dog / dog bear cat ant / bear dog ant cat",
        ],
    ),
    (
        Insert("", LIST, "owl", 1),
        ["cat owl ant dog bear"],
        ["owl cat ant dog bear", "cat owl dog bear", "cat ant dog bear"],
    ),
    (Insert("", LIST, "owl", 4), ["cat ant dog bear owl"], ["cat ant dog owl bear"]),
    (
        InsertRandom("", LIST, "owl", None),
        ["owl cat ant dog bear", "cat ant dog bear owl"],
        ["cat ant dog bear", "owl cat owl ant dog bear", "owl ant cat dog bear"],
    ),
    (Remove("", LIST, "owl", 2), ["cat ant bear"], ["cat ant dog", "cat ant dog bear", "ant cat bear"]),
    (
        RemoveRandom("", LIST, "owl", None),
        ["ant dog bear", "cat ant bear"],
        ["cat ant dog bear", "ant bear", "bear dog ant"],
    ),
    (Replace("", LIST, "owl", 0), ["owl ant dog bear"], ["cat owl dog bear", "owl cat ant dog bear", "owl ant dog"]),
    (
        ReplaceRandom("", LIST, "owl", None),
        ["owl ant dog bear", "cat ant dog owl"],
        ["cat ant dog bear", "owl ant owl bear", "cat ant dog fox"],
    ),
]


@pytest.mark.parametrize(("problem", "valid", "invalid"), CASES, ids=lambda case: getattr(case, "task", ""))
def test_answers_are_judged_as_by_hand(problem, valid, invalid):
    assert all(check(problem, answer) for answer in valid)
    assert not any(check(problem, answer) for answer in [*invalid, ""])


def is_valid(problem, tokens):
    """What a task demands, said otherwise than by listing answers."""
    items, kind = list(problem.items), problem.task.removesuffix("_random")
    if kind == "copy":
        return tokens == items
    if kind == "reverse":
        return list(reversed(tokens)) == items
    if kind == "sort":
        return set(tokens) == set(items) and all(a < b for a, b in itertools.pairwise(tokens))
    if kind == "shuffle":
        return Counter(tokens) == Counter(items) and tokens != items
    if kind == "latin_square":
        rows = [items, list(problem.second), *(row.split() for row in " ".join(tokens).split(ROW_END))]
        lines = [*rows, *zip(*rows, strict=False)]
        return len(rows) == len(items) and all(sorted(line) == sorted(items) for line in lines)
    if kind == "remove":
        places = [place for place in range(len(items)) if [*items[:place], *items[place + 1 :]] == tokens]
    else:
        places = [place for place, token in enumerate(tokens) if token == problem.new]
        rest = [token for token in tokens if token != problem.new]
        kept = items if kind == "insert" else [item for place, item in enumerate(items) if place not in places]
        if len(places) != 1 or rest != kept:
            return False
    return len(places) == 1 and problem.place in (None, places[0])


@given(st.sampled_from(list(LIST_TASKS)), st.integers(0, 10**6), st.data())
def test_a_checker_accepts_exactly_what_the_task_demands(task, seed, data):
    rng = random.Random(seed)
    problem = LIST_TASKS[task](rng)
    tokens = tokenize(problem.sample_answer(rng))
    assert check(problem, " ".join(tokens)) and is_valid(problem, tokens)
    words = sorted({*tokens, *problem.items, getattr(problem, "new", ROW_END)})
    for _ in range(data.draw(st.integers(0, 3))):
        place = data.draw(st.integers(0, len(tokens) - 1))
        change = data.draw(st.sampled_from(["swap", "put", "add", "leave out"]))
        if change == "swap":
            other = data.draw(st.integers(0, len(tokens) - 1))
            tokens[place], tokens[other] = tokens[other], tokens[place]
        elif change == "put":
            tokens[place] = data.draw(st.sampled_from(words))
        elif change == "add":
            tokens.insert(place, data.draw(st.sampled_from(words)))
        elif len(tokens) > 1:
            del tokens[place]
    assert check(problem, " ".join(tokens)) == is_valid(problem, tokens)


@pytest.mark.parametrize("task", LIST_TASKS)
def test_answers_differ_and_as_many_are_valid_as_the_task_leaves_open(task):
    for problem in generate(task, "held_out", 30, 1):
        answers = problem.answers()
        assert len(set(answers)) == len(answers)
        assert (len(answers) > 1) == (task in OPEN_TASKS)
        assert len(problem.items) in NUM_ITEMS and set(problem.items) <= set(ITEMS)
        assert max(map(len, answers)) < GEN_LENGTH
    assert list(ITEMS) == sorted(set(ITEMS))


def test_two_rows_leave_two_or_four_squares_of_24():
    assert len(squares_of(4)) == 24
    seconds = {square[1] for square in squares_of(4)}
    numbers = [len(LatinSquare("", LIST, tuple(LIST[index] for index in second)).answers()) for second in seconds]
    assert Counter(numbers) == {2: 6, 4: 3}


@pytest.mark.parametrize("task", OPEN_TASKS)
def test_valid_answers_are_equally_likely(task):
    problem = next(problem for problem in generate(task, "train", 50, 0) if len(problem.items) == 4)
    rng, answers = random.Random(0), problem.answers()
    drawn = Counter(problem.sample_answer(rng) for _ in range(300 * len(answers)))
    assert drawn.keys() == {" ".join(answer) for answer in answers}
    assert all(220 < count < 380 for count in drawn.values())  # five standard deviations


def modes(problem):
    """By position, the likeliest token and its chance, if all valid answers are equally likely."""
    answers = problem.answers()
    counts = [Counter(column).most_common(1)[0] for column in zip(*answers, strict=True)]
    return [(token, count / len(answers)) for token, count in counts]


@pytest.mark.parametrize("number", NUM_ITEMS)
def test_the_likeliest_tokens_replace_nothing_and_lose_the_inserted_item(number):
    items = ITEMS[:number]
    replaced = modes(ReplaceRandom("", items, "owl", None))
    assert [token for token, _ in replaced] == list(items)
    assert {chance for _, chance in replaced} == {(number - 1) / number}
    inserted = [token for token, _ in modes(InsertRandom("", items, "owl", None))]
    assert "owl" not in inserted


@pytest.mark.parametrize("number", NUM_ITEMS)
def test_the_likeliest_tokens_remove_one_item(number):
    problem = RemoveRandom("", ITEMS[:number], "owl", None)
    assert check(problem, " ".join(token for token, _ in modes(problem)))


def blocks_of(problem, block_length):
    """The positions of an answer, by block of a grid that begins with the prompt; all in one if `block_length` is 0."""
    start, positions = len(tokenize(problem.prompt)), range(len(problem.answers()[0]))
    if not block_length:
        return [list(positions)]
    return [list(block) for _, block in itertools.groupby(positions, lambda place: (start + place) // block_length)]


def decode_exactly(problem, threshold, block_length=0):
    """Decodes with the exact chance of every token, as a perfect model would; ties are broken at random."""
    rng, answers = random.Random(problem.prompt), problem.answers()
    decided = {}
    for block in blocks_of(problem, block_length):
        while masked := [place for place in block if place not in decided]:
            # After tokens that no answer has together any answer is as good.
            possible = [one for one in answers if all(one[at] == token for at, token in decided.items())] or answers
            proposals = []
            for place in masked:
                counts = Counter(answer[place] for answer in possible)
                token = max(counts, key=lambda token: (counts[token], rng.random()))
                proposals.append((counts[token] / len(possible), rng.random(), place, token))
            accepted = [one for one in proposals if one[0] >= threshold] or [max(proposals)]
            decided |= {place: token for _, _, place, token in accepted}
    return " ".join(decided[place] for place in sorted(decided))


@pytest.mark.parametrize("task", OPEN_TASKS)
@pytest.mark.parametrize(("threshold", "broken"), BROKEN.items())
def test_a_perfect_model_breaks_the_tasks_whose_positions_a_threshold_decides_apart(task, threshold, broken):
    problems = generate(task, "held_out", 30, 2)
    num_valid = sum(check(problem, decode_exactly(problem, threshold)) for problem in problems)
    assert num_valid <= 18 if task in broken else num_valid == 30


def test_a_perfect_model_repairs_a_replacement_exactly_where_a_second_block_sees_the_first():
    problems = generate("replace_random", "held_out", 60, 2)
    numbers = [len(blocks_of(problem, 8)) for problem in problems]
    assert set(numbers) == {1, 2}
    assert [check(problem, decode_exactly(problem, 0.7, 8)) for problem in problems] == [n == 2 for n in numbers]


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return MiniLLaDA.load(Path(model_path(request.param)))


def accuracy(model, tasks, threshold):
    problems = [problem for task in tasks for problem in generate(task, "held_out", 24, 9)]
    return evaluate(model, problems, static_rule(threshold), GEN_LENGTH).accuracy


@pytest.mark.parametrize("tasks", [CLEAR_TASKS, OPEN_TASKS], ids=["clear", "open"])
def test_the_bundled_model_is_right_with_one_token_per_step(model, tasks):
    assert accuracy(model, tasks, ONE_PER_STEP) >= 0.95


def test_a_low_threshold_breaks_the_tasks_that_leave_a_choice_and_no_others(model):
    assert accuracy(model, CLEAR_TASKS, 0.3) >= 0.95
    assert accuracy(model, OPEN_TASKS, 0.3) <= 0.6
