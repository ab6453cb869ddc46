"""What the process that forks has imported, and what keeps the engines of the forked ones from importing it again."""

import gc
import importlib
import multiprocessing
from multiprocessing.context import BaseContext

from vllm.utils import system_utils


def _fork() -> BaseContext:
    """The context of vLLM's engine cores, workers and coordinators; on a CPU vLLM spawns them whatever one sets."""
    return multiprocessing.get_context("fork")


# Before the modules that take it by name. API servers are still spawned: prometheus_client finds out as it is imported
# that there are several.
system_utils.get_mp_context = _fork

for _name in (
    "vllm.entrypoints.cli.main",
    "vllm.entrypoints.cli.benchmark.main",
    "vllm.entrypoints.cli.run_batch",
    "vllm.entrypoints.cli.serve",
    "vllm.entrypoints.llm",
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.cpu_worker",
):
    importlib.import_module(_name)

# What was imported stays: a collection need not look at it, nor copy its pages into every fork.
gc.freeze()
