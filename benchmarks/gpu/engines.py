"""Engines of the stages: how they are started, and what of them is looked at."""

import contextlib
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.lines import gib, part
from benchmarks.gpu.sizes import IS_STAND_IN, SIZES

MEMORY_SHARE = 0.05  # of the card, more than an engine of a small model takes
ENGINES: list[Any] = []  # an engine that goes takes the process groups of all engines of its process along


def start_engine(stage: str, model: str | Path, *, label: str | None = None, **arguments: Any) -> Any:
    """An engine in this process; where its default attention does not start, with vLLM's Triton kernel.

    Args:
        stage: Of the line.
        model: Its folder.
        label: What the line calls the engine, where a stage has several.
        arguments: vLLM's.

    Raises:
        RuntimeError: Neither starts.
    """
    from vllm import LLM

    defaults: dict[str, Any] = {"disable_log_stats": True, "max_num_seqs": SIZES.max_num_seqs}
    if "load_format" not in arguments:  # some engines run beside each other: a memory profile would count the others'
        defaults["kv_cache_memory_bytes"] = 2**28 if IS_STAND_IN else 2**30
        defaults["gpu_memory_utilization"] = MEMORY_SHARE  # which has to be free when an engine starts
    if SIZES.capture_sizes and not arguments.get("enforce_eager"):
        sizes = {"cudagraph_capture_sizes": list(SIZES.capture_sizes)}
        defaults["compilation_config"] = sizes | arguments.pop("compilation_config", {})
    if arguments.get("dtype") == "float32":  # Triton multiplies float32 in TF32 else, and confidences are 1e-3 off
        os.environ["TRITON_F32_DEFAULT"] = "ieee"
    about = {"model": Path(model).name} | ({"engine": label} if label else {})
    choices: tuple[dict[str, str], ...] = ({}, {"attention_backend": "TRITON_ATTN"})
    for choice in choices[:1] if "attention_backend" in arguments else choices:
        with part(stage, "start", **about, **choice) as found:
            with _watch_captures(found):
                llm = LLM(str(model), **{**defaults, **arguments, **choice})
            ENGINES.append(llm)
            config = llm.llm_engine.vllm_config
            found["attention"] = attention_of(llm)
            layers = config.compilation_config.static_forward_context.values()
            versions = {getattr(getattr(layer, "impl", None), "vllm_flash_attn_version", None) for layer in layers}
            found["flash_attention"] = sorted(versions - {None})
            found["num_pages"] = config.cache_config.num_gpu_blocks
            found["cudagraph_mode"] = str(config.compilation_config.cudagraph_mode)
            return llm
    raise RuntimeError(f"no engine for {model}")


@contextlib.contextmanager
def _watch_captures(found: dict[str, Any]) -> Iterator[None]:
    """Put time and memory of an engine's graphs on the line of its start."""
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    capture = GPUModelRunner.capture_model

    def watched(runner: Any, **options: Any) -> int:
        start = time.perf_counter()
        num_bytes = capture(runner, **options)
        if not options.get("profile_only"):
            found["capture_s"] = round(time.perf_counter() - start, 2)
            found["capture_gib"] = gib(num_bytes)
            found["num_graphs"] = len(runner.cudagraph_manager.graphs)
        return num_bytes

    GPUModelRunner.capture_model = watched
    try:
        yield
    finally:
        GPUModelRunner.capture_model = capture


def worker_of(llm: Any) -> Any:
    """The worker."""
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker
    return getattr(worker, "worker", worker)


def runner_of(llm: Any) -> Any:
    """The model runner."""
    return worker_of(llm).model_runner


def attention_of(llm: Any) -> list[str]:
    """Names of the attention backends of its layers."""
    return sorted({group.backend.get_name() for groups in runner_of(llm).attn_groups for group in groups})


@dataclass
class Launched:
    """What graphs did for some steps.

    Attributes:
        rows: Of each graph that was replayed, in order.
        ahead: Second steps that were launched before the first one's outcome was known, by request: used and wasted.
    """

    rows: list[int] = field(default_factory=list)
    ahead: Counter[str] = field(default_factory=Counter)


@contextlib.contextmanager
def watch_graphs(llm: Any) -> Iterator[Launched]:
    """What graphs do meanwhile."""
    found, manager = Launched(), runner_of(llm).cudagraph_manager
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    replay, count = getattr(manager, "replay", None), scheduler._count_run_ahead

    def replayed() -> None:
        found.rows.append(manager.chosen.num_tokens)
        replay()

    def counted(report: Any, drafts: Any) -> None:
        found.ahead.update("used" if is_used else "wasted" for is_used in report.ran_ahead.values())
        count(report, drafts)

    scheduler._count_run_ahead = counted
    if manager is not None:
        manager.replay = replayed
    try:
        yield found
    finally:
        scheduler._count_run_ahead = count
        if manager is not None:
            manager.replay = replay
