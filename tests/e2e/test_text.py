"""Text over block borders: characters of several tokens, special tokens, reasoning and tool calls, chat templates.

The model has random weights, so what it says is pinned: the answer is the text and a token of its own.
"""

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm.sampling_params import RequestOutputKind

from tests.byte_tokenizer import END, END_OF_TURN, MASK, VOCABULARY, byte_tokenizer
from tests.conftest import load_golden
from tests.e2e.engine import sampling
from tests.e2e.serving import Server, serving
from tests.reference.llada import make_checkpoint

pytestmark = pytest.mark.e2e

MESSAGES = [{"role": "user", "content": "the weather in Zürich?"}]
EMOJI = "naïve 😀 👩‍👩‍👧 日本語 Zürich 🇨🇭"
THOUGHT = "<think>naïve 😀 thoughts of a plum</think>"
CALLS = "".join(
    f'<tool_call>\n{{"name": "weather", "arguments": {{"city": "{city}"}}}}\n</tool_call>' for city in ("Zürich", "😀")
)
TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
BLOCKS = (3, 16)
MISTRAL_TOKENIZER = Path(find_spec("mistral_common").origin).with_name("data") / (
    "mistral_instruct_tokenizer_241114.model.v7"
)
MISTRAL_TOKENS = 32768


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


