"""vLLM's GPU worker with the canvas runner."""

from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from vllm_osdt.worker.model_runner import CanvasRunnerMixin, CanvasWorkerMixin


class CanvasModelRunner(CanvasRunnerMixin, GPUModelRunner):
    """Canvas runner on the GPU."""


class CanvasWorker(CanvasWorkerMixin, Worker):
    """Chooses the runner."""

    def init_device(self) -> None:
        """Set up the device as vLLM does, then put our runner in place of its own."""
        super().init_device()
        self.model_runner = CanvasModelRunner(self.vllm_config, self.device)
