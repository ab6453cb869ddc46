"""Slot tables of the running requests: canvas and masks on the device, options and progress on the host.

A slot is a request's row in vLLM's own request tables. What a denoising step decides (tokens, masks) stays on the
device; what a step needs to be planned (block, step, rule, which positions are still masked) is NumPy on the host, so
that planning is a few vector operations for the whole batch. The host learns the masks of the last step from a copy
that runs beside the engine's own copy of the output. Schedules come from the engine core (``engine.calibrator``).
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from typing import NamedTuple

import numpy as np
import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import NewRequestData

from csrc_triton.cpu import compiled
from vllm_osdt.calibration.thresholds import Fallback
from vllm_osdt.geometry import MAX_BLOCK_LENGTH
from vllm_osdt.messages import OPEN_HOLE, Assignment, RequestSpec, Switch
from vllm_osdt.models.traits import Traits
from vllm_osdt.options import DecodingOptions, ServerOptions
from vllm_osdt.policies import MODIFIERS, POLICIES
from vllm_osdt.policies.adablock import ADABLOCK, MAX_NUMBERS
from vllm_osdt.policies.base import MAX_BRANCHES, MAX_CARRY, MAX_CONSTANTS, MAX_STATE, Cutter, Policy
from vllm_osdt.worker.transfer import to_device, wait_for

Carry = torch.Tensor | float
NUMBERS = (MAX_CONSTANTS, MAX_STATE, MAX_CARRY)  # columns of CanvasStates.policy_numbers: constants, state, carry
MAX_END_TOKENS = 8  # of a request that its blocks are searched for, besides one that ends its thinking
RUN_AHEAD_SHARE = 0.75  # of a step's blocks that should go on, for another step to be launched behind it
# index + 1 in HostTables.cuts
CUTTERS: tuple[Cutter, ...] = (ADABLOCK, *(policy for policy in POLICIES.values() if policy.cuts_blocks))
# index + 1 in HostTables.adjusts
ADJUSTING = tuple(one for policy in POLICIES.values() if policy.adjusts for one in (policy, *policy.variants))


def _seed(req_id: str, seed: int | None) -> int:
    """The request's random key: its own seed, else one made from its id, equal on every rank."""
    source = f"seed:{seed}" if seed is not None else f"id:{req_id}"
    return int.from_bytes(hashlib.blake2b(source.encode(), digest_size=8).digest(), "little", signed=True)


def _end_token_ids(params: SamplingParams, switch: Switch | None) -> list[int]:
    """The tokens that end a block early, -1 for none: the one that ends thinking, then EOS and stop tokens.

    Where there are more of them than places, the scheduler finds the others when their block is finished.
    """
    eos = [] if params.ignore_eos or params.eos_token_id is None else [params.eos_token_id]
    distinct = dict.fromkeys([*eos, *(params.stop_token_ids or [])])
    return [-1 if switch is None else switch.think_end, *[*distinct, *[-1] * MAX_END_TOKENS][:MAX_END_TOKENS]]


