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
        server = serving(model_path("llada-mini"), "llada-mini", log, is_forked=False)
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
    told = [body["osdt"] for body in bodies]
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
    bad: list[tuple[dict[str, Any], str, str]] = [
        ({"osdt_treshold": 0.5}, "osdt_treshold", "did you mean 'osdt_threshold'?"),
        ({limit: 505}, limit, f"{limit} is 505, but the prompt of "),
        ({"vllm_xargs": {"osdt_threshold": 7}}, "osdt_threshold", "osdt_threshold is 7; expected a number in (0, 1]"),
        ({"osdt_gen_length": 40}, "osdt_gen_length", "gen_length is 40, no multiple of block_length 32; use 64."),
        ({"vllm_xargs": {"osdt_profile": "f" * 16}}, "osdt_profile", "but the request names no task"),
    ]
    before = server.log.read_text()
    for change, parameter, words in bad:
        response = post(server, path, **{**fields, **change, "stream": stream})
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        assert words in error["message"] and "(parameter=" not in error["message"]
        # The messages API's errors have no such field.
        assert error.get("param") == (None if path == "/v1/messages" else parameter), error
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
        (CHAT, {"echo": True, "logprobs": True, "top_logprobs": 2}, "echo=True with logprobs asks for"),
        (COMPLETIONS, {"prompt_logprobs": 2}, "prompt_logprobs asks for log probabilities of the prompt"),
        (CHAT, {"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos is set"),
        (CHAT, {"response_format": {"type": "json_object"}, "osdt_infill": ["A", 3]}, "response_format cannot be sent"),
        (CHAT, {"logprobs": True, "top_logprobs": 2, "osdt_infill": ["A", 3]}, "top_logprobs cannot be sent"),
        (COMPLETIONS, {"structured_outputs": {"regex": "(A"}}, "regex"),
        (CHAT, {"tools": [TOOL], "tool_choice": "required"}, 'tool_choice="required" requires'),
    ],
)
def test_a_refusal_names_what_the_client_sent(server: Server, path: str, fields: dict, words: str) -> None:
    response = post(server, path, **{**ENDPOINTS.get(path, {}), **fields})
    message = response.json()["error"]["message"]
    assert response.status_code == 400 and words in message, message
    assert "StructuredOutputsParams" not in message


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_multiple_choice_of_lm_eval_is_told_what_to_run_instead(server: Server, max_tokens: int) -> None:
    """Its body for ``loglikelihood``: it prints the answer's text and gives up."""
    ids = post(server, "/tokenize", prompt=QUIZ).json()["tokens"]
    body = {"prompt": [ids], "temperature": 0, "max_tokens": max_tokens, "logprobs": 1, "seed": 1234, "echo": True}
    response = post(server, COMPLETIONS, **body)
    error = response.json()["error"]
    assert response.status_code == 400 and error["param"] == "echo"
    for words in ("no next-token probabilities of a prompt", "generate_until", "multiple-choice (loglikelihood)"):
        assert words in error["message"]


