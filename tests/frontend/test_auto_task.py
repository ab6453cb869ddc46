"""How prompts without a task's name are told apart."""

import itertools
import json
import os
import random
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY
from vllm_osdt.frontend.auto_task import MAX_PREFIX, NUM_REQUESTS, AutoTasks, prefix_names
from vllm_osdt.options import UNDECIDED_TASK

SYSTEM = [11, 12, 13, 14, 15, 16]  # begins every prompt
INSTRUCTIONS = {task: [1000 * task + i for i in range(10)] for task in range(1, 9)}


def prompt(rng, task):
    """System prompt, the task's instruction, a question of its own."""
    return [*SYSTEM, *INSTRUCTIONS[task], *(rng.randrange(20_000, 30_000) for _ in range(rng.randrange(1, 60)))]


def stream(seed, number, tasks=(1, 2, 3)):
    """(task, prompt) of requests in no order."""
    rng = random.Random(seed)
    return [(task, prompt(rng, task)) for task in (rng.choice(tasks) for _ in range(number))]


def name_all(tasks, requests, adapter=""):
    """The names given, by task and in order."""
    names = {}
    for task, token_ids in requests:
        names.setdefault(task, []).append(tasks.name(token_ids, adapter))
    return names


def settled(names, number=20):
    """The one name that each task's last requests had."""
    assert all(len({*own[-number:]}) == 1 for own in names.values()), names
    return {task: own[-1] for task, own in names.items()}


def test_tasks_behind_a_shared_prefix_get_a_name_each_and_questions_split_none():
    names = settled(name_all(AutoTasks(256), stream(0, 600)), number=100)
    assert len({*names.values()}) == 3
    # The longest of the prefixes 1, 2, 4, ... that all prompts of the task share: system prompt and instruction.
    assert {task: prefix_names([*SYSTEM, *INSTRUCTIONS[task]])[-1] for task in names} == names


def test_one_task_alone_has_one_name():
    assert len({*settled(name_all(AutoTasks(256), stream(1, 300, tasks=(2,))), number=200).values()}) == 1


@pytest.mark.parametrize("seed", range(5))
def test_names_are_equal_in_processes_that_saw_other_requests(seed):
    first, second = (settled(name_all(AutoTasks(256), stream(s, 400))) for s in (seed, 100 + seed))
    assert first == second


