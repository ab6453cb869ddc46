"""The word-level tokenizer of the bundled models: one token per word, number or line break.

A vocabulary is that of a set of tasks, by default the three of `TASKS`.
"""

import functools
import json
import random
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from vllm_osdt.mini.tasks import TASKS, generate
from vllm_osdt.mini.tasks.base import MAX_NUMBER, tokenize

EOS, MASK, UNKNOWN = "<eos>", "<mask>", "<unk>"
EOS_ID, MASK_ID, UNKNOWN_ID = 0, 1, 2
# Enough draws that every word of a task turns up.
VOCABULARY_DRAWS = 2000
CHAT_TEMPLATE = (
    "{% set text = messages[-1]['content'] | trim %}{{ text }}"
    "{% if add_generation_prompt and not text.endswith('Answer:') %}{{ ' Answer:' }}{% endif %}"
)


@functools.cache
def build_vocabulary(tasks: tuple[str, ...] = tuple(TASKS)) -> dict[str, int]:
    """Specials, numbers if the tasks have any, then the words of the tasks in alphabetical order."""
    rng = random.Random(0)
    words: set[str] = set()
    for task in tasks:
        for problem in generate(task, "train", VOCABULARY_DRAWS, seed=0):
            words.update(tokenize(f"{problem.prompt} {problem.sample_answer(rng)}"))
    has_numbers = any(word.isdigit() for word in words)
    numbers = [str(number) for number in range(MAX_NUMBER + 1)] if has_numbers else []
    tokens = [EOS, MASK, UNKNOWN, *numbers, *sorted(words.difference(numbers))]
    return {token: index for index, token in enumerate(tokens)}


def build_tokenizer(tasks: tuple[str, ...] = tuple(TASKS)) -> Tokenizer:
    """Splits at spaces, keeps line breaks as tokens, joins with single spaces."""
    tokenizer = Tokenizer(models.WordLevel(build_vocabulary(tasks), unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Replace(Regex(r" *\n *"), " \n ")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(" +"), "removed")
    tokenizer.add_special_tokens([EOS, MASK, UNKNOWN])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    """Writes the files `AutoTokenizer` loads."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS,
        "pad_token": EOS,
        "mask_token": MASK,
        "unk_token": UNKNOWN,
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
