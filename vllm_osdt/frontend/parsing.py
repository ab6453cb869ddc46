"""vLLM's reasoning and tool parsers read a stream that has one token a chunk; ours has a block."""

from collections.abc import Iterable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

Message = Any
"""vLLM's ``DeltaMessage``; every process imports this module, and only a server has that class."""


def reading_token_by_token(parser: Any, tokenizer: Any) -> Any:
    """A parser that gives each token of a chunk to its own ``parse_delta``, and one message of what that said.

    Several of vLLM's parsers look for a marker such as ``<think>`` in a chunk of its own, or assert that a chunk has
    one token.

    Args:
        parser: vLLM's, of one answer; changed in place.
        tokenizer: Of the model.
    """
    parser.parse_delta = partial(_parse_chunk, parser.parse_delta, _Pieces(tokenizer))
    return parser


def _parse_chunk(
    parse_delta: Any,
    pieces: "_Pieces",
    delta_text: str,
    delta_token_ids: list[int],
    request: Any,
    prompt_token_ids: list[int] | None = None,
    *,
    finished: bool,
) -> Message | None:
    texts = list(pieces.of(delta_text, delta_token_ids, request, prompt_token_ids))
    if len(texts) < 2:
        return parse_delta(delta_text, delta_token_ids, request, prompt_token_ids, finished=finished)
    last = len(texts) - 1
    return merged(
        parse_delta(text, [token], request, prompt_token_ids, finished=finished and index == last)
        for index, (token, text) in enumerate(zip(delta_token_ids, texts, strict=True))
    )


class _Pieces:
    """The text of each token of a stream, made as vLLM made the text of its chunks.

    A chunk's text may lack what a stop string may yet begin with, which comes with a later chunk, or end at a stop
    string. So pieces are cut where the tokens end in all the text that was sent, and the last one has the rest.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._stream: Any = None
        self._num_decoded = self._num_sent = 0  # characters

    def of(self, text: str, tokens: list[int], request: Any, prompt_token_ids: list[int] | None) -> Iterator[str]:
        """The pieces of a chunk, one a token."""
        if self._stream is None:
            from vllm import SamplingParams
            from vllm.v1.engine.detokenizer import IncrementalDetokenizer

            names = ("skip_special_tokens", "spaces_between_special_tokens")
            params = SamplingParams(**{name: getattr(request, name, True) for name in names})
            prompt = {"prompt_token_ids": prompt_token_ids or [], "prompt_embeds": None}
            told: Any = SimpleNamespace(request_id="", sampling_params=params, **prompt)
            self._stream = IncrementalDetokenizer.from_new_request(self._tokenizer, told)
        begin, cut = self._num_sent, 0
        self._num_sent += len(text)
        for index, token in enumerate(tokens):
            self._stream.update([token], False)
            self._num_decoded += len(self._stream.get_next_output_text(False, True))
            end = len(text) if index == len(tokens) - 1 else min(max(self._num_decoded - begin, cut), len(text))
            yield text[cut:end]
            cut = end


def merged(messages: Iterable[Message | None]) -> Message | None:
    """One message that says what several say; None for no message."""
    found = [message for message in messages if message is not None]
    if not found:
        return None
    fields: dict[str, Any] = {}
    for name in ("role", "content", "reasoning"):
        told = [value for message in found if (value := getattr(message, name)) is not None]
        if told:
            fields[name] = told[0] if name == "role" else "".join(told)
    calls: dict[int, Any] = {}
    for call in (call for message in found for call in message.tool_calls or ()):
        if call.index in calls:
            _extend(calls[call.index], call)
        else:
            calls[call.index] = call.model_copy(deep=True)
    if calls:
        fields["tool_calls"] = list(calls.values())
    return type(found[0])(**fields)


def _extend(call: Any, more: Any) -> None:
    """Add to a tool call what a later message says of it."""
    for name in ("id", "type", "function"):
        if getattr(call, name) is None and getattr(more, name) is not None:
            setattr(call, name, getattr(more, name))
    if more.function is not None and more.function is not call.function:
        name = call.function.name or more.function.name
        parts = [one.arguments for one in (call.function, more.function) if one.arguments is not None]
        values = {"name": name, "arguments": "".join(parts) if parts else None}
        call.function = type(call.function)(**{key: value for key, value in values.items() if value is not None})
