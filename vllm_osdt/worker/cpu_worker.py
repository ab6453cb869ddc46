"""vLLM's CPU worker with the canvas runner, which takes steps of the same rows one behind another."""

import os
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.forward_context import BatchDescriptor, set_forward_context
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.worker.cpu_worker import CPUWorker  # first: it replaces torch.cuda stand-ins

from vllm.v1.worker.cpu.model_runner import CPUModelRunner  # isort: skip

from vllm_osdt.host.compat.cpu import patch_cpu_lora, patch_host_kernels
from vllm_osdt.host.cpu import kernels
from vllm_osdt.options.operator import server_options
from vllm_osdt.worker.model_runner import CanvasRunnerMixin, CanvasWorkerMixin, canvas_step_of
from vllm_osdt.worker.recorder import Decision
from vllm_osdt.worker.step.batch import CanvasInputBatch, denoise_batch
from vllm_osdt.worker.step.layout import plan_again
from vllm_osdt.worker.step.plan import plan_denoise
from vllm_osdt.worker.transfer import send

MAX_STEPS_AHEAD = 4  # so that a request that comes waits for no more than these
MAX_SECONDS_AHEAD = 0.1  # since the engine's step began, after which none begins; longer ones have little to gain

# oneDNN keeps what it prepares for a matrix product of each size, 1024 sizes by default. Steps have almost any number
# of rows, so that grew by gigabytes, and was no faster. oneDNN reads this at its first product.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")


class CanvasModelRunner(CanvasRunnerMixin, CPUModelRunner):
    """Canvas runner on the CPU.

    Where no block of a step is finished by it, and nobody waits for the next one, that has the same rows, pages and
    attention. The runner then takes it before the engine core hears of the first, and so on for a few steps. What the
    core plans, sends and counts for a step is spared; a step of a small model takes little longer than that.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        # Ranks would have to agree on when to stop.
        is_alone = vllm_config.parallel_config.world_size == 1
        self._runs_ahead = is_alone and server_options(vllm_config).run_ahead
        self._is_awaited = False
        self._began = 0.0
        self._forward: Any = None  # vLLM's state of the forward behind which the step's tokens are sampled

    def execute_model(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        """As its base does."""
        self._began, self._is_awaited = time.monotonic(), canvas_step_of(scheduler_output).is_awaited
        return super().execute_model(scheduler_output, *args, **kwargs)

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        """As its base does."""
        self._forward = self.execute_model_state
        try:
            return super().sample_tokens(*args, **kwargs)
        finally:
            self._forward = None

    def _decide(
        self, hidden_states: torch.Tensor, input_batch: CanvasInputBatch
    ) -> tuple[Decision, torch.Tensor | None]:
        """As its base does, and take steps behind the first; the batch's logits are then those of the last."""
        decision, _ = super()._decide(hidden_states, input_batch)
        number = 0
        if self._keeps_rows(input_batch):
            while number < MAX_STEPS_AHEAD and self._goes_on(decision):
                decision = self._step_again(input_batch)
                number += 1
        return decision, torch.full((input_batch.num_reqs,), number) if number else None

    def _keeps_rows(self, input_batch: CanvasInputBatch) -> bool:
        """Whether the next step is like this one but for masks, tokens and what the rules make of them."""
        rows, batch = input_batch.rows, input_batch.denoise
        if not self._runs_ahead or self._is_awaited or rows is None or batch is None:
            return False
        if batch.grammar is not None or batch.drafting is not None or rows.branch.size or rows.span.size:
            return False
        if batch.cut:
            return False  # rows behind a block that this step has cut are left out from the next one on
        return self.model_state.canvas_states.keeps_rows(rows.slots, rows.num_active)

    def _goes_on(self, decision: Decision) -> bool:
        """Whether no block is finished, and no policy waits for a verification."""
        if decision.drafted is not None or time.monotonic() - self._began >= MAX_SECONDS_AHEAD:
            return False
        return not decision.num_ready.numpy().any()

    def _step_again(self, input_batch: CanvasInputBatch) -> Decision:
        """The next step of the rows of a batch, whose tokens are in the canvas by now."""
        states, rows, forward = self.model_state.canvas_states, input_batch.rows, self._forward
        assert rows is not None and input_batch.plan is not None and input_batch.denoise is not None
        states.host.step[rows.slots] += 1
        plan = input_batch.plan = plan_again(states, rows, input_batch.plan)
        source, logit_rows, position = map(torch.from_numpy, (plan.source, plan.logit_rows, plan.position))
        if plan.is_plain:
            batch = replace(input_batch.denoise, step_np=states.host.step[rows.slots], position=position)
        else:
            denoise = plan_denoise(states, rows, plan)
            batch = denoise_batch(states, denoise, send(denoise.arrays, self.device))
        input_batch.denoise, input_batch.logits_indices = batch, logit_rows
        torch.index_select(states.cells, 0, source, out=input_batch.input_ids)
        if self.lora_config is None:
            input_batch.logit_rows = logit_rows
        else:
            self._num_logits = np.diff(plan.cu_num_logits)
            of_rows = input_batch.req_ids, input_batch.idx_mapping_np, input_batch.num_scheduled_tokens
            self._set_active_loras(*self.lora_state.make_lora_inputs(*of_rows))
        with set_forward_context(
            forward.attn_metadata,
            self.vllm_config,
            num_tokens=input_batch.num_tokens,
            batch_descriptor=BatchDescriptor(input_batch.num_tokens, has_lora=self.lora_config is not None),
            slot_mapping=forward.slot_mappings_by_layer,
            is_padding=input_batch.is_padding,
        ):
            hidden_states = self.model(
                input_ids=input_batch.input_ids,
                positions=input_batch.positions,
                inputs_embeds=None,
                intermediate_tensors=None,
                **self.model_state.prepare_inputs(input_batch, self.req_states),
            )
        return super()._decide(hidden_states, input_batch)[0]


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
