"""The plugin costs nothing until it is used, and other models do not notice it."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

# Generates with an ordinary model; "absent" hides this package from the search for entry points.
ORDINARY = """
import importlib.metadata, json, sys
if sys.argv[2] == "absent":
    installed = importlib.metadata.distributions
    importlib.metadata.distributions = lambda **context: (
        distribution for distribution in installed(**context) if distribution.name != "vllm-osdt"
    )
from vllm import LLM, SamplingParams
llm = LLM(model=sys.argv[1], skip_tokenizer_init=True, dtype="float32", max_num_seqs=4, max_model_len=64,
          enforce_eager=True)
prompts = [{"prompt_token_ids": list(range(3, 3 + n))} for n in (1, 4, 9)]
outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=12, detokenize=False), use_tqdm=False)
config = llm.llm_engine.vllm_config
runner = type(llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner)
print("RESULT", json.dumps({
    "tokens": [list(output.outputs[0].token_ids) for output in outputs],
    "v2": config.use_v2_model_runner,
    "runner": f"{runner.__module__}.{runner.__name__}",
    "scheduler": str(config.scheduler_config.get_scheduler_cls()),
    "chunked": config.scheduler_config.enable_chunked_prefill,
    "prefix_caching": config.cache_config.enable_prefix_caching,
    "compilation": str(config.compilation_config.mode),
    "loaded": "vllm_osdt.plugin" in sys.modules,
}))
"""


def python(code, *arguments, **environment):
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=REPOSITORY, env={**os.environ, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_importing_the_package_loads_neither_torch_nor_vllm():
    heavy = "{'torch', 'vllm', 'numpy', 'triton'} & set(sys.modules)"
    assert python(f"import sys, vllm_osdt, vllm_osdt.errors; print(sorted({heavy}))").strip() == "[]"
    # Policies own their options, and make tables of NumPy.
    assert python(f"import sys, vllm_osdt.options; print(sorted({heavy}))").strip() == "['numpy']"


def test_registering_twice_wraps_nothing_twice():
    from vllm import ModelRegistry
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorLogging, KVConnectorProm
    from vllm.engine.arg_utils import EngineArgs
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.engine.output_processor import RequestState
    from vllm.v1.metrics.stats import RequestSpecDecodeMetrics

    import vllm_osdt

    def patched():
        return (
            SamplingParams._validate_diffusion,
            InputProcessor.process_inputs,
            EngineArgs.__dict__["add_cli_args"].__func__,
            EngineArgs.__dict__["from_cli_args"].__func__,
            getattr(VllmConfig.use_v2_model_runner, "fget", VllmConfig.use_v2_model_runner),
            RequestState.make_request_output,
            RequestSpecDecodeMetrics.to_dict,
            KVConnectorProm.__init__,
            KVConnectorLogging.observe,
        )

    vllm_osdt.register()
    once = patched()
    vllm_osdt.register()
    assert all(first is second for first, second in zip(once, patched(), strict=True))
    assert all(function.__wrapped__.__module__.startswith("vllm.") for function in once)
    assert "LLaDAModelLM" in ModelRegistry.get_supported_archs()


@pytest.mark.e2e
def test_another_model_runs_as_if_the_plugin_were_not_installed(tmp_path):
    from transformers import Qwen3Config, Qwen3ForCausalLM, set_seed

    set_seed(0)
    config = Qwen3Config(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=64, initializer_range=0.2, eos_token_id=96,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(tmp_path)
    results = {}
    for presence in ("absent", "present"):
        output = python(ORDINARY, str(tmp_path), presence)
        results[presence] = json.loads(output.rsplit("RESULT ", 1)[1].splitlines()[0])
    assert results["present"].pop("loaded") and not results["absent"].pop("loaded")
    assert results["present"] == results["absent"]
    assert len({tuple(row) for row in results["present"]["tokens"]}) == 3


def test_offline_parameters_are_greedy_unless_told_and_take_our_options_by_name():
    from vllm import SamplingParams

    import vllm_osdt
    from vllm_osdt.errors import InvalidOptionError
    from vllm_osdt.options import OPTION_NAMES

    assert not set(OPTION_NAMES) & set(SamplingParams.__struct_fields__)
    params = vllm_osdt.sampling_params(task="quiz", threshold=0.8, stop=["x"], extra_args={"other": 1})
    assert (params.temperature, params.max_tokens, params.stop) == (0.0, None, ["x"])
    assert params.extra_args == {"other": 1, "osdt_task": "quiz", "osdt_threshold": 0.8}
    assert vllm_osdt.sampling_params(temperature=0.5, max_tokens=7) == SamplingParams(temperature=0.5, max_tokens=7)
    with pytest.raises(InvalidOptionError, match=r"'treshold' is neither .*did you mean .threshold.\?"):
        vllm_osdt.sampling_params(treshold=0.5)


def test_a_checkout_newer_than_its_metadata_still_lets_triton_be_imported(tmp_path):
    """An editable install keeps the entry points of the release that it was made of."""
    info = tmp_path / "vllm_osdt_before-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-osdt-before\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text("[triton.backends]\ncpu = vllm_osdt.cpu.triton_backend\n")
    path = os.pathsep.join([str(tmp_path), str(REPOSITORY)])
    code = (
        "import sys; from triton.backends import backends; "
        "print(backends['cpu'].driver.__name__, 'vllm_osdt.cpu' in sys.modules)"
    )
    assert python(code, PYTHONPATH=path).strip() == "InterpreterDriver True"
