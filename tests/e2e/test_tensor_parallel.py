"""Two ranks decode as one and hold the same profiles."""

import json
import os
import random
import re

import pytest

from tests import forked
from tests.conftest import REPOSITORY, Golden, save_text_tokenizer
from tests.e2e import tensor_parallel_program, two_rank_program
from tests.e2e.engine import generate
from tests.e2e.jobs import MIN_MARGIN, above
from tests.reference.block_causal import ReferenceLLaDA2, ReferenceSDAR, decode_block_causal
from tests.reference.block_causal_checkpoints import make_llada2_checkpoint, make_sdar_checkpoint
from tests.reference.decode import decode, osdt
from tests.reference.llada import ReferenceLLaDA

pytestmark = pytest.mark.e2e


needs_two_cores = pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two ranks on the CPU need two cores")


def run_on_two_ranks(program, *arguments):
    command = [str(REPOSITORY / "tests" / "e2e" / f"{program}.py"), *map(str, arguments)]
    environment = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    run = forked.run(command, cwd=REPOSITORY, env=environment, timeout=300)
    assert run.returncode == 0, run.stderr[-4000:]


@needs_two_cores
def test_two_ranks_take_the_stock_decisions_and_calibrate_alike(golden_random, random_llm, tmp_path):
    run_on_two_ranks("tensor_parallel_program", golden_random.folder, tmp_path / "outcome")
    result = json.loads((tmp_path / "outcome").read_text())
    assert result["decided"] == [case["output_token_ids"] for case in golden_random.cases]
    assert [[profile["task"] for profile in held] for held in result["held"]] == [["shared"], ["other"], ["shared"]]
    assert result["held"][0][0]["id"] == result["held"][2][0]["id"]
    [table] = result["held"][2][0]["thresholds"].values()
    assert result["used"] == [result["held"][2][0]["id"]] * 2
    network = ReferenceLLaDA.load(golden_random.folder)
    rule = osdt(table, cap=0.9, slack=0.0)
    for case, got in zip(golden_random.cases[:2], result["calibrated"], strict=True):
        expected = decode(network, case["prompt_token_ids"], rule, gen_length=64, block_length=32, cache_mode="dual")
        assert got == expected.tokens
    assert len(list(tmp_path.rglob("*.json"))) == 2
    # The same files once more: other weights to the engine, whose profiles are those of the files.
    assert result["reloaded"] == {"updates": [1, 1], "versions": [0, 0, 1, 1], "same": True, "used": result["used"]}
    prompts = [case["prompt_token_ids"] for case in golden_random.cases[:4]]
    alone = tensor_parallel_program.extras_of(random_llm, prompts)  # one rank
    for name in ("tokens", "trace"):
        assert result["extra"][name] == alone[name]
    for got, expected in zip(result["extra"]["logprobs"], alone["logprobs"], strict=True):
        assert got == pytest.approx(expected, abs=1e-4)


def decode_on_two_ranks(tmp_path, engine, prompts, options):
    work, outcome = tmp_path / "work.json", tmp_path / "outcome.json"
    engine = {"skip_tokenizer_init": True, "dtype": "float32", "max_num_seqs": 16, "max_model_len": 256, **engine}
    work.write_text(json.dumps({"engine": engine, "prompts": prompts, "options": options}))
    run_on_two_ranks("two_rank_program", work, outcome)
    return json.loads(outcome.read_text())


def random_requests(number=12, **more):
    rng = random.Random(6)
    prompts = [[rng.randrange(8, 100) for _ in range(rng.randrange(1, 50))] for _ in range(number)]
    options = [
        {"max_tokens": 24, "policy": "static_threshold", "threshold": (0.2, 0.5, 0.9)[i % 3], "block_length": 8, **more}
        for i in range(number)
    ]
    return prompts, options


def assert_as_expected(got, network, prompts, options, **more):
    decoded = [
        decode_block_causal(network, prompt, above(o["threshold"]), block_length=8, max_tokens=24, **more)
        for prompt, o in zip(prompts, options, strict=True)
    ]
    clear = [i for i, d in enumerate(decoded) if min(d.proposal_margin, d.rule_margin, d.edit_margin) > MIN_MARGIN]
    assert len(clear) >= 8
    assert [got[i] for i in clear] == [decoded[i].tokens for i in clear]


@needs_two_cores
def test_two_ranks_decode_sdar_as_one_with_and_without_grammars(tmp_path, start_llm):
    folder = make_sdar_checkpoint(tmp_path / "model", seed=3, num_attention_heads=4, num_key_value_heads=2)
    save_text_tokenizer(Golden(folder, []), tmp_path / "tokenizer")
    engine = {"tokenizer": str(tmp_path / "tokenizer"), "structured_outputs_config": {"backend": "xgrammar"}}
    prompts, options = random_requests()
    structured = [{**options[0], "regex": regex} for regex in (r"[a-c]{2,9}-\d{3}", "(yes|no|maybe not)")]
    work = {"model": str(folder), "skip_tokenizer_init": False, **engine}
    got = decode_on_two_ranks(tmp_path, work, prompts + prompts[:2], options + structured)
    assert_as_expected(got[:-2], ReferenceSDAR.load(folder), prompts, options)
    one_rank = start_llm(folder, max_num_seqs=16, max_model_len=256, **engine)
    for prompt, asked, written in zip(prompts, structured, got[-2:], strict=False):
        [alone] = generate(one_rank, [prompt], two_rank_program.params_of(asked))
        assert written == list(alone.token_ids) and re.fullmatch(asked["regex"], alone.text)


@needs_two_cores
def test_two_ranks_decode_and_edit_llada2_as_one(tmp_path):
    folder = make_llada2_checkpoint(tmp_path / "model", seed=3, num_attention_heads=4, num_key_value_heads=2)
    prompts, options = random_requests(edit_threshold=0.4)
    got = decode_on_two_ranks(tmp_path, {"model": str(folder)}, prompts, options)
    assert_as_expected(got, ReferenceLLaDA2.load(folder), prompts, options, edit_threshold=0.4)
