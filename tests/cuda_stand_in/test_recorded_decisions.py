"""A sample of the recorded decisions of every family, in float32: attention by vLLM's Triton kernel.

Editing, shifted logits, sub-blocks and cache modes are among them; no step of any may wait for the device.
"""

import pytest

import vllm_osdt
from tests.conftest import load_golden
from tests.cuda_stand_in.cuda import LEDGER
from tests.cuda_stand_in.test_graphs import count_replays, runner_of
from tests.e2e.engine import generate, tokens
from tests.e2e.families import FAMILIES
from vllm_osdt.mini import model_path


def short_cases(cases, kind):
    """Of each kind of case, the one with the fewest forwards."""
    shortest = {str(case[kind]): case for case in sorted(cases, key=lambda case: -case["nfe"])}
    return list(shortest.values())


@pytest.mark.parametrize("name", FAMILIES)
def test_the_recorded_decisions_are_taken(name, start_llm):
    family, golden = FAMILIES[name], load_golden(name)
    cases = short_cases(golden.cases, family.kind)
    assert len(cases) > 1
    llm = start_llm(golden.folder, max_num_seqs=4, max_num_batched_tokens=512, max_model_len=256, **family.settings)
    prompts, params = [case["prompt_token_ids"] for case in cases], [family.params_of(case) for case in cases]
    replayed = count_replays(llm)
    LEDGER.clear()
    assert tokens(generate(llm, prompts, params)) == [case["output_token_ids"] for case in cases]
    assert not LEDGER.waits
    fits = [case for case in cases if case["block_length"] <= runner_of(llm).decode_query_len]
    assert bool(replayed) == bool(fits)


def test_a_bundled_model_in_float32_decodes_as_on_a_cpu(mini, start_llm, cpu_tokens):
    problems = cpu_tokens["models"][mini][:2]
    llm = start_llm(
        model_path(mini), tokenizer=model_path(mini), max_num_seqs=2, max_num_batched_tokens=512, max_model_len=256
    )
    prompts = [llm.get_tokenizer().encode(problem["prompt"]) for problem in problems]
    options = {"policy": "static_threshold", "threshold": 0.9, "max_tokens": cpu_tokens["max_tokens"]}
    completions = generate(llm, prompts, vllm_osdt.sampling_params(**options))
    assert tokens(completions) == [problem["tokens"] for problem in problems]
