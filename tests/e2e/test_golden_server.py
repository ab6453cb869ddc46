"""The recorded decisions of the stock decoder, over HTTP."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.conftest import load_golden, save_word_tokenizer
from tests.e2e.engine import case_params
from tests.e2e.serving import serving

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize(("name", "num_cases"), [("llada_random", 24), ("llada_tasks", 60)])
def test_concurrent_clients_get_the_stock_decisions(name, num_cases, tmp_path):
    golden = load_golden(name)
    save_word_tokenizer(golden, tmp_path / "tokenizer")

    def output_of(case):
        fields = {"max_tokens": case["gen_length"], "ignore_eos": True, "return_token_ids": True}
        response = server.complete(case["prompt_token_ids"], vllm_xargs=case_params(case).extra_args, **fields)
        return response.raise_for_status().json()["choices"][0]["token_ids"]

    arguments = ["--tokenizer", str(tmp_path / "tokenizer"), "--max-model-len", "256"]
    with serving(golden.folder, name, tmp_path / "log", *arguments) as server, ThreadPoolExecutor(16) as clients:
        outputs = list(clients.map(output_of, golden.cases))
    assert len(outputs) == num_cases
    assert outputs == [case["output_token_ids"] for case in golden.cases]