def test_names_do_not_depend_on_the_hash_seed():
    code = (
        "import json; from tests.frontend.test_auto_task import *;"
        "print(json.dumps(name_all(AutoTasks(256), stream(7, 200), 'lora')))"
    )
    expected = {str(task): names for task, names in name_all(AutoTasks(256), stream(7, 200), "lora").items()}
    for hash_seed in ("1", "2"):
        printed = subprocess.run(
            [sys.executable, "-c", code], cwd=REPOSITORY, env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        assert json.loads(printed) == expected


def test_before_enough_requests_were_seen_nothing_is_decided():
    tasks = AutoTasks(256)
    names = [tasks.name(token_ids) for _, token_ids in stream(0, NUM_REQUESTS, tasks=(1,))]
    assert names[:-1] == [UNDECIDED_TASK] * (NUM_REQUESTS - 1) and names[-1] != UNDECIDED_TASK
    for task, own in name_all(AutoTasks(256), stream(0, 300)).items():
        assert own[:5] == [UNDECIDED_TASK] * 5 and UNDECIDED_TASK not in own[NUM_REQUESTS:], task


@pytest.mark.parametrize("seed", range(5))
def test_a_name_that_was_left_is_not_given_again(seed):
    requests = stream(seed, 300, tasks=(1, 2)) + stream(seed + 50, 600, tasks=(1, 2, 3, 4))
    for own in name_all(AutoTasks(256), requests).values():
        runs = [name for name, _ in itertools.groupby(own) if name != UNDECIDED_TASK]
        assert len(runs) == len({*runs})
        lengths = [int(name.split(":")[1]) for name in runs]
        assert lengths == sorted(lengths)


def test_identical_traffic_keeps_its_names():
    tasks, requests = AutoTasks(256), stream(0, 300)
    before = settled(name_all(tasks, requests), number=50)
    for _ in range(5):
        assert {task: {*own} for task, own in name_all(tasks, requests).items()} == {
            task: {name} for task, name in before.items()
        }


def test_a_task_that_appears_later_gets_its_own_name_and_changes_no_other():
    tasks = AutoTasks(256)
    before = settled(name_all(tasks, stream(0, 200)), number=30)
    later = name_all(tasks, stream(1, 600, tasks=(1, 2, 3, 4)))
    assert {task: {*later[task]} for task in before} == {task: {name} for task, name in before.items()}
    after = settled(later, number=50)
    assert len({*after.values()}) == 4
    assert UNDECIDED_TASK not in later[4]  # until then it belongs to the prefix it shares with others


@pytest.mark.parametrize("seed", range(5))
def test_a_kind_of_question_is_content(seed):
    """One question in six begins alike; the others are all different."""
    rng = random.Random(seed)
    tasks, names = AutoTasks(256), []
    for _ in range(50 * NUM_REQUESTS):
        question = [7] * 20 if rng.random() < 1 / 6 else [rng.randrange(20_000, 30_000) for _ in range(20)]
        names.append(tasks.name([*SYSTEM, *INSTRUCTIONS[1], *question]))
    assert {*names} == {UNDECIDED_TASK, prefix_names([*SYSTEM, *INSTRUCTIONS[1]])[-1]}


@pytest.mark.parametrize("max_tasks", [1, 3, 6])
def test_no_more_tasks_are_told_apart_than_allowed(max_tasks):
    tasks = AutoTasks(max_tasks)
    names = name_all(tasks, stream(0, 1500, tasks=(1, 2, 3, 4)))
    assert len({*itertools.chain(*names.values())} - {UNDECIDED_TASK}) <= max_tasks
    adapters = [tasks.name([1, 2, 3], f"adapter {index}") for index in range(50)]
    assert tasks._num_nodes <= max_tasks and len(tasks._roots) <= max_tasks
    assert len({*adapters}) > 1  # told apart all the same, without a node each


def test_what_has_a_profile_is_named_at_once_in_a_fresh_process():
    names = settled(name_all(AutoTasks(256), stream(0, 400)))
    known = {*names.values()}
    asked = []

    def is_known(name):
        asked.append(name)
        return name in known

    fresh = AutoTasks(256, is_known)
    for task, token_ids in stream(9, 60):
        assert fresh.name(token_ids) == names[task]
    assert fresh.name([5] * 40) not in known
    assert len(asked) < 61 * 8  # prefixes of a prompt, not all names


def test_of_known_prefixes_the_longest_is_meant():
    token_ids = list(range(40))
    names = prefix_names(token_ids)
    assert AutoTasks(256, lambda name: name in (names[2], names[4])).name(token_ids) == names[4]


def test_adapters_are_told_apart():
    tasks = AutoTasks(256)
    requests = stream(0, 400)
    names = [settled(name_all(tasks, requests, adapter)) for adapter in ("", "first", "second")]
    assert len({name for own in names for name in own.values()}) == 9


def test_prefixes_double_up_to_a_limit_and_short_prompts_have_few():
    lengths = [int(name.split(":")[1]) for name in prefix_names(list(range(3 * MAX_PREFIX)))]
    assert lengths == [0, *(2**i for i in range(13))] and lengths[-1] == MAX_PREFIX
    assert [len(prefix_names([1] * n)) for n in (0, 1, 2, 3, 4)] == [1, 2, 3, 3, 4]
    assert prefix_names([1, 23]) != prefix_names([12, 3])
    assert all(len(name) <= 200 and name.isprintable() for name in prefix_names([10**9] * 5000, "adapter"))


def test_short_prompts_are_named_too():
    tasks = AutoTasks(256)
    prompts = [], [1], [1, 2], [9] * 9
    names = [tasks.name(token_ids) for _ in range(3 * NUM_REQUESTS) for token_ids in prompts]
    assert names[-4:] == [prefix_names(token_ids)[-1] for token_ids in prompts]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("number", [5, 8, 12])
def test_many_tasks_of_equal_weight_are_told_apart_in_time(number, seed):
    rng = random.Random(seed)
    instructions = {task: [1000 + task, *range(50, 70)] for task in range(number)}
    names, tasks = {}, AutoTasks(256)
    for _ in range(4000):
        task = rng.randrange(number)
        question = [rng.randrange(20_000, 30_000) for _ in range(30)]
        names.setdefault(task, []).append(tasks.name([*SYSTEM, *instructions[task], *question]))
    assert len({*settled(names).values()}) == number
