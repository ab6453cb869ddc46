"""Plans the rows of canvas requests: which steps refresh the whole canvas and which denoise only the active block.

vLLM's scheduler keeps queues, KV pages, preemption, stop conditions and metrics. Rows of the canvas travel as
speculative placeholders, the way vLLM's own diffusion models do, so a step of a request is described by two numbers:
the position where its rows start (``num_computed_tokens``) and the number of placeholders after its committed tokens.
"""

from dataclasses import dataclass
from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.stats import RequestSpecDecodeMetrics, SchedulerStats
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.spec_decode.metrics import SpecDecodingStats

from vllm_osdt import metrics
from vllm_osdt.config import MAX_BLOCK_LENGTH, RESOLVED_KEY


@dataclass(slots=True)
class CanvasPlan:
    """What the scheduler knows of a request's canvas.

    Attributes:
        gen_length: Canvas length in tokens.
        block_length: Positions denoised together.
        cache: ``none``, ``prefix`` or ``dual``.
        refreshed_at: Committed tokens when prompt and canvas were last computed together, -1 before the first time.
    """

    gen_length: int
    block_length: int
    cache: str
    refreshed_at: int = -1


def _plan(request: Request) -> CanvasPlan:
    plan = getattr(request, "canvas_plan", None)
    if plan is None:
        options = request.sampling_params.extra_args[RESOLVED_KEY]
        plan = CanvasPlan(options["gen_length"], options["block_length"], options["cache"])
        request.canvas_plan = plan
    return plan


def _ended_well(request: Request) -> bool:
    """Whether a finished request was decoded to its end. A match of a stop string reaches the engine as an abort, so
    a request that has stop strings counts once it has output."""
    if request.status in (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED):
        return True
    return (
        request.status == RequestStatus.FINISHED_ABORTED
        and bool(request.sampling_params.stop)
        and request.num_output_tokens > 0
    )


