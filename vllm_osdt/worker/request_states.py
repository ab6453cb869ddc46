"""Slot tables of the running requests: canvas and masks on the device, options and progress on the host.

A slot is a request's row in vLLM's own request tables. What a denoising step decides (tokens, masks) stays on the
device; what a step needs to be planned (block, step, rule, which positions are still masked) is NumPy on the host, so
that planning is a few vector operations for the whole batch. The host learns the masks of the last step from a copy
that runs beside the engine's own copy of the output.
"""

import hashlib
import logging
from collections.abc import Container, Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from vllm.sampling_params import SamplingParams
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.core.sched.output import NewRequestData

from csrc_triton.cpu import compiled
from vllm_osdt.calibration.calibrate import Fallback
from vllm_osdt.calibration.guard import DriftGuard
from vllm_osdt.calibration.profile import CalibrationProfile, ProfileKey, Setting
from vllm_osdt.calibration.recorder import Recorder
from vllm_osdt.calibration.registry import ProfileRegistry
from vllm_osdt.config import MAX_BLOCK_LENGTH, RESOLVED_KEY, UNDECIDED_TASK, DecodingOptions
from vllm_osdt.policies import POLICIES, Schedule
from vllm_osdt.policies.fixed_steps import fixed_steps
from vllm_osdt.policies.osdt import osdt
from vllm_osdt.policies.static_threshold import static_threshold
from vllm_osdt.worker.report import Report

logger = logging.getLogger(f"vllm.{__name__}")  # below vLLM's own, whose handlers it uses


MAX_END_TOKENS = 8  # of a request that its blocks are searched for


@dataclass
class RequestRecord:
    """What holds for a request until it ends, across preemption: its schedule and its part in calibration."""

    options: DecodingOptions
    schedule: Schedule
    key: ProfileKey
    seed: int
    recorder: Recorder | None = None
    profile: CalibrationProfile | None = None
    slot: int = -1
    num_fallbacks: np.ndarray | None = None  # of slots it has lost

    @property
    def setting(self) -> Setting:
        """How its thresholds are made from a profile."""
        return Setting(self.options.mode, self.options.metric, self.options.record, self.options.risk)


class _Observed(NamedTuple):
    """What requests saw, on its way to the host."""

    records: list[RequestRecord]
    seen: torch.Tensor
    copied: torch.cuda.Event


def _seed(req_id: str, seed: int | None) -> int:
    """The request's random key: its own seed, else one made from its id, equal on every rank."""
    source = f"seed:{seed}" if seed is not None else f"id:{req_id}"
    return int.from_bytes(hashlib.blake2b(source.encode(), digest_size=8).digest(), "little", signed=True)


def _end_token_ids(params: SamplingParams) -> list[int]:
    """The tokens that end a block early, -1 for none: EOS and stop tokens. Where there are more of them than places,
    the scheduler finds the others when their block is finished."""
    eos = [] if params.ignore_eos or params.eos_token_id is None else [params.eos_token_id]
    distinct = dict.fromkeys([*eos, *(params.stop_token_ids or [])])
    return [*distinct, *[-1] * MAX_END_TOKENS][:MAX_END_TOKENS]


