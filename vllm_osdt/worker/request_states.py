"""Slot tables of the running requests: canvas and masks on the device, options and progress on the host.

A slot is a request's row in vLLM's own request tables. What a denoising step decides (tokens, masks) stays on the
device; what a step needs to be planned (block, step, rule, which positions are still masked) is NumPy on the host, so
that planning is a few vector operations for the whole batch. The host learns the masks of the last step from a copy
that runs beside the engine's own copy of the output.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from vllm.sampling_params import SamplingParams
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.core.sched.output import NewRequestData

from vllm_osdt.calibration.profile import CalibrationProfile, ProfileKey
from vllm_osdt.calibration.recorder import Recorder
from vllm_osdt.calibration.registry import ProfileRegistry
from vllm_osdt.config import MAX_BLOCK_LENGTH, RESOLVED_KEY, DecodingOptions
from vllm_osdt.policies import POLICIES, Schedule


@dataclass
class RequestRecord:
    """What holds for a request until it ends, across preemption: its schedule and its part in calibration."""

    options: DecodingOptions
    schedule: Schedule
    key: ProfileKey
    seed: int
    recorder: Recorder | None = None


def _seed(req_id: str, seed: int | None) -> int:
    """The request's random key: its own seed, else one made from its id, equal on every rank."""
    source = f"seed:{seed}" if seed is not None else f"id:{req_id}"
    return int.from_bytes(hashlib.blake2b(source.encode(), digest_size=8).digest(), "little", signed=True)


def _end_token_id(params: SamplingParams) -> int:
    """The token that ends a block early, -1 for none: EOS, or the one stop token of a request without EOS. Further
    stop tokens are found by the scheduler, when their block is finished."""
    if not params.ignore_eos and params.eos_token_id is not None:
        return params.eos_token_id
    stop_token_ids = params.stop_token_ids or []
    return stop_token_ids[0] if len(stop_token_ids) == 1 else -1


