"""``vllm serve MODEL --plugin osdt`` and clients that send nothing but messages; what is refused, and how."""

import asyncio
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.serving import Server, serving
from vllm_osdt.mini import model_path
from vllm_osdt.mini.tasks import TASKS, check, generate

pytestmark = pytest.mark.e2e

PROBLEMS = {task: generate(task, "held_out", 48, seed=7) for task in TASKS}
QUIZ = PROBLEMS["multiple_choice"][0].prompt
MESSAGES = [{"role": "user", "content": QUIZ.removesuffix(" Answer:")}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The bundled model, and no option of ours."""
    log = tmp_path_factory.mktemp("server") / "log"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_LOGGING_LEVEL", "INFO")  # as a user has it
        server = serving(model_path("llada-mini"), "llada-mini", log)
    with server as running:
        yield running


def post(server: Server, path: str, **fields: Any) -> httpx.Response:
    """POST a body; a stream is read to its end."""
    return httpx.post(f"{server.url}{path}", json={"model": "llada-mini", **fields}, timeout=120)


def ask_all(server: Server, problems: list[Any], **fields: Any) -> list[dict[str, Any]]:
    """Chat about every problem, some at a time, in this order."""

    async def send() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=16)
        async with httpx.AsyncClient(timeout=240, limits=limits) as client:
            bodies = [
                {"model": "llada-mini", "messages": [{"role": "user", "content": p.prompt.removesuffix(" Answer:")}]}
                for p in problems
            ]
            url = f"{server.url}/v1/chat/completions"
            return await asyncio.gather(*(client.post(url, json={**body, **fields}) for body in bodies))

    return [response.raise_for_status().json() for response in asyncio.run(send())]


def answers(bodies: list[dict[str, Any]]) -> list[str]:
    return [body["choices"][0]["message"]["content"] for body in bodies]


@pytest.fixture(scope="module")
def static(server: Server) -> dict[str, list[str]]:
    """By task: what the static threshold answers in a canvas that the task's answers fit."""
    options = {"vllm_xargs": {"osdt_policy": "static_threshold"}, "max_tokens": 96}
    return {task: answers(ask_all(server, PROBLEMS[task], **options)) for task in TASKS}


ORDERS = {
    "one task after another": [problem for task in TASKS for problem in PROBLEMS[task]],
    "the other way round": [problem for task in reversed(TASKS) for problem in PROBLEMS[task]],
    "mixed": random.Random(1).sample([problem for task in TASKS for problem in PROBLEMS[task]], 48 * len(TASKS)),
}


@pytest.mark.parametrize("order", ORDERS)
def test_clients_that_send_nothing_but_messages_lose_no_answer(server: Server, static, order: str) -> None:
    """No task, no ``max_tokens``: more than any task's calibration takes, and none is made of them."""
    expected = {
        problem.prompt: text for task in TASKS for problem, text in zip(PROBLEMS[task], static[task], strict=True)
    }
    bodies = ask_all(server, ORDERS[order])
    given = answers(bodies)
    assert [expected[problem.prompt] for problem in ORDERS[order]] == given
    assert all(check(problem, text) for problem, text in zip(ORDERS[order], given, strict=True))
    told = [body["metrics"]["speculative_decoding"]["osdt"] for body in bodies]
    assert {(one["task"], one["profile"], one["calibrating"]) for one in told} == {(None, None, False)}


def test_every_endpoint_answers_well_without_a_limit(server: Server, static) -> None:
    text = static["multiple_choice"][0]
    reply = post(server, "/v1/responses", input=MESSAGES[0]["content"]).raise_for_status().json()
    assert reply["output"][0]["content"][0]["text"] == text
    stream = post(server, "/v1/chat/completions", messages=MESSAGES, stream=True).raise_for_status().text
    chunks = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks) == text


ENDPOINTS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 64},
    "/v1/completions": {"prompt": QUIZ, "max_tokens": 64},
    "/v1/responses": {"input": MESSAGES[0]["content"], "max_output_tokens": 64},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 64},
}


@pytest.mark.parametrize("path", ENDPOINTS)
@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_is_http_400_with_its_reason_on_every_endpoint(server: Server, path: str, stream: bool) -> None:
    fields = ENDPOINTS[path]
    limit = next(name for name in fields if "tokens" in name)
    bad = {
        "osdt_treshold is no option": ({"osdt_treshold": 0.5}, "did you mean 'osdt_threshold'?"),
        "too long": ({limit: 505}, f"{limit} is 505, but the prompt of "),
        "no value": ({"vllm_xargs": {"osdt_threshold": 7}}, "osdt_threshold is 7; expected a number in (0, 1]"),
        "not implemented": ({"vllm_xargs": {"osdt_threshold": 0.5}, "osdt_threshold": 0.6}, "send one of them"),
    }
    before = server.log.read_text()
    for change, words in bad.values():
        response = post(server, path, **{**fields, **change, "stream": stream})
        assert response.status_code == 400, response.text
        assert words in response.json()["error"]["message"]
    said = server.log.read_text()[len(before) :].splitlines()
    said = [line for line in said if "[loggers.py" not in line and "[metrics.py" not in line]  # vLLM's, every 10 s
    assert len([line for line in said if "Refused a request: " in line]) == len(bad)
    assert "Traceback" not in "".join(said)
    assert len(said) <= 2 * len(bad)  # the refusal, and the access