class HostTables(NamedTuple):
    """What planning a step reads: one entry or row per slot, on the host."""

    canvas_start: np.ndarray  # int64, see geometry.Canvas
    canvas_end: np.ndarray  # int64, position behind the part of the canvas that has been computed
    first_end: np.ndarray  # int64, position behind the part of the canvas that is there at first
    last_end: np.ndarray  # int64, position behind all of the canvas
    max_output_end: np.ndarray  # int64
    block_length: np.ndarray  # int64; 0: the slot has no canvas
    block_start: np.ndarray  # int64, position of the active block; -1: none yet
    step: np.ndarray  # int64, denoising steps the active block has seen
    num_alone: np.ndarray  # int64, positions of it that its first step decided alone, whatever the policy
    masked: np.ndarray  # bool [slots, MAX_BLOCK_LENGTH], of the active block
    rule: np.ndarray  # int8
    parameters: np.ndarray  # float32 [slots, row_length], of the rule, by block and step
    min_unmask: np.ndarray  # int32 [slots, MAX_BLOCK_LENGTH], positions unmasked at least, by step in the block
    fallback: np.ndarray  # int8, shape of parameters, where a calibrated parameter comes from
    num_fallbacks: np.ndarray  # int64 [kinds], denoising steps since the last report
    temperature: np.ndarray  # float32
    seed: np.ndarray  # int64
    end_token_ids: np.ndarray  # int64 [slots, 1 + MAX_END_TOKENS], -1 for none: of the thinking, and of the output
    is_recorded: np.ndarray  # bool, the request calibrates its task, or has a grammar
    has_grammar: np.ndarray  # bool, a grammar says which tokens it may have
    is_watched: np.ndarray  # bool, the guard wants its confidence at block entry
    reports_confidence: np.ndarray  # bool, its cache mode wants the confidence of every step
    edit_threshold: np.ndarray  # float32, infinite for none
    sub_block_length: np.ndarray  # int64, 0: none
    sub_block_cache: np.ndarray  # bool
    adjusts: np.ndarray  # int8, the policy that adjusts its steps: place in ADJUSTING, from 1; 0: none
    modifies: np.ndarray  # int64, a bit for each of MODIFIERS that it has
    by_entropy: np.ndarray  # bool, its confidences are of entropies
    reads_logits: np.ndarray  # bool, its policy reads its logits
    prompt_end: np.ndarray  # int64, prompt tokens
    is_shaped: np.ndarray  # bool, its logits are changed before a token is proposed
    penalizes: np.ndarray  # bool, by the tokens that are there among other things
    penalties: np.ndarray  # float32 [slots, 3], presence, frequency, repetition
    filters_confidence: np.ndarray  # bool, its confidence is the proposal's share of what is left
    num_logprobs: np.ndarray  # int32, log probabilities of each token besides its own; -1: none at all
    pinned: np.ndarray  # bool [slots, row_length], positions of the canvas that the request gives
    cuts: np.ndarray  # int8, what says how long its blocks are: place in CUTTERS, from 1; 0: nothing
    block_limit: np.ndarray  # int32, positions of the active block where that is cut; 0: not known yet
    is_dual: np.ndarray  # bool, its steps between refreshes compute the active block alone
    may_end: np.ndarray  # bool [slots, row_length], positions of holes that an end token may end
    draft_threshold: np.ndarray  # float32, confidence that confirms a drafted token; infinite without a draft
    max_drafts: np.ndarray  # int32, branches of a step at most that verify drafts, with the block; 0: none ever
    draft_sizes: np.ndarray  # int32 [slots, MAX_BLOCK_LENGTH], of such: positions that a step should unmask, by step
    takes_subsets: np.ndarray  # bool, of such: a draft is right where the target has all of it
    num_drafted: np.ndarray  # int32, further branches of which the device has the tokens, for the active block


