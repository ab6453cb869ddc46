"""Where the key ``osdt`` stands in answers and streams, on pieces as vLLM sends them."""

import asyncio
import json
from types import SimpleNamespace

from vllm.entrypoints.anthropic.protocol import AnthropicMessagesResponse
from vllm.entrypoints.openai.completion.protocol import CompletionResponse, CompletionResponseChoice
from vllm.entrypoints.scale_out.token_in_token_out.protocol import GenerateTokensChoice, GenerateTokensResponse

from vllm_osdt.frontend import response
from vllm_osdt.messages import KEY

# Nested, with a null, as a figure of the future may be: it must arrive whole.
ABOUT = {"policy": "osdt", "profile": None, "trace": [{"step": 0, "confidence": [0.5, None]}]}
OTHER = {**ABOUT, "policy": "factor"}


def chunk(index=0, finish_reason=None, **fields):
    choice = {"index": index, "text": 'é "osdt": 1', "finish_reason": finish_reason}
    return f"data: {json.dumps({'id': 'a', 'choices': [choice], **fields})}\n\n"


USAGE = f"data: {json.dumps({'choices': [], 'usage': {'total_tokens': 3}})}\n\n"
DONE = "data: [DONE]\n\n"


def run(stream, pieces, *args):
    """The pieces that a stream of ours makes of vLLM's."""

    async def source():
        for piece in pieces:
            if callable(piece):  # what the engine's outputs say by then
                piece()
            else:
                yield piece

    async def collect():
        return [piece async for piece in stream(source(), *args)]

    return asyncio.run(collect())


def test_the_last_chunk_of_a_stream_says_it_with_or_without_usage():
    for tail in ([], [USAGE]):
        told = {}
        first, last = chunk(), chunk(finish_reason="stop")
        pieces = [first, lambda told=told: told.update({0: ABOUT}), last, *tail, DONE]
        got = run(response.in_stream, pieces, told, 1)
        plain = [first, last, *tail, DONE]
        assert got[:-2] == plain[:-2] and got[-1] == DONE
        assert json.loads(got[-2][6:]) == {**json.loads(plain[-2][6:]), KEY: ABOUT}


def test_the_last_chunk_of_each_of_several_choices_says_it():
    told = {0: ABOUT, 1: OTHER}
    pieces = [chunk(0), chunk(1, "stop"), chunk(0, "length"), USAGE, DONE]
    got = run(response.in_stream, pieces, told, 2)
    says = [json.loads(piece[6:])["choices"][0].get(KEY) for piece in got[:3]]
    assert says == [None, OTHER, ABOUT] and got[3:] == pieces[3:]
    assert KEY not in json.loads(got[2][6:])


def test_a_stream_that_nothing_is_known_of_is_passed_on_as_it_is():
    error = 'data: {"error": {"message": "a"}}\n\n'
    pieces = [chunk(), chunk(finish_reason="stop"), error, DONE]
    assert run(response.in_stream, pieces, {}, 1) == pieces
    assert run(response.in_stream, pieces[:1], {0: ABOUT}, 1) == pieces[:1]  # cut off: nothing is lost


def test_an_error_behind_the_last_chunk_does_not_say_it():
    error = 'data: {"error": {"message": "a"}}\n\n'
    got = run(response.in_stream, [chunk(finish_reason="stop"), error, DONE], {0: ABOUT}, 1)
    assert sorted(got) == sorted([error, DONE, next(piece for piece in got if "choices" in piece)])
    assert [KEY in json.loads(piece[6:]) for piece in got if "choices" in piece] == [True]


def test_events_of_messages_say_it_in_the_delta_of_the_message():
    told = {}
    says = f"data: {json.dumps({'choices': [], KEY: ABOUT})}\n\n"
    assert run(response.sniffing, [chunk(), says, DONE], told) == [chunk(), says, DONE]
    assert told == {0: ABOUT}
    delta = 'event: message_delta\ndata: {"type": "message_delta", "delta": {"stop_reason": "end_turn"}}\n\n'
    stop = 'event: message_stop\ndata: {"type": "message_stop"}\n\n'
    got = run(response.in_events, [delta, stop], told)
    assert json.loads(got[0].split("data: ")[1])[KEY] == ABOUT and got[1] == stop


def test_outputs_are_noted_by_choice_once_they_are_finished():
    def output(*completions):
        return SimpleNamespace(outputs=[SimpleNamespace(index=index, osdt=about) for index, about in completions])

    told = {}
    results = [(0, output((0, None))), (1, output((1, OTHER))), (0, output((0, ABOUT)))]
    assert run(response.noting, results, told, lambda result: 2 * result[0]) == results
    assert told == {3: OTHER, 0: ABOUT}


def test_an_answer_of_any_class_carries_it_whole():
    def tokens(n):
        choices = [GenerateTokensChoice(index=index, finish_reason="stop", token_ids=[index]) for index in range(n)]
        return GenerateTokensResponse(request_id="a", choices=choices)

    def texts(n):
        choices = [CompletionResponseChoice(index=index, text="") for index in range(n)]
        return CompletionResponse(id="a", created=0, model="m", choices=choices, usage={})

    def message(n):
        return AnthropicMessagesResponse(id="a", content=[], model="m")

    for make in (tokens, texts):
        several = response.tell(make(2), {0: ABOUT, 1: OTHER}, 2)
        assert isinstance(several, type(make(2)))
        dumped = several.model_dump(mode="json")
        assert [choice.pop(KEY) for choice in dumped["choices"]] == [ABOUT, OTHER]
        assert dumped == make(2).model_dump(mode="json")
    for make in (tokens, texts, message):
        assert KEY not in response.tell(make(1), {}, 1).model_dump()
        dumped = response.tell(make(1), {0: ABOUT}, 1).model_dump(mode="json", exclude_none=True)
        assert dumped.pop(KEY) == ABOUT
        assert dumped == make(1).model_dump(mode="json", exclude_none=True)