@pytest.mark.parametrize("path", ENDPOINTS)
def test_a_task_at_the_top_of_the_body_is_heard(server: Server, path: str) -> None:
    """As clients send fields that they do not know: vLLM drops them."""
    metrics = "vllm:osdt_requests_total"

    def calibrating() -> float:
        lines = httpx.get(f"{server.url}/metrics", timeout=30).text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(metrics) and "calibrating" in line)

    before = calibrating()
    post(server, path, **ENDPOINTS[path], osdt_task=f"top {path}").raise_for_status()
    for _ in range(50):
        if calibrating() > before:
            break
        asyncio.run(asyncio.sleep(0.1))
    assert calibrating() == before + 1
    both = {"osdt_task": "one", "vllm_xargs": {"osdt_task": "other"}}
    refused = post(server, path, **ENDPOINTS[path], **both)
    assert refused.status_code == 400 and "'one' at the top of the body" in refused.json()["error"]["message"]


CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


@pytest.mark.parametrize(
    ("path", "fields", "words"),
    [
        (CHAT, {"use_beam_search": True, "n": 2}, "use_beam_search is not implemented"),
        (COMPLETIONS, {"use_beam_search": True, "n": 2}, "use_beam_search is not implemented"),
        ("/generative_scoring", {"query": "a", "items": ["b"], "label_token_ids": [5]}, "Generative scoring is not"),
        (CHAT, {"echo": True, "logprobs": True, "top_logprobs": 2}, "echo=True"),
        (COMPLETIONS, {"prompt_logprobs": 2}, "prompt_logprobs=2 (leave it out)"),
        (CHAT, {"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos is set"),
        (COMPLETIONS, {"structured_outputs": {"regex": "(A"}}, "regex"),
        (CHAT, {"tools": [TOOL], "tool_choice": "required"}, 'tool_choice="required" requires'),
    ],
)
def test_a_refusal_names_what_the_client_sent(server: Server, path: str, fields: dict, words: str) -> None:
    response = post(server, path, **{**ENDPOINTS.get(path, {}), **fields})
    message = response.json()["error"]["message"]
    assert response.status_code == 400 and words in message, message
    assert "StructuredOutputsParams" not in message


def test_an_answer_is_one_of_the_choices_that_are_asked_for(server: Server) -> None:
    """The model's words have spaces between them: a choice of one word each."""
    for words in (["A", "B", "C", "D"], ["teal", "recipe"]):
        for path, fields in ((CHAT, {"messages": MESSAGES}), (COMPLETIONS, {"prompt": QUIZ})):
            body = post(server, path, **fields, structured_outputs={"choice": words}).raise_for_status().json()
            [choice] = body["choices"]
            text = choice["message"]["content"] if path == CHAT else choice["text"]
            assert text.strip() in words
            assert choice["finish_reason"] == "stop"


def test_the_log_says_in_one_paragraph_what_was_decided_and_nothing_of_each_weight(server: Server) -> None:
    log = server.log.read_text()
    [line] = [line for line in log.splitlines() if "vllm-osdt decodes with policy osdt" in line]
    decoding = ["static threshold 0.9", "block length 32", "canvas 96", "cache mode dual"]
    tasks = ["calibrates on 64 requests", "name no task: static threshold", "profiles of this model in"]
    assert all(words in line for words in decoding + tasks)
    assert "Attempted to load weight" not in log


def test_a_running_server_follows_what_tune_chooses_though_it_has_a_profile(server: Server, tmp_path: Path) -> None:
    problems = generate("word_problems", "held_out", 130, seed=13)
    prompts, asked = [problem.prompt for problem in problems[:64]], problems[64].prompt
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda prompt: server.complete(prompt, osdt_task="tuned", osdt_early=False), prompts))
    before = server.complete(asked, osdt_task="tuned").json()["metrics"]["speculative_decoding"]["osdt"]
    assert before["policy"] == "osdt" and before["profile"] is not None
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": problem.prompt}) + "\n" for problem in problems))
    command = [Path(sys.executable).with_name("vllm-osdt"), "tune", "llada-mini", "--task", "tuned", "--json"]
    command += ["--prompts", file, "--risk", "0.1", "--max-tokens", "96", "--server", server.url]
    command += ["--policies", "static_threshold", "--dtype", "float32"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert "does not follow" not in done.stderr
    after = server.complete(asked, osdt_task="tuned").json()["metrics"]["speculative_decoding"]["osdt"]
    assert after["policy"] == "static_threshold" and after["profile"] == json.loads(done.stdout)["profile"]
    assert after["profile"] != before["profile"] and after["nfe"] >= before["nfe"]


def test_the_server_still_serves(server: Server) -> None:
    """Last: after all those refusals."""
    assert post(server, CHAT, messages=MESSAGES).status_code == 200
    assert "EngineDeadError" not in server.log.read_text()
