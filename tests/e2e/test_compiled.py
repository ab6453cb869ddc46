"""A model that vLLM compiles decodes as one that it does not."""

import pytest

from tests.e2e.engine import case_params, generate, tokens

pytestmark = pytest.mark.e2e

MODE = 3  # CompilationMode.VLLM_COMPILE, as -O1 and above ask for; a CPU has its own in its place


def test_a_compiled_model_decodes_the_same(golden_tasks, start_llm):
    compiled = start_llm(golden_tasks.folder, compilation_config={"mode": MODE}, max_num_seqs=64, max_model_len=256)
    cases = golden_tasks.cases[:12]
    completions = generate(compiled, [case["prompt_token_ids"] for case in cases], list(map(case_params, cases)))
    assert tokens(completions) == [case["output_token_ids"] for case in cases]
