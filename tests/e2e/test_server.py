"""``vllm serve`` on the bundled model, over HTTP: completions, chat, streaming, refusals, aborts, shutdown."""

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import httpx
import openai
import pytest

from tests.e2e.serving import Server, has_shut_down, serving
from vllm_osdt.mini import model_path
from vllm_osdt.mini.tasks import TASKS, generate

pytestmark = pytest.mark.e2e

PROMPTS = {task: generate(task, "held_out", 4, seed=7) for task in TASKS}
BASE = {"model": "llada-mini", "max_tokens": 96, "temperature": 0}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The bundled model with server defaults."""
    # The second default is one that only --osdt-config can have set.
    defaults = json.dumps({"policy": "static_threshold", "threshold": 0.85})
    log = tmp_path_factory.mktemp("server") / "log"
    with serving(
        model_path("llada-mini"), "llada-mini", log, "--osdt-config", defaults, "--enable-scale-out"
    ) as running:
        yield running


def nfe_of(body: dict) -> int:
    """Forward passes that a response says it took."""
    return body["osdt"]["nfe"]


def test_completion_is_repeatable_and_says_its_nfe(server: Server) -> None:
    bodies = [server.complete(PROMPTS["code"][0].prompt).raise_for_status().json() for _ in range(2)]
    assert bodies[0]["choices"][0]["text"] == bodies[1]["choices"][0]["text"] != ""
    assert 1 <= nfe_of(bodies[0]) < bodies[0]["usage"]["completion_tokens"]


def test_server_default_of_osdt_config_applies_and_a_request_overrides_it(server: Server) -> None:
    prompt = PROMPTS["word_problems"][0].prompt
    default, same, other = (
        server.complete(prompt, vllm_xargs=options).raise_for_status().json()
        for options in ({}, {"osdt_threshold": 0.85}, {"osdt_policy": "fixed_steps"})
    )
    assert nfe_of(default) == nfe_of(same)
    assert nfe_of(other) > nfe_of(default)


def test_task_calibrates_on_its_first_request(server: Server) -> None:
    prompt = PROMPTS["multiple_choice"][0].prompt
    static = nfe_of(server.complete(prompt, vllm_xargs={"osdt_threshold": 0.99}).json())
    options = {"osdt_policy": "osdt", "osdt_task": "first-request", "osdt_threshold": 0.99, "osdt_threshold_cap": 0.5}
    options |= {"osdt_statistic": "q1", "osdt_num_calibration_requests": 1}
    first, second = (nfe_of(server.complete(prompt, vllm_xargs=options).json()) for _ in range(2))
    assert first == static
    assert second < first


def test_stream_carries_the_same_text_in_several_pieces(server: Server) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    prompt = PROMPTS["code"][1].prompt
    whole = client.completions.create(prompt=prompt, **BASE).choices[0].text
    pieces = [chunk.choices[0].text for chunk in client.completions.create(prompt=prompt, stream=True, **BASE)]
    assert "".join(pieces) == whole
    assert len([piece for piece in pieces if piece]) > 1


def test_chat_uses_the_bundled_template(server: Server) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    prompt = PROMPTS["multiple_choice"][1].prompt
    content = prompt.removesuffix(" Answer:")
    chat = client.chat.completions.create(messages=[{"role": "user", "content": content}], **BASE)
    assert chat.choices[0].message.content == server.complete(prompt).json()["choices"][0]["text"]
    streamed = client.chat.completions.create(messages=[{"role": "user", "content": content}], stream=True, **BASE)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in streamed)
    assert text == chat.choices[0].message.content


def test_chat_without_max_tokens_is_served(server: Server) -> None:
    messages = [{"role": "user", "content": PROMPTS["multiple_choice"][2].prompt.removesuffix(" Answer:")}]
    body = {"model": "llada-mini", "messages": messages}
    response = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120)
    assert response.status_code == 200, response.text
    assert response.json()["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"vllm_xargs": {"osdt_polcy": "osdt"}}, ["osdt_polcy", "osdt_policy"]),
        ({"vllm_xargs": {"osdt_threshold": 1.5}}, ["osdt_threshold", "1.5"]),
        ({"vllm_xargs": {"osdt_cache_mode": "triple"}}, ["osdt_cache_mode", "triple"]),
        ({"vllm_xargs": {"osdt_gen_length": 100}}, ["100", "128"]),
        ({"max_tokens": 5000}, ["512"]),
        ({"prompt_logprobs": 2}, ["prompt_logprobs", "generate_until"]),
        ({"bad_words": ["def two"]}, ["bad_words", "'def two'", "one token"]),
        ({"bad_words": ["def two"], "stream": True}, ["bad_words", "'def two'", "one token"]),
        ({"structured_outputs": {"choice": ["A", "B"]}, "ignore_eos": True}, ["ignore_eos", "document"]),
        (
            {"osdt_answer_block_length": 1, "osdt_think_end_token": 9, "osdt_check_prompt": [8, 0], "stream": True},
            ["check_prompt", "a token that ends the output"],
        ),
        ({"osdt_answer_block_length": 1, "osdt_think_end_token": 0, "stream": True}, ["token 0 ends the output"]),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_bad_request_is_answered_400_with_the_reason(server: Server, fields: dict, words: list[str]) -> None:
    response = server.complete(PROMPTS["code"][0].prompt, **fields)
    assert response.status_code == 400, response.text
    message = response.json()["error"]["message"]
    assert all(word in message for word in words), message
    assert server.complete(PROMPTS["code"][0].prompt, max_tokens=8).status_code == 200


def test_32_clients_with_mixed_options_get_what_each_gets_alone(server: Server) -> None:
    options = [
        {},
        {"vllm_xargs": {"osdt_cache_mode": "none"}},
        {"vllm_xargs": {"osdt_cache_mode": "prefix", "osdt_threshold": 0.6}},
        {"vllm_xargs": {"osdt_policy": "fixed_steps", "osdt_block_length": 16}},
        {"vllm_xargs": {"osdt_policy": "factor"}},
        {"temperature": 0.8, "seed": 11},
        {"max_tokens": 20},
        {"stop": ["."]},
    ]
    problems = [problem for task in TASKS for problem in PROMPTS[task]]
    requests = [{**BASE, "prompt": problems[i % len(problems)].prompt, **options[i % len(options)]} for i in range(32)]
    alone = [server.complete(**request).raise_for_status().json()["choices"][0]["text"] for request in requests[:8]]

    async def send_all() -> list[httpx.Response]:
        async with httpx.AsyncClient(timeout=240) as client:
            return await asyncio.gather(*(client.post(f"{server.url}/v1/completions", json=r) for r in requests))

    responses = asyncio.run(send_all())
    assert [response.status_code for response in responses] == [200] * 32
    assert [response.json()["choices"][0]["text"] for response in responses[:8]] == alone


def test_client_that_hangs_up_harms_nobody(server: Server) -> None:
    prompt = PROMPTS["word_problems"][1].prompt
    expected = server.complete(prompt).json()["choices"][0]["text"]
    body = {**BASE, "prompt": prompt, "stream": True, "vllm_xargs": {"osdt_policy": "fixed_steps"}}
    for _ in range(4):
        with (
            httpx.Client(timeout=60) as client,
            client.stream("POST", f"{server.url}/v1/completions", json=body) as response,
        ):
            next(response.iter_lines())
    assert server.complete(prompt).json()["choices"][0]["text"] == expected
    deadline = time.monotonic() + 60
    while "vllm:num_requests_running" in (metrics := httpx.get(f"{server.url}/metrics", timeout=30).text):
        running = [line for line in metrics.splitlines() if line.startswith("vllm:num_requests_running")]
        if all(line.endswith(" 0.0") for line in running):
            break
        assert time.monotonic() < deadline, running
        time.sleep(0.2)


def test_denoising_steps_are_in_vllms_own_metrics(server: Server) -> None:
    def steps() -> float:
        lines = httpx.get(f"{server.url}/metrics", timeout=30).text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:diffusion_num_denoising_steps_t"))

    before = steps()
    body = server.complete(PROMPTS["code"][2].prompt).json()
    deadline = time.monotonic() + 30
    while steps() < before + nfe_of(body):
        assert time.monotonic() < deadline
        time.sleep(0.2)


ONE_SHOT = {"osdt_policy": "osdt", "osdt_statistic": "q1", "osdt_num_calibration_requests": 1}


def told(body: dict) -> dict:
    """What a response or the last piece of a stream says of its decoding."""
    return body["osdt"]


def post(server: Server, path: str, **fields) -> httpx.Response:
    """POST a body; a stream is read to its end."""
    response = httpx.post(f"{server.url}{path}", json={"model": "llada-mini", **fields}, timeout=120)
    assert response.status_code == 200, response.text
    return response


def pieces_of(response: httpx.Response) -> list[dict]:
    """The JSON of a stream's pieces, in order."""
    return [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]


