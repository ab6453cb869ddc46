"""What the sampler needs of a step, on the device."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from vllm.v1.worker.gpu.input_batch import InputBatch

from csrc_triton import Blocks, Rules
from vllm_osdt.policies import Policy
from vllm_osdt.policies.base import Cutter
from vllm_osdt.worker.grammar import GrammarRows
from vllm_osdt.worker.slots import CanvasStates
from vllm_osdt.worker.step.layout import StepPlan
from vllm_osdt.worker.step.plan import DenoisePlan
from vllm_osdt.worker.step.queries import Queries
from vllm_osdt.worker.step.rows import StepRows


class LogitRows(NamedTuple):
    """Some of a step's M logit rows, S of them; their requests want more than the best token.

    Attributes:
        slots_np: int64 ``[S]`` slot of each, on the host.
        rows_np: int64 ``[S]``, the same as ``rows``, likewise.
        rows: int64 ``[S]``, which of the M.
        slots: int32 ``[S]``, the same as ``slots_np``.
        place: int64 ``[S]``, position of the token that each predicts; ``NOWHERE`` where ``min_tokens`` is not asked.
        asks_share: bool ``[S]``, whose confidence is their share of what is left; None when no row's is.
        penalties: float64 ``[S, 5]``, presence, frequency and repetition penalty, end of prompt, end of canvas; None
            when no row has a penalty.
    """

    slots_np: np.ndarray
    rows_np: np.ndarray
    rows: torch.Tensor
    slots: torch.Tensor
    place: torch.Tensor
    asks_share: torch.Tensor | None = None
    penalties: torch.Tensor | None = None

    def part(self, start: int, stop: int) -> "LogitRows":
        """Rows ``start`` to ``stop`` of them."""
        return LogitRows._make(None if one is None else one[start:stop] for one in self)


class ReadRows(NamedTuple):
    """The logit rows that a policy reads, S of a step's M: those of its requests' masked positions.

    Attributes:
        rows: int64 ``[S]``, which of the M, ascending.
        request: int64 ``[S]``, whose each is: which of the policy's requests.
        offset: int64 ``[S]``, position in the active block.
        slots: int64 ``[S]``, of the request of each.
        step_index: int64 ``[S]``, denoising steps that the block has seen before this one.
        shaped: Those of them whose logits are changed; None without any.
        shaped_at: int64: which of the S those are.
        shaped_np: The same on the host.
        block_length_np: int64 ``[S]``, of the request of each, on the host.
        longest: The largest of those.
        is_verified: bool ``[S]``, whether they are of a verification; None where none is.
    """

    rows: torch.Tensor
    request: torch.Tensor
    offset: torch.Tensor
    slots: torch.Tensor
    step_index: torch.Tensor
    shaped: LogitRows | None
    shaped_at: torch.Tensor
    shaped_np: np.ndarray
    block_length_np: np.ndarray
    longest: int
    is_verified: torch.Tensor | None = None


class PolicyRequests(NamedTuple):
    """Some of a step's requests, S of them, as ``policies.Step`` has them; ``rows`` and ``slots`` ascend or not alike.

    Attributes:
        rows: int64 ``[S]``, which of the batch's requests.
        slots: int64 ``[S]``.
        step_index: int64 ``[S]``.
        block_index: int64 ``[S]``.
        num_left: int64 ``[S]``.
        num_positions: int64 ``[S]``.
        num_alone: int64 ``[S]``.
        output_index: int64 ``[S]``.
        first_slot: Where their slots are consecutive ones in ascending order, the first; else -1. Their rows of a table
            are then a part of it, which takes no copies.
    """

    rows: torch.Tensor
    slots: torch.Tensor
    step_index: torch.Tensor
    block_index: torch.Tensor
    num_left: torch.Tensor
    num_positions: torch.Tensor
    num_alone: torch.Tensor
    output_index: torch.Tensor
    first_slot: int

    def take(self, table: torch.Tensor) -> torch.Tensor:
        """Their rows ``[S, ...]`` of a table by slot, the table's own or copies: :meth:`put` them back if changed."""
        if self.first_slot >= 0:
            return table.narrow(0, self.first_slot, self.slots.shape[0])
        return table.index_select(0, self.slots)

    def put(self, table: torch.Tensor, own: torch.Tensor) -> None:
        """Put back what :meth:`take` gave."""
        if self.first_slot < 0:
            table.index_copy_(0, self.slots, own)


class CutRows(NamedTuple):
    """The requests whose blocks are cut in a step, of one cutter."""

    cutter: Cutter
    requests: PolicyRequests


class AdjustedRows(NamedTuple):
    """The requests of a policy that adjusts its steps, see ``policies.Step``; S of them."""

    policy: Policy
    requests: PolicyRequests
    read: ReadRows | None  # where the policy reads logits
    span: torch.Tensor | None  # int64 [S, 2], see policies.base.Verification; None where nothing is verified


