"""``vllm serve`` on the stand-in: vLLM's front end has our options, refusals, response field and metrics."""

import httpx
import pytest

from tests.e2e.serving import ANSWER_LIMIT_S, serving
from vllm_osdt.mini import model_path


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "log"
    arguments = ["--osdt-config", '{"threshold": 0.85, "block_length": 8}', "--max-num-seqs", "4"]
    arguments += ["--compilation-config", '{"cudagraph_capture_sizes": [16]}']  # the default ones take many minutes
    with serving(model_path("sdar-mini"), "sdar-mini", log, *arguments) as running:
        yield running


def test_a_response_says_how_it_was_decoded_and_metrics_count_it(server):
    body = server.complete("A saw B", max_tokens=8, vllm_xargs={"osdt_policy": "factor"}).raise_for_status().json()
    about = body["osdt"]
    assert about["policy"] == "factor" and 1 <= about["nfe"] <= 9
    assert not body.get("kv_transfer_params")
    metrics = httpx.get(f"{server.url}/metrics", timeout=ANSWER_LIMIT_S).text
    assert "vllm:osdt_request_forward_passes_count{" in metrics


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"vllm_xargs": {"osdt_polcy": "osdt"}}, "did you mean 'osdt_policy'"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"use_beam_search": True, "n": 2}, "use_beam_search"),
        ({"stream": True, "prompt_logprobs": 2}, "prompt_logprobs"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_request_is_refused_before_its_answer_begins(server, fields, words):
    response = server.complete("A saw B", **fields)
    assert response.status_code == 400 and words in response.text
