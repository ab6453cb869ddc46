"""What the sampler needs of a step, planned on the host."""

from typing import Any, NamedTuple

import numpy as np

from csrc_triton.cpu import compiled
from csrc_triton.types import ENTROPY_SCALE
from vllm_osdt.policies import MODIFIERS, Policy
from vllm_osdt.policies.base import Cutter
from vllm_osdt.worker.slots import ADJUSTING, CUTTERS, CanvasStates, HostTables
from vllm_osdt.worker.step.layout import StepPlan
from vllm_osdt.worker.step.rows import StepRows

_NONE = np.empty(0, dtype=np.int64)
NOWHERE = 2**30  # a place behind all minima of output


def noise_keys(seed: np.ndarray, position: np.ndarray, step: np.ndarray) -> np.ndarray:
    """One random key per position and denoising step, so that sampling depends on nothing else.

    Args:
        seed, position, step: int64 ``[M]``; step counts from the block's first.

    Returns:
        int64 ``[M]``: two rounds of the splitmix64 finalizer.
    """
    with np.errstate(over="ignore"):
        key = seed.astype(np.uint64)
        for word in (position, step):
            key = (key ^ word.astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
            key = (key ^ (key >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            key = (key ^ (key >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            key ^= key >> np.uint64(31)
    return key.view(np.int64)


class DenoisePlan(NamedTuple):
    """What the sampler needs of a step, on the host: :class:`DenoiseBatch` before it is sent to the device."""

    slots: np.ndarray  # int64 [R]
    is_active: np.ndarray  # bool [R]
    step: np.ndarray  # int64 [R], denoising steps that the block has seen before
    policies: list[Policy]  # that adjust the step
    first_slots: list[int]  # of their requests, see PolicyRequests
    cutters: list[Cutter]  # that cut blocks in this step
    has_cuts: bool  # whether some request has a cutter
    recorded: np.ndarray  # int64 [C], requests that calibrate or have a grammar
    arrays: dict[str, np.ndarray]  # for the device
    shaped_slots: np.ndarray  # int64 [S], of the rows whose logits are changed
    scored_slots: np.ndarray  # int64 [S], of the rows whose log probabilities are returned
    num_scores: int  # log probabilities of each token, -1: none
    read_slots: dict[int, np.ndarray]  # of rows that a policy reads and whose logits are changed, by policy
    read_lengths: dict[int, tuple[np.ndarray, int]]  # ReadRows.block_length_np and longest, by policy
    modifiers: list[int]  # places in MODIFIERS of those that requests have
    drafting: np.ndarray  # int64 [G], slots of the requests whose drafts are verified and made

    @property
    def needs_logits(self) -> bool:
        """As ``DenoiseBatch.needs_logits``."""
        reads = bool(self.modifiers) or any(f"read_{number}" in self.arrays for number in range(len(self.policies)))
        return (reads and self.arrays["position"].size > 0) or bool(self.shaped_slots.size or self.scored_slots.size)


def plan_denoise(states: CanvasStates, rows: StepRows, plan: StepPlan) -> DenoisePlan:
    """What the sampler needs of a planned step.

    Args:
        states: Tables.
        rows: What runs. A step that decides first positions alone is adjusted by no policy.
        plan: The step.
    """
    host, num_requests = states.host, rows.num_requests
    # Of requests, and of these and their further branches.
    slots, decides_first, all_slots = rows.slots[:num_requests], rows.decides_first[:num_requests], rows.slots
    is_active, step = plan.mask_rows[:num_requests] < host.block_length.size, host.step[slots]
    all_steps = host.step[all_slots] + rows.branch if rows.branch.size else step
    arrays = {
        "slots": slots,
        "mask_rows": plan.mask_rows,
        "canvas_index": plan.canvas_index,
        "end_token_ids": plan.end_token_ids,
        "num_output_positions": plan.num_output_positions,
        "rule": plan.rule,
        "parameter": plan.parameter,
        "min_unmask": plan.min_unmask,
        "position": plan.position,
    }
    if plan.is_plain:
        return _plain_plan(slots, is_active, step, arrays)
    temperature = host.temperature[slots]
    is_shaped, num_scores = host.is_shaped[slots], host.num_logprobs[slots]
    is_scored = num_scores >= 0
    takes_part = is_active & ~decides_first
    policies, first_slots, of_policies = _adjusting(states, slots, step, takes_part)
    for number, policy in enumerate(policies if rows.span.size else ()):
        if policy.verifies:
            of_policies[f"adjusted_span_{number}"] = rows.span[of_policies[f"adjusted_{number}"][0]]
    cuts = host.cuts[slots]
    cutters: list[Cutter] = []
    if cuts.any():
        is_due = takes_part & (cuts > 0) & (host.block_limit[slots] == 0)
        for number in np.unique(cuts[is_due]).tolist():
            of_policies[f"cut_{len(cutters)}"] = _of_policy(states, slots, step, is_due & (cuts == number))
            cutters.append(CUTTERS[number - 1])
    shaped_slots = scored_slots = _NONE
    read_slots: dict[int, np.ndarray] = {}
    read_lengths: dict[int, tuple[np.ndarray, int]] = {}
    modifies = host.modifies[slots] * is_active
    modifiers = [number for number in range(len(MODIFIERS)) if (modifies >> number & 1).any()]
    reads = host.reads_logits[slots] & is_active & ~decides_first
    if is_scored.any():
        arrays["asking"] = slots[is_scored]
    has_logits = np.ones(plan.position.size, dtype=bool)
    row_req = row_slots = row_pos = places = _NONE
    if temperature.any() or is_shaped.any() or is_scored.any() or rows.span.size or modifiers:
        row_req, row_pos = np.divmod(plan.position, plan.canvas_index.shape[1])
        row_slots = all_slots[row_req]
        places = host.block_start[row_slots] + row_pos
        if temperature.any():
            arrays["temperature"] = host.temperature[row_slots]
            arrays["noise_key"] = noise_keys(host.seed[row_slots], places, all_steps[row_req])
        if rows.span.size:
            first, length = rows.span[row_req].T
            has_logits = (length == 0) | ((row_pos >= first) & (row_pos < first + length))
        may_end = host.may_end[row_slots, places]
        places = np.where(may_end, NOWHERE, places)
        shaped_rows = np.flatnonzero(host.is_shaped[row_slots] & has_logits)
        shaped_slots = _some_rows(host, arrays, "shaped", shaped_rows, row_slots, places)
        scored_rows = np.flatnonzero((host.num_logprobs[row_slots] >= 0) & has_logits)
        scored_slots = _some_rows(host, arrays, "scored", scored_rows, row_slots, places)
        for number in modifiers:
            is_modified = (row_req < num_requests) & (modifies[np.minimum(row_req, num_requests - 1)] >> number & 1 > 0)
            which = np.flatnonzero(is_modified & host.masked[row_slots, row_pos])
            of_rows = (which, row_slots[which], row_pos[which], step[row_req[which]])
            arrays[f"modified_{number}"] = np.stack(of_rows)
    for number in range(len(policies) if reads.any() else 0):
        of_policy = of_policies[f"adjusted_{number}"][0]
        if not reads[of_policy].any():
            continue
        read, read_lengths[number] = _read_rows(host, plan, all_slots, step, of_policy[reads[of_policy]], has_logits)
        if not reads[of_policy].all():
            read[1] = np.flatnonzero(reads[of_policy])[read[1]]
        arrays[f"read_{number}"] = read
        if rows.span.size and policies[number].verifies:
            arrays[f"read_{number}_verified"] = rows.is_verified[row_req[read[0]]]
        arrays[f"read_{number}_at"], read_slots[number] = _NONE, _NONE
        if is_shaped.any():
            arrays[f"read_{number}_at"] = np.flatnonzero(host.is_shaped[read[3]])
            which = read[0, arrays[f"read_{number}_at"]]
            read_slots[number] = _some_rows(host, arrays, f"read_{number}_shaped", which, row_slots, places)
    asks_entropy = host.by_entropy[all_slots]
    if asks_entropy.any():
        arrays["by_entropy"] = asks_entropy[plan.position // plan.canvas_index.shape[1]]
    edit_threshold = host.edit_threshold[all_slots]
    if np.isfinite(edit_threshold).any():
        arrays["edit_threshold"] = edit_threshold
    draft_threshold = host.draft_threshold[all_slots]
    if np.isfinite(draft_threshold).any():
        # Where confidence is 1 - H / 32, a distribution of entropy H counts as one of confidence exp(-H).
        with np.errstate(divide="ignore"):
            by_entropy = np.maximum(1 + np.log(draft_threshold) / np.float32(ENTROPY_SCALE), 0)
        arrays["draft_threshold"] = np.where(asks_entropy, by_entropy, draft_threshold)
    recorded = _NONE
    if states.observed:
        recorded = np.flatnonzero(host.is_recorded[slots] & is_active)
        if recorded.size:
            arrays["recorded"] = recorded
    drafting = _NONE
    if host.max_drafts[slots].any():
        drafting, of_drafts = _drafting(host, rows, takes_part)
        arrays |= of_drafts
    return DenoisePlan(
        slots,
        is_active,
        step,
        policies,
        first_slots,
        cutters,
        bool(cuts.any()),
        recorded,
        arrays | of_policies,
        shaped_slots,
        scored_slots,
        int(num_scores.max(initial=-1)),
        read_slots,
        read_lengths,
        modifiers,
        drafting,
    )


def _read_rows(
    host: HostTables,
    plan: StepPlan,
    slots: np.ndarray,
    step: np.ndarray,
    requests: np.ndarray,
    has_logits: np.ndarray,
) -> tuple[np.ndarray, tuple[np.ndarray, int]]:
    """The logit rows that a policy reads, int64 ``[5, S]`` in the order of ``ReadRows``, and their blocks' lengths.

    Args:
        host: Tables.
        plan: The step.
        slots: int64, of requests and further branches.
        step: int64, of requests.
        requests: int64, which of them have the policy and read logits.
        has_logits: bool ``[M]``, rows that mean something.
    """
    found, length = np.empty((5, plan.position.size), dtype=np.int64), np.empty(plan.position.size, dtype=np.int64)
    number, longest = _find_rows(
        found,
        length,
        plan.position,
        plan.canvas_index.shape[1],
        requests,
        slots,
        step,
        has_logits,
        host.masked,
        host.block_length,
    )
    return found if number == length.size else found[:, :number].copy(), (length[:number], longest)


@compiled()
def _find_rows(
    found: np.ndarray,
    length: np.ndarray,
    position: np.ndarray,
    width: int,
    requests: np.ndarray,
    slots: np.ndarray,
    step: np.ndarray,
    has_logits: np.ndarray,
    masked: np.ndarray,
    block_length: np.ndarray,
) -> tuple[int, int]:
    """Fill the first columns of the first two, and say how many; and the longest length."""
    request_of = np.full(slots.size, -1)
    for k in range(requests.size):
        request_of[requests[k]] = k
    number = longest = 0
    for row in range(position.size):
        req, offset = divmod(position[row], width)
        slot = slots[req]
        if request_of[req] >= 0 and masked[slot, offset] and has_logits[row]:
            found[0, number], found[1, number], found[2, number] = row, request_of[req], offset
            found[3, number], found[4, number], length[number] = slot, step[req], block_length[slot]
            longest = max(longest, block_length[slot])
            number += 1
    return number, longest


def _drafting(host: HostTables, rows: StepRows, takes_part: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The slots of the requests whose drafts a step verifies and makes, and the arrays of :class:`DraftRows`."""
    requests = np.flatnonzero(takes_part & (host.max_drafts[rows.slots[: takes_part.size]] > 0))
    slots = rows.slots[requests]
    if not slots.size:
        return _NONE, {}
    number, most = int(rows.branch.max(initial=0)) + 1, int(host.max_drafts[slots].max())
    entries = np.full((requests.size, number), -1, dtype=np.int64)
    entries[:, 0] = requests
    if rows.branch.size:
        place = np.full(takes_part.size, -1)
        place[requests] = np.arange(requests.size)
        further = np.flatnonzero((rows.branch > 0) & (place[rows.request] >= 0))
        entries[place[rows.request[further]], rows.branch[further]] = further
    step = host.step[slots, None] + np.arange(number + most)
    sizes = np.take_along_axis(host.draft_sizes[slots], np.minimum(step, host.draft_sizes.shape[1] - 1), axis=1)
    # A draft needs a mask, so that not all of these are of use, or computed.
    host.num_drafted[slots] = host.max_drafts[slots] - 1
    return slots, {
        "drafting_entries": entries,
        "drafting_slots": slots,
        "drafting_sizes": sizes.astype(np.int64),
        "drafting_subset": host.takes_subsets[slots],
    }


def _some_rows(
    host: HostTables, arrays: dict[str, np.ndarray], name: str, rows: np.ndarray, slots: np.ndarray, places: np.ndarray
) -> np.ndarray:
    """Add the arrays of ``LogitRows`` for some of the M logit rows; returns their slots.

    Args:
        host: Tables.
        arrays: For the device, added to.
        name: Which rows they are.
        rows: int64 ``[S]``.
        slots, places: int64 ``[M]``.
    """
    chosen = slots[rows]
    if rows.size:
        arrays[f"{name}_rows"], arrays[f"{name}_place"] = rows, places[rows]
        arrays[f"{name}_slots"] = chosen.astype(np.int32)
        if host.filters_confidence[chosen].any():
            arrays[f"{name}_asks_share"] = host.filters_confidence[chosen]
        if host.penalizes[chosen].any():
            ends = np.stack([host.prompt_end[chosen], host.canvas_end[chosen]], axis=1)
            arrays[f"{name}_penalties"] = np.concatenate([host.penalties[chosen], ends], axis=1, dtype=np.float64)
    return chosen


def _adjusting(
    states: CanvasStates, slots: np.ndarray, step: np.ndarray, takes_part: np.ndarray
) -> tuple[list[Policy], list[int], dict[str, np.ndarray]]:
    """The policies that adjust a step, and of each the first slot and :func:`_of_policy`."""
    policy_of = states.host.adjusts[slots]
    policies: list[Policy] = []
    first_slots: list[int] = []
    arrays: dict[str, np.ndarray] = {}
    for number in sorted(set(policy_of.tolist()) - {0}):
        own = _of_policy(states, slots, step, takes_part & (policy_of == number))
        if own.shape[1]:
            arrays[f"adjusted_{len(policies)}"] = own
            first_slots.append(first_of_consecutive(own[1].tolist()))
            policies.append(ADJUSTING[number - 1])
    return policies, first_slots, arrays


def first_of_consecutive(slots: list[int]) -> int:
    """The first of consecutive slots in ascending order; -1 where they are not."""
    first = slots[0]
    return first if slots == list(range(first, first + len(slots))) else -1


def _of_policy(states: CanvasStates, slots: np.ndarray, step: np.ndarray, is_own: np.ndarray) -> np.ndarray:
    """Some of a step's requests, int64 ``[8, S]`` in the order of :class:`PolicyRequests`; one array is sent at once.

    Args:
        states: Tables.
        slots, step: int64 ``[R]``.
        is_own: bool ``[R]``, which are meant.
    """
    host = states.host
    found = np.empty((8, slots.size), dtype=np.int64)
    number = _describe(
        found,
        slots,
        step,
        is_own,
        states.is_block_causal,
        host.block_start,
        host.canvas_start,
        host.block_length,
        host.first_end,
        host.last_end,
        host.prompt_end,
        host.cuts,
        host.block_limit,
        host.masked,
        host.pinned,
        host.num_alone,
    )
    return found if number == slots.size else found[:, :number].copy()


@compiled()
def _describe(
    found: np.ndarray,
    slots: np.ndarray,
    steps: np.ndarray,
    is_own: np.ndarray,
    is_block_causal: bool,
    block_start: np.ndarray,
    canvas_start: np.ndarray,
    block_length: np.ndarray,
    all_first_end: np.ndarray,
    last_end: np.ndarray,
    prompt_end: np.ndarray,
    cuts: np.ndarray,
    block_limit: np.ndarray,
    masked: np.ndarray,
    pinned: np.ndarray,
    num_alone: np.ndarray,
) -> int:
    """Fill the first columns of :func:`_of_policy`, and say how many.

    Undecided and all positions are those of canvases as far as they are there (``Canvas.end_at``). The tables come one
    by one, since a call takes long to unpack a tuple of all of them.
    """
    number = 0
    for req in range(slots.size):
        if not is_own[req]:
            continue
        slot = slots[req]
        start, length, first_end = block_start[slot], block_length[slot], all_first_end[slot]
        grown = max(start + 1 - first_end, 0)
        end = min(first_end + (grown + length - 1) // length * length, last_end[slot])
        # A block-causal model's first block may begin in the prompt: it ends on the grid.
        offset = start - canvas_start[slot]
        behind = start + length - (offset % length if is_block_causal else 0)
        if cuts[slot] and block_limit[slot]:
            behind = start + block_limit[slot]
        left = 0
        for k in range(masked.shape[1]):
            left += masked[slot, k]
        for position in range(behind, end):
            left += not pinned[slot, position]
        found[0, number], found[1, number], found[2, number] = req, slot, steps[req]
        found[3, number], found[4, number] = offset // length, left
        found[5, number] = end - max(prompt_end[slot], canvas_start[slot])
        found[6, number], found[7, number] = num_alone[slot], start - prompt_end[slot]
        number += 1
    return number


def idle_plan() -> DenoisePlan:
    """Of a step that denoises nothing."""
    return _plain_plan(_NONE, np.empty(0, dtype=bool), _NONE, {})


def _plain_plan(
    slots: np.ndarray, is_active: np.ndarray, step: np.ndarray, arrays: dict[str, np.ndarray]
) -> DenoisePlan:
    """Of a step in which no request wants more than its best tokens."""
    none: list[Any] = []
    return DenoisePlan(
        slots, is_active, step, none, none, none, False, _NONE, arrays, _NONE, _NONE, -1, {}, {}, none, _NONE
    )
