"""What a step sees that the engine core wants to know: confidences at block entry, and steps of a calibration.

On a GPU the values are copied to the host beside the engine's own copy of the step's output, and become a
:class:`StepReport` when the engine reads that (:class:`ReportedOutput`); nothing waits for them.
"""

from collections.abc import Callable
from copy import copy
from typing import Any, NamedTuple

import numpy as np
import torch
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

from csrc_triton import Proposals
from csrc_triton.cpu import compiled
from csrc_triton.types import NO_CONFIDENCE
from vllm_osdt.messages import STEP_REPORT, HeldWeights, RecordedStep, Span, StepReport
from vllm_osdt.worker.slots import CanvasStates
from vllm_osdt.worker.step.batch import DenoiseBatch
from vllm_osdt.worker.transfer import wait_for


class _Seen(NamedTuple):
    """What one step saw; tensors on the host, complete when the step's output is."""

    req_ids: list[str]
    batch: DenoiseBatch
    mean_confidence: torch.Tensor | None  # float32 [R]
    recorded: torch.Tensor | None  # int32 [6, C, W], see grids_to_record
    ran_ahead: torch.Tensor | None  # bool or int64 [R], steps behind this one that were of use; None without any
    drafted: torch.Tensor | None  # int64 [R, 2], see Decision


class Decision(NamedTuple):
    """What a step decided, on the device; R requests, W positions, M logit rows."""

    proposals: Proposals
    is_masked: torch.Tensor | None  # bool [M], which proposals are of masked positions; all when None
    before: torch.Tensor | None  # bool [R, W], masks before the step, where they are kept
    after: torch.Tensor | None  # bool [R, MAX_BLOCK_LENGTH], masks after it; None where the host has the tables
    canvas: torch.Tensor  # int32 [R, W], tokens
    confidence: torch.Tensor  # float32 [R, W], NO_CONFIDENCE without logits
    num_ready: torch.Tensor  # int32 [R], tokens to emit
    # int64 [R, 2], positions that the next step verifies (messages.Span), length 0: none; None without such a policy
    drafted: torch.Tensor | None = None
    ahead: torch.Tensor | None = None  # int64 [R, W], see RecordedStep


class StepRecorder:
    """Collects what a step saw, for the report that goes with its output."""

    def __init__(self, states: CanvasStates) -> None:
        self._states = states
        self._seen: _Seen | None = None
        self._copied = None if states.device.type == "cpu" else torch.cuda.Event()

    def see(
        self,
        req_ids: list[str],
        batch: DenoiseBatch,
        decision: Decision,
        recorded: torch.Tensor | None,
        ran_ahead: torch.Tensor | None = None,
    ) -> None:
        """Take in a step.

        Args:
            req_ids: ``[R]`` ids of the batch's requests.
            batch: The step.
            decision: What it decided.
            recorded: Of :func:`grids_to_record`; None when no request calibrates.
            ran_ahead: bool or int64 ``[R]``, how many steps behind this one were of use; None without any.
        """
        drafted = decision.drafted
        if not self._states.observed and ran_ahead is None and drafted is None:
            return
        means = None
        if self._states.observed and self._wanted(batch).any():
            means = mean_by_request(decision.proposals, decision.is_masked, *batch.blocks.canvas_index.shape)
        if means is None and recorded is None and ran_ahead is None and drafted is None:
            return
        if self._copied is not None:
            means, recorded, ran_ahead, drafted = map(_to_host, (means, recorded, ran_ahead, drafted))
            self._copied.record()
        self._seen = _Seen(req_ids, batch, means, recorded, ran_ahead, drafted)

    def _wanted(self, batch: DenoiseBatch) -> np.ndarray:
        """The requests whose mean confidence is reported, bool ``[R]``."""
        host, slots = self._states.host, batch.slots_np
        enters = host.is_watched[slots] & (batch.step_np == 0)
        return (enters | host.reports_confidence[slots]) & batch.is_active

    def attach_to(self, output: Any, weights: HeldWeights) -> Any:
        """The output with the report of its step.

        Args:
            output: vLLM's.
            weights: That the step had.
        """
        if isinstance(output, AsyncModelRunnerOutput):
            return ReportedOutput(output, self._report_later(weights))
        if isinstance(output, ModelRunnerOutput):
            output = copy(output)  # vLLM shares the empty one
            setattr(output, STEP_REPORT, self._report_later(weights)())
        return output

    def _report_later(self, weights: HeldWeights) -> Callable[[], StepReport]:
        seen, self._seen = self._seen, None
        host = self._states.host
        report = StepReport(
            num_fallbacks=self._states.take_fallbacks(),
            weights=weights,
            takes_branches=self._states.has_branches,
        )
        if seen is None:
            return lambda: report
        # The tables are those of the next step when the report is read.
        slots, wanted = seen.batch.slots_np, self._wanted(seen.batch)
        block, offset = np.divmod(
            host.block_start[slots] - host.canvas_start[slots], np.maximum(host.block_length[slots], 1)
        )
        offset[host.cuts[slots] == 0] = 0
        reports_all, rows = host.reports_confidence[slots], seen.batch.recorded_np
        is_watched = host.is_watched[slots]

        def finish() -> StepReport:
            if self._copied is not None:
                wait_for(self._copied)  # long done: the output has come
            if seen.mean_confidence is not None:
                means = seen.mean_confidence.numpy()
                for row in np.flatnonzero(wanted).tolist():
                    if is_watched[row] and seen.batch.step_np[row] == 0:
                        report.entries.append((seen.req_ids[row], int(block[row]), float(means[row])))
                    if reports_all[row]:
                        report.mean_confidence[seen.req_ids[row]] = float(means[row])
            if seen.ran_ahead is not None:
                report.ran_ahead = dict(zip(seen.req_ids, map(int, seen.ran_ahead.tolist()), strict=True))
            if seen.drafted is not None:
                for req_id, (first, length) in zip(seen.req_ids, seen.drafted.tolist(), strict=False):
                    if length:
                        report.drafted[req_id] = Span(first, length)
            if seen.recorded is not None:
                req_ids = [seen.req_ids[row] for row in rows.tolist()]
                confidence, proposal, before, after, tokens, ahead = seen.recorded.numpy()
                report.recorded = RecordedStep(
                    req_ids,
                    block[rows],
                    seen.batch.step_np[rows],
                    confidence.view(np.float32),
                    proposal,
                    before.astype(bool),
                    after.astype(bool),
                    tokens,
                    ahead,
                    offset[rows],
                )
            return report

        return finish