def test_every_kind_of_response_says_how_it_was_decoded(server: Server) -> None:
    prompt = PROMPTS["code"][3].prompt
    options = {**ONE_SHOT, "osdt_task": "told"}
    first = told(server.complete(prompt, vllm_xargs=options).raise_for_status().json())
    assert (first["policy"], first["task"], first["profile"], first["calibrating"]) == ("osdt", "told", None, True)
    whole = server.complete(prompt, vllm_xargs=options).json()
    about = told(whole)
    assert len(about["profile"]) == 16 and not about["calibrating"] and about["nfe"] == nfe_of(whole)
    assert about["tokens_per_forward"] == whole["usage"]["completion_tokens"] / about["nfe"]
    assert whole["metrics"]["speculative_decoding"]["osdt"] == about  # where it was in the last release
    content = prompt.removesuffix(" Answer:")
    greedy = {"temperature": 0, "vllm_xargs": options}
    bodies = {
        "/v1/completions": {**greedy, "prompt": prompt, "max_tokens": 96},
        "/v1/chat/completions": {**greedy, "messages": [{"role": "user", "content": content}], "max_tokens": 96},
        "/v1/responses": {**greedy, "input": content, "max_output_tokens": 96},
        "/v1/messages": {**greedy, "messages": [{"role": "user", "content": content}], "max_tokens": 96},
    }
    for path, body in bodies.items():
        answer = post(server, path, **body).json()
        assert told(answer) == about, path
        assert not answer.get("kv_transfer_params")
        for more in [{}, {"stream_options": {"include_usage": True}}] if "completions" in path else [{}]:
            pieces = pieces_of(post(server, path, **body, stream=True, **more))
            says = [
                index for index, piece in enumerate(pieces) if "osdt" in piece or "osdt" in piece.get("response", {})
            ]
            [last] = says
            if path == "/v1/messages":
                assert [piece["type"] for piece in pieces[last:]] == ["message_delta", "message_stop"]
            else:
                assert last == len(pieces) - 1
            assert told(pieces[last].get("response", pieces[last])) == about, path
    ids = post(server, "/tokenize", prompt=prompt).json()["tokens"]
    body = {"token_ids": ids, "sampling_params": {"temperature": 0, "max_tokens": 96}, **options}
    assert told(post(server, "/inference/v1/generate", **body).json()) == about
    assert told(pieces_of(post(server, "/inference/v1/generate", **body, stream=True))[-1]) == about


