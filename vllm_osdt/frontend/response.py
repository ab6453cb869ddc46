"""What a response says of its decoding: the key ``osdt`` of every endpoint's answer, streams included.

An answer of one choice has it at the top, an answer of several in each choice. A stream has it in its last chunk, or in
the last one of each choice.
"""

import json
from collections.abc import AsyncIterator, Callable, Iterable
from functools import cache
from typing import Any

from pydantic import BaseModel, ConfigDict, SerializeAsAny, create_model

from vllm_osdt.messages import KEY

Told = dict[int, Any]
"""What the finished choices of an answer say, by their index."""

_DATA, _ENDS = "data: {", '"finish_reason":'


def tell(response: Any, told: Told, num_choices: int) -> Any:
    """An answer that says how it was decoded.

    Args:
        response: One of vLLM's answers, changed in place where its class lets other fields in.
        told: By index of the choice.
        num_choices: Of the answer.
    """
    if not told:
        return response
    if num_choices == 1:
        return _with_field(response, told[0])
    response.choices = [_with_field(choice, told.get(index)) for index, choice in enumerate(response.choices)]
    return _with_field(response, None)


async def noting(results: AsyncIterator[Any], told: Told, offset_of: Callable[[Any], int] = lambda _: 0) -> Any:
    """The results of an engine, while what they say is noted.

    Args:
        results: vLLM's ``RequestOutput``, or pairs of a prompt's index and such.
        told: Gets what finished choices say.
        offset_of: The index of a result's first choice in the answer.
    """
    async for result in results:
        output = result[1] if isinstance(result, tuple) else result
        note(output.outputs, told, offset_of(result))
        yield result


def note(completions: Iterable[Any], told: Told, offset: int = 0) -> None:
    """Note what finished completions say, the first of which may be the choice ``offset`` of its answer."""
    for completion in completions:
        about = getattr(completion, KEY, None)
        if about is not None:
            told[offset + completion.index] = about


async def in_stream(pieces: AsyncIterator[str], told: Told, num_choices: int) -> AsyncIterator[str]:
    """A stream of chunks that says how it was decoded.

    From the end of the only choice on, pieces follow at once, so that the last chunk can be waited for.

    Args:
        pieces: Of the stream, as they are sent.
        told: What its choices say, once they are finished.
        num_choices: Of the answer.
    """
    held: str | None = None
    async for piece in pieces:
        if not told or not piece.startswith(_DATA):
            if held is not None and piece.startswith("data: [DONE]"):
                yield _edited(held, lambda chunk: chunk.update({KEY: told[0]}))
                held = None
            yield piece
        elif num_choices > 1:
            yield _edited(piece, lambda chunk: _tell_choices(chunk, told)) if _ENDS in piece else piece
        elif '"choices":' in piece:
            if held is not None:
                yield held
            held = piece
        else:
            yield piece
    if held is not None:
        yield held


def _tell_choices(chunk: dict[str, Any], told: Told) -> None:
    for choice in chunk.get("choices", ()):
        if choice.get("finish_reason") is not None and choice["index"] in told:
            choice[KEY] = told[choice["index"]]


async def sniffing(pieces: AsyncIterator[str], told: Told) -> AsyncIterator[str]:
    """A stream of chunks, while what it says of its only choice is noted."""
    async for piece in pieces:
        if f'"{KEY}":' in piece:
            found = json.loads(piece.removeprefix("data: ")).get(KEY)
            if found is not None:
                told[0] = found
        yield piece


async def in_events(pieces: AsyncIterator[str], told: Told) -> AsyncIterator[str]:
    """A stream of the messages API, whose last event with a figure, ``message_delta``, says how it was decoded."""
    async for piece in pieces:
        if told and piece.startswith("event: message_delta\n"):
            yield _edited(piece, lambda event: event.update({KEY: told[0]}))
        else:
            yield piece


def _edited(piece: str, edit: Callable[[dict[str, Any]], None]) -> str:
    """A piece of a stream with its JSON changed in place."""
    head, data = piece.split("data: ", 1)
    values = json.loads(data)
    edit(values)
    return f"{head}data: {json.dumps(values, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _with_field(model: BaseModel, value: Any) -> Any:
    """A model with our field; nothing is added for None."""
    if type(model).model_config.get("extra") == "allow":
        if value is not None:
            setattr(model, KEY, value)
        return model
    fields = {**model.__dict__} if value is None else {**model.__dict__, KEY: value}
    return _open(type(model)).model_construct(**fields)


@cache
def _open(cls: type[BaseModel]) -> type[BaseModel]:
    """A subclass that lets other fields in, its choices included."""
    fields: dict[str, Any] = {}
    if "choices" in cls.model_fields:
        fields["choices"] = (list[SerializeAsAny[BaseModel]], ...)
    made = create_model(cls.__name__, __base__=cls, **fields)
    made.model_config = ConfigDict(**{**cls.model_config, "extra": "allow"})
    made.model_rebuild(force=True)
    return made