class ReportedOutput(AsyncModelRunnerOutput):
    """vLLM's output that is still being copied, and the report that comes with it."""

    def __init__(self, output: AsyncModelRunnerOutput, report: Callable[[], StepReport]) -> None:
        self._output = output
        self._report = report

    def get_output(self) -> ModelRunnerOutput:
        """Wait for the output, as vLLM does; the report is then there too."""
        output = self._output.get_output()
        setattr(output, STEP_REPORT, self._report())
        return output

    def get_kv_connector_output(self) -> Any:
        """As vLLM does; 0.33 asks for it when the output has failed."""
        return self._output.get_kv_connector_output()


def _to_host(tensor: torch.Tensor | None) -> torch.Tensor | None:
    if tensor is None:
        return None
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def mean_by_request(proposals: Proposals, is_masked: torch.Tensor | None, num_reqs: int, width: int) -> torch.Tensor:
    """Mean confidence of every request's masked positions, float32 ``[num_reqs]``, NaN without any.

    Args:
        proposals: Of the batch; those of a request follow each other.
        is_masked: bool ``[M]``, which of them count; all when None.
        num_reqs, width: Shape that ``proposals.position`` indexes.
    """
    position, confidence = proposals.position, proposals.confidence
    if confidence.device.type == "cpu":
        if is_masked is not None:
            position, confidence = position[is_masked], confidence[is_masked]
        means = np.full(num_reqs, np.nan, dtype=np.float32)
        _mean_by_request(means, position.numpy(), confidence.numpy(), width)
        return torch.from_numpy(means)
    request = torch.div(position, width, rounding_mode="floor")
    weight = torch.ones_like(confidence) if is_masked is None else is_masked.to(confidence.dtype)
    total = torch.zeros(num_reqs + 1, dtype=torch.float32, device=confidence.device)  # the last: of padding
    total.index_add_(0, request, confidence * weight)
    return (total / torch.zeros_like(total).index_add_(0, request, weight))[:num_reqs]


@compiled()
def _mean_by_request(means: np.ndarray, position: np.ndarray, confidence: np.ndarray, width: int) -> None:
    """Write the mean confidence of every request's rows; rows of a request follow each other."""
    count = 0
    for row in range(position.size):
        request = position[row] // width
        if row == 0 or position[row - 1] // width != request:
            count = 0
            means[request] = 0.0
        count += 1
        means[request] += (confidence[row] - means[request]) / count


def grids_to_record(states: CanvasStates, batch: DenoiseBatch, decision: Decision) -> torch.Tensor:
    """What a recorded step keeps of the requests that calibrate, in one tensor, which is copied at once.

    Args:
        states: Tables, after the step.
        batch: The step; some of its requests calibrate.
        decision: What it decided, with the masks before it.

    Returns:
        int32 ``[6, C, W]``: bits of the confidence, proposal, masks before and after, tokens, steps ahead
        (``RecordedStep``).
    """
    rows, shape = batch.recorded, batch.blocks.canvas_index.shape
    assert rows is not None and decision.before is not None
    confidence = decision.confidence
    token, _ = decision.proposals.to_grids(*shape)
    has_logits = confidence != NO_CONFIDENCE
    proposal = torch.where(has_logits, token, -1).to(torch.int32)
    before = (decision.before & has_logits).to(torch.int32)
    after = states.masked[batch.blocks.slots, : shape[1]].to(torch.int32)
    if batch.has_cuts:  # what is behind a cut is as undecided as it was
        limit = states.block_limit[batch.slots]
        place = torch.arange(shape[1], device=limit.device)
        is_behind = (limit > 0).unsqueeze(1) & (place >= limit.unsqueeze(1))
        after[: limit.shape[0]] |= is_behind.to(torch.int32)
    ahead = torch.zeros_like(before) if decision.ahead is None else decision.ahead.to(torch.int32)
    grids = (confidence.view(torch.int32), proposal, before, after, decision.canvas, ahead)
    return torch.stack(grids)[:, rows]
