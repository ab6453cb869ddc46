"""What the benchmarks decode: models with tasks whose answers code can check.

A bundled model or a rung of the ladder (``make ladder``) has the bundled tasks. ``weak`` is the small LLaDA of
``tests/golden/llada_tasks``, of another vocabulary and nearly always wrong, which no default of ours was chosen on. Run
as a program, this writes that model and its prompts into ``build/weak-llada``, for ``vllm-osdt tune``.
"""

import functools
import importlib
import json
import random
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from common import REPOSITORY

CALIBRATION_SEED = 1000  # of the problems that calibrate
WEAK = "weak"
RANDOM = "random-130m"
RANDOM_PROMPT = 64  # tokens
WEAK_WEIGHTS = REPOSITORY / "tests" / "golden" / "llada_tasks"
WEAK_MODEL = REPOSITORY / "build" / "weak-llada"
NAMES = ("Ann", "Ben", "Eva", "Lily", "Max", "Sam", "Tom", "Zoe")
THINGS = ("apples", "books", "cards", "coins", "pens", "shells")


@dataclass(frozen=True)
class Problem:
    """A prompt and whether a completion answers it."""

    prompt: str | dict[str, list[int]]
    is_right: Callable[[str], bool]


Draw = Callable[[int, int], list[Problem]]
"""So many held-out problems of a task, from a seed."""


class Source(NamedTuple):
    """A model and its tasks.

    Attributes:
        label: For tables.
        path: Folder of the checkpoint.
        gen_length: Positions of a canvas.
        tasks: By name.
    """

    label: str
    path: str
    gen_length: int
    tasks: dict[str, Draw]


def find_source(name: str) -> Source:
    """A bundled model, ``weak``, or the folder of a model whose name begins as a bundled one's."""
    from vllm_osdt.mini import MODELS, gen_length_of, model_path, tasks_of

    if name == RANDOM:
        return random_source()
    if name == WEAK:
        return Source(WEAK, str(make_weak_model()), 64, {task: weak_draw(task) for task in WEAK_TASKS})
    label = Path(name).name
    bundled = next((model for model in MODELS if label.startswith(model)), None)
    if bundled is None:
        raise SystemExit(f"{name} is neither {WEAK}, {', '.join(MODELS)} nor a folder whose name begins as one of them")
    path = model_path(name) if name in MODELS else name
    return Source(
        label,
        path,
        gen_length_of(bundled),
        {task: lambda count, seed, task=task: own_problems(task, count, seed) for task in tasks_of(bundled)},
    )


def random_source() -> Source:
    """A LLaDA of 134 million random weights, whose answers mean nothing: a model whose step takes its time."""
    import bench_vs_fast_dllm

    folder = Path(tempfile.gettempdir()) / f"{RANDOM}-seed{bench_vs_fast_dllm.SEED}"
    bench_vs_fast_dllm.make_random_model(folder)

    def draw(count: int, seed: int) -> list[Problem]:
        chance = random.Random(seed)
        tokens = [[chance.randrange(1, 31_000) for _ in range(RANDOM_PROMPT)] for _ in range(count)]
        return [Problem({"prompt_token_ids": one}, lambda text: False) for one in tokens]

    return Source(RANDOM, str(folder), 32, {"random": draw})


def own_problems(task: str, count: int, seed: int) -> list[Problem]:
    """Held-out problems of a bundled task."""
    from vllm_osdt.mini.tasks import check, generate

    drawn = generate(task, "held_out", count, seed)
    return [Problem(problem.prompt, lambda text, problem=problem: check(problem, text)) for problem in drawn]


def user_problems(path: str, checker: str | None) -> dict[str, list[Problem]]:
    """The problems of a file, by task."""
    if checker is None:

        def check(row, text):
            return str(row["answer"]) in text
    else:
        module, _, name = checker.partition(":")
        check = getattr(importlib.import_module(module), name)
    found = defaultdict(list)
    for line in Path(path).read_text().splitlines():
        row = json.loads(line)
        found[row.get("task", "task")].append(Problem(row["prompt"], lambda text, row=row: check(row, text)))
    return dict(found)


