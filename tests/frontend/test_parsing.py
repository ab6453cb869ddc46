"""A parser says the same of a stream whatever its chunks are."""

import json
from typing import Any

import pytest
from tokenizers.decoders import DecodeStream
from vllm.entrypoints.generate.base.protocol import DeltaFunctionCall, DeltaMessage, DeltaToolCall
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.parser import ParserManager

from tests.byte_tokenizer import byte_tokenizer
from vllm_osdt.frontend.parsing import merged, reading_token_by_token

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
THOUGHT = "<think>naïve 😀</think>"
CALLS = "".join(
    f'<tool_call>\n{{"name": "weather", "arguments": {{"city": "{city}"}}}}\n</tool_call>' for city in ("Zürich", "😀")
)
ANSWERS = {
    "a thought": THOUGHT + "the answer is 日本語",
    "a thought that does not end": "<think>the answer is a plum and so on",
    "a thought without its beginning": "naïve 😀</think>the answer",
    "calls": "Well: " + CALLS,
    "a thought and calls": THOUGHT + "Well: " + CALLS,
    "neither": "the answer is 日本語",
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


def told(message: DeltaMessage | None) -> dict[str, Any]:
    """What a whole stream's messages, merged into one, say."""
    calls = [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls]
    return {"reasoning": message.reasoning or "", "content": message.content or "", "calls": calls}


def parse_in_chunks(tokenizer: Any, parsers: tuple[str | None, str | None], text: str, size: int, **fields: Any) -> Any:
    """Stream an answer to vLLM's parsers with so many tokens a chunk, as a server does."""
    reasoning, tool = parsers
    cls = ParserManager.get_parser(
        reasoning_parser_name=reasoning, tool_parser_name=tool, enable_auto_tools=tool is not None
    )
    tools = {"tools": [TOOL]} if tool else {}
    request = ChatCompletionRequest(model="m", messages=[{"role": "user", "content": "x"}], **tools, **fields)
    parser = reading_token_by_token(cls(tokenizer, request.tools), tokenizer)
    ids, prompt = tokenizer.encode(text, add_special_tokens=False), tokenizer.encode("the")
    stream, messages = DecodeStream(skip_special_tokens=request.skip_special_tokens), []
    for start in range(0, len(ids), size):
        chunk = ids[start : start + size]
        piece = "".join(stream.step(tokenizer._tokenizer, token) or "" for token in chunk)
        messages.append(parser.parse_delta(piece, chunk, request, prompt, finished=start + size >= len(ids)))
    whole = cls(tokenizer, request.tools).parse(text, request, enable_auto_tools=tool is not None)
    return told(merged(messages)), whole


@pytest.mark.parametrize("tool", [None, "hermes"])
@pytest.mark.parametrize("reasoning", ["deepseek_r1", "ernie45", "qwen3", None])
@pytest.mark.parametrize("answer", ANSWERS)
def test_a_stream_of_blocks_is_parsed_as_one_of_tokens(tokenizer, reasoning, tool, answer) -> None:
    if reasoning is None and tool is None:
        tool = "pythonic"
    by_token, (thought, content, calls) = parse_in_chunks(tokenizer, (reasoning, tool), ANSWERS[answer], 1)
    for size in (2, 5, 8, 32, 1000):
        assert parse_in_chunks(tokenizer, (reasoning, tool), ANSWERS[answer], size)[0] == by_token
    found = [(call.name, json.loads(call.arguments)) for call in calls or []]
    assert by_token == {"reasoning": thought or "", "content": content or "", "calls": found}


def test_a_parser_that_asserts_one_token_a_chunk_gets_that(tokenizer) -> None:
    text = "the answer is 日本語"
    got, _ = parse_in_chunks(tokenizer, ("hunyuan_a13b", None), text, 8)
    assert got["content"] + got["reasoning"] == text


class Echo:
    """Notes the pieces that it is given."""

    def __init__(self) -> None:
        self.pieces: list[tuple[str, tuple[int, ...], bool]] = []

    def parse_delta(self, delta_text, delta_token_ids, request, prompt_token_ids=None, *, finished):
        self.pieces.append((delta_text, tuple(delta_token_ids), finished))
        return DeltaMessage(content=delta_text)


def test_text_that_was_held_back_comes_with_the_next_chunk_and_no_text_is_lost(tokenizer) -> None:
    request = ChatCompletionRequest(model="m", messages=[{"role": "user", "content": "x"}])
    ids = tokenizer.encode("a😀bcd", add_special_tokens=False)
    assert len(ids) == 8
    parser = reading_token_by_token(Echo(), tokenizer)
    chunks = [("", ids[:2], False), ("a😀", ids[2:6], False), ("bc", ids[6:], False), ("d", [], True)]
    messages = [parser.parse_delta(text, tokens, request, [1], finished=end) for text, tokens, end in chunks]
    assert [message.content for message in messages] == ["", "a😀", "bc", "d"]
    given = [piece for piece, _, _ in parser.pieces]
    assert given == ["", "", "a", "", "😀", "", "bc", "", "d"]
    assert [end for *_, end in parser.pieces] == [False] * 8 + [True]
    assert [token for _, tokens, _ in parser.pieces for token in tokens] == ids


def test_merged_messages_keep_each_call_apart() -> None:
    def call(index: int, name: str | None, arguments: str | None, **fields: Any) -> DeltaMessage:
        function = DeltaFunctionCall(name=name, arguments=arguments)
        return DeltaMessage(tool_calls=[DeltaToolCall(index=index, function=function, **fields)])

    assert merged([None, None]) is None
    parts = [call(0, "f", None, id="x", type="function"), call(0, None, '{"a"'), call(0, None, ": 1}"), None]
    message = merged([DeltaMessage(reasoning="t"), DeltaMessage(content="w"), *parts, call(1, "g", "{}", id="y")])
    assert message.model_dump(exclude_unset=True, exclude_none=True) == {
        "content": "w",
        "reasoning": "t",
        "tool_calls": [
            {"id": "x", "type": "function", "index": 0, "function": {"name": "f", "arguments": '{"a": 1}'}},
            {"id": "y", "index": 1, "function": {"name": "g", "arguments": "{}"}},
        ],
    }
