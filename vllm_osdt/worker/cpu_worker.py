"""vLLM's CPU worker with the canvas runner."""

import os
from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker  # first: it replaces torch.cuda stand-ins

from vllm.v1.worker.cpu.model_runner import CPUModelRunner  # isort: skip

from vllm_osdt.host.compat.cpu import patch_cpu_lora, patch_host_kernels
from vllm_osdt.host.cpu import kernels
from vllm_osdt.worker.model_runner import CanvasRunnerMixin, CanvasWorkerMixin

# oneDNN keeps what it prepares for a matrix product of each size, 1024 sizes by default. Steps have almost any number
# of rows, so that grew by gigabytes, and was no faster. oneDNN reads this at its first product.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")


class CanvasModelRunner(CanvasRunnerMixin, CPUModelRunner):
    """Canvas runner on the CPU."""


class CanvasWorker(CanvasWorkerMixin, CPUWorker):
    """Chooses the runner."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kernels.register()  # vLLM's constructor looks the configured kernels up
        super().__init__(*args, **kwargs)

    def init_device(self) -> None:
        """Set up the device as vLLM does, then put our runner in place of its own."""
        super().init_device()
        patch_host_kernels()
        if self.vllm_config.lora_config is not None:
            patch_cpu_lora()
        self.model_runner = CanvasModelRunner(self.vllm_config, self.device)
