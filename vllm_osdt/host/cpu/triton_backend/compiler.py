"""Compiler half of the "cpu" backend. Interpreted kernels are never compiled, so it only says so."""

from types import ModuleType
from typing import Any

from triton.backends.compiler import BaseBackend, GPUTarget, Language

from vllm_osdt.host.cpu.triton_backend.interpreter import HAS_REAL_BACKEND

if HAS_REAL_BACKEND:
    from triton.backends.cpu.compiler import *  # noqa: F403
else:

    class InterpreterBackend(BaseBackend):
        """Answers for the target "cpu" and refuses to compile for it."""

        binary_ext = "none"

        @staticmethod
        def supports_target(target: GPUTarget) -> bool:
            """Whether the target is the one that `InterpreterDriver` names."""
            return target.backend == "cpu"

        def hash(self) -> str:
            """Identify the backend in cache keys."""
            return "vllm-osdt-interpreter"

        def parse_options(self, options: dict[str, Any]) -> object:
            """Refuse: the first thing a compilation asks for.

            Raises:
                RuntimeError: always.
            """
            raise RuntimeError(
                "a Triton kernel was compiled for the CPU, which this backend only interprets: "
                "TRITON_INTERPRET is off or was set after the kernel was decorated; unset it, or install triton-cpu"
            )

        def add_stages(self, stages: dict[str, Any], options: object, language: Language) -> None:
            """Add no stage: there is nothing to lower to."""

        def load_dialects(self, context: Any) -> None:
            """Load no dialect."""

        def get_module_map(self) -> dict[str, ModuleType]:
            """Map no interface module."""
            return {}

    # `import triton` fails for everybody when this class is abstract, as a new method of a later Triton would make it.
    InterpreterBackend.__abstractmethods__ = frozenset()