class CanvasScheduler(Scheduler):
    """vLLM's scheduler for models that attend to their whole canvas.

    A request's first step, and the first step of each block, computes prompt and canvas together (a refresh); later
    steps compute the rows its cache mode says. A step is planned whole or not at all: rows of one request are never
    split over two steps.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Counters by number of accepted tokens: a request may have longer blocks than the served default.
        self.num_spec_tokens = MAX_BLOCK_LENGTH
        self._max_num_active_reqs: int = self.max_num_active_reqs
        self._placeholders = [-1] * self.max_model_len
        self._postponed: dict[str, int] = {}  # request id -> steps it has waited for room, in a row
        self._failed_req_ids: set[str] = set()
        self._news = metrics.EngineNews()
        self._allocate_slots = self.kv_cache_manager.allocate_slots
        self.kv_cache_manager.allocate_slots = self._allocate_with_canvas

    def add_request(self, request: Request) -> None:
        """Queue a request, with vLLM's per-request speculative metrics on: their steps are the request's NFE. (The
        engine argument that turns them on is refused without a speculative config.)"""
        request.spec_decode_metrics = RequestSpecDecodeMetrics.new(_plan(request).block_length)
        super().add_request(request)

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """Plan one engine step (see the class)."""
        budget = self.max_num_scheduled_tokens
        order = self.running
        waited, self._postponed = self._postponed, {}
        if waited:
            order = sorted(order, key=lambda request: -waited.get(request.request_id, 0))
        for request in order:
            num_rows = self._plan_step(request, budget)
            if num_rows == 0:
                self._postponed[request.request_id] = waited.get(request.request_id, 0) + 1
            budget -= num_rows
        self._limit_admissions(budget)
        output = super().schedule(throttle_prefills)
        # A dynamic attribute travels with the output to every worker.
        output.failed_req_ids = self._failed_req_ids
        self._failed_req_ids = set()
        return output

    def _plan_step(self, request: Request, budget: int) -> int:
        """Set where a running request's rows start; returns their number, 0 when they must wait for budget."""
        plan = _plan(request)
        committed = request.num_output_tokens
        prefix = request.num_prompt_tokens + committed
        rest = plan.gen_length - committed
        if plan.cache == "none" or plan.refreshed_at != committed:
            start, num_canvas_rows = 0, rest
        else:
            start, num_canvas_rows = prefix, plan.block_length if plan.cache == "dual" else rest
        num_rows = prefix + num_canvas_rows - start
        if num_rows > budget:
            # schedule() counts current_step up before it looks at this.
            request.next_decode_eligible_step = self.current_step + 2
            return 0
        request.num_computed_tokens = start
        request.spec_token_ids = self._placeholders[:num_canvas_rows]
        return num_rows

    def _limit_admissions(self, budget: int) -> None:
        """Admit only as many waiting requests as have room for prompt and canvas in this step."""
        room = len(self.running)
        for request in self.waiting:
            budget -= request.num_prompt_tokens + _plan(request).gen_length
            if budget < 0:
                break
            room += 1
        self.max_num_active_reqs = min(room, self._max_num_active_reqs)

    def _allocate_with_canvas(self, request: Request, num_new_tokens: int, *args: Any, **kwargs: Any) -> Any:
        """Give a request that starts (or resumes) the KV pages of its whole canvas at once, and a running one none."""
        if request.status == RequestStatus.RUNNING:
            return self.kv_cache_manager.empty_kv_cache_blocks
        num_new_tokens += _plan(request).gen_length - request.num_output_tokens
        return self._allocate_slots(request, num_new_tokens, *args, **kwargs)

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        """Add the canvas rows of newly admitted requests: their first step is a refresh, not a prompt-only prefill."""
        for new in scheduler_output.scheduled_new_reqs:
            request = self.requests[new.req_id]
            num_canvas_rows = _plan(request).gen_length - request.num_output_tokens
            scheduler_output.num_scheduled_tokens[new.req_id] += num_canvas_rows
            scheduler_output.total_num_scheduled_tokens += num_canvas_rows
            scheduler_output.scheduled_spec_decode_tokens[new.req_id] = self._placeholders[:num_canvas_rows]
        for req_id in scheduler_output.num_scheduled_tokens:
            request = self.requests[req_id]
            _plan(request).refreshed_at = request.num_output_tokens
        super()._update_after_schedule(scheduler_output)

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        """Nothing: the next step's placeholders are planned by :meth:`schedule`."""

    def make_spec_decoding_stats(
        self,
        spec_decoding_stats: SpecDecodingStats | None,
        num_draft_tokens: int,
        *args: Any,
        **kwargs: Any,
    ) -> SpecDecodingStats | None:
        """vLLM's counters by position end at ``num_spec_tokens``; canvas rows beyond it count in the sum alone."""
        counted = min(num_draft_tokens, self.num_spec_tokens)
        stats = super().make_spec_decoding_stats(spec_decoding_stats, counted, *args, **kwargs)
        if stats is not None:
            stats.num_draft_tokens += num_draft_tokens - counted
        return stats

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """As vLLM does. Every output, not only an engine's last, says how its request is decoded and how many forwards
        it has taken so far: the front end may end the request at a stop string."""
        self._news.hear(getattr(model_runner_output, "osdt_report", None), self.requests)
        requests = {req_id: self.requests[req_id] for req_id in model_runner_output.req_ids if req_id in self.requests}
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for client in outputs.values():
            for output in client.outputs:
                request = requests.get(output.request_id)
                if request is not None and request.spec_decode_metrics is not None:
                    output.spec_decode_metrics = request.spec_decode_metrics
                    output.kv_transfer_params = {metrics.KEY: self._news.describe(request)}
        return outputs

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        """vLLM's, with what happened to profiles and requests since the last ones."""
        stats = super().make_stats(*args, **kwargs)
        news = self._news.take()
        if stats is not None and news:
            stats.kv_connector_stats = {metrics.KEY: news}
        return stats

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        if not _ended_well(request):
            self._failed_req_ids.add(request.request_id)
        self._news.ended(request, counts=_ended_well(request))
        return super()._free_request(request, *args, **kwargs)
