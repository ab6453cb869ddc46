"""Structured output and forced tool calls over HTTP, by OpenAI's client, of a model that would never write them."""

import json
from collections.abc import Iterator

import jsonschema
import openai
import pytest

from tests.conftest import load_golden, save_text_tokenizer
from tests.e2e.serving import Server, serving

pytestmark = pytest.mark.e2e

TRIP = {
    "type": "object",
    "properties": {"city": {"enum": ["oslo", "rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 30}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": TRIP, "strict": True}} for name in ("book", "stay")
]
FORMAT = {"type": "json_schema", "json_schema": {"name": "trip", "schema": TRIP, "strict": True}}
MESSAGES = [{"role": "user", "content": "yes no"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """SDAR with random weights; whitespace would go on for ever."""
    folder, golden = tmp_path_factory.mktemp("server"), load_golden("sdar_random")
    save_text_tokenizer(golden, folder / "tokenizer")
    (folder / "template").write_text("{% for message in messages %}{{ message.content }} {% endfor %}")
    grammars = json.dumps({"backend": "xgrammar", "disable_any_whitespace": True})
    arguments = ["--tokenizer", str(folder / "tokenizer"), "--chat-template", str(folder / "template")]
    arguments += ["--max-model-len", "256", "--structured-outputs-config", grammars]
    arguments += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    with serving(golden.folder, "sdar-random", folder / "log", *arguments) as running:
        yield running


@pytest.fixture
def chat(server: Server):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")

    def create(**fields):
        fields = {"model": server.model, "messages": MESSAGES, "max_tokens": 96, "temperature": 0.7, **fields}
        return client.chat.completions.create(**fields)

    return create


def test_a_schema_is_followed_whole_and_streamed(chat):
    for options in ({"osdt_policy": "static_threshold"}, {"osdt_policy": "fixed_steps"}, {"osdt_task": "trips"}):
        own = {"vllm_xargs": options}
        answer = chat(response_format=FORMAT, n=2, seed=1, extra_body=own)
        for choice in answer.choices:
            assert choice.finish_reason == "stop"
            jsonschema.validate(json.loads(choice.message.content), TRIP)
        pieces = [chunk for chunk in chat(response_format=FORMAT, seed=1, extra_body=own, stream=True) if chunk.choices]
        text = "".join(chunk.choices[0].delta.content or "" for chunk in pieces)
        assert text == chat(response_format=FORMAT, seed=1, extra_body=own).choices[0].message.content
        jsonschema.validate(json.loads(text), TRIP)


def test_a_json_object_is_one_or_the_beginning_of_one(chat):
    [choice] = chat(response_format={"type": "json_object"}).choices
    assert choice.message.content.startswith("{")
    assert choice.finish_reason == "length" or isinstance(json.loads(choice.message.content), dict)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "stay"}}], ids=str)
def test_a_forced_tool_is_called_with_valid_arguments(server, chat, choice):
    words = json.loads((server.log.with_name("tokenizer") / "tokenizer.json").read_text())["model"]["vocab"]
    biases = {str(words[space]): -100 for space in ("\u0120", "\u010a")}  # vLLM's grammar of a call has any number
    biases[str(words["<|eos|>"])] = 100  # and any number of calls
    message = chat(tools=TOOLS, tool_choice=choice, logit_bias=biases, seed=1).choices[0].message
    assert message.tool_calls
    for call in message.tool_calls:
        assert call.function.name in ("book", "stay") if choice == "required" else call.function.name == "stay"
        jsonschema.validate(json.loads(call.function.arguments), TRIP)


def test_choices_and_expressions_of_a_completion(server):
    for asked, texts in (({"choice": ["yes", "no"]}, ["yes", "no"]), ({"regex": "a{3}|b"}, ["aaa", "b"])):
        answer = server.complete("yes", structured_outputs=asked).raise_for_status().json()["choices"][0]
        assert answer["text"] in texts and answer["finish_reason"] == "stop"


def test_what_cannot_be_a_grammar_is_answered_400_and_the_server_goes_on(server):
    for asked in ({"regex": "(a"}, {"grammar": "root ::= "}, {"json": {"type": "nothing"}}, {"choice": []}):
        refused = server.complete("yes", structured_outputs=asked)
        assert refused.status_code == 400, refused.text
    refused = server.complete("yes", structured_outputs={"regex": "a"}, ignore_eos=True)
    assert refused.status_code == 400 and "ignore_eos" in refused.json()["error"]["message"]
    words = json.loads((server.log.with_name("tokenizer") / "tokenizer.json").read_text())["model"]["vocab"]
    own = {"structured_outputs": {"choice": ["yes", "no"]}, "allowed_token_ids": [words["b"]]}
    stuck = server.complete("yes", **own)
    assert stuck.status_code == 400 and "No token that" in stuck.json()["error"]["message"], stuck.text
    assert stuck.json()["error"]["param"] == "structured_outputs"
    assert '"code": 400' in server.complete("yes", **own, stream=True).text
    assert server.complete("yes", max_tokens=4).status_code == 200
    assert "EngineDeadError" not in server.log.read_text()
