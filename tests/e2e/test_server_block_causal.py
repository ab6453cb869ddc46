"""The bundled block-causal model over HTTP, on two data-parallel engines."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.e2e.serving import serving
from tests.e2e.trained import train
from vllm_osdt.mini import model_path
from vllm_osdt.mini.tasks import check, generate

pytestmark = pytest.mark.e2e

# As SDAR-4B-Chat's: inherited from the model it was trained from.
GENERATION = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.05}
STATIC = {"osdt_policy": "static_threshold"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "sdar-mini"
    shutil.copytree(model_path("sdar-mini"), folder)
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    return folder


@pytest.fixture(scope="module")
def server(checkpoint, tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "log"
    config = json.dumps(
        {"profile_dir": "", "num_calibration_requests": 4, "statistic": "q1", "slack": 0.1, "task": "served"}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_SERVER_DEV_MODE", "1")  # for the endpoints of weight updates
        with serving(checkpoint, "sdar-mini", log, "--data-parallel-size", "2", "--osdt-config", config) as running:
            yield running


def test_a_checkpoint_that_wishes_for_filters_has_them(server):
    body = {"model": "sdar-mini", "prompt": "quiz", "max_tokens": 8, "seed": 3}

    def text(**fields):
        answer = httpx.post(f"{server.url}/v1/completions", json={**body, **fields}, timeout=60)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["text"]

    wished = {name: value for name, value in GENERATION.items() if name != "do_sample"}
    assert text() == text(**wished)
    hot = {"temperature": 2.0, "repetition_penalty": 1.0}
    texts = {text(**{**hot, "top_p": top_p, "top_k": 0}) for top_p in (1.0, 1e-6)}
    assert len(texts) == 2 and text(temperature=0) == text(**{**wished, "top_k": 1})


def num_served(server):
    """Requests that ended well, of each engine."""
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    served = [line for line in lines if line.startswith("vllm:request_success_total")]
    engines = sorted({line.split('engine="')[1].split('"')[0] for line in served})
    return [sum(float(line.rsplit(" ", 1)[1]) for line in served if f'engine="{engine}"' in line) for engine in engines]


def test_two_engines_answer_many_clients_right(server):
    problems, before = generate("code", "held_out", 24, 5), num_served(server)
    with ThreadPoolExecutor(12) as clients:
        answers = list(clients.map(lambda problem: server.complete(problem.prompt, vllm_xargs=STATIC), problems))
    assert {answer.status_code for answer in answers} == {200}
    texts = [answer.json()["choices"][0]["text"] for answer in answers]
    assert sum(map(check, problems, texts)) >= 23
    counts = [after - earlier for after, earlier in zip(num_served(server), before, strict=True)]
    assert len(counts) == 2 and min(counts) > 0 and sum(counts) == 24


def test_a_stream_brings_whole_blocks_and_says_how_it_was_decoded(server):
    prompt = generate("code", "held_out", 1, 6)[0].prompt
    body = {"model": "sdar-mini", "prompt": prompt, "max_tokens": 96, "temperature": 0, "stream": True}
    body |= {"vllm_xargs": {**STATIC, "osdt_task": "streamed"}, "stream_options": {"include_usage": True}}
    whole = server.complete(prompt, vllm_xargs=STATIC).json()
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
        chunks = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: {")]
    chunks = [json.loads(chunk) for chunk in chunks]
    texts = [chunk["choices"][0]["text"] for chunk in chunks if chunk["choices"]]
    assert "".join(texts) == whole["choices"][0]["text"]
    assert len([text for text in texts if text]) > 2  # blocks of 8
    about = chunks[-1]["osdt"]
    assert (about["policy"], about["task"]) == ("static_threshold", "streamed")
    assert about["nfe"] >= len(texts) - 1


def test_options_of_the_other_attention_are_refused(server):
    answer = server.complete("quiz", vllm_xargs={"osdt_cache_mode": "dual"})
    assert answer.status_code == 400
    assert "osdt_cache_mode is 'dual'; this model's attention allows block" in answer.json()["error"]["message"]


def test_every_api_server_has_the_operators_options(server):
    """vLLM starts one for each engine, in processes of their own."""
    with ThreadPoolExecutor(12) as clients:
        answers = list(clients.map(lambda _: server.complete("quiz", max_tokens=8).json(), range(24)))
    assert {answer["osdt"]["task"] for answer in answers} == {"served"}


def test_weights_change_on_every_engine_between_pause_and_resume(server, checkpoint):
    """The last test of this server, which then has other weights."""

    def post(path, **body):
        answer = httpx.post(f"{server.url}/{path}", json=body, timeout=60)
        assert answer.status_code == 200, answer.text

    def ask():
        with ThreadPoolExecutor(12) as clients:
            answers = list(clients.map(lambda _: server.complete(prompt, vllm_xargs=STATIC).json(), range(16)))
        about = [answer["osdt"] for answer in answers]
        return (
            {answer["choices"][0]["text"] for answer in answers},
            {(one["weights_version_at_start"], one["weights_version"]) for one in about},
        )

    prompt, before = generate("code", "held_out", 1, 6)[0].prompt, num_served(server)
    texts, versions = ask()
    assert len(texts) == 1 and versions == {(0, 0)}
    train(checkpoint)
    post("pause?mode=keep")
    post("collective_rpc", method="reload_weights")
    post("update_weight_version", new_version="step 1")
    post("resume")
    new_texts, versions = ask()
    assert len(new_texts) == 1 and new_texts != texts and versions == {("step 1", "step 1")}
    assert min(after - earlier for after, earlier in zip(num_served(server), before, strict=True)) > 0
    shutil.copy(Path(model_path("sdar-mini")) / "model.safetensors", checkpoint)
    post("collective_rpc", method="reload_weights")
    assert ask() == (texts, {(2, 2)})
