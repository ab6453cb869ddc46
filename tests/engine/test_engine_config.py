"""Engine settings of our models: what is set without a flag, what is refused, and the command line."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from vllm.config import CUDAGraphMode
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_osdt.calibration.fingerprint import model_fingerprint
from vllm_osdt.calibration.store import open_store
from vllm_osdt.engine import engine_config
from vllm_osdt.errors import OSDTError
from vllm_osdt.options.operator import default_decoding_options, server_options

CONFIG = {
    "architectures": ["LLaDAModelLM"],
    "model_type": "llada",
    "d_model": 64,
    "n_heads": 2,
    "n_layers": 1,
    "mlp_hidden_size": 96,
    "vocab_size": 64,
    "embedding_size": 64,
    "max_sequence_length": 256,
    "mask_token_id": 63,
    "eos_token_id": 0,
    "torch_dtype": "float32",
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    """A folder with a config and nothing else: enough to configure an engine."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return str(tmp_path)


def configure(checkpoint: str, **arguments):
    """The engine configuration of a checkpoint."""
    return EngineArgs(model=checkpoint, skip_tokenizer_init=True, **arguments).create_engine_config()


def test_engine_needs_no_flag(checkpoint: str) -> None:
    config = configure(checkpoint)
    assert config.scheduler_config.scheduler_cls == "vllm_osdt.engine.scheduler.CanvasScheduler"
    assert config.parallel_config.worker_cls.startswith("vllm_osdt.worker.")
    assert config.diffusion_config.canvas_length == 32
    assert config.use_v2_model_runner
    assert not config.scheduler_config.async_scheduling
    assert not config.scheduler_config.enable_chunked_prefill
    assert not config.cache_config.enable_prefix_caching
    assert config.model_config.get_diff_sampling_param()["temperature"] == 0.0


def test_temperature_of_the_checkpoint_is_kept(checkpoint: str) -> None:
    (Path(checkpoint) / "generation_config.json").write_text(json.dumps({"temperature": 0.4}))
    assert configure(checkpoint).model_config.get_diff_sampling_param()["temperature"] == 0.4


def test_temperature_of_the_operator_is_kept(checkpoint: str) -> None:
    config = configure(checkpoint, override_generation_config={"temperature": 0.7})
    assert config.model_config.get_diff_sampling_param()["temperature"] == 0.7


def test_block_length_of_the_checkpoint_is_the_default_and_the_operators_wins(checkpoint: str) -> None:
    (Path(checkpoint) / "config.json").write_text(json.dumps({**CONFIG, "block_length": 16}))
    assert default_decoding_options(configure(checkpoint)).block_length == 16
    config = configure(checkpoint, additional_config={"osdt": {"block_length": 8}})
    assert default_decoding_options(config).block_length == 8
    assert config.diffusion_config.canvas_length == 8


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"pipeline_parallel_size": 2}, ["pipeline_parallel_size is 2", "--tensor-parallel-size"]),
        ({"additional_config": {"osdt": {"treshold": 0.5}}}, ["treshold", "threshold"]),
        ({"additional_config": {"osdt": {"threshold": 2}}}, ["threshold is 2"]),
        ({"scheduler_cls": "some.Scheduler"}, ["some.Scheduler"]),
        ({"logits_processors": ["some.Processor"]}, ["logits_processors are set", "remove them"]),
        ({"prefill_schedule_interval": 4}, ["prefill_schedule_interval is 4", "1"]),
        (
            {"enable_batch_sharded_sampling": True, "tensor_parallel_size": 2},
            ["enable_batch_sharded_sampling is set", "every rank"],
        ),
    ],
)
def test_engine_that_cannot_work_is_refused(checkpoint: str, arguments: dict, words: list[str]) -> None:
    with pytest.raises(ValueError) as refusal:  # noqa: PT011  its words are looked at below
        configure(checkpoint, **arguments)
    assert all(word in str(refusal.value) for word in words)


def test_unsupported_config_value_is_refused_by_name(checkpoint: str) -> None:
    (Path(checkpoint) / "config.json").write_text(json.dumps({**CONFIG, "block_type": "sequential"}))
    with pytest.raises(Exception, match="block_type is 'sequential'"):
        configure(checkpoint)


def test_command_line_takes_plugin_and_options(checkpoint: str) -> None:
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    arguments = ["--model", checkpoint, "--skip-tokenizer-init", "--plugin", "osdt"]
    parsed = parser.parse_args([*arguments, "--osdt-config", '{"threshold": 0.7, "task": "math"}'])
    config = AsyncEngineArgs.from_cli_args(parsed).create_engine_config()
    assert (default_decoding_options(config).threshold, default_decoding_options(config).task) == (0.7, "math")


def test_command_line_refuses_another_plugin(checkpoint: str, capsys: pytest.CaptureFixture) -> None:
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    with pytest.raises(SystemExit):
        parser.parse_args(["--model", checkpoint, "--plugin", "other"])
    assert "--plugin" in capsys.readouterr().err


