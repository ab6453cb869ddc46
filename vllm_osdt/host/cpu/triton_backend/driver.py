"""Driver half of the "cpu" backend: the device on which interpreted kernels run."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from vllm_osdt.host.cpu.triton_backend.interpreter import HAS_REAL_BACKEND, is_interpreting

if HAS_REAL_BACKEND:
    from triton.backends.cpu.driver import *  # noqa: F403
else:

    def _time_once_ms(kernel_call: Callable[[], Any], *, quantiles: Sequence[float], **_: Any) -> list[float]:
        """Run the kernel once and report that time, in ms, for every quantile."""
        start = time.perf_counter()
        kernel_call()
        return [(time.perf_counter() - start) * 1e3] * len(quantiles)

    class InterpreterDriver(DriverBase):
        """The active driver exactly where kernels are interpreted for want of a GPU."""

        @classmethod
        def is_active(cls) -> bool:
            """Whether Triton should choose this driver."""
            return is_interpreting()

        def map_python_to_cpp_type(self, ty: str) -> str:
            """Refuse: launchers are generated for compiled kernels only.

            Raises:
                NotImplementedError: always.
            """
            raise NotImplementedError(f"no C++ type for {ty}: the interpreter generates no launcher")

        def get_current_target(self) -> GPUTarget:
            """Name the target that `InterpreterBackend` supports."""
            return GPUTarget("cpu", "interpreter", 1)

        def get_current_device(self) -> int:
            """Return the only device index there is."""
            return 0

        def get_current_stream(self, device: int) -> int:
            """Return the null stream: launches are synchronous."""
            return 0

        def get_active_torch_device(self) -> Any:
            """Return torch's CPU device."""
            import torch

            return torch.device("cpu")

        def get_benchmarker(self) -> Any:
            """Return what the autotuner times configurations with; Triton's own needs a GPU's events."""
            return _time_once_ms

    # `import triton` fails for everybody when this class is abstract, as a new method of a later Triton would make it.
    InterpreterDriver.__abstractmethods__ = frozenset()
