"""A sample of the recorded decisions of every family, in float32: attention by vLLM's Triton kernel."""

import pytest

from tests.conftest import load_golden
from tests.e2e import test_block_causal, test_fast_dllm_v2, test_llada2
from tests.e2e.engine import case_params, generate, tokens
from vllm_osdt.mini import model_path

# By checkpoint: sampling parameters of a case, what the tests of the family start the engine with, and the field by
# which cases differ in kind. Models of experts come first: vLLM makes their process groups with the first engine.
FAMILIES = {
    "llada2_random": (test_llada2.recorded, {"hf_overrides": {"mask_token_id": 255, "eos_token_id": 2}}, "editing_threshold"),
    "llada_random": (case_params, {}, "cache"),
    "llada_tasks": (case_params, {}, "cache"),
    "dream_random": (case_params, {}, "cache"),
    "sdar_random": (test_block_causal.recorded, {}, "remasking_strategy"),
    "fast_dllm_v2_random": (test_fast_dllm_v2.recorded, {"hf_overrides": {"mask_token_id": 255}}, "sub_block_cache"),
}  # fmt: skip


def short_cases(cases, field):
    """The case with the fewest forwards of each kind."""
    kinds = {str(case[field]): case for case in sorted(cases, key=lambda case: -case["nfe"])}
    return list(kinds.values())


@pytest.mark.parametrize("name", FAMILIES)
def test_the_recorded_decisions_are_taken(name, start_llm):
    params_of, settings, field = FAMILIES[name]
    golden = load_golden(name)
    cases = short_cases(golden.cases, field)
    assert len(cases) > 1
    llm = start_llm(golden.folder, max_num_seqs=4, max_num_batched_tokens=512, max_model_len=256, **settings)
    completions = generate(llm, [case["prompt_token_ids"] for case in cases], [params_of(case) for case in cases])
    assert tokens(completions) == [case["output_token_ids"] for case in cases]


def test_a_bundled_model_in_float32_decodes_as_on_a_cpu(mini, start_llm, cpu_tokens):
    problems = cpu_tokens["models"][mini][:2]
    llm = start_llm(
        model_path(mini), tokenizer=model_path(mini), max_num_seqs=2, max_num_batched_tokens=512, max_model_len=256
    )
    prompts = [llm.get_tokenizer().encode(problem["prompt"]) for problem in problems]
    import vllm_osdt

    options = {"policy": "static_threshold", "threshold": 0.9, "max_tokens": cpu_tokens["max_tokens"]}
    completions = generate(llm, prompts, vllm_osdt.sampling_params(**options))
    assert tokens(completions) == [problem["tokens"] for problem in problems]