def test_every_choice_of_several_says_how_it_was_decoded(server: Server) -> None:
    prompts = [problem.prompt for problem in (PROMPTS["code"][0], PROMPTS["word_problems"][0])]
    alone = [told(server.complete(prompt).json()) for prompt in prompts]
    both = server.complete(prompts).json()
    assert alone[0] != alone[1] and [told(choice) for choice in both["choices"]] == alone
    sampled = {"n": 2, "temperature": 0.7, "seed": 5}
    four = server.complete(prompts, **sampled).json()
    streamed = {}
    for piece in pieces_of(server.complete(prompts, **sampled, stream=True)):
        assert "osdt" not in piece
        for choice in piece["choices"]:
            assert ("osdt" in choice) == (choice["finish_reason"] is not None)
            if "osdt" in choice:
                streamed[choice["index"]] = told(choice)
    assert [streamed[index] for index in range(4)] == [told(choice) for choice in four["choices"]]
    messages = [{"role": "user", "content": prompts[0].removesuffix(" Answer:")}]
    chat = post(server, "/v1/chat/completions", messages=messages, max_tokens=96, **sampled).json()
    assert [told(choice) for choice in chat["choices"]] == [told(choice) for choice in four["choices"][:2]]
    ids = post(server, "/tokenize", prompt=prompts[0]).json()["tokens"]
    tokens = post(server, "/inference/v1/generate", token_ids=ids, sampling_params={**sampled, "max_tokens": 96}).json()
    assert [told(choice) for choice in tokens["choices"]] == [told(choice) for choice in four["choices"][:2]]
    content = [[{"role": "user", "content": prompt.removesuffix(" Answer:")}] for prompt in prompts]
    batch = post(server, "/v1/chat/completions/batch", messages=content, temperature=0, max_tokens=96).json()
    assert [told(choice) for choice in batch["choices"]] == alone
    assert not any("osdt" in answer for answer in (both, four, chat, tokens, batch))