class CanvasStates:
    """Tables of ``max_num_reqs`` slots.

    Invariant: after :meth:`begin_step`, ``masked_np[slot, :block_length]`` are the masks of the slot's active block,
    which starts at position ``block_start_np[slot]`` and has seen ``step_np[slot]`` denoising steps.
    """

    def __init__(self, max_num_reqs: int, max_model_len: int, mask_token_id: int, device: torch.device) -> None:
        self.max_model_len = max_model_len
        self.mask_token_id = mask_token_id
        self.device = device
        self.registry = ProfileRegistry()
        self.records: dict[str, RequestRecord] = {}
        self._slot_of: dict[str, int] = {}

        # Prompt, decided tokens and mask tokens, by absolute position; the last cell takes writes of padding.
        self.cells = torch.zeros(max_num_reqs * max_model_len + 1, dtype=torch.int32, device=device)
        self.token_ids = self.cells[:-1].view(max_num_reqs, max_model_len)
        # Masks of the active block.
        self.masked = torch.zeros(max_num_reqs, MAX_BLOCK_LENGTH, dtype=torch.bool, device=device)
        pinned = device.type != "cpu"
        self._masked_host = torch.zeros_like(self.masked, device="cpu", pin_memory=True) if pinned else self.masked
        self._copied = torch.cuda.Event() if pinned else None
        self._copy_pending: tuple[np.ndarray, torch.Tensor] | None = None
        self.masked_np = self._masked_host.numpy()

        self.prompt_len_np = np.zeros(max_num_reqs, dtype=np.int64)
        self.canvas_end_np = np.zeros(max_num_reqs, dtype=np.int64)  # prompt + canvas
        self.output_end_np = np.zeros(max_num_reqs, dtype=np.int64)  # prompt + max_tokens
        self.block_length_np = np.zeros(max_num_reqs, dtype=np.int64)  # 0: the slot has no canvas
        self.block_start_np = np.full(max_num_reqs, -1, dtype=np.int64)
        self.step_np = np.zeros(max_num_reqs, dtype=np.int64)
        self.rule_np = np.zeros(max_num_reqs, dtype=np.int8)
        self.parameters_np = np.zeros((max_num_reqs, max_model_len), dtype=np.float32)
        self.temperature_np = np.zeros(max_num_reqs, dtype=np.float32)
        self.seed_np = np.zeros(max_num_reqs, dtype=np.int64)
        self.eos_np = np.full(max_num_reqs, -1, dtype=np.int64)
        self.recorder_np = np.zeros(max_num_reqs, dtype=bool)

    def add(self, slot: int, new: NewRequestData) -> None:
        """Fill a slot for a request that starts or resumes: its block starts again, its schedule stays."""
        params = new.sampling_params
        assert params is not None and new.prefill_token_ids is not None
        record = self.records.get(new.req_id)
        if record is None:
            record = self.records[new.req_id] = self._admit(new)
        options, num_prefill = record.options, len(new.prefill_token_ids)
        assert options.gen_length is not None and params.max_tokens is not None
        prompt_len = new.prompt_len
        end = prompt_len + options.gen_length
        self._slot_of[new.req_id] = slot
        row = np.full(end, self.mask_token_id, dtype=np.int32)
        row[:num_prefill] = new.prefill_token_ids
        self.token_ids[slot, :end] = async_tensor_h2d(row, device=self.device)
        self.prompt_len_np[slot] = prompt_len
        self.canvas_end_np[slot] = end
        self.output_end_np[slot] = prompt_len + params.max_tokens
        self.block_length_np[slot] = options.block_length
        self.block_start_np[slot] = -1
        self.rule_np[slot] = record.schedule.rule
        parameters = record.schedule.parameters.ravel()
        self.parameters_np[slot, : parameters.size] = parameters
        self.temperature_np[slot] = params.temperature
        self.seed_np[slot] = record.seed
        self.eos_np[slot] = _end_token_id(params)
        self.recorder_np[slot] = record.recorder is not None

    def _admit(self, new: NewRequestData) -> RequestRecord:
        """Decide, once, how a request is decoded and whether it calibrates its task."""
        params = new.sampling_params
        options = DecodingOptions(**params.extra_args[RESOLVED_KEY])
        assert options.gen_length is not None
        key = ProfileKey(options.task, options.block_length, options.cache, options.threshold)
        thresholds, recorder = None, None
        if options.policy == "osdt":
            # A request that ends within its first block says too little of a task.
            long_enough = params.max_tokens >= options.block_length
            profile = self.registry.profiles.get(key)
            if long_enough and self.registry.claim(key, new.req_id, recalibrate=options.recalibrate):
                num_blocks = options.gen_length // options.block_length
                recorder = Recorder(num_blocks, options.block_length, self.device)
            elif profile is not None:
                thresholds = profile.thresholds(options.mode, options.metric, options.record)
        schedule = POLICIES[options.policy](options, thresholds)
        return RequestRecord(options, schedule, key, _seed(new.req_id, params.seed), recorder)

    def free_slot(self, req_id: str) -> None:
        """A request lost its slot: it ended or was preempted."""
        slot = self._slot_of.pop(req_id, None)
        if slot is not None:
            self.block_length_np[slot] = 0
            self.prompt_len_np[slot] = self.canvas_end_np[slot] = self.output_end_np[slot] = 0
            self.recorder_np[slot] = False

    def end(self, req_id: str, *, failed: bool) -> None:
        """A request ended. A calibration that went well is published; an aborted or failed one publishes nothing."""
        record = self.records.pop(req_id, None)
        if record is None or record.recorder is None:
            return
        confidence, committed = record.recorder.to_arrays()
        if failed or np.isnan(confidence[0, 0]).all():
            self.registry.release(record.key, req_id)
        else:
            self.registry.publish(CalibrationProfile(record.key, confidence, committed), req_id)

    def begin_step(self, slots: np.ndarray, block_start: np.ndarray) -> None:
        """Bring the host's view up to date for the step that is being prepared.

        Args:
            slots: ``[num_reqs]`` slots scheduled.
            block_start: ``[num_reqs]`` position of the first uncommitted token, as the scheduler sees it.
        """
        if self._copy_pending is not None:
            copied_slots, host = self._copy_pending
            assert self._copied is not None
            self._copied.synchronize()  # long done: the engine has read the output of that step
            self.masked_np[copied_slots, : host.shape[1]] = host.numpy()
            self._copy_pending = None
        new_block = self.block_start_np[slots] != block_start
        self.step_np[slots] = np.where(new_block, 0, self.step_np[slots] + 1)
        self.block_start_np[slots] = block_start
        fresh = slots[new_block]
        if fresh.size:
            self.masked_np[fresh] = np.arange(MAX_BLOCK_LENGTH) < self.block_length_np[fresh, None]
            if self.device.type != "cpu":
                index = async_tensor_h2d(fresh, device=self.device)
                self.masked[index] = async_tensor_h2d(self.masked_np[fresh], device=self.device)

    def copy_masks_to_host(self, slots: np.ndarray, masked: torch.Tensor) -> None:
        """Start copying the masks ``[num_reqs, width]`` that a step left; :meth:`begin_step` picks them up."""
        if self.device.type == "cpu":
            return
        host = torch.empty(masked.shape, dtype=torch.bool, pin_memory=True)
        host.copy_(masked, non_blocking=True)
        assert self._copied is not None
        self._copied.record()
        self._copy_pending = (slots, host)
