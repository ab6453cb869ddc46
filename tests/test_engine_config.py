"""Engine settings of our models: what is set without a flag, what is refused, and the command line."""

import json
import shutil
from pathlib import Path

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_osdt.engine_config import model_fingerprint, server_defaults

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
    assert config.scheduler_config.scheduler_cls == "vllm_osdt.scheduler.CanvasScheduler"
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
    assert server_defaults(configure(checkpoint)).block_length == 16
    config = configure(checkpoint, additional_config={"osdt": {"block_length": 8}})
    assert server_defaults(config).block_length == 8
    assert config.diffusion_config.canvas_length == 8


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"pipeline_parallel_size": 2}, ["pipeline_parallel_size is 2", "--tensor-parallel-size"]),
        ({"additional_config": {"osdt": {"treshold": 0.5}}}, ["treshold", "threshold"]),
        ({"additional_config": {"osdt": {"threshold": 2}}}, ["threshold is 2"]),
        ({"scheduler_cls": "some.Scheduler"}, ["some.Scheduler"]),
        ({"prefill_schedule_interval": 4}, ["prefill_schedule_interval is 4", "1"]),
    ],
)
def test_engine_that_cannot_work_is_refused(checkpoint: str, arguments: dict, words: list[str]) -> None:
    with pytest.raises(ValueError) as refusal:
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
    assert (server_defaults(config).threshold, server_defaults(config).task) == (0.7, "math")


def test_command_line_refuses_another_plugin(checkpoint: str, capsys: pytest.CaptureFixture) -> None:
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    with pytest.raises(SystemExit):
        parser.parse_args(["--model", checkpoint, "--plugin", "other"])
    assert "--plugin" in capsys.readouterr().err


def test_fingerprint_follows_the_weights_wherever_they_are(checkpoint: str, tmp_path_factory, monkeypatch) -> None:
    (Path(checkpoint) / "model.safetensors").write_bytes(b"weights")
    config = configure(checkpoint)
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
    from tests.reference.block_causal import SDAR_FIELDS

    (tmp_path / "config.json").write_text(json.dumps({**SDAR_FIELDS, "block_size": 24}))
    return str(tmp_path)


def test_block_causal_engines_share_pages_of_whole_blocks(block_causal: str) -> None:
    config = configure(block_causal)
    assert config.scheduler_config.scheduler_cls == "vllm_osdt.scheduler.CanvasScheduler"
    assert not config.scheduler_config.async_scheduling
    assert config.scheduler_config.enable_chunked_prefill
    assert config.cache_config.enable_prefix_caching
    assert config.cache_config.block_size % 24 == 0
    assert server_defaults(config).cache == "block"


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


@pytest.mark.parametrize("mode", ["FULL", "PIECEWISE", "FULL_AND_PIECEWISE"])
def test_cuda_graphs_are_refused_for_block_causal_models(block_causal: str, mode: str) -> None:
    assert configure(block_causal).compilation_config.cudagraph_mode.name == "NONE"
    with pytest.raises(ValueError, match=f"cudagraph_mode is {mode}"):
        configure(block_causal, compilation_config={"mode": 3, "cudagraph_mode": mode})