class CanvasStates:
    """Tables of ``max_num_reqs`` slots, each a row of ``row_length`` positions.

    The context, and what a block that begins in it would have behind it.

    Invariant: after :meth:`begin_step`, ``host.masked[slot, :block_length]`` are the masks of the slot's active block,
    which starts at position ``host.block_start[slot]`` and has seen ``host.step[slot]`` denoising steps.
    """

    def __init__(self, max_num_reqs: int, row_length: int, traits: Traits, device: torch.device) -> None:
        self.device = device
        self.mask_token_id = traits.mask_token_id
        self.logits_shift = traits.logits_shift
        self.is_block_causal = traits.is_block_causal
        self.commits_causally = traits.commits_causally
        # Where no causal row predicts the position behind it, each position that is verified needs its own mask.
        self.verifies_by_branches = not (traits.logits_shift or traits.commits_causally)
        self._slot_of: dict[str, int] = {}
        self.observed: set[str] = set()  # ids of the requests of which the engine core wants more than tokens

        # Prompt, decided tokens and mask tokens, by absolute position; a cell that takes writes of padding; and, by
        # slot, branch and position in the active block, the tokens of further branches. Behind them a mask token.
        self.padding_cell, num_branches = max_num_reqs * row_length, max_num_reqs * (MAX_BRANCHES - 1)
        self.mask_cell = self.padding_cell + 1 + num_branches * MAX_BLOCK_LENGTH
        self.cells = torch.zeros(self.mask_cell + 1, dtype=torch.int32, device=device)
        self.cells[self.mask_cell] = self.mask_token_id
        self.token_ids = self.cells[: self.padding_cell].view(max_num_reqs, row_length)
        self.branch_ids = self.cells[self.padding_cell + 1 : self.mask_cell].view(
            max_num_reqs, MAX_BRANCHES - 1, MAX_BLOCK_LENGTH
        )
        # Masks of the active block; a row for requests that denoise nothing in a step; and those of further branches.
        self.idle_row = max_num_reqs
        self.masked = torch.zeros(max_num_reqs + 1 + num_branches, MAX_BLOCK_LENGTH, dtype=torch.bool, device=device)
        self.branch_masked = self.masked[max_num_reqs + 1 :].view(max_num_reqs, MAX_BRANCHES - 1, MAX_BLOCK_LENGTH)
        # Branches that the last step accepted besides the block itself: so many more denoising steps of the block.
        self.num_accepted = torch.zeros(max_num_reqs, dtype=torch.int32, device=device)
        self.has_branches = True  # False where attention cannot take them
        # Steps that the active block has seen without a mask, where the request edits.
        self.num_post_steps = torch.zeros(self.masked.shape[0], dtype=torch.int32, device=device)
        # Of requests whose policy adjusts its steps: numbers of the request, and of its active block.
        self.policy_numbers = torch.zeros(max_num_reqs, sum(NUMBERS), device=device)
        self.constants, self.policy_state, self.policy_carry = self.policy_numbers.split(NUMBERS, dim=1)
        self._carry_at_entry = self.policy_carry.clone()  # when the active block was entered
        # Of preempted requests: first position of their block, and both of the above.
        self._kept_carry: dict[str, tuple[int, Carry, Carry]] = {}
        self._thinking: set[str] = set()  # ids of the requests that may yet begin an answer, which takes over nothing
        self.cut_constants = torch.zeros(max_num_reqs, MAX_NUMBERS, device=device)
        self.block_limit = torch.zeros(max_num_reqs + 1, dtype=torch.int32, device=device)  # as HostTables.block_limit
        self.policy_memory = torch.zeros(
            max_num_reqs, MAX_BLOCK_LENGTH, 0, device=device
        )  # of positions; grows when asked for
        # Of requests with modifiers, by place in MODIFIERS: numbers of the request, and of positions, likewise.
        self.modifier_constants = torch.zeros(len(MODIFIERS), max_num_reqs, MAX_CONSTANTS, device=device)
        self.modifier_memory = [self.policy_memory.clone() for _ in MODIFIERS]
        self.policy_tensors: dict[str, Mapping[str, torch.Tensor]] = {}  # by policy, of the operator's files
        self.kept_logits_bytes = 0  # for what policies keep of earlier steps
        # Drafted tokens of the cells, -1 for none; there once a request has a draft.
        self.drafts = torch.empty(0, dtype=torch.int32, device=device)
        # The masks that a step left are copied to the host beside the engine's own copies.
        is_host = device.type == "cpu"
        self._masked_host = self.masked[: max_num_reqs + 1]
        self._accepted_host = self.num_accepted
        if not is_host:
            self._masked_host = torch.zeros_like(self._masked_host, device="cpu", pin_memory=True)
            self._accepted_host = torch.zeros_like(self._accepted_host, device="cpu", pin_memory=True)
        self._accepted_pending: np.ndarray | None = None  # slots
        self._limit_host = self.block_limit if is_host else torch.zeros_like(self.block_limit, device="cpu")
        if not is_host:
            self._limit_host = self._limit_host.pin_memory()
        self._limit_pending = False
        self._copied = None if is_host else torch.cuda.Event()
        self._copy_pending: np.ndarray | None = None  # slots
        self._copy_width = 0
        # Active block, steps and masks of each slot when goes_on was asked last.
        self._seen = np.full((max_num_reqs, 3), -1, dtype=np.int64)
        self._entered = np.empty(0, dtype=np.int64)  # slots that entered a block in the step that is being prepared

        self.host = HostTables(
            canvas_start=np.zeros(max_num_reqs, dtype=np.int64),
            canvas_end=np.zeros(max_num_reqs, dtype=np.int64),
            first_end=np.zeros(max_num_reqs, dtype=np.int64),
            last_end=np.zeros(max_num_reqs, dtype=np.int64),
            max_output_end=np.zeros(max_num_reqs, dtype=np.int64),
            block_length=np.zeros(max_num_reqs, dtype=np.int64),
            block_start=np.full(max_num_reqs, -1, dtype=np.int64),
            step=np.zeros(max_num_reqs, dtype=np.int64),
            num_alone=np.zeros(max_num_reqs, dtype=np.int64),
            masked=self._masked_host.numpy() if is_host else np.zeros(tuple(self._masked_host.shape), dtype=bool),
            rule=np.zeros(max_num_reqs, dtype=np.int8),
            parameters=np.zeros((max_num_reqs, row_length), dtype=np.float32),
            min_unmask=np.zeros((max_num_reqs, MAX_BLOCK_LENGTH), dtype=np.int32),
            fallback=np.zeros((max_num_reqs, row_length), dtype=np.int8),
            num_fallbacks=np.zeros(len(Fallback), dtype=np.int64),
            temperature=np.zeros(max_num_reqs, dtype=np.float32),
            seed=np.zeros(max_num_reqs, dtype=np.int64),
            end_token_ids=np.full((max_num_reqs, 1 + MAX_END_TOKENS), -1, dtype=np.int64),
            is_recorded=np.zeros(max_num_reqs, dtype=bool),
            has_grammar=np.zeros(max_num_reqs, dtype=bool),
            is_watched=np.zeros(max_num_reqs, dtype=bool),
            reports_confidence=np.zeros(max_num_reqs, dtype=bool),
            edit_threshold=np.full(max_num_reqs, np.inf, dtype=np.float32),
            sub_block_length=np.zeros(max_num_reqs, dtype=np.int64),
            sub_block_cache=np.zeros(max_num_reqs, dtype=bool),
            adjusts=np.zeros(max_num_reqs, dtype=np.int8),
            modifies=np.zeros(max_num_reqs, dtype=np.int64),
            by_entropy=np.zeros(max_num_reqs, dtype=bool),
            reads_logits=np.zeros(max_num_reqs, dtype=bool),
            prompt_end=np.zeros(max_num_reqs, dtype=np.int64),
            is_shaped=np.zeros(max_num_reqs, dtype=bool),
            penalizes=np.zeros(max_num_reqs, dtype=bool),
            penalties=np.zeros((max_num_reqs, 3), dtype=np.float32),
            filters_confidence=np.zeros(max_num_reqs, dtype=bool),
            num_logprobs=np.full(max_num_reqs, -1, dtype=np.int32),
            pinned=np.zeros((max_num_reqs, row_length), dtype=bool),
            cuts=np.zeros(max_num_reqs, dtype=np.int8),
            block_limit=self.block_limit.numpy() if is_host else np.zeros(max_num_reqs + 1, dtype=np.int32),
            is_dual=np.zeros(max_num_reqs, dtype=bool),
            may_end=np.zeros((max_num_reqs, row_length), dtype=bool),
            draft_threshold=np.full(max_num_reqs, np.inf, dtype=np.float32),
            max_drafts=np.zeros(max_num_reqs, dtype=np.int32),
            draft_sizes=np.ones((max_num_reqs, MAX_BLOCK_LENGTH), dtype=np.int32),
            takes_subsets=np.zeros(max_num_reqs, dtype=bool),
            num_drafted=np.zeros(max_num_reqs, dtype=np.int32),
        )

    def add_request(self, slot: int, new: NewRequestData, spec: RequestSpec, assignment: Assignment) -> None:
        """Fill a slot for a request that starts or resumes: its block starts again, its schedule is the same."""
        params, options, canvas, schedule = new.sampling_params, spec.options, spec.canvas, assignment.schedule
        assert params is not None and new.prefill_token_ids is not None
        num_prefill, host = len(new.prefill_token_ids), self.host
        self._slot_of[new.req_id] = slot
        if spec.switch is not None:
            self._thinking.add(new.req_id)
        elif new.req_id in self._thinking:
            self.forget([new.req_id])
        row = np.full(canvas.end, self.mask_token_id, dtype=np.int32)
        row[:num_prefill] = new.prefill_token_ids
        host.pinned[slot] = host.may_end[slot] = False
        if spec.pinned is not None:
            tokens, start = np.array(spec.pinned, dtype=np.int32), len(new.prompt_token_ids or ())
            given = start + np.flatnonzero(tokens >= 0)
            row[given], host.pinned[slot, given] = tokens[given - start], True
            host.may_end[slot, start : start + tokens.size] = tokens == OPEN_HOLE
        self.token_ids[slot, : canvas.end] = to_device(row, self.device)
        host.canvas_start[slot] = canvas.start
        host.canvas_end[slot] = 0
        host.first_end[slot] = canvas.end if canvas.first_end is None else canvas.first_end
        host.last_end[slot] = canvas.end
        host.max_output_end[slot] = canvas.max_output_end
        host.block_length[slot] = canvas.block_length
        host.block_start[slot] = -1
        host.rule[slot] = schedule.rule
        parameters = schedule.parameters.ravel()
        host.parameters[slot, : parameters.size] = parameters
        host.min_unmask[slot] = 0
        if schedule.min_unmask is not None:
            host.min_unmask[slot, : canvas.block_length] = schedule.min_unmask
        host.fallback[slot] = 0
        if schedule.fallback is not None:
            host.fallback[slot, : parameters.size] = schedule.fallback.ravel()
        host.temperature[slot] = params.temperature
        host.seed[slot] = _seed(new.req_id, params.seed)
        host.end_token_ids[slot] = _end_token_ids(params, spec.switch)
        host.has_grammar[slot] = assignment.has_grammar
        host.is_recorded[slot] = assignment.is_recorded or assignment.has_grammar
        host.is_watched[slot] = assignment.is_watched
        host.reports_confidence[slot] = options.refresh_confidence > 0
        host.edit_threshold[slot] = np.inf if options.edit_threshold is None else options.edit_threshold
        host.sub_block_length[slot] = options.sub_block_length or 0
        host.sub_block_cache[slot] = options.sub_block_cache
        host.prompt_end[slot] = len(new.prompt_token_ids or ())
        host.max_drafts[slot] = host.num_drafted[slot] = 0
        if schedule.drafts is not None:
            host.max_drafts[slot], host.takes_subsets[slot] = schedule.drafts.number, schedule.drafts.is_subset
            host.draft_sizes[slot, : canvas.block_length] = schedule.drafts.sizes
        host.draft_threshold[slot] = np.inf
        if assignment.has_drafts:
            self._clear_draft(slot, options.draft_threshold)
            self.write_draft(slot, int(host.prompt_end[slot]), spec.draft or [])
        host.filters_confidence[slot] = options.filtered_confidence
        if host.is_recorded[slot] or assignment.is_watched or options.refresh_confidence > 0:
            self.observed.add(new.req_id)
        policy = POLICIES[assignment.policy or options.policy]
        adjusting = (policy, *policy.variants)[schedule.variant]
        host.adjusts[slot] = ADJUSTING.index(adjusting) + 1 if adjusting in ADJUSTING else 0
        host.is_dual[slot] = options.cache_mode == "dual"
        self._set_cutter(slot, options, policy, assignment)
        host.by_entropy[slot], host.reads_logits[slot] = assignment.by_entropy, assignment.reads_logits
        if host.adjusts[slot]:
            self.constants[slot] = self._constants(schedule.constants)
            self.policy_carry[slot] = self._carry_of(new.req_id, num_prefill)
            self.policy_memory = _with_room(self.policy_memory, policy.memory_size)
        host.modifies[slot] = 0
        for number, modifier in enumerate(MODIFIERS):
            if modifier.is_on(options):
                host.modifies[slot] |= 1 << number
                self.modifier_constants[number, slot] = self._constants(modifier.constants(options))
                size = modifier.memory_size(canvas.block_length)
                self.modifier_memory[number] = _with_room(self.modifier_memory[number], size)

    def _carry_of(self, req_id: str, num_decided: int) -> Carry:
        """What a policy kept of a request that has so many decided positions, before its next block; 0 at its start."""
        block_start, at_entry, at_end = self._kept_carry.pop(req_id, (num_decided, 0.0, 0.0))
        return at_end if num_decided > block_start else at_entry

    def forget(self, req_ids: Iterable[str]) -> None:
        """Requests have ended, or begin anew: what is kept for those that come back goes."""
        for req_id in req_ids:
            self._kept_carry.pop(req_id, None)
            self._thinking.discard(req_id)

    def load_policies(self, operator: ServerOptions) -> None:
        """Read what policies have in files that the operator names, and what room they have."""
        self.kept_logits_bytes = int(operator.kept_logits_gib * 2**30)
        if self.device.type == "cpu":  # compiled now where there is no cache, not in a request's first step
            for loops in ("csrc_triton.cpu_reading", "vllm_osdt.policies.loops"):
                import_module(loops)
        for name, policy in POLICIES.items():
            found = {key: tensor.to(self.device) for key, tensor in policy.tensors(operator).items()}
            if found:
                self.policy_tensors[name] = found

    def _constants(self, values: Sequence[float], length: int = MAX_CONSTANTS) -> torch.Tensor:
        """Numbers of a request, float32 ``[length]``, 0 behind them."""
        constants = np.zeros(length, dtype=np.float32)
        constants[: len(values)] = values
        return to_device(constants, self.device)

    def _set_cutter(self, slot: int, options: DecodingOptions, policy: Policy, assignment: Assignment) -> None:
        """Fill in what says how long a request's blocks are."""
        cutter: Cutter | None = policy if policy.cuts_blocks else None
        if options.adablock:
            cutter = ADABLOCK
        self.host.cuts[slot] = 0
        if cutter is not None:
            self.host.cuts[slot] = CUTTERS.index(cutter) + 1
            constants = assignment.schedule.constants
            if cutter is ADABLOCK:
                constants = ADABLOCK.constants(options, by_entropy=assignment.by_entropy)
            self.cut_constants[slot] = self._constants(constants, MAX_NUMBERS)

    def _clear_draft(self, slot: int, threshold: float) -> None:
        """A request with drafts takes the slot; nothing is drafted yet."""
        if not self.drafts.numel():
            self.drafts = torch.full_like(self.cells, -1)
        self._drafts_of(slot)[:] = -1
        self.host.draft_threshold[slot] = threshold

    def write_draft(self, slot: int, start: int, tokens: Sequence[int]) -> None:
        """Draft the tokens of a request from position ``start`` on, -1 for none."""
        own = self._drafts_of(slot)
        own[start : start + len(tokens)] = to_device(np.array(tokens, dtype=np.int32), self.device)

    def _drafts_of(self, slot: int) -> torch.Tensor:
        return self.drafts[: self.padding_cell].view(self.token_ids.shape)[slot]

    def remove_request(self, req_id: str) -> None:
        """A request lost its slot: it ended or was preempted."""
        slot = self._slot_of.pop(req_id, None)
        self.observed.discard(req_id)
        if slot is not None:
            host = self.host
            if host.adjusts[slot]:
                at_end = self.policy_carry[slot].clone()
                has_block = host.block_start[slot] >= 0  # else it has kept what it came back with
                at_entry = self._carry_at_entry[slot].clone() if has_block else at_end
                self._kept_carry[req_id] = int(host.block_start[slot]), at_entry, at_end
            host.block_length[slot] = 0
            host.canvas_start[slot] = host.canvas_end[slot] = host.max_output_end[slot] = 0
            host.is_recorded[slot] = host.is_watched[slot] = host.reports_confidence[slot] = False
            host.adjusts[slot] = host.cuts[slot] = host.modifies[slot] = host.max_drafts[slot] = 0
            host.is_shaped[slot] = host.has_grammar[slot] = False
            host.num_logprobs[slot] = -1

    def take_fallbacks(self) -> np.ndarray | None:
        """Denoising steps by kind of fallback since the last call, None when there were none."""
        counts = self.host.num_fallbacks
        if not counts[1:].any():
            return None
        taken = counts.copy()
        counts[:] = 0
        return taken

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
            wait_for(self._copied)  # long done: the engine has read the output of that step
            slots_of_copy, width = self._copy_pending, self._copy_width
            self.host.masked[slots_of_copy, :width] = self._masked_host[: slots_of_copy.size, :width].numpy()
            if self._limit_pending:
                self.host.block_limit[slots_of_copy] = self._limit_host[: slots_of_copy.size].numpy()
                self._limit_pending = False
            self._copy_pending = None
        if self._accepted_pending is not None:
            accepted = self._accepted_host.numpy()
            chosen = accepted[self._accepted_pending] if self.device.type == "cpu" else accepted
            self.host.step[self._accepted_pending] += chosen[: self._accepted_pending.size]
            self._accepted_pending = None
        is_new = np.empty(slots.size, dtype=bool)
        _enter_blocks(self.host, slots, block_start, num_active, is_new)
        self._entered = slots[is_new]

    def arrays_of_entered_blocks(self) -> dict[str, np.ndarray]:
        """What the device is told of blocks that are entered in this step; :meth:`enter_blocks` takes it there."""
        entered, host = self._entered, self.host
        is_host = self.device.type == "cpu"  # masks are shared
        if not entered.size:
            return {}
        keeps = np.isfinite(host.edit_threshold[entered]) | (host.adjusts[entered] > 0) | (host.modifies[entered] > 0)
        if is_host and not keeps.any():
            return {}
        return {"entered": entered} | ({} if is_host else {"entered_masks": host.masked[entered]})

    def enter_blocks(self, sent: Mapping[str, torch.Tensor]) -> None:
        """Begin the blocks that are entered in this step on the device.

        Args:
            sent: :meth:`arrays_of_entered_blocks` there, perhaps among others.
        """
        entered = sent.get("entered")
        if entered is None:
            return
        if "entered_masks" in sent:
            self.masked[entered] = sent["entered_masks"]
        self.num_post_steps[entered] = 0
        self.block_limit[entered] = 0
        if self.host.adjusts[self._entered].any():
            self.policy_state[entered] = 0.0
            self._carry_at_entry[entered] = self.policy_carry[entered]
            if self.policy_memory.shape[2]:
                self.policy_memory[entered] = 0.0
        if self.host.modifies[self._entered].any():
            for memory in self.modifier_memory:
                memory[entered] = 0.0

    def keeps_rows(self, slots: np.ndarray, num_active: np.ndarray) -> bool:
        """Whether the next step of these requests has the rows of the one that is being prepared, if no block ends.

        No block may be in its first step, which refreshes or commits another one's keys and values, and no sub-blocks
        are among them. A request that the engine core wants to know something of is looked at step by step.

        Args:
            slots: int64 ``[R]``.
            num_active: int64 ``[R]``, positions of the active block; 0: nothing is denoised.
        """
        host = self.host
        if (host.is_recorded[slots] | host.reports_confidence[slots]).any():
            return False
        return bool(host.step[slots].all() and num_active.all()) and not host.sub_block_length[slots].any()

    def goes_on(self, slots: np.ndarray, num_active: np.ndarray) -> bool:
        """Whether the next step has these rows (:meth:`keeps_rows`), as far as is known; the arguments are the same.

        Most blocks should have masks left behind this step: more than what their last step removed.
        """
        host = self.host
        if host.cuts[slots].any() or not self.keeps_rows(slots, num_active):  # the host hears later of a cut
            return False
        steps = host.step[slots]
        left = host.masked[slots].sum(axis=1)
        seen_block, seen_step, seen_left = self._seen[slots].T
        is_known = (seen_block == host.block_start[slots]) & (seen_step < steps)
        num_steps = steps - np.where(is_known, seen_step, 0)
        removed = np.where(is_known, seen_left, num_active) - left
        self._seen[slots] = np.stack([host.block_start[slots], steps, left], axis=1)
        return bool((left * num_steps > removed).mean() >= RUN_AHEAD_SHARE)

    def copy_masks_to_host(
        self, slots_np: np.ndarray, masks: torch.Tensor, width: int, limit: torch.Tensor | None = None
    ) -> None:
        """Start copying the masks that a step left; :meth:`begin_step` picks them up.

        Args:
            slots_np: ``[num_reqs]`` slots, on the host.
            masks: bool ``[num_reqs or more, MAX_BLOCK_LENGTH]`` of those slots, on the device.
            width: Longest block among them.
            limit: int32 ``[num_reqs or more]``, how long the blocks are, where some have been cut.
        """
        self._masked_host[: slots_np.size].copy_(masks[: slots_np.size], non_blocking=True)
        if limit is not None:
            self._limit_host[: slots_np.size].copy_(limit[: slots_np.size], non_blocking=True)
            self._limit_pending = True
        assert self._copied is not None
        self._copied.record()
        self._copy_pending, self._copy_width = slots_np, width

    def hear_accepted(self, slots_np: np.ndarray, slots: torch.Tensor) -> None:
        """Have :meth:`begin_step` count the denoising steps that accepted branches stand for.

        Call it before :meth:`copy_masks_to_host`, whose end it waits for.

        Args:
            slots_np: int64 ``[G]`` slots that may have accepted some, on the host.
            slots: The same on the device.
        """
        if self.device.type != "cpu":
            accepted = self.num_accepted.index_select(0, slots)
            self._accepted_host[: slots_np.size].copy_(accepted, non_blocking=True)
        self._accepted_pending = slots_np


def _with_room(memory: torch.Tensor, size: int) -> torch.Tensor:
    """Memory of positions, ``[..., size]`` at least; what is there is kept."""
    if size <= memory.shape[-1]:
        return memory
    grown = memory.new_zeros(*memory.shape[:-1], size)
    grown[..., : memory.shape[-1]] = memory
    return grown


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
            host.block_start[slot], host.step[slot], host.block_limit[slot] = block_start[req], 0, 0
            host.num_drafted[slot] = host.num_alone[slot] = 0
            size = min(host.block_length[slot], num_active[req])
            for k in range(host.masked.shape[1]):
                host.masked[slot, k] = k < size and not host.pinned[slot, block_start[req] + k]
