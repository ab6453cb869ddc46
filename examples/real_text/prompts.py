"""Prompts without a data set: questions about docstrings and descriptions of installed packages, or a user's file."""

import ast
import json
import random
import sysconfig
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

QUESTIONS = (
    "Explain this in simple words:\n{}",
    "What is this text about?\n{}",
    "Write a short story that begins like this:\n{}",
    "Give three questions a student could ask about this text, with answers:\n{}",
    "Rewrite this for a beginner and give an example:\n{}",
    "Summarize:\n{}",
    "Continue this text:\n{}",
    "What could go wrong here?\n{}",
)
MIN_CHARACTERS, MAX_CHARACTERS = 60, 400
TEMPLATE = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
# The same for vLLM's chat endpoint. The GGUF's own adds a system prompt, which this model has not seen.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def passages(folder: Path, rng: random.Random) -> Iterator[str]:
    """First paragraphs of docstrings and paragraphs of package descriptions below a folder, files in random order."""
    files = sorted(path for pattern in ("*.py", "*.md", "METADATA") for path in folder.rglob(pattern))
    rng.shuffle(files)
    for path in files:
        try:
            text = path.read_text()
            texts = list(docstrings(text)) if path.suffix == ".py" else text.split("\n\n")
        except (SyntaxError, ValueError, OSError, RecursionError):
            continue
        for passage in texts:
            passage = " ".join(passage.split())
            if MIN_CHARACTERS <= len(passage) <= MAX_CHARACTERS and sum(map(str.isalpha, passage)) > len(passage) / 2:
                yield passage


def docstrings(source: str) -> Iterator[str]:
    """The first paragraph of every docstring."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            yield (ast.get_docstring(node) or "").split("\n\n")[0]


def collect(number: int, seed: int, file: Path | None = None) -> list[str]:
    """Different prompts in random order, as the chat template puts them.

    Args:
        number: How many; fewer if there are not so many.
        seed: Of the order and of the questions.
        file: JSON lines with a `prompt` or `question` each; its prompts come first.
    """
    rng = random.Random(seed)
    found: dict[str, None] = {}
    if file is not None:
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        found = dict.fromkeys(row["prompt"] if "prompt" in row else row["question"] for row in rows)
    seen: set[str] = set()
    paths = sysconfig.get_paths()
    for passage in chain.from_iterable(passages(Path(paths[name]), rng) for name in ("purelib", "stdlib")):
        if len(found) >= number:
            break
        if passage not in seen:
            seen.add(passage)
            found[rng.choice(QUESTIONS).format(passage)] = None
    prompts = list(found)
    rng.shuffle(prompts)
    return [TEMPLATE.format(prompt) for prompt in prompts[:number]]