class ModifiedRequests(NamedTuple):
    """The logit rows of the requests that have a modifier, S of a step's M: those of their masked positions.

    Attributes:
        number: Place of the modifier in ``policies.MODIFIERS``.
        rows: int64 ``[S]``, which of the M.
        slots: int64 ``[S]``, of the request of each.
        offset: int64 ``[S]``, position in the active block.
        step_index: int64 ``[S]``, denoising steps that the block has seen before this one.
    """

    number: int
    rows: torch.Tensor
    slots: torch.Tensor
    offset: torch.Tensor
    step_index: torch.Tensor


class DraftRows(NamedTuple):
    """The requests whose drafts a step verifies and makes (``worker.drafting``), G of them, with up to K branches.

    Attributes:
        entries: int64 ``[G, K]``, which of the step's blocks each branch is, -1 for none; the first is the request.
        slots: int64 ``[G]``.
        sizes: int64 ``[G, at least 2 K]``, positions that a denoising step is expected to unmask, from this one on.
        is_subset: bool ``[G]``, a draft is right where the target has all of it; else where it is the target.
        slots_np: The same as ``slots`` on the host.
    """

    entries: torch.Tensor
    slots: torch.Tensor
    sizes: torch.Tensor
    is_subset: torch.Tensor
    slots_np: np.ndarray


@dataclass(frozen=True)
class DenoiseBatch:
    """What the sampler needs of a step; R requests, W the longest block among them, M positions with logits.

    Blocks, rules and thresholds are those of the requests, and behind them of their further branches: Q of each, of
    which the first R are the requests'.

    Attributes:
        slots_np: ``[R]`` slots, on the host.
        is_active: bool ``[R]``, on the host: whether the request denoises in this step.
        step_np: int64 ``[R]``, on the host: denoising steps that the block has seen before this one.
        slots: The same as ``slots_np``, on the device.
        blocks: The active blocks; those that denoise nothing have the last row of ``CanvasStates.masked``.
        position: int64 ``[M]``, index into ``[R, W]`` of each logits row: of masked positions, and of those that may be
            edited.
        rules: By which each block is unmasked; policies that adjust the step overwrite parameters.
        temperature: float32 ``[M]``, or None when all are 0.
        noise_key: int64 ``[M]``, or None likewise.
        by_entropy: bool ``[M]``, rows whose confidence is one of their entropy, or None when there are none.
        edit_threshold: float32 ``[R]``, infinite where nothing is edited, or None when no request edits.
        draft_threshold: float32 ``[R]``, infinite where nothing is drafted, or None when no request has a draft.
        adjusted: The requests whose policy adjusts the step, by policy.
        has_cuts: Whether the blocks of some requests are, or will be, shorter than ``block_length``.
        cut: The requests whose blocks are cut in this step, by cutter.
        recorded_np: int64 ``[C]``, on the host: which of the batch's requests calibrate or have a grammar.
        recorded: The same on the device, None where none does.
        shaped: Rows whose logits are changed before a token is proposed; None without any.
        scored: Rows whose log probabilities are returned; None without any.
        num_scores: Log probabilities returned of each token, besides its own, of the request that asks for most; -1
            when none asks.
        grammar: What grammars allow, which comes after the model has run; None where no request has one.
        modified: The rows of each modifier that a request has.
        drafting: The requests whose drafts are verified and made; None without any.
        asking: int64 ``[A]`` slots of the requests that ask for them, None when none does.
    """

    slots_np: np.ndarray
    is_active: np.ndarray
    step_np: np.ndarray
    slots: torch.Tensor
    blocks: Blocks
    position: torch.Tensor
    rules: Rules
    temperature: torch.Tensor | None
    noise_key: torch.Tensor | None
    by_entropy: torch.Tensor | None
    edit_threshold: torch.Tensor | None
    draft_threshold: torch.Tensor | None
    adjusted: list[AdjustedRows]
    has_cuts: bool
    cut: list[CutRows]
    recorded_np: np.ndarray
    recorded: torch.Tensor | None
    shaped: LogitRows | None = None
    scored: LogitRows | None = None
    num_scores: int = -1
    asking: torch.Tensor | None = None
    grammar: GrammarRows | None = None
    modified: tuple[ModifiedRequests, ...] = ()
    drafting: DraftRows | None = None

    @property
    def needs_logits(self) -> bool:
        """Whether the step needs more of its logits than the best token and its confidence."""
        reads = bool(self.modified) or any(one.read is not None for one in self.adjusted)
        return (reads and self.position.shape[0] > 0) or self.shaped is not None or self.scored is not None


