"""Clients of a server as their users have them: the OpenAI client and vLLM's own commands."""

import asyncio
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests import forked
from tests.e2e.serving import VLLM, Server, serving
from vllm_osdt.mini import model_path

pytestmark = pytest.mark.e2e

QUESTION = "quiz : pick one beast . A saw B dog C plum ."
MESSAGES = [{"role": "user", "content": QUESTION}]
ANSWER = "the answer is B ."


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(model_path("llada-mini"), "llada-mini", tmp_path_factory.mktemp("server") / "log") as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")


def command(*arguments: object) -> str:
    """What one of vLLM's commands prints."""
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    done = forked.run([str(VLLM), *map(str, arguments)], env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_the_openai_client_with_nothing_but_messages(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="llada-mini", messages=MESSAGES)
    assert answer.choices[0].message.content.endswith(ANSWER) and answer.osdt["task"] is None
    *chunks, last = client.chat.completions.create(model="llada-mini", messages=MESSAGES, stream=True)
    assert (
        "".join(chunk.choices[0].delta.content or "" for chunk in [*chunks, last]) == answer.choices[0].message.content
    )
    assert last.osdt == answer.osdt
    with client.chat.completions.stream(model="llada-mini", messages=MESSAGES) as events:
        assert events.get_final_completion().choices[0].message.content == answer.choices[0].message.content
    response = client.responses.create(model="llada-mini", input=QUESTION)
    assert response.output_text == answer.choices[0].message.content and response.osdt == answer.osdt


def test_the_openai_client_with_parameters(client: openai.OpenAI) -> None:
    asked = {"temperature": 0.8, "top_p": 0.9, "n": 2, "stop": ["."], "seed": 3, "max_completion_tokens": 40}
    fields = {"model": "llada-mini", "messages": MESSAGES, "extra_body": {"osdt_task": "client"}, **asked}
    answer = client.chat.completions.create(**fields, logprobs=True, top_logprobs=2)
    assert len(answer.choices) == 2
    for choice in answer.choices:
        assert choice.finish_reason == "stop" and "." not in choice.message.content and choice.osdt["task"] == "client"
        assert all(len(one.top_logprobs) == 2 and one.logprob <= 0 for one in choice.logprobs.content)
    texts = {0: "", 1: ""}
    for chunk in client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert list(texts.values()) == [choice.message.content for choice in answer.choices]
    assert chunk.usage.completion_tokens == answer.usage.completion_tokens
    with pytest.raises(openai.BadRequestError, match="did you mean 'osdt_threshold'") as refused:
        client.chat.completions.create(model="llada-mini", messages=MESSAGES, extra_body={"osdt_treshold": 0.5})
    assert refused.value.param == "osdt_treshold"


def test_the_asynchronous_openai_client(server: Server, client: openai.OpenAI) -> None:
    expected = client.chat.completions.create(model="llada-mini", messages=MESSAGES).choices[0].message.content

    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            asked = (client.chat.completions.create(model="llada-mini", messages=MESSAGES) for _ in range(4))
            texts = [answer.choices[0].message.content for answer in await asyncio.gather(*asked)]
            chunks = await client.chat.completions.create(model="llada-mini", messages=MESSAGES, stream=True)
            return [*texts, "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])]

    assert asyncio.run(ask()) == [expected] * 5


def test_vllm_chat_and_bench_serve(server: Server) -> None:
    assert ANSWER in command("chat", "--url", f"{server.url}/v1", "--quick", QUESTION)
    lengths = ["--random-input-len", 16, "--random-output-len", 64]
    asked = ["--model", "llada-mini", "--tokenizer", model_path("llada-mini"), "--dataset-name", "random", *lengths]
    printed = command("bench", "serve", "--base-url", server.url, *asked, "--num-prompts", 4)
    figures = dict(re.findall(r"^(.+?): +([0-9.]+) *$", printed, re.MULTILINE))
    assert (figures["Successful requests"], figures["Total generated tokens"]) == ("4", str(4 * 64))
    assert int(figures["Committed tokens"]) == 4 * 64 > int(figures["Denoising steps"]) > 0


def test_vllm_run_batch(tmp_path: Path) -> None:
    body = {"model": "llada-mini", "messages": MESSAGES}
    bodies = [body, {**body, "osdt_task": "batch"}, {**body, "osdt_treshold": 0.5}]
    lines = [
        {"custom_id": str(index), "method": "POST", "url": "/v1/chat/completions", "body": one}
        for index, one in enumerate(bodies)
    ]
    asked, answered = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    asked.write_text("".join(json.dumps(line) + "\n" for line in lines))
    model = ["--model", model_path("llada-mini"), "--served-model-name", "llada-mini", "--dtype", "float32"]
    command("run-batch", "-i", asked, "-o", answered, *model)
    plain, of_task, refused = sorted(map(json.loads, answered.read_text().splitlines()), key=lambda it: it["custom_id"])
    for one, task in ((plain, None), (of_task, "batch")):
        answer = one["response"]["body"]
        assert answer["choices"][0]["message"]["content"].endswith(ANSWER) and answer["osdt"]["task"] == task
    assert "did you mean 'osdt_threshold'" in json.dumps(refused)


def test_vllm_bench_throughput(tmp_path: Path) -> None:
    lengths = ["--random-input-len", 16, "--random-output-len", 64, "--num-prompts", 4]
    figures = tmp_path / "figures.json"
    model = ["--model", model_path("llada-mini"), "--dtype", "float32", "--output-json", figures]
    command("bench", "throughput", *model, "--dataset-name", "random", *lengths)
    found = json.loads(figures.read_text())
    assert found["num_requests"] == 4 and found["total_num_tokens"] == 4 * (16 + 64)
