"""What a request may say of the end of its thinking, and what is refused."""

import json
from types import SimpleNamespace

import pytest
from vllm import SamplingParams

from tests.engine.test_engine_config import CONFIG, configure
from vllm_osdt.errors import InvalidOptionError
from vllm_osdt.frontend.admission import admit
from vllm_osdt.messages import RequestSpec, Switch

WORDS = {"</think>": [7], "Check.": [8, 9], "stop": [5]}


@pytest.fixture(scope="module")
def vllm_config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    (folder / "config.json").write_text(json.dumps({**CONFIG, "block_length": 16}))
    return configure(str(folder), additional_config={"osdt": {"profile_dir": ""}})


def admitted(vllm_config, encode=lambda text: WORDS.get(text, [3, 4]), **values):
    """The spec of a request with these options and sampling parameters."""
    own = {name: values.pop(name) for name in list(values) if name in SamplingParams.__struct_fields__}
    extra = {f"osdt_{name}": value for name, value in {"answer_block_length": 1, **values}.items()}
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": 32, **own}, extra_args=extra)
    request = SimpleNamespace(
        prompt_token_ids=[11, 12, 13], lora_request=None, resumable=False, sampling_params=params, cache_salt=None,
        request_id="a",
    )  # fmt: skip
    admit(request, vllm_config, encode=encode)
    return RequestSpec.of(request.sampling_params)


@pytest.mark.parametrize(
    ("options", "switch"),
    [
        ({}, Switch(7, [])),
        ({"think_end_token": "stop", "check_prompt": "Check."}, Switch(5, [8, 9])),
        ({"think_end_token": 20, "check_prompt": [21]}, Switch(20, [21])),
        ({"logprobs": 1}, Switch(7, [])),
        ({"answer_block_length": None}, None),
    ],
)
def test_tokens_are_ids_or_text(vllm_config, options, switch):
    assert admitted(vllm_config, **options).switch == switch


def test_an_answer_is_a_request_whose_prompt_is_what_was_written(vllm_config):
    spec = admitted(vllm_config, answer_block_length=4, policy="fixed_steps", steps_per_block=8, gen_length=32)
    answer = spec.answer(3 + 13)
    assert (answer.switch, answer.options.block_length, answer.options.answer_block_length) == (None, 4, None)
    assert (answer.canvas.start, answer.canvas.end, answer.canvas.max_output_end) == (16, 35, 35)
    assert (answer.options.gen_length, answer.options.steps) == (19, 5 * 4)  # no more than a block has positions


def test_what_takes_the_place_of_the_end_of_thinking():
    assert Switch(7, [8, 9]).written([3, 7, 5]) == ([3, 8, 9], 2)
    assert Switch(7, []).written([3, 7, 5, 7]) == ([3, 7], 0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"answer_block_length": 5}, "answer_block_length is 5, but it divides block_length 16 not"),
        ({"answer_block_length": 32}, "answer_block_length is 32, but it divides block_length 16 not"),
        ({"task": "gsm"}, "thresholds of task 'gsm' are for blocks of one length"),
        ({"policy": "fixed_steps", "steps": 32}, "steps 32 are shared out among blocks of one length"),
        ({"policy": "cad_llm"}, "blocks of that length are refused .cad_min_block is 4"),
        ({"think_end_token": "two words"}, "think_end_token is 'two words', but that is 2 tokens of this model"),
        ({"think_end_token": 5000}, "think_end_token is 5000, but this model's token ids are below"),
        ({"stop_token_ids": [7]}, "think_end_token is None, but token 7 ends the output"),
        ({"check_prompt": [5000]}, "check_prompt is .5000., but expected text or a list of token ids below"),
        ({"check_prompt": "Check.", "stop_token_ids": [9]}, "it has a token that ends the output"),
        ({"policy": "dimple", "adablock": True}, "^policy is 'dimple', whose schedule is one of whole blocks"),
        ({"check_prompt": list(range(8, 40))}, "check_prompt has 32 tokens, which are part of the output"),
        ({"infill": [[8], 4]}, "osdt_infill cannot be sent with answer_block_length"),
        ({"draft": [8, 9]}, "osdt_draft cannot be sent with answer_block_length"),
        ({"check_prompt": "Check.", "logprobs": 1}, "logprobs cannot be sent with answer_block_length"),
        (
            {"answer_block_length": None, "check_prompt": "Check."},
            "without osdt_answer_block_length: send",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(vllm_config, options, words):
    with pytest.raises(InvalidOptionError, match=words):
        admitted(vllm_config, **options)


def test_without_a_tokenizer_tokens_are_ids(vllm_config):
    with pytest.raises(InvalidOptionError, match="is 0 tokens of this model instead of one; send a token id"):
        admitted(vllm_config, encode=None)
    with pytest.raises(InvalidOptionError, match="expected a list of token ids below"):
        admitted(vllm_config, encode=None, think_end_token=7, check_prompt="Check.")
