"""Round trips and the files `AutoTokenizer` loads."""

import random

import pytest
from transformers import AutoTokenizer

from vllm_osdt.mini.tasks import ALL_TASKS, FAMILIES, TASKS, generate, tasks_beside
from vllm_osdt.mini.tokenizer import EOS_ID, MASK_ID, UNKNOWN_ID, build_tokenizer, build_vocabulary, save_tokenizer


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Saves and loads the tokenizer of a set of tasks."""

    def load(tasks):
        folder = tmp_path_factory.mktemp("tokenizer")
        save_tokenizer(build_tokenizer(tasks), folder, 512)
        return AutoTokenizer.from_pretrained(folder)

    return load


@pytest.fixture(scope="module")
def loaded(load):
    return load(tuple(TASKS))


@pytest.mark.parametrize("task", ALL_TASKS)
def test_generated_texts_round_trip_without_unknown_words(task, load):
    loaded = load(tasks_beside(task))
    rng = random.Random(0)
    for problem in generate(task, "held_out", 200, 2):
        for text in (problem.prompt, problem.sample_answer(rng)):
            ids = loaded.encode(text)
            assert UNKNOWN_ID not in ids
            assert loaded.decode(ids) == text


@pytest.mark.parametrize("tasks", FAMILIES)
def test_vocabulary_has_the_specials_first_and_is_small(tasks):
    vocabulary = build_vocabulary(tuple(tasks))
    assert list(vocabulary.values()) == list(range(len(vocabulary)))
    assert len(vocabulary) <= 256
    assert list(vocabulary)[:3] == ["<eos>", "<mask>", "<unk>"]


def test_special_tokens_load(loaded):
    assert (loaded.eos_token_id, loaded.pad_token_id, loaded.mask_token_id) == (EOS_ID, EOS_ID, MASK_ID)


def test_other_words_are_unknown_and_line_breaks_need_no_spaces(loaded):
    assert loaded.encode("zebra") == [UNKNOWN_ID]
    assert loaded.encode("x\ny") == loaded.encode("x \n y")


@pytest.mark.parametrize("content", ["math : mia", "math : mia Answer:"])
def test_chat_ends_with_one_answer_marker(loaded, content):
    messages = [{"role": "user", "content": content}]
    text = loaded.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "math : mia Answer:"