def test_structured_decisions_are_answered_as_not_implemented(server: Server) -> None:
    questions = {"q": {"type": "boolean", "instructions": "Is it a beast?"}}
    response = post(server, "/v1/systemone", state="a dog", questions=questions)
    assert response.status_code == 501 and "does not support" in response.json()["error"]["message"]


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
    before = server.complete(asked, osdt_task="tuned").json()["osdt"]
    assert before["policy"] == "osdt" and before["profile"] is not None
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": problem.prompt}) + "\n" for problem in problems))
    command = [Path(sys.executable).with_name("vllm-osdt"), "tune", "llada-mini", "--task", "tuned", "--json"]
    command += ["--prompts", file, "--risk", "0.1", "--max-tokens", "96", "--server", server.url]
    command += ["--policies", "static_threshold", "--dtype", "float32"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert "does not follow" not in done.stderr
    after = server.complete(asked, osdt_task="tuned").json()["osdt"]
    assert after["policy"] == "static_threshold" and after["profile"] == json.loads(done.stdout)["profile"]
    assert after["profile"] != before["profile"] and after["nfe"] >= before["nfe"]


def test_the_server_still_serves(server: Server) -> None:
    """Last: after all those refusals."""
    assert post(server, CHAT, messages=MESSAGES).status_code == 200
    assert "EngineDeadError" not in server.log.read_text()


def ask(server: Server, path: str, **fields: Any) -> list[dict[str, Any]]:
    """The choices of a completion or a chat, each with its ``text``."""
    body = {**ENDPOINTS[path], "temperature": 0, **fields}
    response = post(server, path, **body)
    assert response.status_code == 200, response.text
    choices = response.json()["choices"]
    return [{**one, "text": one.get("text", one.get("message", {}).get("content"))} for one in choices]


BOTH = pytest.mark.parametrize("path", [CHAT, COMPLETIONS])


@BOTH
def test_parameters_that_change_logits_are_heard(server: Server, path: str) -> None:
    [plain] = ask(server, path, return_token_ids=True)
    ids = plain["token_ids"]
    hot = {"temperature": 2.0, "seed": 5}
    [sampled] = ask(server, path, **hot)
    assert sampled["text"] != plain["text"]
    for greedy in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        assert ask(server, path, **hot, **greedy)[0]["text"] == plain["text"]
    [banned] = ask(server, path, logit_bias={str(ids[0]): -100}, return_token_ids=True)
    assert ids[0] not in banned["token_ids"]
    [only] = ask(server, path, allowed_token_ids=ids[:2], return_token_ids=True)
    assert set(only["token_ids"]) <= set(ids[:2])
    word = plain["text"].split()[0]
    assert word not in ask(server, path, bad_words=[word])[0]["text"].split()
    [long] = ask(server, path, min_tokens=len(ids) + 3, return_token_ids=True)
    assert len(long["token_ids"]) >= len(ids) + 3
    [varied] = ask(server, path, frequency_penalty=2.0, presence_penalty=2.0, ignore_eos=True, return_token_ids=True)
    [repeated] = ask(server, path, ignore_eos=True, return_token_ids=True)
    assert len(set(varied["token_ids"])) > len(set(repeated["token_ids"]))
    [penalized] = ask(server, path, repetition_penalty=1.9, ignore_eos=True, return_token_ids=True)
    assert penalized["token_ids"] != repeated["token_ids"]


@BOTH
def test_several_answers_stop_strings_and_echo_are_heard(server: Server, path: str) -> None:
    several = ask(server, path, n=3, temperature=2.0, seed=1)
    assert len({one["text"] for one in several}) > 1
    assert [one["text"] for one in ask(server, path, n=3, temperature=2.0, seed=1)] == [one["text"] for one in several]
    [plain] = ask(server, path)
    word = plain["text"].split()[1]
    [cut], [kept] = ask(server, path, stop=[word]), ask(server, path, stop=[word], include_stop_str_in_output=True)
    assert word not in cut["text"] and kept["text"].rstrip() == cut["text"].rstrip() + " " + word
    [endless] = ask(server, path, ignore_eos=True)
    assert (endless["finish_reason"], plain["finish_reason"]) == ("length", "stop")
    [special] = ask(server, path, skip_special_tokens=False, ignore_eos=True)
    assert "<eos>" in special["text"] and "<eos>" not in endless["text"]
    [echoed] = ask(server, path, echo=True)
    # A chat echoes the assistant's last message, and there is none.
    assert echoed["text"] == (QUIZ if path == COMPLETIONS else "") + plain["text"]


def test_log_probabilities_come_with_every_endpoint(server: Server) -> None:
    [completion] = ask(server, COMPLETIONS, logprobs=2)
    found = completion["logprobs"]
    assert "".join(found["tokens"]).replace("<eos>", "") == completion["text"].replace(" ", "")
    assert all(value <= 0 for value in found["token_logprobs"]) and sum(found["token_logprobs"]) > -10
    assert {len(top) for top in found["top_logprobs"]} == {2}
    [chat] = ask(server, CHAT, logprobs=True, top_logprobs=2)
    content = chat["logprobs"]["content"]
    assert [one["logprob"] for one in content] == pytest.approx(found["token_logprobs"], abs=1e-3)
    assert {len(one["top_logprobs"]) for one in content} == {2}
    body = {**ENDPOINTS[CHAT], "temperature": 0, "logprobs": True, "top_logprobs": 2, "stream": True}
    stream = post(server, CHAT, **body).raise_for_status().text
    chunks = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
    streamed = [one for chunk in chunks for one in ((chunk["choices"][0].get("logprobs") or {}).get("content") or [])]
    assert streamed == content
    fields = {"include": ["message.output_text.logprobs"], "top_logprobs": 2, "temperature": 0}
    reply = post(server, "/v1/responses", **{**ENDPOINTS["/v1/responses"], **fields}).raise_for_status().json()
    of_reply = reply["output"][0]["content"][0]["logprobs"]
    assert [one["logprob"] for one in of_reply][: len(content)] == pytest.approx(
        [one["logprob"] for one in content], abs=1e-3
    )


def test_a_draft_saves_forwards_by_both_of_its_names(server: Server) -> None:
    options = {"temperature": 0, "osdt_policy": "static_threshold", "osdt_draft_threshold": 0.2}
    plain = {name: value for name, value in options.items() if "draft" not in name}
    first = post(server, CHAT, **{**ENDPOINTS[CHAT], **plain}).raise_for_status().json()
    text = first["choices"][0]["message"]["content"]
    fields = ({"prediction": {"type": "content", "content": text}}, {"osdt_draft": text})
    found = [post(server, CHAT, **{**ENDPOINTS[CHAT], **options, **one}).raise_for_status().json() for one in fields]
    assert [one["choices"][0]["message"]["content"] for one in found] == [text, text]
    assert found[0]["osdt"]["nfe"] == found[1]["osdt"]["nfe"] < first["osdt"]["nfe"]
    parts = {"type": "content", "content": [{"type": "image", "text": "x"}]}
    refused = post(server, CHAT, **{**ENDPOINTS[CHAT], "prediction": parts})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "prediction"
    beside = {"prediction": fields[0]["prediction"], "response_format": {"type": "json_object"}}
    refused = post(server, CHAT, **{**ENDPOINTS[CHAT], **beside})
    assert refused.status_code == 400 and "prediction cannot be sent with structured" in refused.text


def test_a_suffix_and_a_template_are_filled(server: Server) -> None:
    suffix = " so the answer is A ."
    body = {"prompt": QUIZ, "max_tokens": 24, "temperature": 0, "suffix": suffix}
    answer = post(server, COMPLETIONS, **body, return_token_ids=True).raise_for_status().json()
    [choice] = answer["choices"]
    assert len(choice["token_ids"]) <= 24 and suffix not in choice["text"]
    parts = [" so the answer is", 1, " ."]
    for path in (CHAT, COMPLETIONS):
        fields = {name: value for name, value in ENDPOINTS[path].items() if name != "max_tokens"}
        filled = post(server, path, **fields, temperature=0, osdt_infill=parts, osdt_return_trace=True)
        body = filled.raise_for_status().json()
        [choice] = body["choices"]
        text = choice.get("text") or choice["message"]["content"]
        assert text.startswith(" so the answer is") and text.endswith(" .") and len(text.split()) == 6
        assert body["osdt"]["trace"]["confidence"].count(None) == 5
    parts[1] = {"max_tokens": 8}
    body = {"prompt": QUIZ, "temperature": 0, "osdt_infill": parts, "return_token_ids": True}
    answer = post(server, COMPLETIONS, **body).raise_for_status().json()
    [choice] = answer["choices"]
    assert answer["usage"]["completion_tokens"] == len(choice["token_ids"]) <= 14
    assert "<eos>" not in choice["text"] and choice["text"].endswith(" .")
    stream = post(server, COMPLETIONS, **body, stream=True).raise_for_status().text
    chunks = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == choice["text"]
    refused = post(server, COMPLETIONS, prompt=QUIZ, osdt_infill=parts, stream=True, max_tokens=2)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "max_tokens"