def test_the_openai_client_has_it_as_an_attribute(server: Server) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    prompt = PROMPTS["code"][0].prompt
    answer = client.completions.create(prompt=prompt, **BASE)
    assert answer.osdt["policy"] == "static_threshold" and answer.osdt["nfe"] >= 1
    *pieces, last = client.completions.create(prompt=prompt, stream=True, **BASE)
    assert last.osdt == answer.osdt and not any(hasattr(piece, "osdt") for piece in pieces)
    response = client.responses.create(model="llada-mini", input=prompt, temperature=0, max_output_tokens=32)
    assert response.osdt["nfe"] >= 1 and "osdt" not in response.output_text


def test_a_pinned_profile_is_used_over_http_and_an_unknown_one_refused(server: Server) -> None:
    prompt = PROMPTS["multiple_choice"][3].prompt
    options = {**ONE_SHOT, "osdt_task": "pin"}
    server.complete(prompt, vllm_xargs=options)
    pin = told(server.complete(prompt, vllm_xargs=options).json())["profile"]
    server.complete(PROMPTS["code"][3].prompt, vllm_xargs={**options, "osdt_recalibrate": True})
    pinned = told(server.complete(prompt, vllm_xargs={**options, "osdt_profile": pin}).json())
    assert pinned["profile"] == pin != told(server.complete(prompt, vllm_xargs=options).json())["profile"]
    refused = server.complete(prompt, vllm_xargs={**options, "osdt_profile": "0" * 16})
    assert refused.status_code == 400 and "0" * 16 in refused.json()["error"]["message"]


def test_what_happens_to_profiles_is_in_the_servers_metrics(server: Server) -> None:
    def value(name: str, *labels: str) -> float:
        lines = httpx.get(f"{server.url}/metrics", timeout=30).text.splitlines()
        found = [line for line in lines if line.startswith(name + "{") and all(label in line for label in labels)]
        return sum(float(line.split()[-1]) for line in found)

    made = value("vllm:osdt_calibrations_total", 'outcome="made"')
    used = value("vllm:osdt_requests_total", 'kind="calibrated"')
    options = {**ONE_SHOT, "osdt_task": "metrics"}
    bodies = [server.complete(PROMPTS["code"][0].prompt, vllm_xargs=options).json() for _ in range(3)]
    assert [told(body)["calibrating"] for body in bodies] == [True, False, False]
    deadline = time.monotonic() + 30
    while value("vllm:osdt_requests_total", 'kind="calibrated"') < used + 2:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert value("vllm:osdt_calibrations_total", 'outcome="made"') == made + 1
    assert value("vllm:osdt_request_forward_passes_count", 'policy="osdt"') >= 2
    assert 0 < value("vllm:osdt_threshold", 'task="metrics"') <= 0.9


def test_tokens_in_and_out_without_a_limit_have_the_models_usual_length(server: Server) -> None:
    def ask(**fields):
        body = {"model": "llada-mini", "token_ids": [5, 6, 7], **fields}
        return httpx.post(f"{server.url}/inference/v1/generate", json=body, timeout=120)

    open_ended = {"temperature": 0, "ignore_eos": True}
    reply = ask(sampling_params=open_ended)
    assert reply.status_code == 200, reply.text
    assert len(reply.json()["choices"][0]["token_ids"]) == 96
    limited = ask(sampling_params={**open_ended, "max_tokens": 40}).json()
    assert len(limited["choices"][0]["token_ids"]) == 40
    refused = ask(sampling_params=open_ended, osdt_treshold=0.5)
    assert refused.status_code == 400 and "did you mean 'osdt_threshold'" in refused.text


def test_a_server_that_meets_its_ended_engine_has_shut_down() -> None:
    """Its last words are those of psutil about a process that has ended and that nobody has waited for."""
    meet = "import os, psutil, time; child = os.fork() or os._exit(0); time.sleep(0.2); psutil.Process(child).cmdline()"
    ended = subprocess.run([sys.executable, "-c", meet], capture_output=True, text=True, check=False)
    assert ended.returncode == 1 and has_shut_down(1, ended.stderr)
    assert not has_shut_down(1, "EngineDeadError\n" + ended.stderr) and not has_shut_down(2, ended.stderr)
    assert not has_shut_down(1, ended.stderr + "RuntimeError: another") and not has_shut_down(1, "")
    assert has_shut_down(-signal.SIGINT, "") and has_shut_down(0, "Bye.")


def test_shutdown_is_clean(server: Server) -> None:
    """Last: it ends the server."""
    server.process.send_signal(signal.SIGINT)
    status = server.process.wait(timeout=60)
    assert has_shut_down(status, server.log.read_text())
