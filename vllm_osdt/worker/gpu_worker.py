"""vLLM's GPU worker with the canvas runner."""

import torch
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from vllm_osdt.geometry import MAX_BLOCK_LENGTH
from vllm_osdt.worker.model_runner import CanvasRunnerMixin, CanvasWorkerMixin


class CanvasModelRunner(CanvasRunnerMixin, GPUModelRunner):
    """Canvas runner on the GPU."""

    def _dummy_sampler_run(self, hidden_states: torch.Tensor) -> None:
        """What vLLM measures before it gives the rest of the memory to KV pages.

        Logits of as many positions as a step can read, where vLLM has one row a request.
        """
        num_rows = min(self.max_num_tokens, self.max_num_reqs * MAX_BLOCK_LENGTH)
        rows = torch.arange(num_rows, device=hidden_states.device) % hidden_states.shape[0]
        logits = self.model.compute_logits(hidden_states[rows])
        assert self.sampler is not None
        self.sampler(logits, None)


class CanvasWorker(CanvasWorkerMixin, Worker):
    """Chooses the runner."""

    def _make_model_runner(self) -> CanvasModelRunner:
        """vLLM's hook for another runner."""
        return CanvasModelRunner(self.vllm_config, self.device)