def test_fingerprint_follows_the_weights_wherever_they_are(checkpoint: str, tmp_path_factory, monkeypatch) -> None:
    (Path(checkpoint) / "model.safetensors").write_bytes(b"weights")
    config = configure(checkpoint, dtype="bfloat16")
    by_path = model_fingerprint(config)
    assert (by_path.vocab_size, by_path.mask_token_id, by_path.dtype) == (64, 63, "bfloat16")
    # A repository's name: the weights are those of its snapshot in the cache.
    hub = tmp_path_factory.mktemp("hub")
    shutil.copytree(checkpoint, hub / "models--org--name" / "snapshots" / "abc")
    (hub / "models--org--name" / "refs").mkdir()
    (hub / "models--org--name" / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    monkeypatch.setattr(config.model_config, "model", "org/name")
    assert model_fingerprint(config) == by_path
    # No file here: the name stands for the weights.
    monkeypatch.setattr(config.model_config, "model", "org/other")
    assert model_fingerprint(config).weights.startswith("org/other@")


@pytest.fixture
def block_causal(tmp_path: Path) -> str:
    """The same for a block-causal model."""
    from tests.reference.block_causal_checkpoints import SDAR_FIELDS

    (tmp_path / "config.json").write_text(json.dumps({**SDAR_FIELDS, "block_size": 24}))
    return str(tmp_path)


def test_block_causal_engines_share_pages_of_whole_blocks(block_causal: str) -> None:
    config = configure(block_causal)
    assert config.scheduler_config.scheduler_cls == "vllm_osdt.engine.scheduler.CanvasScheduler"
    assert not config.scheduler_config.async_scheduling
    assert config.scheduler_config.enable_chunked_prefill
    assert config.cache_config.enable_prefix_caching
    assert config.cache_config.block_size % 24 == 0
    assert default_decoding_options(config).cache_mode == "block"


@pytest.mark.parametrize(("block_size", "is_shared"), [(96, True), (64, False)])
def test_pages_that_cut_blocks_are_not_shared(block_causal: str, block_size: int, is_shared: bool) -> None:
    config = configure(block_causal, block_size=block_size)
    assert config.cache_config.block_size == block_size
    assert config.cache_config.enable_prefix_caching == is_shared


def test_fused_commits_are_of_block_causal_models(checkpoint: str, block_causal: str) -> None:
    parted = {"osdt": {"fused_commit": False}}
    assert configure(block_causal, additional_config=parted)
    (Path(checkpoint) / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(ValueError, match="fused_commit is false"):
        configure(checkpoint, additional_config=parted)


def test_causal_commits_want_neither_whole_blocks_nor_pages_of_them(tmp_path: Path) -> None:
    from tests.reference.nemotron_labs_diffusion import FIELDS

    (tmp_path / "config.json").write_text(json.dumps({**FIELDS, "block_size": 24}))
    config = configure(str(tmp_path), max_model_len=500, block_size=64)
    assert config.model_config.max_model_len == 500
    assert config.cache_config.enable_prefix_caching and config.cache_config.block_size == 64
    assert configure(str(tmp_path)).cache_config.block_size == 32
    options = default_decoding_options(config)
    assert (options.cache_mode, options.block_length, options.is_on_grid) == ("causal", 24, False)
    assert not config.model_config.hf_config.traits.is_threshold_strict
    fused = configure(str(tmp_path), additional_config={"osdt": {"cache_mode": "causal_fused"}})
    assert default_decoding_options(fused).cache_mode == "causal_fused"
    with pytest.raises(ValueError, match="fused_commit is false, but cache_mode says"):
        configure(str(tmp_path), additional_config={"osdt": {"fused_commit": False}})
    with pytest.raises(ValueError, match="cache_mode is 'dual'; this model's attention allows causal, causal_fused"):
        configure(str(tmp_path), additional_config={"osdt": {"cache_mode": "dual"}})


@pytest.mark.parametrize(
    ("folder", "block_size", "arguments", "expected", "warning"),
    [
        ("SDAR-8B-Chat-b32", None, {}, 32, "takes the block length 32 from the name"),
        ("SDAR-8B-Chat", None, {}, 4, "does not say how long its blocks are; 4 is assumed"),
        ("SDAR-8B-Chat-b32", 4, {}, 4, "sounds like blocks of 32, but its config says 4"),
        ("SDAR-8B-Chat-b32", None, {"hf_overrides": {"block_length": 8}}, 8, ""),
        ("SDAR-8B-Chat-b32", None, {"hf_overrides": {"block_length": 4}}, 4, ""),
        ("SDAR-8B-Chat", None, {"hf_overrides": {"block_size": 4}}, 4, ""),
        ("SDAR-8B-Chat", None, {"hf_overrides": {"block_length": 8}}, 8, ""),
        ("SDAR-8B-Chat-b32", None, {"additional_config": {"osdt": {"block_length": 16}}}, 16, ""),
        ("SDAR-8B-Chat-b16", 16, {}, 16, ""),
    ],
)
def test_the_block_length_that_a_config_does_not_say_comes_from_the_name(
    tmp_path, monkeypatch, folder, block_size, arguments, expected, warning
):
    from tests.reference.block_causal_checkpoints import SDAR_FIELDS
    from vllm_osdt.engine import engine_config

    said = []
    monkeypatch.setattr(engine_config.logger, "warning_once", lambda text, *args: said.append(text % args))
    monkeypatch.setattr(engine_config.logger, "info_once", lambda text, *args: said.append(text % args))
    fields = {**SDAR_FIELDS, "block_size": block_size}
    path = tmp_path / folder
    path.mkdir()
    (path / "config.json").write_text(json.dumps({k: v for k, v in fields.items() if v is not None}))
    config = configure(str(path), **arguments)
    assert default_decoding_options(config).block_length == config.diffusion_config.canvas_length == expected
    about = [text for text in said if "block" in text and "switches off" not in text]
    assert warning in about[0] if warning else about == []


def test_a_context_of_broken_blocks_is_cut_to_whole_ones(block_causal: str) -> None:
    config = configure(block_causal, max_model_len=500)
    assert config.model_config.max_model_len == config.scheduler_config.max_model_len == 480


def test_a_context_below_one_block_is_refused(block_causal: str) -> None:
    with pytest.raises(ValueError, match="max_model_len is 20, less than one block of 24"):
        configure(block_causal, max_model_len=20)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        ("make_llada2_checkpoint", {"policy": "entropy_bound", "edit_threshold": 0.5}, "edit_threshold is 0.5"),
        ("make_fast_dllm_v2_checkpoint", {"policy": "static_threshold", "steps": 8}, "steps is 8; with policy"),
        (
            "make_fast_dllm_v2_checkpoint",
            {"policy": "static_threshold", "steps_per_block": 4},
            "steps is 4; with policy",
        ),
    ],
)
def test_defaults_that_every_request_would_be_refused_for_are_refused_at_start(
    tmp_path, make, options, message
) -> None:
    from tests.reference import block_causal_checkpoints

    folder = getattr(block_causal_checkpoints, make)(tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        configure(str(folder), additional_config={"osdt": options})


@pytest.mark.parametrize("name", ["max_num_batched_tokens", "max_num_scheduled_tokens"])
def test_rows_for_less_than_two_blocks_are_refused(block_causal: str, name: str) -> None:
    from vllm_osdt.engine.engine_config import _set_up_block_causal, server_options

    config = configure(block_causal)
    setattr(config.scheduler_config, name, 47)
    with pytest.raises(
        ValueError, match=f"{name} is 47; a step computes up to two blocks of 24. Raise it to at least 48"
    ):
        _set_up_block_causal(config, 24, server_options(config))


def test_experts_of_several_cpu_engines_are_refused(tmp_path: Path) -> None:
    """vLLM itself would fail at the first request."""
    from tests.reference.block_causal_checkpoints import LLADA2_FIELDS

    (tmp_path / "config.json").write_text(json.dumps(LLADA2_FIELDS))
    with pytest.raises(ValueError, match="data_parallel_size is 2, but vLLM cannot exchange experts' inputs"):
        configure(str(tmp_path), data_parallel_size=2)
    with pytest.raises(ValueError, match="enable_lora is set, but vLLM has no kernels"):
        configure(str(tmp_path), enable_lora=True)


@pytest.mark.parametrize("backend", ["FLASHINFER", "FLEX_ATTENTION"])
def test_attention_that_has_no_room_for_blocks_is_refused(checkpoint: str, block_causal: str, backend: str) -> None:
    with pytest.raises(ValueError, match=f"attention backend {backend} holds as many requests as max_num_seqs"):
        configure(block_causal, attention_config={"backend": backend})
    (Path(checkpoint) / "config.json").write_text(json.dumps(CONFIG))
    asked = {"attention_config": {"backend": backend}}
    if backend == "FLASHINFER":
        with pytest.raises(ValueError, match="attention backend FLASHINFER is passed over by vLLM itself"):
            configure(checkpoint, **asked)
    else:
        assert configure(checkpoint, **asked).attention_config.backend.name == backend


@pytest.mark.parametrize(("cache_dtype", "expected"), [("auto", None), ("bfloat16", None), ("fp8", "TRITON_ATTN")])
def test_a_gpu_gets_attention_that_has_room(monkeypatch, cache_dtype: str, expected: str | None) -> None:
    from types import SimpleNamespace

    from vllm.config import AttentionConfig

    from vllm_osdt.engine import engine_config

    monkeypatch.setattr(engine_config, "current_platform", SimpleNamespace(is_cuda=lambda: True))
    attention = AttentionConfig()
    engine_config._choose_attention(attention, cache_dtype)
    assert (attention.backend and attention.backend.name) == expected
    attention = AttentionConfig()
    engine_config._choose_attention(attention, cache_dtype, mixes_causal=True)
    assert attention.backend is not None and attention.backend.name == "TRITON_ATTN"


FILTERS = {"top_k": 20, "top_p": 0.95, "repetition_penalty": 1.05}
GENERATION = {"temperature": 0.6, **FILTERS, "eos_token_id": [7, 8]}


def test_what_a_checkpoint_wishes_holds_for_requests_that_say_nothing(checkpoint: str) -> None:
    (Path(checkpoint) / "generation_config.json").write_text(json.dumps(GENERATION))
    assert configure(checkpoint).model_config.get_diff_sampling_param() == {"temperature": 0.6, **FILTERS}
    greedy = configure(checkpoint, override_generation_config={"temperature": None}).model_config
    assert greedy.get_diff_sampling_param() == {"temperature": 0.0, **FILTERS}
    plain = configure(checkpoint, generation_config="vllm").model_config
    assert plain.get_diff_sampling_param() == {"temperature": 0.0}


def test_what_an_operator_wishes_comes_before_it(checkpoint: str) -> None:
    (Path(checkpoint) / "generation_config.json").write_text(json.dumps(GENERATION))
    model = configure(checkpoint, override_generation_config={"top_p": 1.0}).model_config
    assert model.get_diff_sampling_param() == {"temperature": 0.6, **FILTERS, "top_p": 1.0}


def test_whole_steps_are_captured_for_both_kinds_of_attention_on_a_gpu(
    checkpoint: str, block_causal: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert configure(block_causal).compilation_config.cudagraph_mode.name == "NONE"  # on a CPU
    config = configure(checkpoint)
    monkeypatch.setattr(engine_config.current_platform, "is_cpu", lambda: False)
    for asked, expected in ((None, "FULL"), ("FULL", "FULL"), ("NONE", "NONE")):
        config.compilation_config.cudagraph_mode = asked and CUDAGraphMode[asked]
        config.compilation_config.cudagraph_capture_sizes = None
        engine_config._choose_graphs(config, 32)
        assert config.compilation_config.cudagraph_mode.name == expected
    config.compilation_config.cudagraph_mode = CUDAGraphMode.PIECEWISE
    with pytest.raises(OSDTError, match="cudagraph_mode is PIECEWISE"):
        engine_config._choose_graphs(config, 32)


def test_running_ahead_is_refused_where_no_step_does(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"osdt": {"run_ahead": True}}
    assert configure(checkpoint, additional_config=asked, data_parallel_size=2)  # engines of their own
    with pytest.raises(OSDTError, match="run_ahead is true, but on a CPU the 2 ranks"):
        configure(checkpoint, additional_config=asked, tensor_parallel_size=2)
    assert configure(checkpoint, additional_config={"osdt": {"run_ahead": False}}, tensor_parallel_size=2)
    config = configure(checkpoint, enforce_eager=True)
    config.additional_config = asked
    monkeypatch.setattr(engine_config.current_platform, "is_cpu", lambda: False)
    with pytest.raises(OSDTError, match=r"run_ahead is true, but CUDA graphs, .* are switched off"):
        engine_config.CanvasModelConfig.verify_and_update_config(config)


def test_bounds_of_the_load_lie_among_the_rows_of_steps(checkpoint: str) -> None:
    def load(low: int, high: int) -> dict:
        return {
            "additional_config": {"osdt": {"load_aware": {"low": low, "high": high}}},
            "max_num_batched_tokens": 300,
        }

    assert server_options(configure(checkpoint, **load(299, 400))).load_aware == (299, 400)
    with pytest.raises(OSDTError, match=r"load_aware has low 300, but no step has more .* 300, .* Lower it"):
        configure(checkpoint, **load(300, 400))
    assert configure(checkpoint, **load(1, 33))
    with pytest.raises(OSDTError, match=r"load_aware has high 32, .* block_length 32 rows, .* Raise it above 32"):
        configure(checkpoint, **load(1, 32))


def test_a_filter_must_fit_the_served_blocks(checkpoint: str, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    def own(**options) -> dict:
        return {"additional_config": {"osdt": {"profile_dir": "", **options}}}

    shapes = {"hidden.weight": (8, 8), "hidden.bias": (8,), "out.weight": (8, 8), "out.bias": (8,)}
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "filter.safetensors")
    file = str(tmp_path / "filter.safetensors")
    with pytest.raises(OSDTError, match=r"block_length is 32, but the filter of .* is for blocks of 8"):
        configure(checkpoint, **own(filter_file=file))
    assert configure(checkpoint, **own(filter_file=file, block_length=8, policy="learned_filter"))
    with pytest.raises(OSDTError, match=r"filter_file .*none' cannot be read"):
        configure(checkpoint, **own(filter_file=str(tmp_path / "none")))
    with pytest.raises(OSDTError, match="policy is 'learned_filter', but this server has no filter"):
        configure(checkpoint, **own(policy="learned_filter"))


FUSED = {"osdt": {"fused_lm_head": True}}


def test_drafts_by_load_are_refused_where_attention_takes_none(checkpoint: str) -> None:
    osdt = {"osdt": {"load_aware": {"low": 32, "high": 256}}}
    with pytest.raises(OSDTError, match="load_aware is set, but attention backend FLEX_ATTENTION takes no drafts"):
        configure(checkpoint, additional_config=osdt, attention_config={"backend": "FLEX_ATTENTION"})


def test_rows_of_a_fused_lm_head_that_is_not_there_are_refused(checkpoint: str) -> None:
    with pytest.raises(OSDTError, match="fused_lm_head_max_rows is set, but fused_lm_head is not"):
        configure(checkpoint, additional_config={"osdt": {"fused_lm_head_max_rows": 8}})


def test_the_fused_lm_head_is_refused_on_a_cpu(checkpoint: str) -> None:
    with pytest.raises(OSDTError, match=r"fused_lm_head is true, but it is a kernel for GPUs: .*leave it out"):
        configure(checkpoint, additional_config=FUSED)
    assert configure(checkpoint, additional_config={"osdt": {"fused_lm_head": False}})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"enable_lora": True}, "fused_lm_head is true and enable_lora is set, but an adapter may change logits"),
        (
            {"dtype": "bfloat16", "hf_overrides": {"head_dtype": "float32"}},
            "fused_lm_head is true and head_dtype is torch.float32, .* the model's torch.bfloat16",
        ),
    ],
)
def test_the_fused_lm_head_is_refused_on_a_gpu_beside_what_it_does_not_do(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch, arguments: dict, words: str
) -> None:
    config = configure(checkpoint, **arguments)
    config.additional_config = FUSED
    monkeypatch.setattr(engine_config.current_platform, "is_cpu", lambda: False)
    with pytest.raises(OSDTError, match=words):
        engine_config.CanvasModelConfig.verify_and_update_config(config)


