"""Engines with ``fused_lm_head`` decode what engines without it decode, and write no logits."""

from types import SimpleNamespace

import pytest

from tests.conftest import load_golden
from tests.cuda_stand_in.cuda import LEDGER
from tests.cuda_stand_in.test_default_settings import prompts_of
from tests.cuda_stand_in.test_graphs import PLAIN, count_replays, params, random_params
from tests.cuda_stand_in.test_recorded_decisions import short_cases
from tests.e2e.engine import generate, tokens
from tests.e2e.families import FAMILIES
from vllm_osdt.mini import model_path
from vllm_osdt.worker.graphs import Ends

FUSED = {"osdt": {"profile_dir": "", "fused_lm_head": True}}
KERNELS = {"_lm_head_kernel", "_combine_kernel"}


@pytest.fixture(scope="module")
def engines(mini, start_llm):
    """Engines of a model in bfloat16: without the option, with it, and with it and without graphs."""
    settings = {"dtype": "auto", "tokenizer": model_path(mini), "max_num_seqs": 6}
    eager = {"enforce_eager": True, "compilation_config": None}
    written = []
    with pytest.MonkeyPatch.context() as patch:
        from vllm.model_executor.layers.logits_processor import LogitsProcessor

        forward = LogitsProcessor.forward

        def noted(*args, **kwargs):
            written.append(1)
            return forward(*args, **kwargs)

        patch.setattr(LogitsProcessor, "forward", noted)
        LEDGER.clear()
        graphs = start_llm(model_path(mini), additional_config=FUSED, **settings)
        without_graphs = start_llm(model_path(mini), additional_config=FUSED, **settings, **eager)
        launches = set(LEDGER.launches)
        logits = start_llm(model_path(mini), **settings, **eager)
        yield SimpleNamespace(
            logits=logits, fused=[graphs, without_graphs], graphs=graphs, launches=launches, written=written
        )


@pytest.fixture
def prompts(engines, cpu_tokens, mini):
    return prompts_of(engines.logits, cpu_tokens["models"][mini])


def test_the_kernels_are_compiled_at_start(engines):
    assert {launch[0] for launch in engines.launches} >= KERNELS


@pytest.mark.parametrize(("policies", "ends"), [(PLAIN, Ends.DECIDED), (("local_leap", "bacd"), Ends.PROPOSED)])
def test_the_tokens_are_those_of_written_logits(engines, prompts, policies, ends):
    asked = [random_params(seed, policies) for seed in range(6)]
    assert {one.temperature > 0 for one in asked} == {True, False}
    engines.written.clear()
    expected = tokens(generate(engines.logits, prompts, asked))
    assert engines.written
    replayed = count_replays(engines.graphs)
    engines.written.clear()
    LEDGER.clear()
    for llm in engines.fused:
        assert tokens(generate(llm, prompts, asked)) == expected
    assert not engines.written
    assert not LEDGER.waits
    assert ends in {graph.ends for graph in replayed}
    launched = {launch for launch in LEDGER.launches if launch[0] in KERNELS}
    assert launched and launched <= engines.launches  # nothing is compiled by a request


def test_a_greedy_request_decodes_as_on_a_cpu(engines, prompts, cpu_tokens, mini):
    asked = params(max_tokens=cpu_tokens["max_tokens"], threshold=0.9)
    for llm in engines.fused:
        assert tokens(generate(llm, prompts, asked)) == [one["tokens"] for one in cpu_tokens["models"][mini]]


def test_steps_of_more_rows_than_the_operator_says_write_logits(start_llm, cpu_tokens):
    LEDGER.clear()
    llm = start_llm(
        model_path("llada-mini"),
        dtype="auto",
        tokenizer=model_path("llada-mini"),
        max_num_seqs=6,
        additional_config={"osdt": {**FUSED["osdt"], "fused_lm_head_max_rows": 32}},
    )
    launches = set(LEDGER.launches)
    recorded = cpu_tokens["models"]["llada-mini"]
    prompts, asked = prompts_of(llm, recorded), params(max_tokens=cpu_tokens["max_tokens"], threshold=0.9)
    for batch in (prompts[:1], prompts):
        LEDGER.clear()
        found = tokens(generate(llm, batch, asked))
        assert found == [one["tokens"] for one in recorded[: len(batch)]]
        names = {launch[0] for launch in LEDGER.launches}
        assert "_confidence_kernel" in names or len(batch) == 1
        assert not [launch for launch in LEDGER.launches if launch not in launches]


def test_recorded_decisions_are_taken_in_float32(start_llm):
    family, golden = FAMILIES["sdar_random"], load_golden("sdar_random")
    cases = short_cases(golden.cases, family.kind)
    [block_length] = {case["block_length"] for case in cases}
    llm = start_llm(
        golden.folder,
        additional_config={"osdt": {**FUSED["osdt"], "block_length": block_length}},
        compilation_config={"cudagraph_capture_sizes": [16, 32]},
        max_num_seqs=4,
        max_num_batched_tokens=512,
        max_model_len=256,
        **family.settings,
    )
    prompts, asked = [case["prompt_token_ids"] for case in cases], [family.params_of(case) for case in cases]
    replayed = count_replays(llm)
    assert tokens(generate(llm, prompts, asked)) == [case["output_token_ids"] for case in cases]
    assert replayed
