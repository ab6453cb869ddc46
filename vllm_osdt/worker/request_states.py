"""Slot tables of the running requests: canvas and masks on the device, options and progress on the host.

A slot is a request's row in vLLM's own request tables. What a denoising step decides (tokens, masks) stays on the
device; what a step needs to be planned (block, step, rule, which positions are still masked) is NumPy on the host, so
that planning is a few vector operations for the whole batch. The host learns the masks of the last step from a copy
that runs beside the engine's own copy of the output.
"""

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from vllm.sampling_params import SamplingParams
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.core.sched.output import NewRequestData

from csrc_triton.cpu import compiled
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


class HostTables(NamedTuple):
    """What planning a step reads: one entry or row per slot, on the host."""

    prompt_len: np.ndarray  # int64
    canvas_end: np.ndarray  # int64, prompt + canvas
    output_end: np.ndarray  # int64, prompt + max_tokens
    block_length: np.ndarray  # int64; 0: the slot has no canvas
    block_start: np.ndarray  # int64, position of the active block; -1: none yet
    step: np.ndarray  # int64, denoising steps the active block has seen
    masked: np.ndarray  # bool [slots, MAX_BLOCK_LENGTH], of the active block
    rule: np.ndarray  # int8
    parameters: np.ndarray  # float32 [slots, max_model_len], of the rule, by block and step
    temperature: np.ndarray  # float32
    seed: np.ndarray  # int64
    eos_token_id: np.ndarray  # int64, -1 for none
    recording: np.ndarray  # bool, the request calibrates its task


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A tensor of the array on the device, without a copy where that is the host, without waiting elsewhere."""
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else async_tensor_h2d(tensor, device=device)


class CanvasStates:
    """Tables of ``max_num_reqs`` slots.

    Invariant: after :meth:`begin_step`, ``host.masked[slot, :block_length]`` are the masks of the slot's active block,
    which starts at position ``host.block_start[slot]`` and has seen ``host.step[slot]`` denoising steps.
    """

    def __init__(
        self,
        max_num_reqs: int,
        max_model_len: int,
        mask_token_id: int,
        device: torch.device,
        registry: ProfileRegistry | None = None,
    ) -> None:
        self.max_model_len = max_model_len
        self.mask_token_id = mask_token_id
        self.device = device
        self.registry = registry or ProfileRegistry()
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

        self.host = HostTables(
            prompt_len=np.zeros(max_num_reqs, dtype=np.int64),
            canvas_end=np.zeros(max_num_reqs, dtype=np.int64),
            output_end=np.zeros(max_num_reqs, dtype=np.int64),
            block_length=np.zeros(max_num_reqs, dtype=np.int64),
            block_start=np.full(max_num_reqs, -1, dtype=np.int64),
            step=np.zeros(max_num_reqs, dtype=np.int64),
            masked=self._masked_host.numpy(),
            rule=np.zeros(max_num_reqs, dtype=np.int8),
            parameters=np.zeros((max_num_reqs, max_model_len), dtype=np.float32),
            temperature=np.zeros(max_num_reqs, dtype=np.float32),
            seed=np.zeros(max_num_reqs, dtype=np.int64),
            eos_token_id=np.full(max_num_reqs, -1, dtype=np.int64),
            recording=np.zeros(max_num_reqs, dtype=bool),
        )

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
        self.token_ids[slot, :end] = to_device(row, self.device)
        self.host.prompt_len[slot] = prompt_len
        self.host.canvas_end[slot] = end
        self.host.output_end[slot] = prompt_len + params.max_tokens
        self.host.block_length[slot] = options.block_length
        self.host.block_start[slot] = -1
        self.host.rule[slot] = record.schedule.rule
        parameters = record.schedule.parameters.ravel()
        self.host.parameters[slot, : parameters.size] = parameters
        self.host.temperature[slot] = params.temperature
        self.host.seed[slot] = record.seed
        self.host.eos_token_id[slot] = _end_token_id(params)
        self.host.recording[slot] = record.recorder is not None

    def _admit(self, new: NewRequestData) -> RequestRecord:
        """Decide, once, how a request is decoded and whether it calibrates its task."""
        params = new.sampling_params
        options = DecodingOptions(**params.extra_args[RESOLVED_KEY])
        assert options.gen_length is not None
        key = ProfileKey(options.task, options.block_length, options.cache, options.threshold)
        thresholds, recorder = None, None
        if options.policy == "osdt":
            profile = self.registry.find(key)
            # A request that ends within its first block says too little of a task.
            long_enough = params.max_tokens >= options.block_length
            if long_enough and (profile is None or options.recalibrate) and self.registry.claim(key, new.req_id):
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
            self.host.block_length[slot] = 0
            self.host.prompt_len[slot] = self.host.canvas_end[slot] = self.host.output_end[slot] = 0
            self.host.recording[slot] = False

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
            self.host.masked[copied_slots, : host.shape[1]] = host.numpy()
            self._copy_pending = None
        is_new = np.empty(slots.size, dtype=bool)
        _enter_blocks(self.host, slots, block_start, is_new)
        if self.device.type != "cpu" and is_new.any():
            fresh = slots[is_new]
            self.masked[to_device(fresh, self.device)] = to_device(self.host.masked[fresh], self.device)

    def copy_masks_to_host(self, slots_np: np.ndarray, slots: torch.Tensor, width: int) -> None:
        """Start copying the masks ``[num_reqs, width]`` that a step left; :meth:`begin_step` picks them up."""
        if self.device.type == "cpu":
            return
        host = torch.empty((slots_np.size, width), dtype=torch.bool, pin_memory=True)
        host.copy_(self.masked[slots, :width], non_blocking=True)
        assert self._copied is not None
        self._copied.record()
        self._copy_pending = (slots_np, host)


@compiled()
def _enter_blocks(host: HostTables, slots: np.ndarray, block_start: np.ndarray, is_new: np.ndarray) -> None:
    """Count the step of every slot, or mask its block whole where it is another one than before."""
    for req in range(slots.size):
        slot = slots[req]
        is_new[req] = host.block_start[slot] != block_start[req]
        host.step[slot] += 1
        if is_new[req]:
            host.block_start[slot], host.step[slot] = block_start[req], 0
            for k in range(host.masked.shape[1]):
                host.masked[slot, k] = k < host.block_length[slot]