def test_the_largest_graph_is_no_larger_than_asked(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configure(checkpoint)
    monkeypatch.setattr(engine_config.current_platform, "is_cpu", lambda: False)
    compilation = config.compilation_config
    compilation.cudagraph_mode = compilation.cudagraph_capture_sizes = None
    compilation.max_cudagraph_capture_size = 100
    engine_config._choose_graphs(config, 32)
    assert compilation.cudagraph_capture_sizes == [32, 64, 96]
    assert compilation.max_cudagraph_capture_size == 96


def test_experts_that_ranks_share_are_captured_by_none(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configure(checkpoint, enable_lora=True)
    monkeypatch.setattr(engine_config.current_platform, "is_cpu", lambda: False)
    monkeypatch.setattr(config.parallel_config, "data_parallel_size", 2)
    traits = config.model_config.hf_config.traits
    for has_experts, expected in ((False, CUDAGraphMode.FULL), (True, CUDAGraphMode.NONE)):
        own = dataclasses.replace(traits, has_experts=has_experts)
        monkeypatch.setattr(type(config.model_config.hf_config), "traits", own)
        compilation = config.compilation_config
        compilation.cudagraph_mode = compilation.cudagraph_capture_sizes = None
        compilation.max_cudagraph_capture_size = None
        engine_config._choose_graphs(config, 32)
        assert compilation.cudagraph_mode == expected
    config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL
    with pytest.raises(OSDTError, match="cudagraph_mode is FULL, but no step of experts shared by data-parallel ranks"):
        engine_config._choose_graphs(config, 32)


def test_graphs_by_number_of_adapters_are_refused(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configure(checkpoint, enable_lora=True)
    monkeypatch.setattr(engine_config.current_platform, "is_cpu", lambda: False)
    monkeypatch.setattr(config.lora_config, "specialize_active_lora", True)
    config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL
    with pytest.raises(OSDTError, match="specialize_active_lora is set, but its graphs would leave out rows without"):
        engine_config._choose_graphs(config, 32)
    config.compilation_config.cudagraph_mode = CUDAGraphMode.NONE
    engine_config._choose_graphs(config, 32)


def test_captured_sizes_are_whole_blocks_that_a_step_can_have() -> None:
    assert engine_config.capture_sizes(32, 300) == [32, 64, 96, 128, 192, 256]
    assert engine_config.capture_sizes(8, 64, [1, 20, 65]) == [8, 24]
    assert engine_config.capture_sizes(32, 16) == []


FAMILY_FIELDS = {
    "LLADA": "llada",
    "DREAM": "dream",
    "LLADA_MOE": "llada_moe",
    "SDAR": "sdar",
    "SDAR_MOE": "sdar_moe",
    "LLADA2": "llada2_moe",
    "FAST_DLLM_V2": "fast_dllm_v2",
    "STABLE_DIFFCODER": "stable_diffcoder",
    "ILLADA": "illada",
    "A2D_QWEN3": "a2d_qwen3",
    "A2D_QWEN2": "a2d_qwen2",
    "A2D_LLAMA": "a2d_llama",
    "NEMOTRON": "nemotron_labs_diffusion",
}


@pytest.fixture(params=FAMILY_FIELDS)
def any_family(request, tmp_path: Path) -> Path:
    """A config of every family, and nothing else."""
    from tests.models.test_rope import FAMILIES

    return FAMILIES[FAMILY_FIELDS[request.param]][0](tmp_path / "model")


def change(folder: Path, **fields) -> None:
    """Other fields in a checkpoint's config."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def read_config(fields: dict):
    """A checkpoint's config as its family's class reads it.

    (vLLM tries several times to read what is refused.)
    """
    from vllm_osdt.models.configs.parser import CanvasConfigParser

    return CanvasConfigParser.classes[fields["architectures"][0]].from_dict(fields)


@pytest.mark.parametrize("value", [0, -1, 129, 200, 8.0, "8", True])
def test_no_block_length_that_a_request_could_not_have_passes_from_anywhere(any_family: Path, value) -> None:
    words = f"block_length is {value!r}.*expected an integer from 1 to 128"
    with pytest.raises(ValueError, match=words):
        configure(str(any_family), additional_config={"osdt": {"block_length": value}})
    with pytest.raises(ValueError, match=words):
        configure(str(any_family), hf_overrides={"block_length": value})
    config = json.loads((any_family / "config.json").read_text())
    name = next((name for name in ("block_size", "bd_size") if name in config), "block_length")
    with pytest.raises(ValueError, match=words):
        read_config({**config, name: value})


@pytest.mark.parametrize("value", [None, -1, 101, 3.0, "<mask>", True])
def test_a_mask_token_that_is_none_is_refused_by_name(any_family: Path, value) -> None:
    words = rf"mask_token_id is {value!r}; it must be a token id in \[0, 101\)\. .*--hf-overrides"
    change(any_family, mask_token_id=value)
    with pytest.raises(ValueError, match=words):
        configure(str(any_family))
    assert configure(str(any_family), hf_overrides={"mask_token_id": 100})
    change(any_family, mask_token_id=100)
    with pytest.raises(ValueError, match=words):
        configure(str(any_family), hf_overrides={"mask_token_id": value})


REFUSED_FIELDS = {
    "LLADA": [("alibi", True), ("activation_type", "gelu"), ("rope", False), ("layer_norm_with_affine", False)],
    "DREAM": [("hidden_act", "gelu"), ("use_sliding_window", True)],
    "LLADA_MOE": [("qk_layernorm", False), ("norm_topk_prob", True), ("clip_qkv", 8.0), ("attention_bias", True)],
    "SDAR": [("hidden_act", "gelu"), ("use_sliding_window", True)],
    "SDAR_MOE": [("hidden_act", "gelu"), ("use_sliding_window", True)],
    "LLADA2": [
        ("use_qk_norm", False),
        ("score_function", "softmax"),
        ("norm_topk_prob", False),
        ("router_dtype", "bf16"),
    ],
    "FAST_DLLM_V2": [("hidden_act", "gelu"), ("use_sliding_window", True)],
    "STABLE_DIFFCODER": [("hidden_act", "gelu"), ("attention_bias", True), ("mlp_bias", True)],
    "ILLADA": [("hidden_act", "gelu"), ("attention_bias", True), ("mlp_bias", True), ("layer_norm_eps", 1e-5)],
    "A2D_QWEN3": [("hidden_act", "gelu"), ("use_sliding_window", True)],
    "A2D_QWEN2": [("hidden_act", "gelu"), ("use_sliding_window", True)],
    "A2D_LLAMA": [("hidden_act", "gelu"), ("attention_bias", True), ("mlp_bias", True)],
    "NEMOTRON": [
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("sliding_window", 64),
        ("dlm_paradigm", "autoregressive"),
    ],
}


def test_fields_that_are_not_honored_are_refused_in_a_config_and_in_an_override(any_family: Path, request) -> None:
    for name, value in REFUSED_FIELDS[request.node.callspec.params["any_family"]]:
        words = f"{name} is {value!r}; only .* is implemented"
        with pytest.raises(ValueError, match=words):
            configure(str(any_family), hf_overrides={name: value})
        with pytest.raises(ValueError, match=words):
            read_config({**json.loads((any_family / "config.json").read_text()), name: value})


def test_the_canvas_of_vllms_diffusion_config_is_our_block(any_family: Path) -> None:
    config = configure(str(any_family), diffusion_config={"canvas_length": 16})
    assert default_decoding_options(config).block_length == config.diffusion_config.canvas_length == 16
    same = {"osdt": {"block_length": 16}}
    assert configure(str(any_family), diffusion_config={"canvas_length": 16}, additional_config=same)
    for arguments, words in (
        ({"canvas_length": 200}, "block_length is 200; expected an integer from 1 to 128"),
        ({"canvas_length": 8, "max_denoising_steps": 4}, "max_denoising_steps to 4; here a policy decides"),
        ({"canvas_length": 8}, "canvas_length to 8, but --osdt-config sets block_length, which is the same, to 16"),
    ):
        with pytest.raises(ValueError, match=words):
            configure(str(any_family), diffusion_config=arguments, additional_config=same if "same" in words else {})


@pytest.mark.parametrize(
    ("is_causal", "arguments", "words"),
    [
        (False, {"enable_chunked_prefill": True}, "enable_chunked_prefill is True"),
        (False, {"enable_prefix_caching": True}, "enable_prefix_caching is True"),
        (False, {"long_prefill_token_threshold": 64}, "long_prefill_token_threshold is 64"),
        (False, {"async_scheduling": True}, "async_scheduling is True"),
        (True, {"enable_chunked_prefill": False}, "enable_chunked_prefill is False"),
        (
            True,
            {"enable_prefix_caching": True, "block_size": 64},
            "enable_prefix_caching is True, but pages of block_size",
        ),
        (True, {"async_scheduling": True}, "async_scheduling is True"),
    ],
)
def test_what_an_operator_has_set_is_honored_or_refused(
    checkpoint: str, block_causal: str, is_causal: bool, arguments: dict, words: str
) -> None:
    if not is_causal:
        (Path(checkpoint) / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(ValueError, match=words):
        configure(checkpoint, **arguments)
    opposite = {name: not value for name, value in arguments.items() if isinstance(value, bool)}
    assert configure(checkpoint, **opposite)


def test_a_refusal_of_ours_is_no_validation_error_of_the_whole_config(checkpoint: str) -> None:
    from vllm_osdt.errors import OSDTError

    with pytest.raises(OSDTError, match=r"^gen_length is 40; it must be a multiple of block_length 32"):
        configure(checkpoint, additional_config={"osdt": {"gen_length": 40}})
    with pytest.raises(OSDTError, match=r"gen_length is 256; .* at most 255"):
        configure(checkpoint, additional_config={"osdt": {"gen_length": 256}})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is no JSON"),
        ("[1]", "is no JSON object"),
        ('{"treshold": 0.5}', "Unknown option 'treshold' (did you mean 'threshold'?)"),
        ('{"threshold": 2}', "threshold is 2; expected a number in (0, 1]"),
        ('{"drift": "of"}', "drift is 'of' (did you mean 'off'?)"),
    ],
)
def test_a_mistake_in_osdt_config_is_told_before_anything_is_loaded(
    checkpoint: str, capsys: pytest.CaptureFixture, text: str, words: str
) -> None:
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    with pytest.raises(SystemExit):
        parser.parse_args(["--model", checkpoint, "--osdt-config", text])
    said = " ".join(capsys.readouterr().err.split())
    assert "argument --osdt-config: " in said and words in said
    assert "_json" not in said


@pytest.mark.parametrize(
    ("is_fast", "arguments", "dtype"),
    [(False, {}, "float32"), (False, {"dtype": "bfloat16"}, "bfloat16"), (True, {}, "bfloat16")],
)
def test_a_cpu_whose_bfloat16_is_slow_serves_in_float32_unless_told(
    checkpoint: str, monkeypatch, is_fast: bool, arguments: dict, dtype: str
) -> None:
    from vllm_osdt.engine import engine_config

    said = []
    monkeypatch.setattr(engine_config, "has_fast_bfloat16", lambda: is_fast)
    monkeypatch.setattr(engine_config.logger, "warning_once", lambda text, *args: said.append(text % args))
    for stored in ("float32", "bfloat16"):
        change(Path(checkpoint), torch_dtype=stored)
        assert str(configure(checkpoint, **arguments).model_config.dtype) == f"torch.{dtype}"
    assert any("serves in float32" in line for line in said) == (dtype == "float32")


def test_weights_of_less_precision_keep_their_dtype(checkpoint: str, monkeypatch) -> None:
    from tests.models.test_quantization import QUANTIZATION
    from vllm_osdt.engine import engine_config

    monkeypatch.setattr(engine_config, "has_fast_bfloat16", lambda: False)
    change(Path(checkpoint), quantization_config=QUANTIZATION)
    assert str(configure(checkpoint).model_config.dtype) == "torch.bfloat16"


def test_an_engine_says_in_one_paragraph_what_was_decided(checkpoint: str, block_causal: str, tmp_path) -> None:
    from vllm_osdt.engine.engine_config import describe_engine

    text = describe_engine(configure(block_causal, additional_config={"osdt": {"profile_dir": ""}}))
    assert "block length 24" in text and "cache mode block" in text and "canvas" not in text.replace("canvas_", "")
    assert "profiles in memory only" in text and "name no task: static threshold" in text
    (Path(checkpoint) / "config.json").write_text(json.dumps(CONFIG))
    own = {"osdt": {"profile_dir": str(tmp_path / "p"), "task": "chat", "policy": "factor", "gen_length": 64}}
    text = describe_engine(configure(checkpoint, additional_config=own))
    decoding = [
        "policy factor",
        "static threshold 0.9",
        "block length 32",
        "canvas 64, and more when an answer needs it",
        "cache mode dual",
    ]
    tasks = ["calibrates on 64 requests", "task 'chat'", str(tmp_path / "p"), ": 0 tasks"]
    assert all(words in text for words in decoding + tasks) and "\n" not in text


FIRST = """
import sys
from vllm.engine.arg_utils import EngineArgs
asked = {"skip_tokenizer_init": True, "diffusion_config": {"canvas_length": 16}}
config = EngineArgs(model=sys.argv[1], **asked).create_engine_config()
assert config.diffusion_config.canvas_length == 16
import vllm_osdt.engine.engine_config as engine_config
engine_config.has_fast_bfloat16 = lambda: False
assert str(EngineArgs(model=sys.argv[1], **asked).create_engine_config().model_config.dtype) == "torch.float32"
"""


def test_the_first_engine_of_a_process_is_asked_too(checkpoint: str) -> None:
    """vLLM loads plugins while it makes the arguments."""
    done = subprocess.run([sys.executable, "-c", FIRST, checkpoint], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_arguments_that_make_two_engines_are_asked_as_they_were_given(checkpoint: str) -> None:
    """vLLM writes what it fills in into them."""
    arguments = EngineArgs(model=checkpoint, skip_tokenizer_init=True)
    assert arguments.create_engine_config()
    assert arguments.enable_prefix_caching is not None  # vLLM's default, which nobody asked for
    assert arguments.create_engine_config()


def test_options_of_the_command_line_are_in_its_arguments(checkpoint: str) -> None:
    """API servers in processes of their own read those before they load plugins."""
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    parsed = parser.parse_args(["--model", checkpoint, "--osdt-config", '{"threshold": 0.7}'])
    AsyncEngineArgs.from_cli_args(parsed)
    assert parsed.additional_config == {"osdt": {"threshold": 0.7}}


def test_an_empty_canvas_in_vllms_diffusion_config_says_nothing(checkpoint: str) -> None:
    config = configure(checkpoint, diffusion_config={"max_denoising_steps": None})
    assert default_decoding_options(config).block_length == 32


def test_a_profile_folder_that_cannot_be_read_is_told_and_nothing_else(checkpoint: str, monkeypatch) -> None:
    from vllm_osdt.engine import engine_config

    listdir = os.listdir

    def refuse(folder):
        if folder == store.folder:
            raise PermissionError(13, "Permission denied")
        return listdir(folder)

    config = configure(checkpoint)
    store = open_store(server_options(config).profile_dir, config)
    monkeypatch.setattr(engine_config.os, "listdir", refuse)
    assert "cannot be read (Permission denied)" in engine_config.describe_engine(config)


def test_a_model_is_called_by_its_repository_or_its_folder(tmp_path: Path) -> None:
    from vllm_osdt.engine.engine_config import model_name

    assert model_name("org/SDAR-8B-Chat-b32") == "org/SDAR-8B-Chat-b32"
    assert model_name("/cache/models--org--SDAR-8B-Chat-b32/snapshots/0a1b2c") == "org/SDAR-8B-Chat-b32"
    assert model_name(str(tmp_path)) == tmp_path.name == model_name(f"{tmp_path}/")


@pytest.mark.parametrize(
    ("family", "overrides", "words"),
    [
        ("LLADA", {"embedding_size": 50}, "embedding_size is 50, below vocab_size 101"),
        ("LLADA_MOE", {"moe_layer_freq": [1, 0]}, "moe_layer_freq is"),
        ("LLADA_MOE", {"head_dim": 8}, "head_dim is 8"),
    ],
)
def test_what_a_family_alone_checks_is_checked_after_overrides_too(tmp_path, family, overrides, words) -> None:
    from tests.reference.llada import make_checkpoint
    from tests.reference.llada_moe import make_llada_moe_checkpoint

    folder = {"LLADA": make_checkpoint, "LLADA_MOE": make_llada_moe_checkpoint}[family](tmp_path / "model")
    with pytest.raises(ValueError, match=words):
        configure(str(folder), hf_overrides=overrides)