@pytest.fixture(scope="module")
def server(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Random weights in the published format, with a vocabulary of bytes, and both kinds of parser."""
    folder, golden = tmp_path_factory.mktemp("bytes"), load_golden("llada_random")
    weights = load_file(golden.folder / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    for name in ("model.transformer.wte.weight", "model.transformer.ff_out.weight"):
        weights[name] = torch.randn(VOCABULARY, weights[name].shape[1], generator=generator) * 0.2
    save_file(weights, folder / "model.safetensors")
    ids = {"eos_token_id": tokenizer.eos_token_id, "mask_token_id": tokenizer.mask_token_id}
    config = {**golden.config, **ids, "pad_token_id": ids["eos_token_id"]}
    sizes = {"vocab_size": VOCABULARY, "embedding_size": VOCABULARY}
    (folder / "config.json").write_text(json.dumps({**config, **sizes}))
    tokenizer.save_pretrained(folder)
    arguments = ["--reasoning-parser", "deepseek_r1", "--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    arguments += ["--trust-request-chat-template"]
    with serving(folder, "bytes", tmp_path_factory.mktemp("server") / "log", *arguments) as running:
        yield running


def post(server: Server, path: str, **fields: Any) -> httpx.Response:
    body = {"model": server.model, "temperature": 0, **fields}
    return httpx.post(f"{server.url}{path}", json=body, timeout=120).raise_for_status()


def stream(server: Server, path: str, **fields: Any) -> list[dict[str, Any]]:
    """The choice of every chunk that has one."""
    lines = post(server, path, stream=True, **fields).text.splitlines()
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    return [chunk["choices"][0] for chunk in chunks if chunk["choices"]]


def pinned(tokenizer: Any, text: str, block: int) -> dict[str, Any]:
    """Fields of a request whose answer is a text and a full stop."""
    stop = tokenizer.encode(".", add_special_tokens=False)
    return {"osdt_infill": [text, 1], "allowed_token_ids": stop, "osdt_block_length": block}


@pytest.mark.parametrize("block", [1, 3, 8, 32])
def test_no_character_is_cut_at_the_border_of_a_block(server: Server, tokenizer: Any, block: int) -> None:
    fields = {"prompt": "the", "return_token_ids": True, **pinned(tokenizer, EMOJI, block)}
    whole = post(server, "/v1/completions", **fields).json()["choices"][0]
    chunks = stream(server, "/v1/completions", **fields)
    assert whole["text"] == EMOJI + "." == "".join(chunk["text"] for chunk in chunks)
    assert not any("\ufffd" in chunk["text"] for chunk in chunks)
    ids = whole["token_ids"]
    assert [token for chunk in chunks for token in chunk["token_ids"]] == ids
    until_border = [tokenizer.decode(ids[:border]) for border in range(block, len(ids), block)]
    assert any("\ufffd" in text for text in until_border)  # within a character


def test_bytes_that_are_no_character_are_the_same_in_a_stream(server: Server) -> None:
    broken = 0
    for seed in range(3):
        fields = {"prompt": "the", "max_tokens": 60, "temperature": 1.5, "seed": seed, "osdt_block_length": 4}
        whole = post(server, "/v1/completions", **fields).json()["choices"][0]["text"]
        assert "".join(chunk["text"] for chunk in stream(server, "/v1/completions", **fields)) == whole
        broken += "\ufffd" in whole
    assert broken


def test_special_tokens_are_skipped_or_not_alike(server: Server, tokenizer: Any) -> None:
    text = f"the {END_OF_TURN}plum {MASK}😀{END_OF_TURN}"
    for block in BLOCKS:
        for skip, expected in ((True, "the plum 😀."), (False, text + ".")):
            fields = {"skip_special_tokens": skip, "prompt": "the", **pinned(tokenizer, text, block)}
            whole = post(server, "/v1/completions", **fields).json()["choices"][0]["text"]
            streamed = "".join(chunk["text"] for chunk in stream(server, "/v1/completions", **fields))
            assert (whole, streamed) == (expected, expected)


ANSWERS = {
    "a thought": THOUGHT + "the answer 日本語",
    "a thought that does not end": "<think>the answer is a plum and so on",
    "calls": "<think></think>Well: " + CALLS,
    "a thought and calls": THOUGHT + "Well: " + CALLS,
}


def said_by(message: dict[str, Any]) -> dict[str, Any]:
    calls = [
        (one["function"]["name"], json.loads(one["function"]["arguments"])) for one in message.get("tool_calls") or []
    ]
    return {"reasoning": message["reasoning"] or "", "content": message["content"] or "", "calls": calls}


def joined(deltas: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that a stream's chunks make, as a client makes it."""
    message: dict[str, Any] = {
        name: "".join(one.get(name) or "" for one in deltas) for name in ("reasoning", "content")
    }
    calls: dict[int, dict[str, Any]] = {}
    for call in (call for one in deltas for call in one.get("tool_calls") or []):
        function = calls.setdefault(call["index"], {"function": {"name": "", "arguments": ""}})["function"]
        for name in function:
            function[name] += call["function"].get(name) or ""
    return {**message, "tool_calls": list(calls.values())}


@pytest.mark.parametrize("answer", ANSWERS)
def test_reasoning_and_tool_calls_are_told_apart_in_chunks_of_a_block(
    server: Server, tokenizer: Any, answer: str
) -> None:
    text, tools = ANSWERS[answer], {"tools": [TOOL]} if "calls" in answer else {}
    for block in BLOCKS:
        fields = {"messages": MESSAGES, **tools, **pinned(tokenizer, text, block)}
        whole = post(server, "/v1/chat/completions", **fields).json()["choices"][0]
        said = said_by(whole["message"])
        assert said["reasoning"] in (text.partition("</think>")[0].removeprefix("<think>") + tail for tail in ("", "."))
        assert [city["city"] for _, city in said["calls"]] == (["Zürich", "😀"] if tools else [])
        chunks = stream(server, "/v1/chat/completions", **fields)
        assert said_by(joined([chunk["delta"] for chunk in chunks])) == said, block


def test_the_other_endpoints_tell_them_apart_too(server: Server, tokenizer: Any) -> None:
    fields = pinned(tokenizer, THOUGHT + "the answer 日本語", 8)
    events = post(server, "/v1/messages", messages=MESSAGES, max_tokens=128, stream=True, **fields).text.splitlines()
    deltas = [json.loads(line[6:]).get("delta", {}) for line in events if line.startswith("data: {")]
    assert "".join(delta.get("thinking", "") for delta in deltas) == "naïve 😀 thoughts of a plum"
    assert "".join(delta.get("text", "") for delta in deltas)[:-1] == "the answer 日本語"
    lines = post(server, "/v1/responses", input=MESSAGES[0]["content"], stream=True, **fields).text.splitlines()
    told = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    kinds = {
        "response.reasoning_text.delta": "naïve 😀 thoughts of a plum",
        "response.output_text.delta": "the answer 日本語",
    }
    for kind, expected in kinds.items():
        assert "".join(event["delta"] for event in told if event["type"] == kind)[: len(expected)] == expected


LLADA = (  # of LLaDA-8B-Instruct, with our beginning of a text
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = '" + END + "' + content %}"
    "{% endif %}{{ content }}{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)


def test_a_chat_template_is_tokenized_once_as_it_stands(server: Server, tokenizer: Any) -> None:
    """No second beginning of the text, and each marker of the vocabulary is one token."""
    asked = f"<|start_header_id|>user<|end_header_id|>\n\n{MESSAGES[0]['content']}<|eot_id|>"
    texts = {LLADA: f"{END}{asked}<|start_header_id|>assistant<|end_header_id|>\n\n"}
    texts[None] = f"<|im_start|>user\n{MESSAGES[0]['content']}<|im_end|>\n<|im_start|>assistant\n"
    for template, text in texts.items():
        fields = {"messages": MESSAGES, "max_tokens": 4, "return_token_ids": True}
        body = post(
            server, "/v1/chat/completions", **fields, **({"chat_template": template} if template else {})
        ).json()
        assert body["prompt_token_ids"] == tokenizer.encode(text, add_special_tokens=False)
        assert body["prompt_token_ids"].count(tokenizer.eos_token_id) == text.count(END)


def test_text_of_a_published_tokenizer_is_streamed_as_it_is_decoded_whole(tmp_path: Path, start_llm: Any) -> None:
    """Mistral's, which falls back to bytes: an emoji is four tokens, and borders of blocks cut it."""
    sizes = {"vocab_size": MISTRAL_TOKENS + 1, "embedding_size": MISTRAL_TOKENS + 1}
    folder = make_checkpoint(tmp_path / "model", seed=1, mask_token_id=MISTRAL_TOKENS, **sizes)
    (folder / "tokenizer.model.v7").symlink_to(MISTRAL_TOKENIZER)
    llm = start_llm(folder, tokenizer=str(folder), tokenizer_mode="mistral", max_num_seqs=8, max_model_len=256)
    tokenizer = llm.get_tokenizer()
    pieces: dict[str, list[Any]] = {}
    for index, block_length in enumerate((3, 4, 7, 16)):
        one = sampling(None, policy="static_threshold", block_length=block_length)
        one.extra_args["osdt_infill"] = [EMOJI, 1, EMOJI]
        one.output_kind = RequestOutputKind.DELTA
        llm.llm_engine.add_request(str(index), {"prompt_token_ids": [5, 6, 7]}, one)
        pieces[str(index)] = []
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            pieces[output.request_id].append(output.outputs[0])
    expected = tokenizer.encode(EMOJI, add_special_tokens=False)
    assert len(expected) > len(EMOJI)  # characters of several tokens
    for of_request in pieces.values():
        ids = [token for piece in of_request for token in piece.token_ids]
        assert ids[: len(expected)] == ids[-len(expected) :] == expected and len(ids) == 2 * len(expected) + 1
        text = "".join(piece.text for piece in of_request)
        assert (
            len(of_request) > 4 and text == tokenizer.decode(ids, skip_special_tokens=True) and text.startswith(EMOJI)
        )