class HostTables(NamedTuple):
    """What planning a step reads: one entry or row per slot, on the host."""

    origin: np.ndarray  # int64, position of the first block: behind the prompt, or at its last incomplete block
    canvas_end: np.ndarray  # int64
    output_end: np.ndarray  # int64, prompt + max_tokens
    block_length: np.ndarray  # int64; 0: the slot has no canvas
    block_start: np.ndarray  # int64, position of the active block; -1: none yet
    step: np.ndarray  # int64, denoising steps the active block has seen
    masked: np.ndarray  # bool [slots, MAX_BLOCK_LENGTH], of the active block
    rule: np.ndarray  # int8
    parameters: np.ndarray  # float32 [slots, row_length], of the rule, by block and step
    quota: np.ndarray  # int32 [slots, MAX_BLOCK_LENGTH], positions unmasked at least, by step in the block
    fallback: np.ndarray  # int8, shape of parameters, where a calibrated parameter comes from
    num_fallbacks: np.ndarray  # int64 [slots, kinds], denoising steps by kind
    temperature: np.ndarray  # float32
    seed: np.ndarray  # int64
    end_token_ids: np.ndarray  # int64 [slots, MAX_END_TOKENS], -1 for none
    recording: np.ndarray  # bool, the request calibrates its task
    edit_threshold: np.ndarray  # float32, infinite for none
    sub_block_length: np.ndarray  # int64, 0: none
    sub_block_cache: np.ndarray  # bool
    first_alone: np.ndarray  # bool, a block's first step decides its first position, and no other


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A tensor of the array on the device, without a copy where that is the host, without waiting elsewhere."""
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else async_tensor_h2d(tensor, device=device)


class CanvasStates:
    """Tables of ``max_num_reqs`` slots, each a row of ``row_length`` positions: the context, and what a block that
    begins in it would have behind it.

    Invariant: after :meth:`begin_step`, ``host.masked[slot, :block_length]`` are the masks of the slot's active block,
    which starts at position ``host.block_start[slot]`` and has seen ``host.step[slot]`` denoising steps.
    """

    def __init__(
        self,
        max_num_reqs: int,
        row_length: int,
        mask_token_id: int,
        device: torch.device,
        registry: ProfileRegistry | None = None,
        guard: DriftGuard | None = None,
        logits_shift: int = 0,
        is_block_causal: bool = False,
        is_strict: bool = False,
    ) -> None:
        self.mask_token_id = mask_token_id
        self.device = device
        self.registry = registry or ProfileRegistry()
        self.guard = guard
        self.logits_shift = logits_shift  # position i is read from the logits at i - logits_shift
        self.is_block_causal = is_block_causal  # blocks lie on a grid from position 0 and see no later ones
        self.is_strict = is_strict  # a confidence that equals the static threshold does not pass
        self.report = Report()
        self.records: dict[str, RequestRecord] = {}
        self._slot_of: dict[str, int] = {}
        self._last_in_slot: dict[int, str] = {}

        # Prompt, decided tokens and mask tokens, by absolute position; the last cell takes writes of padding.
        self.cells = torch.zeros(max_num_reqs * row_length + 1, dtype=torch.int32, device=device)
        self.token_ids = self.cells[:-1].view(max_num_reqs, row_length)
        # Masks of the active block; the last row is for requests that denoise nothing in a step.
        self.masked = torch.zeros(max_num_reqs + 1, MAX_BLOCK_LENGTH, dtype=torch.bool, device=device)
        # Steps that the active block has seen without a mask, where the request edits.
        self.num_post_steps = torch.zeros(max_num_reqs + 1, dtype=torch.int32, device=device)
        # Mean confidence of the masked positions, by block and denoising step; NaN where there was no step.
        self.mean_confidence = torch.full((max_num_reqs, row_length), torch.nan, device=device)
        # Copies to the host that run beside the engine's own: the masks that a step left, and what the guard compares.
        is_host = device.type == "cpu"
        self._masked_host = self.masked if is_host else torch.zeros_like(self.masked, device="cpu", pin_memory=True)
        self._copied = None if is_host else torch.cuda.Event()
        self._copy_pending: np.ndarray | None = None  # slots
        self._copy_width = 0
        self._watch_pending: list[_Observed] = []  # of the step that is being prepared
        self._watch_due: list[_Observed] = []  # of the one before

        self.host = HostTables(
            origin=np.zeros(max_num_reqs, dtype=np.int64),
            canvas_end=np.zeros(max_num_reqs, dtype=np.int64),
            output_end=np.zeros(max_num_reqs, dtype=np.int64),
            block_length=np.zeros(max_num_reqs, dtype=np.int64),
            block_start=np.full(max_num_reqs, -1, dtype=np.int64),
            step=np.zeros(max_num_reqs, dtype=np.int64),
            masked=self.masked.numpy() if is_host else np.zeros(tuple(self.masked.shape), dtype=bool),
            rule=np.zeros(max_num_reqs, dtype=np.int8),
            parameters=np.zeros((max_num_reqs, row_length), dtype=np.float32),
            quota=np.zeros((max_num_reqs, MAX_BLOCK_LENGTH), dtype=np.int32),
            fallback=np.zeros((max_num_reqs, row_length), dtype=np.int8),
            num_fallbacks=np.zeros((max_num_reqs, len(Fallback)), dtype=np.int64),
            temperature=np.zeros(max_num_reqs, dtype=np.float32),
            seed=np.zeros(max_num_reqs, dtype=np.int64),
            end_token_ids=np.full((max_num_reqs, MAX_END_TOKENS), -1, dtype=np.int64),
            recording=np.zeros(max_num_reqs, dtype=bool),
            edit_threshold=np.full(max_num_reqs, np.inf, dtype=np.float32),
            sub_block_length=np.zeros(max_num_reqs, dtype=np.int64),
            sub_block_cache=np.zeros(max_num_reqs, dtype=bool),
            first_alone=np.zeros(max_num_reqs, dtype=bool),
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
        prompt_len = origin = new.prompt_len
        if self.is_block_causal:
            origin -= prompt_len % options.block_length
        end = origin + options.gen_length
        self._slot_of[new.req_id] = slot
        row = np.full(end, self.mask_token_id, dtype=np.int32)
        row[:num_prefill] = new.prefill_token_ids
        self.token_ids[slot, :end] = to_device(row, self.device)
        self.host.origin[slot] = origin
        self.host.canvas_end[slot] = end
        self.host.output_end[slot] = prompt_len + params.max_tokens
        self.host.block_length[slot] = options.block_length
        self.host.block_start[slot] = -1
        self.host.rule[slot] = record.schedule.rule
        parameters = record.schedule.parameters.ravel()
        self.host.parameters[slot, : parameters.size] = parameters
        self.host.quota[slot] = 0
        if record.schedule.quota is not None:
            self.host.quota[slot, : options.block_length] = record.schedule.quota
        self.host.fallback[slot] = 0
        if record.schedule.fallback is not None:
            self.host.fallback[slot, : parameters.size] = record.schedule.fallback.ravel()
        self.host.num_fallbacks[slot] = 0
        self.mean_confidence[slot] = torch.nan
        record.slot = slot
        self._last_in_slot[slot] = new.req_id
        self.host.temperature[slot] = params.temperature
        self.host.seed[slot] = record.seed
        self.host.end_token_ids[slot] = _end_token_ids(params)
        self.host.recording[slot] = record.recorder is not None
        self.host.edit_threshold[slot] = np.inf if options.edit_threshold is None else options.edit_threshold
        self.host.sub_block_length[slot] = options.sub_block_length or 0
        self.host.sub_block_cache[slot] = options.sub_block_cache
        self.host.first_alone[slot] = self._is_first_alone(options)

    def _admit(self, new: NewRequestData) -> RequestRecord:
        """Decide, once, how a request is decoded and whether it calibrates its task."""
        params = new.sampling_params
        options = DecodingOptions(**params.extra_args[RESOLVED_KEY])
        key = ProfileKey(options.task or "", options.block_length, options.cache_key, options.threshold)
        if self.is_strict:
            strict = np.nextafter(np.float32(options.threshold), np.float32(np.inf))
            options = replace(options, threshold=float(strict))
        first_alone = self._is_first_alone(options)
        schedule = static_threshold(options, first_alone=first_alone)
        record = RequestRecord(options, schedule, key, _seed(new.req_id, params.seed))
        if options.policy == "osdt":
            self._find_profile(record, new.req_id, params.max_tokens)
        elif options.policy == "fixed_steps":
            record.schedule = fixed_steps(options, first_alone=first_alone)
        elif options.policy != "static_threshold":
            record.schedule = POLICIES[options.policy](options, None)
        self.report.requests[new.req_id] = {
            "policy": options.policy,
            "task": options.task,
            "profile": record.profile.profile_id if record.profile is not None else None,
            "calibrating": record.recorder is not None,
        }
        return record

    def _is_first_alone(self, options: DecodingOptions) -> bool:
        """Whether a block's first step decides one position: with shifted logits, the one whose logits are at the row
        before the block, which later steps do not compute."""
        return self.logits_shift > 0 and options.cache != "none"

    def _find_profile(self, record: RequestRecord, req_id: str, max_tokens: int) -> None:
        """Have a request use a profile, or make one."""
        options, key, counts = record.options, record.key, self.report.counts
        if options.profile is not None:
            record.profile = self.registry.find_pinned(key.task, options.profile)
            if record.profile is None:
                counts["fallbacks", "pin"] += 1
        elif options.task is not None:
            record.profile = self.registry.find(key, options.calibrations)
            # A request that ends within its first block says too little of a task.
            can_calibrate = max_tokens >= options.block_length and options.task != UNDECIDED_TASK
            if (
                can_calibrate
                and (record.profile is None or options.recalibrate)
                and self.registry.claim(key, req_id, options.calibrations)
            ):
                record.profile = None
                record.recorder = Recorder(options.num_blocks, options.block_length, self.device)
        if record.profile is not None:
            record.schedule = osdt(options, record.profile.thresholds(record.setting))
            self.report.uses(key.task, record.profile.profile_id, float(record.schedule.parameters.mean()))
        counts["requests", "calibrated" if record.profile else "calibrating" if record.recorder else "static"] += 1

    def free_slot(self, req_id: str) -> None:
        """A request lost its slot: it ended or was preempted."""
        slot = self._slot_of.pop(req_id, None)
        if slot is not None:
            record = self.records[req_id]
            lost = self.host.num_fallbacks[slot].copy()
            record.num_fallbacks = lost if record.num_fallbacks is None else record.num_fallbacks + lost
            self.host.block_length[slot] = 0
            self.host.origin[slot] = self.host.canvas_end[slot] = self.host.output_end[slot] = 0
            self.host.recording[slot] = False

    def end(self, req_ids: Iterable[str], failed: Container[str]) -> None:
        """Requests ended, their slots are free but not yet given away. A calibration that went well is delivered; an
        aborted or failed one is not."""
        ended = [(req_id, self.records.pop(req_id)) for req_id in req_ids if req_id in self.records]
        for req_id, record in ended:
            if record.num_fallbacks is not None:
                for kind in (Fallback.BLOCK, Fallback.STEP, Fallback.CELL):
                    if record.num_fallbacks[kind]:
                        self.report.counts["fallbacks", kind.name.lower()] += int(record.num_fallbacks[kind])
            if record.recorder is not None:
                self._end_calibration(req_id, record, failed=req_id in failed)
        self._watch([record for req_id, record in ended if req_id not in failed and self._is_watched(req_id, record)])

    def _is_watched(self, req_id: str, record: RequestRecord) -> bool:
        """Whether the guard is to hear of a request: it used its task's own profile, and its slot still is its own."""
        own = record.profile is not None and record.options.profile is None
        return own and self._last_in_slot.get(record.slot) == req_id

    def _end_calibration(self, req_id: str, record: RequestRecord, *, failed: bool) -> None:
        assert record.recorder is not None
        recording = record.recorder.to_arrays()
        if failed or np.isnan(recording.confidence[0, 0]).all():
            self.registry.release(record.key, req_id)
            return
        profile = self.registry.deliver(record.key, req_id, recording, record.options.calibrations)
        if profile is not None:
            schedule = osdt(record.options, profile.thresholds(record.setting))
            before, after = profile.expected_forwards(schedule.parameters)
            logger.info(
                "Calibrated task %r on %d requests (profile %s): thresholds by block %s; about %.1f -> %.1f forwards "
                "a request expected.",
                record.key.task,
                profile.num_requests,
                profile.profile_id,
                " ".join(f"{value:.2f}" for value in schedule.parameters[:, 0]),
                before,
                after,
            )

    def _watch(self, records: list[RequestRecord]) -> None:
        """Compare what requests saw with the profiles they used."""
        if self.guard is None or not records:
            return
        slots = to_device(np.array([record.slot for record in records]), self.device)
        seen = self.mean_confidence[slots]
        if self.device.type == "cpu":
            self._compare(records, seen.numpy())
        else:
            host = torch.empty(seen.shape, dtype=seen.dtype, pin_memory=True)
            host.copy_(seen, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
            self._watch_pending.append(_Observed(records, host, copied))

    def _compare_what_has_come(self) -> None:
        """Hand the guard what the step before has copied. A step later, whatever the device's pace: the ranks of a
        tensor-parallel group must forsake a profile in the same step."""
        for observed in self._watch_due:
            observed.copied.synchronize()  # long done: the engine has read the output of that step
            self._compare(observed.records, observed.seen.numpy())
        self._watch_due, self._watch_pending = self._watch_pending, []

    def _compare(self, records: list[RequestRecord], seen: np.ndarray) -> None:
        """Compare what requests saw, float32 ``[requests, row_length]``, with the profiles they used."""
        assert self.guard is not None
        for record, row in zip(records, seen, strict=True):
            profile = record.profile
            assert profile is not None
            num_blocks, block_length = record.options.num_blocks, record.options.block_length
            table = row[: num_blocks * block_length].reshape(num_blocks, block_length)
            drift = self.guard.observe(profile, table)
            if drift is None:
                continue
            self.report.counts["drift", self.guard.action] += 1
            logger.warning(
                "Task %r no longer looks like its profile %s: over %d requests, confidence at block entry differs by "
                "%.3f and has cosine %.3f with it. %s",
                record.key.task,
                profile.profile_id,
                drift.num_requests,
                drift.gap,
                drift.cosine,
                "It calibrates again." if self.guard.action == "recalibrate" else "",
            )
            if self.guard.action == "recalibrate":
                self.registry.mark_stale(profile)

    def take_report(self) -> dict[str, Any] | None:
        """What happened since the last call, for the scheduler."""
        for label, number in self.registry.counts.items():
            if number:
                self.report.counts["calibrations", label] += number
        self.registry.counts.clear()
        return self.report.take()

    def begin_step(self, slots: np.ndarray, block_start: np.ndarray, num_active: np.ndarray) -> None:
        """Bring the host's view up to date for the step that is being prepared.

        Args:
            slots: ``[num_reqs]`` slots scheduled.
            block_start: ``[num_reqs]`` position of the first uncommitted token, as the scheduler sees it.
            num_active: ``[num_reqs]`` positions of the active block from there on, or more; 0: the request denoises
                nothing in this step.
        """
        if self._copy_pending is not None:
            assert self._copied is not None
            self._copied.synchronize()  # long done: the engine has read the output of that step
            slots_of_copy, width = self._copy_pending, self._copy_width
            self.host.masked[slots_of_copy, :width] = self._masked_host[: slots_of_copy.size, :width].numpy()
            self._copy_pending = None
        self._compare_what_has_come()
        is_new = np.empty(slots.size, dtype=bool)
        _enter_blocks(self.host, slots, block_start, num_active, is_new)
        fresh = slots[is_new]
        if self.device.type != "cpu" and fresh.size:
            self.masked[to_device(fresh, self.device)] = to_device(self.host.masked[fresh], self.device)
        if np.isfinite(self.host.edit_threshold[fresh]).any():
            self.num_post_steps[to_device(fresh, self.device)] = 0

    def note_confidence(
        self,
        step_cell: torch.Tensor,
        cells: torch.Tensor,
        width: int,
        confidence: torch.Tensor,
        is_masked: torch.Tensor | None = None,
    ) -> None:
        """Keep the mean confidence of a step's masked positions, for the guard.

        Args:
            step_cell: int64 ``[num_reqs]``, where in ``mean_confidence``.
            cells: int64 ``[M]``, request * width + position of every position with logits.
            width: Of ``cells``.
            confidence: float32 ``[M]``.
            is_masked: bool ``[M]``, which of them count; all when None.
        """
        if self.guard is None:
            return
        if self.device.type == "cpu":
            if is_masked is not None:
                cells, confidence = cells[is_masked], confidence[is_masked]
            tensors = (self.mean_confidence.view(-1), step_cell, cells, confidence)
            _mean_by_request(*(tensor.numpy() for tensor in tensors), width)
            return
        request = torch.div(cells, width, rounding_mode="floor")
        weight = torch.ones_like(confidence) if is_masked is None else is_masked.to(confidence.dtype)
        total = torch.zeros_like(step_cell, dtype=torch.float32).index_add_(0, request, confidence * weight)
        count = torch.zeros_like(total).index_add_(0, request, weight)
        means = self.mean_confidence.view(-1)
        means[step_cell] = torch.where(count > 0, total / count, means[step_cell])

    def copy_masks_to_host(self, slots_np: np.ndarray, slots: torch.Tensor, width: int) -> None:
        """Start copying the masks ``[num_reqs, width]`` that a step left; :meth:`begin_step` picks them up."""
        if self.device.type == "cpu":
            return
        self._masked_host[: slots_np.size].copy_(self.masked[slots], non_blocking=True)
        assert self._copied is not None
        self._copied.record()
        self._copy_pending, self._copy_width = slots_np, width


@compiled()
def _enter_blocks(
    host: HostTables, slots: np.ndarray, block_start: np.ndarray, num_active: np.ndarray, is_new: np.ndarray
) -> None:
    """Count the step of every slot, or mask its block whole where it is another one than before."""
    for req in range(slots.size):
        slot = slots[req]
        is_new[req] = num_active[req] > 0 and host.block_start[slot] != block_start[req]
        host.step[slot] += num_active[req] > 0
        if is_new[req]:
            host.block_start[slot], host.step[slot] = block_start[req], 0
            for k in range(host.masked.shape[1]):
                host.masked[slot, k] = k < min(host.block_length[slot], num_active[req])


@compiled()
def _mean_by_request(
    table: np.ndarray, step_cell: np.ndarray, cells: np.ndarray, confidence: np.ndarray, width: int
) -> None:
    """Write the mean confidence of every request's rows; rows of a request follow each other."""
    count = 0
    for row in range(cells.size):
        request = cells[row] // width
        if row == 0 or cells[row - 1] // width != request:
            count = 0
            table[step_cell[request]] = 0.0
        count += 1
        table[step_cell[request]] += (confidence[row] - table[step_cell[request]]) / count