def make_weak_model() -> Path:
    """The weak model with a tokenizer, in a folder that vLLM can load."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    from vllm_osdt.mini.tokenizer import save_tokenizer

    vocabulary = json.loads((WEAK_WEIGHTS / "vocab.json").read_text())
    WEAK_MODEL.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[EOS]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(" +"), "removed")
    tokenizer.add_special_tokens(["[EOS]", "[MASK]"])
    save_tokenizer(tokenizer, WEAK_MODEL, 256)
    about = WEAK_MODEL / "tokenizer_config.json"
    tokens = {"eos_token": "[EOS]", "pad_token": "[EOS]", "mask_token": "[MASK]", "unk_token": "[EOS]"}
    about.write_text(json.dumps({**json.loads(about.read_text()), **tokens}) + "\n")
    for name in ("config.json", "model.safetensors"):
        (WEAK_MODEL / name).write_bytes((WEAK_WEIGHTS / name).read_bytes())
    return WEAK_MODEL


def spelled(number: int) -> str:
    """Its digits, tokens of their own."""
    return " ".join(str(number))


def weak_word_problem(chance: random.Random) -> Problem:
    """Addition and subtraction in words; the answer follows ``####``."""
    name, thing, value = chance.choice(NAMES), chance.choice(THINGS), chance.randint(2, 40)
    sentences = [f"{name} has {spelled(value)} {thing} ."]
    for _ in range(chance.randint(1, 3)):
        verb = chance.choice(["buys", "finds", "gives", "eats", "doubles"])
        if verb == "doubles":
            value *= 2
            sentences.append(f"{name} doubles them .")
        elif verb in ("buys", "finds"):
            more = chance.randint(1, 40)
            value += more
            sentences.append(f"{name} {verb} {spelled(more)} more .")
        elif value > 1:
            less = chance.randint(1, value - 1)
            value -= less
            sentences.append(f"{name} {verb} away {spelled(less)} .")
    answer = spelled(value)

    def is_right(text: str) -> bool:
        parts = text.split("####")
        return len(parts) > 1 and parts[1].strip() == answer

    return Problem(f"[gsm] {' '.join(sentences)} How many {thing} ? [SEP]", is_right)


def weak_code(chance: random.Random) -> Problem:
    """A function of x in words; the answer is an expression that must give its values."""
    steps = [
        (chance.choice(["square", "negate", "add", "mul", "sub"]), chance.randint(2, 19))
        for _ in range(chance.randint(1, 3))
    ]
    words = " then ".join(name if name in ("square", "negate") else f"{name} {spelled(by)}" for name, by in steps)

    def value(x: int) -> int:
        for name, by in steps:
            x = {"square": x * x, "negate": -x, "add": x + by, "mul": x * by, "sub": x - by}[name]
        return x

    def is_right(text: str) -> bool:
        text = text.strip()
        expression = re.sub(r"(?<=\d) (?=\d)", "", text.removeprefix("return "))
        is_expression = text.startswith("return ") and re.fullmatch(r"[x\d+\-*() ]{1,120}", expression)
        if not is_expression or re.search(r"\*\*\s*(?!2\b)", expression):
            return False
        try:
            return all(eval(expression, {"__builtins__": {}}, {"x": x}) == value(x) for x in (-3, 0, 2, 5))
        except Exception:  # what a model writes may fail in any way
            return False

    return Problem(f"[code] def f ( x ) : {words} then done [SEP]", is_right)


def weak_choice(chance: random.Random) -> Problem:
    """The smallest or largest of four numbers."""
    kind, values = chance.choice(["smallest", "largest"]), chance.sample(range(20, 100), 4)
    letter = "ABCD"[values.index((min if kind == "smallest" else max)(values))]

    def is_right(text: str) -> bool:
        words = text.split()
        return "answer" in words and words[words.index("answer") + 1 :][:1] == [letter]

    options = " ".join(f"{name} {spelled(value)}" for name, value in zip("ABCD", values, strict=True))
    return Problem(f"[mcq] Which is {kind} ? {options} [SEP]", is_right)


WEAK_TASKS = {"word_problems": weak_word_problem, "code": weak_code, "multiple_choice": weak_choice}


def weak_draw(task: str) -> Draw:
    """Problems as the weak model was trained on."""

    def draw(count: int, seed: int) -> list[Problem]:
        chance = random.Random(f"{task} {seed}")
        return [WEAK_TASKS[task](chance) for _ in range(count)]

    return draw


NUM_FOR_TUNE = 800


@functools.cache
def weak_problems() -> dict[str, Problem]:
    """Problems of the weak model by prompt."""
    return {problem.prompt: problem for task in WEAK_TASKS for problem in weak_draw(task)(NUM_FOR_TUNE, 0)}


def check_weak(prompt: str, text: str) -> bool:
    """The checker of ``vllm-osdt tune`` for what :func:`write_weak_prompts` has written."""
    return weak_problems()[prompt].is_right(text)


def write_weak_prompts(folder: Path) -> None:
    """The weak model's problems as files of prompts, a task each."""
    folder.mkdir(parents=True, exist_ok=True)
    for task in WEAK_TASKS:
        prompts = [problem.prompt for problem in weak_draw(task)(NUM_FOR_TUNE, 0)]
        (folder / f"{task}.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))


if __name__ == "__main__":
    write_weak_prompts(make_weak_model())