@dataclass
class CanvasInputBatch(InputBatch):
    """vLLM's input batch with what a canvas needs.

    Attributes:
        denoise: The denoising step that it is for.
        logit_rows: int64 ``[M]``, the same as ``logits_indices`` where the last layer narrows the hidden states to
            them; None where it does not.
        queries: What attention sees of it.
        graph: The graph that runs it, a ``StepDescriptor``.
        rows: What the scheduler asked for, on the host.
        plan: Its layout, likewise.
        pages: Arrays of ``worker.branch_pages``, where the step has further branches.
    """

    denoise: DenoiseBatch | None = None
    logit_rows: torch.Tensor | None = None
    queries: Queries | None = None
    graph: Any = None
    rows: "StepRows | None" = None
    plan: StepPlan | None = None
    pages: dict[str, torch.Tensor] | None = None


def denoise_batch(states: CanvasStates, plan: DenoisePlan, sent: Mapping[str, torch.Tensor]) -> DenoiseBatch:
    """A planned step on the device.

    Args:
        states: Tables.
        plan: The step.
        sent: ``plan.arrays`` on the device, perhaps among others; a graph's, with padding.
    """
    return DenoiseBatch(
        slots_np=plan.slots,
        is_active=plan.is_active,
        step_np=plan.step,
        slots=sent["slots"],
        blocks=Blocks(
            cells=states.cells,
            masked=states.masked,
            slots=sent["mask_rows"],
            canvas_index=sent["canvas_index"],
            end_token_ids=sent["end_token_ids"],
            num_output_positions=sent["num_output_positions"],
        ),
        position=sent["position"],
        rules=Rules(rule=sent["rule"], parameter=sent["parameter"], min_unmask=sent["min_unmask"]),
        temperature=sent.get("temperature"),
        noise_key=sent.get("noise_key"),
        by_entropy=sent.get("by_entropy"),
        edit_threshold=sent.get("edit_threshold"),
        draft_threshold=sent.get("draft_threshold"),
        adjusted=[_adjusted_rows(policy, number, plan, sent) for number, policy in enumerate(plan.policies)],
        has_cuts=plan.has_cuts,
        cut=[CutRows(cutter, _policy_requests(sent[f"cut_{number}"])) for number, cutter in enumerate(plan.cutters)],
        recorded_np=plan.recorded,
        recorded=sent.get("recorded"),
        shaped=_logit_rows("shaped", plan.shaped_slots, plan.arrays, sent),
        scored=_logit_rows("scored", plan.scored_slots, plan.arrays, sent),
        num_scores=plan.num_scores,
        asking=sent.get("asking"),
        modified=tuple(_modified(number, sent[f"modified_{number}"]) for number in plan.modifiers),
        drafting=_draft_rows(plan, sent),
    )


def _draft_rows(plan: DenoisePlan, sent: Mapping[str, torch.Tensor]) -> DraftRows | None:
    """The requests whose drafts are verified and made, on the device; None without any."""
    if not plan.drafting.size:
        return None
    entries, slots, sizes, subset = (sent[f"drafting_{name}"] for name in ("entries", "slots", "sizes", "subset"))
    return DraftRows(entries, slots, sizes, subset, plan.drafting)


def _adjusted_rows(policy: Policy, number: int, plan: DenoisePlan, sent: Mapping[str, torch.Tensor]) -> AdjustedRows:
    read = None
    if f"read_{number}" in sent:
        rows, request, offset, slots, step_index = sent[f"read_{number}"].unbind()
        shaped = _logit_rows(f"read_{number}_shaped", plan.read_slots[number], plan.arrays, sent)
        at = sent[f"read_{number}_at"], plan.arrays[f"read_{number}_at"]
        lengths, is_verified = plan.read_lengths[number], sent.get(f"read_{number}_verified")
        read = ReadRows(rows, request, offset, slots, step_index, shaped, *at, *lengths, is_verified)
    requests = _policy_requests(sent[f"adjusted_{number}"], plan.first_slots[number])
    return AdjustedRows(policy, requests, read, sent.get(f"adjusted_span_{number}"))


def _modified(number: int, found: torch.Tensor) -> ModifiedRequests:
    """The rows of a modifier."""
    rows, slots, offset, step_index = found.unbind()
    return ModifiedRequests(number, rows, slots, offset, step_index)


def _policy_requests(found: torch.Tensor, first_slot: int = -1) -> PolicyRequests:
    """:func:`_of_policy` on the device."""
    rows, slots, *others = found.unbind()
    step_index, block_index, num_left, num_positions, num_alone, output_index = others
    known = num_left, num_positions, num_alone, output_index
    return PolicyRequests(rows, slots, step_index, block_index, *known, first_slot)


def _logit_rows(
    name: str, slots: np.ndarray, arrays: Mapping[str, np.ndarray], sent: Mapping[str, torch.Tensor]
) -> LogitRows | None:
    if not slots.size:
        return None
    return LogitRows(
        slots,
        arrays[f"{name}_rows"],
        sent[f"{name}_rows"],
        sent[f"{name}_slots"],
        sent[f"{name}_place"],
        sent.get(f"{name}_asks_share"),
        sent.get(f"{name}_penalties"),
    )
