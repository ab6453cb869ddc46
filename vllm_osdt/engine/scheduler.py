"""Plans the rows of canvas requests, by their ``CanvasPlan``.

vLLM's scheduler keeps queues, KV pages, preemption, stop conditions and metrics. Rows of the canvas travel as
speculative placeholders, the way vLLM's own diffusion models do; rows start at ``num_computed_tokens``.
"""

import sys
import time
from collections.abc import Container, Iterable
from copy import copy
from itertools import chain
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.metrics.stats import RequestSpecDecodeMetrics, SchedulerStats
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.spec_decode.metrics import SpecDecodingStats

from vllm_osdt.calibration.store import open_store
from vllm_osdt.engine.audit import Auditor
from vllm_osdt.engine.branches import Brancher, BranchPool, rows_under_load, share_rows, step_of
from vllm_osdt.engine.calibrator import Calibrator
from vllm_osdt.engine.canvas_plan import CanvasPlan, Rows, make_plan
from vllm_osdt.engine.engine_config import describe_engine
from vllm_osdt.engine.grammar import Grammars
from vllm_osdt.engine.infill import kept, num_needed, select
from vllm_osdt.engine.ngram import draft_block
from vllm_osdt.engine.statistics import describe, num_forwards
from vllm_osdt.engine.trace import Tracer
from vllm_osdt.engine.weights import Weights
from vllm_osdt.geometry import MAX_BLOCK_LENGTH, max_logit_rows
from vllm_osdt.host.compat.engine import patch_page_allocation, patch_page_caching
from vllm_osdt.messages import (
    CANVAS_STEP,
    ERROR,
    KEY,
    OPEN_HOLE,
    STEP_REPORT,
    TRACE,
    Assignment,
    CanvasStep,
    Decides,
    HeldWeights,
    RequestSpec,
    Span,
    StepReport,
)
from vllm_osdt.models.traits import Traits
from vllm_osdt.options.operator import server_options
from vllm_osdt.policies import POLICIES
from vllm_osdt.policies.base import Branch

logger = init_logger("vllm.vllm_osdt.engine.scheduler")
NO_TOKEN = (
    "No token that the request's other parameters allow continues its structured output; leave out allowed_token_ids, "
    "logit_bias, bad_words, min_tokens or stop_token_ids, or let them allow what the output needs."
)


def _ended_well(request: Request) -> bool:
    """Whether a finished request was decoded to its end.

    A match of a stop string reaches the engine as an abort, so a request that has stop strings counts once it has
    output.
    """
    if request.status in (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED):
        return True
    return (
        request.status == RequestStatus.FINISHED_ABORTED
        and bool(request.sampling_params.stop)
        and request.num_output_tokens > 0
    )


class CanvasScheduler(Scheduler):
    """vLLM's scheduler for models that denoise a canvas; a request's ``CanvasPlan`` says which of its rows run.

    It plans a step when the last one's outcome is known: the rows of a step depend on whether a block is finished.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Counters by number of accepted tokens: a request may have longer blocks than the served default.
        self.num_spec_tokens = MAX_BLOCK_LENGTH
        logger.info("%s", describe_engine(self.vllm_config))
        self.calibrator = Calibrator.of_engine(self.vllm_config)
        options = server_options(self.vllm_config)
        self._auditor = Auditor(options.audit)
        self._weights = Weights()
        self._tracer = Tracer(self.max_num_running_reqs)
        self._ended_thinking: dict[str, int] = {}  # in this step, by id: how many of its new tokens are given
        self._is_fused = options.fused_commit
        self._load_aware = options.load_aware
        model = self.vllm_config.model_config
        self._traits: Traits = model.hf_config.traits
        self._grammars = Grammars(self.structured_output_manager, model.get_vocab_size(), self._traits.mask_token_id)
        # vLLM would apply it to a canvas too.
        self._long_prefill_threshold = self.scheduler_config.long_prefill_token_threshold
        self.scheduler_config.long_prefill_token_threshold = 0
        self._max_rows = sys.maxsize  # of a request in the step that is being planned, beyond two blocks
        self._placeholders = [-1] * self.max_model_len
        self._postponed: dict[str, int] = {}  # request id -> steps it has waited for room, in a row
        self._rows: dict[str, Rows] = {}  # of the step that is being planned
        self._room = 0  # rows of it that are left
        self._branch_room = 0  # likewise, of branches: logits are read in few more rows than blocks have
        self._has_branch = False  # whether a request of it has branches
        self._verifies = False  # whether it verifies drafts of a request
        self._lacking: list[Request] = []  # those that wait in it, for pages of branches
        self._ran_ahead: dict[str, int] = {}  # of the step that is being counted, see StepReport
        self._has_waited = False  # whether some request has found no place in the last step
        self._branchers: dict[str, Brancher] = {}  # of requests that run and whose policy has branches
        max_reqs, max_rows = self.max_num_running_reqs, self.max_num_scheduled_tokens
        self._max_branch_rows = sys.maxsize  # logits of all of a step's rows may be read
        if max_logit_rows(max_reqs, max_rows) < max_rows:
            self._max_branch_rows = max_logit_rows(max_reqs, max_rows) - max_reqs * self._traits.block_length
        groups = self.kv_cache_config.kv_cache_groups
        self._pool = BranchPool(self.kv_cache_manager.block_pool, groups[0].kv_cache_spec.block_size if groups else 1)
        # Layers of several kinds would need pages of each; branches are left out there, and where attention cannot take
        # them, of which the first step's report tells: no block's first step has any.
        self._has_branches = len(groups) == 1
        self._verifies_by_branches = not (self._traits.logits_shift or self._traits.commits_causally)
        self._allocate_slots = patch_page_allocation(self.kv_cache_manager, self._allocate_for_rows)
        patch_page_caching(self.kv_cache_manager, lambda request: self._plan(request).num_final)

    def add_request(self, request: Request) -> None:
        """Queue a request, with vLLM's per-request speculative metrics on: their steps are the request's NFE.

        (The engine argument that turns them on is refused without a speculative config.)
        """
        request.spec_decode_metrics = RequestSpecDecodeMetrics.new(self._plan(request).block_length)
        request.canvas_steps = -1, 0  # first undecided position when it ran last, and denoising steps of that block
        super().add_request(request)

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """Plan one engine step (see the class)."""
        self._room = self.max_num_scheduled_tokens
        self._max_rows = self._rows_of_a_long_prompt()
        self._has_branch = self._verifies = False
        if self._branchers:
            longer = sum(max(self._plan(one).block_length - self._traits.block_length, 0) for one in self.running)
            self._branch_room = self._max_branch_rows - longer
        self._rows.clear()
        self._admit_audits()
        self._lacking.clear()
        self._tracer.keep(self.running)
        order = self.running
        waited, self._postponed = self._postponed, {}
        if waited:
            audits = self._auditor.running  # behind all others
            order = sorted(order, key=lambda one: (one.request_id in audits, -waited.get(one.request_id, 0)))
        for request in order:
            if not self._plan_step(request):
                self._postponed[request.request_id] = waited.get(request.request_id, 0) + 1
        if self._lacking and not self._rows:
            self._have_one_preempt()
        output = super().schedule(throttle_prefills)
        audits = self._auditor.running
        num_waiting = self.get_request_counts()[1]
        if audits and num_waiting:  # an audit may wait as long as it takes
            num_waiting -= sum(one.request_id in audits for one in chain(self.waiting, self.kv_holding_waiting))
        self._has_waited = num_waiting > 0
        if audits and self.running and self.running[-1].request_id not in audits:  # others have begun behind it
            self.running.sort(key=lambda one: one.request_id in audits)
        has_place = len(self.running) < self.max_num_running_reqs
        step = CanvasStep(is_awaited=bool(self._postponed) or (self._has_waited and has_place))
        for new in output.scheduled_new_reqs:  # or resumed
            request = self.requests[new.req_id]
            self._grammars.forget(new.req_id)
            if not request.num_output_tokens:
                request.canvas_weights, request.canvas_is_answer = self._weights, False
            spec = self._spec(request)
            assignment = self.calibrator.assign(
                new.req_id,
                spec,
                request.sampling_params.max_tokens,
                is_kept=request.canvas_weights is not self._weights or request.canvas_is_answer,
                has_grammar=request.use_structured_output,
            )
            if spec.options.return_trace:
                assignment = assignment._replace(is_recorded=True)
                self._tracer.begin(new.req_id, assignment.schedule)
            step.assignments[new.req_id] = assignment
            request.canvas_about = self.calibrator.about(new.req_id)
            request.canvas_ngram = spec.options.draft_ngram if assignment.has_drafts else None
            request.canvas_drafted = -1
            brancher = self._brancher_of(request, assignment)
            if brancher is not None:
                self._branchers[new.req_id] = brancher
        self._draft(step, output.num_scheduled_tokens)
        if self._has_branch:
            for req_id in output.num_scheduled_tokens:
                if self._rows[req_id].branches:
                    step.branches[req_id] = self._pool.of_step(req_id, self._rows[req_id].branches)
        if self._traits.logits_shift or self._traits.commits_causally:
            step.first_position = frozenset(
                req_id for req_id in output.num_scheduled_tokens if self._rows[req_id].decides == Decides.FIRST_POSITION
            )
        if self._verifies:
            spans = ((req_id, self._rows[req_id].verified) for req_id in output.num_scheduled_tokens)
            step.verified = {req_id: span for req_id, span in spans if span is not None}
        setattr(output, CANVAS_STEP, step)  # a dynamic attribute travels with the output to every worker
        return output

    def _draft(self, step: CanvasStep, req_ids: Iterable[str]) -> None:
        """Look up drafts of the blocks that are entered, behind what a request drafts itself."""
        for request in map(self.requests.__getitem__, req_ids):
            begin = request.num_tokens
            if request.canvas_ngram is None or request.canvas_drafted == begin:
                continue
            request.canvas_drafted = begin
            if begin >= request.num_prompt_tokens + len(self._spec(request).draft or ()):
                length = self._plan(request).active_length(begin)
                tokens = draft_block(request.all_token_ids, request.canvas_ngram, length)
                step.drafts[request.request_id] = begin, tokens

    def get_grammar_bitmask(self, scheduler_output: SchedulerOutput) -> GrammarOutput | None:
        """What the grammars of a step's requests allow in their active blocks; made while the model runs."""
        requests = map(self.requests.__getitem__, scheduler_output.num_scheduled_tokens)
        return self._grammars.allow(
            (request, self._plan(request).active_length(request.num_tokens))
            for request in requests
            if request.use_structured_output and self._rows[request.request_id].decides != Decides.NOTHING
        )

    def _admit_audits(self) -> None:
        """Have one audit run while all requests have a place beside it; stop it when one has none, or has waited.

        It is the last request of those that run, the first that vLLM preempts. For rows or pages that it has a request
        that comes waits one step.
        """
        num_running, num_waiting = self.get_request_counts()
        if num_running + num_waiting > self.max_num_running_reqs or self._has_waited or self._lacking:
            self._stop_audits()
        elif (
            self._auditor.num_waiting
            and not self._auditor.running
            and not num_waiting
            and num_running < self.max_num_running_reqs
            and self.pause_state == PauseState.UNPAUSED
        ):
            self.add_request(self._auditor.start())

    def _stop_audits(self) -> None:
        """Take running audits off the engine; they begin anew later."""
        stopped = self._auditor.put_back()
        if stopped:
            self.finish_requests(stopped, RequestStatus.FINISHED_ABORTED)

    def get_num_unfinished_requests(self) -> int:
        """As vLLM counts, and the audits that wait, so that an engine without requests sees to them."""
        waiting = self._auditor.num_waiting if self.pause_state == PauseState.UNPAUSED else 0
        return super().get_num_unfinished_requests() + waiting

    def set_pause_state(self, pause_state: PauseState) -> None:
        """As vLLM does; audits are not waited for."""
        if pause_state != PauseState.UNPAUSED:
            self._stop_audits()
        super().set_pause_state(pause_state)

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
        """As vLLM does; audits give their pages back."""
        self._stop_audits()
        return super().reset_prefix_cache(*args, **kwargs)

    def hear_weights(self, held: HeldWeights) -> None:
        """If the workers' weights have changed, use nothing any more that other weights made.

        Pages and profiles go, and so do calibrations and audits under way. Requests that run keep their output, compute
        all keys and values anew, and decide their active block from its start.

        Args:
            held: What the workers hold.
        """
        if held.num_updates == self._weights.num_updates:
            return
        self._weights = Weights(held.num_updates)
        for request in self.running:
            if request.prefill_stats is not None:  # nothing of it has been told
                request.prefill_stats.set(request.num_prompt_tokens, 0, 0)
        self.reset_prefix_cache(reset_running_requests=True, reset_connector=True)
        self._auditor.forget()
        store = None
        if held.checkpoint is not None:
            store = open_store(server_options(self.vllm_config).profile_dir, self.vllm_config, held.checkpoint)
        self.calibrator.forget(store)
        logger.info(
            "The weights have changed (update %d). Profiles are now %s.",
            held.num_updates,
            "kept in memory only" if store is None else f"those of {store.model}",
        )

    def name_weights(self, label: str) -> None:
        """Give the weights that are served the caller's label."""
        self._weights.label = label

    def _spec(self, request: Request) -> RequestSpec:
        spec: RequestSpec | None = getattr(request, "canvas_spec", None)
        if spec is None:
            spec = request.canvas_spec = RequestSpec.of(request.sampling_params)
        assert spec is not None
        return spec

    def _plan(self, request: Request) -> CanvasPlan:
        plan = getattr(request, "canvas_plan", None)
        if plan is None:
            plan = request.canvas_plan = make_plan(self._spec(request), self._traits, is_fused=self._is_fused)
        return plan

    def _rows_of_a_long_prompt(self) -> int:
        """vLLM's rule: ``long_prefill_token_threshold``, or a request's share of the step, if others want some."""
        num_requests = sum(self.get_request_counts())
        if not self._long_prefill_threshold or num_requests < 2:
            return sys.maxsize
        if not self.adaptive_long_prefill_threshold:
            return self._long_prefill_threshold
        return max(self._long_prefill_threshold, self.scheduler_config.max_num_batched_tokens // num_requests)

    def _next_rows(self, request: Request) -> Rows | None:
        plan = self._plan(request)
        rows = plan.next_rows(request.num_tokens, min(self._room, max(self._max_rows, 2 * plan.block_length)))
        if rows is not None and rows.verified is not None and self._verifies_by_branches:
            rows = self._with_verified(request, rows, rows.verified)
            return rows if rows.num_all_rows <= self._room else None
        brancher = self._branchers.get(request.request_id)
        if rows is None or brancher is None or not brancher.needs_all:
            return rows
        begin, num_steps = request.canvas_steps
        num_before = num_steps if begin == request.num_tokens else 0
        rows = rows._replace(branches=self._branches_of(request, rows, num_before))
        num_further = rows.num_all_rows - rows.num_rows
        has_room = num_further <= self._branch_room or not self._has_branch
        return rows if has_room and rows.num_all_rows <= self._room else None

    def _with_verified(self, request: Request, rows: Rows, span: Span) -> Rows:
        """The rows of a verification with a branch for each position behind the first, as many as fit the engine."""
        if not self._has_branches:
            return rows._replace(verified=span._replace(length=1))
        begin = request.num_tokens + span.first - rows.start + 1  # rows of the first position
        wanted = [Branch(rows.start, begin + number, is_causal=True) for number in range(1, span.length)]
        max_pages = self._pool.pages_left_by(self._spec(request).canvas.end)
        branches = self._pool.those_that_fit(wanted, self.max_num_scheduled_tokens - rows.num_rows, max_pages)
        return rows._replace(branches=branches, verified=span._replace(length=len(branches) + 1))

    def _brancher_of(self, request: Request, assignment: Assignment) -> Brancher | None:
        """What says which branches a request has; None without, as where its policy waits for a task's thresholds."""
        options = self.calibrator.options(request.request_id)
        policy = POLICIES[options.policy]
        if not (self._has_branches and policy.has_branches) or assignment.schedule.drafts is None:
            return None
        return Brancher(policy, options, self._pool.pages_left_by(self._spec(request).canvas.end))

    def _branches_of(self, request: Request, rows: Rows, num_before: int) -> tuple[Branch, ...]:
        """The further branches that a step would have if the engine had no other request.

        Args:
            request: Whose step it is.
            rows: Of the step.
            num_before: Denoising steps that the block has had before. Its first step may compute more than the block.
        """
        if rows.decides != Decides.BLOCK or not num_before:
            return ()
        begin = request.num_tokens
        step = step_of(rows, begin, self._plan(request).active_length(begin), num_before)
        max_rows = min(self.max_num_scheduled_tokens, rows.num_rows + self._max_branch_rows)
        return self._pool.branches_that_fit(self._branchers[request.request_id], step, max_rows)

    def _add_spare_branches(self, req_ids: Container[str]) -> None:
        """Give rows and pages that are left, and that the load allows, to branches which tokens do not depend on."""
        num_rows = self.max_num_scheduled_tokens - self._room
        if self._load_aware is not None and num_rows >= self._load_aware[1]:
            return
        wanted = {}
        for req_id in (one for one, brancher in self._branchers.items() if not brancher.needs_all and one in req_ids):
            request = self.requests[req_id]
            num_before = request.canvas_steps[1] - 1  # this one is counted
            wanted[req_id] = self._branches_of(request, self._rows[req_id], num_before)
        if not wanted:
            return
        room = min(self._room, self._branch_room)
        if self._load_aware is not None:
            num_wanted = sum(branch.num_rows for branches in wanted.values() for branch in branches)
            room = min(room, rows_under_load(self._load_aware, num_rows, num_wanted))
        for req_id, branches in share_rows(wanted, self._pool, room, len(self.running)).items():
            self._rows[req_id] = self._rows[req_id]._replace(branches=branches)
            self._has_branch |= bool(branches)

    def _has_pages(self, request: Request, rows: Rows) -> bool:
        """Whether a request has pages for the branches of these rows; they are kept for it."""
        return not rows.branches or self._pool.hold(request.request_id, rows.branches, self._is_idle)

    def _is_idle(self, req_id: str) -> bool:
        """Whether a request has no branches in the step that is being planned, as far as that is known."""
        rows = self._rows.get(req_id)
        return rows is None or not rows.branches

    def _have_one_preempt(self) -> None:
        """Plan the step of one request, where all that run wait for pages of branches: others are preempted for it.

        It is the one that vLLM would preempt last. It keeps these pages, and who was preempted comes back once there is
        room beside them.
        """
        if self.policy == SchedulingPolicy.PRIORITY:
            one = min(self._lacking, key=lambda other: (other.priority, other.arrival_time))
        else:
            one = min(self._lacking, key=self.running.index)
        rows = self._next_rows(one)
        assert rows is not None
        one.next_decode_eligible_step = 0
        self._postponed.pop(one.request_id)
        self._set_rows(one, rows)

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        """As vLLM does; pages of branches go too."""
        self._pool.release(request.request_id)
        self._branchers.pop(request.request_id, None)
        request.canvas_steps = -1, 0
        super()._preempt_request(request, *args, **kwargs)

    def _plan_step(self, request: Request) -> bool:
        """Set which rows of a running request are next; False when it must wait, for room or for pages of branches."""
        rows = self._next_rows(request)
        if rows is not None and not self._has_pages(request, rows):
            self._lacking.append(request)
            rows = None
        if rows is None:
            # schedule() counts current_step up before it looks at this.
            request.next_decode_eligible_step = self.current_step + 2
            return False
        self._set_rows(request, rows)
        return True

    def _set_rows(self, request: Request, rows: Rows) -> None:
        """Plan these rows of a running request."""
        self._room -= rows.num_all_rows
        self._branch_room -= rows.num_all_rows - rows.num_rows
        self._has_branch |= bool(rows.branches)
        self._verifies |= rows.verified is not None
        self._rows[request.request_id] = rows
        # schedule() takes num_tokens + spec_token_ids + num_output_placeholders - num_computed_tokens rows; the
        # placeholders of asynchronous outputs, of which there are none, make up for a step that ends before num_tokens.
        request.num_computed_tokens = rows.start
        request.spec_token_ids = self._placeholders[: rows.num_drafts]
        request.num_output_placeholders = rows.end - request.num_tokens - rows.num_drafts

    def _allocate_for_rows(self, request: Request, num_new_tokens: int, *args: Any, **kwargs: Any) -> Any:
        """Give a request the KV pages of its planned rows; plan those of one that starts or resumes."""
        plan, is_new = self._plan(request), request.status != RequestStatus.RUNNING
        if is_new:
            if self._lacking or not self._has_place_for_adapter(request):
                return None
            plan.admit(request.num_computed_tokens + kwargs["num_new_computed_tokens"])
            rows = self._next_rows(request)
            if rows is None:
                return None
        else:
            rows = self._rows[request.request_id]
        pages = self.kv_cache_manager.empty_kv_cache_blocks
        if not self._has_pages(request, rows):
            return None
        if rows.end > plan.pages_end:
            kwargs["delay_cache_blocks"] = True  # drafts are among its tokens
            end = plan.pages_needed(rows)
            pages = self._allocate_slots(request, end - rows.start, *args, **kwargs)
            if pages is None and self._pool.release_spare():
                pages = self._allocate_slots(request, end - rows.start, *args, **kwargs)
            if pages is None:
                return None
            plan.pages_end = end
        if is_new:
            self._room -= rows.num_all_rows
            self._rows[request.request_id] = rows
        plan.schedule(request.num_tokens, rows)
        begin, num_steps = request.canvas_steps
        num_steps = num_steps if begin == request.num_tokens else 0
        request.canvas_steps = request.num_tokens, num_steps + (rows.decides == Decides.BLOCK)
        if is_new:  # for others of this step; nothing can take its rows from it any more
            self.kv_cache_manager.cache_blocks(request, plan.num_final)
        return pages

    def _has_place_for_adapter(self, request: Request) -> bool:
        """vLLM counts adapters of requests that run in this step; some of ours wait for room, and run in the next."""
        if request.lora_request is None:
            return True
        adapters = {one.lora_request.lora_int_id for one in self.running if one.lora_request is not None}
        return len(adapters | {request.lora_request.lora_int_id}) <= self.lora_config.max_loras

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        """Put the planned rows of newly admitted requests in place of the prompt alone."""
        num_scheduled = scheduler_output.num_scheduled_tokens
        for req_id in self._rows:  # planned, though perhaps preempted since
            self.requests[req_id].num_output_placeholders = 0
        if self.kv_cache_manager.enable_caching:
            # Not earlier: a request that comes later in the step may preempt one that was to run.
            for request in map(self.requests.__getitem__, num_scheduled):
                self.kv_cache_manager.cache_blocks(request, self._plan(request).num_final)
        if self._branchers:
            self._add_spare_branches(num_scheduled)
        for req_id in num_scheduled:
            rows = self._rows[req_id]
            scheduler_output.total_num_scheduled_tokens += rows.num_all_rows - num_scheduled[req_id]
            num_scheduled[req_id] = rows.num_all_rows
            if rows.num_drafts:
                scheduler_output.scheduled_spec_decode_tokens[req_id] = self._placeholders[: rows.num_drafts]
        super()._update_after_schedule(scheduler_output)

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        """Nothing: the next step's placeholders are planned by :meth:`schedule`."""

    def make_spec_decoding_stats(
        self,
        spec_decoding_stats: SpecDecodingStats | None,
        num_draft_tokens: int,
        *args: Any,
        request_id: str,
        **kwargs: Any,
    ) -> SpecDecodingStats | None:
        """vLLM's counters by position end at ``num_spec_tokens``; canvas rows beyond it count in the sum alone.

        Steps behind a request's step (``StepReport.ran_ahead``) count as steps of their own. Audits do not count.
        """
        if request_id in self._auditor.running:
            return spec_decoding_stats
        counted = min(num_draft_tokens, self.num_spec_tokens)
        stats = super().make_spec_decoding_stats(spec_decoding_stats, counted, *args, request_id=request_id, **kwargs)
        if stats is not None:
            stats.num_draft_tokens += num_draft_tokens - counted
            for _ in range(self._ran_ahead.get(request_id, 0)):
                stats.observe_draft(counted, 0)
                stats.num_draft_tokens += num_draft_tokens - counted
        return stats

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """As vLLM does.

        Every output, not only an engine's last, says how its request is decoded and how many forwards it has taken so
        far: the front end may end the request at a stop string. What audits give goes to no client.
        """
        audits = self._auditor.running
        self._ran_ahead = {}
        failed: list[str] = []
        report: StepReport | None = getattr(model_runner_output, STEP_REPORT, None)
        if report is not None and report.weights.num_updates != self._weights.num_updates:
            # Not told between two steps: this one had pages and profiles of other weights. It is void, as vLLM's rule
            # for requests that are preempted while they are in flight has it.
            self.hear_weights(report.weights)
            return super().update_from_output(scheduler_output, model_runner_output)
        if report is not None:
            if not report.takes_branches:
                self._has_branches = False
                self._branchers.clear()
            self.calibrator.hear(report)
            for req_id, confidence in report.mean_confidence.items():
                if req_id in self.requests:
                    self._plan(self.requests[req_id]).hear(confidence)
            for req_id, span in report.drafted.items():
                if req_id in self.requests:
                    self._plan(self.requests[req_id]).drafted = span
            self._trace(report)
            self._count_run_ahead(report, scheduler_output.scheduled_spec_decode_tokens)
            if report.recorded is not None:
                failed = self._grammars.hear(report.recorded, self.requests)
                self._fail(failed, model_runner_output)
        requests = {req_id: self.requests[req_id] for req_id in model_runner_output.req_ids if req_id in self.requests}
        self._count_commits(scheduler_output, requests)
        self._end_templates(requests, model_runner_output)
        self._ended_thinking.clear()
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for client in outputs.values():
            if audits:
                client.outputs = [output for output in client.outputs if output.request_id not in audits]
            for output in client.outputs:
                request = requests.get(output.request_id)
                if request is not None and request.spec_decode_metrics is not None:
                    output.spec_decode_metrics = request.spec_decode_metrics
                    about = describe(request, request.canvas_about, request.canvas_weights, self._weights)
                    num_given = self._ended_thinking.get(output.request_id, 0)
                    trace = self._tracer.take(output.request_id, len(output.new_token_ids), num_given)
                    if output.new_token_ids and OPEN_HOLE in (self._spec(request).pinned or ()):
                        trace = self._leave_out(request, output, trace)
                    if trace is not None:
                        about[TRACE] = trace
                    if output.request_id in failed:
                        about[ERROR] = NO_TOKEN
                    output.kv_transfer_params = {KEY: about}
        for req_id in self._ended_thinking:
            if req_id in self.requests and not self.requests[req_id].is_finished():
                self._begin_answer(self.requests[req_id])
        return outputs

    def _update_request_with_output(
        self, request: Request, new_token_ids: list[int], *args: Any, **kwargs: Any
    ) -> tuple[list[int], bool]:
        """As vLLM does, with the check prompt in place of a token that ends thinking."""
        switch = self._spec(request).switch
        if switch is None or switch.think_end not in new_token_ids:
            return super()._update_request_with_output(request, new_token_ids, *args, **kwargs)
        new_token_ids, num_given = switch.written(new_token_ids)
        num_own = len(new_token_ids) - num_given
        new_token_ids, stopped = super()._update_request_with_output(request, new_token_ids, *args, **kwargs)
        self._ended_thinking[request.request_id] = max(len(new_token_ids) - num_own, 0)
        return new_token_ids, stopped

    def _begin_answer(self, request: Request) -> None:
        """Have a request go on in the answer's blocks, as one that was preempted: its keys and values are others."""
        spec = self._spec(request)
        assert spec.switch is not None
        self.running.remove(request)
        self.prev_step_scheduled_req_ids.discard(request.request_id)
        self._preempt_request(request, time.monotonic())
        if self.log_stats:
            request.events.pop()  # nobody took its place
        self.waiting.remove_request(request)
        self.kv_holding_waiting.prepend_request(request)  # the queue that goes on while new requests are held back
        self.calibrator.finish_request(request.request_id, ended_well=False)
        request.canvas_spec, request.canvas_plan = spec.answer(request.num_tokens), None
        request.canvas_is_answer, request.canvas_read_end = True, request.num_tokens
        request.sampling_params = copy(request.sampling_params)  # other answers of the client's request may share it
        request.sampling_params.extra_args = request.canvas_spec.as_extra_args()
        request.cache_salt, request.block_hashes = spec.switch.cache_salt, []
        request.update_block_hashes()

    def _end_templates(self, requests: dict[str, Request], model_runner_output: ModelRunnerOutput) -> None:
        """End templates that nothing is missing of any more, before vLLM asks whether requests have ended."""
        for req_id, request in requests.items():
            template = self._spec(request).pinned
            if template and template[-1] == OPEN_HOLE:
                new = model_runner_output.sampled_token_ids[model_runner_output.req_id_to_index[req_id]]
                tokens, ends = [*request.output_token_ids, *new], request.sampling_params.all_stop_token_ids
                request.max_tokens = num_needed(template, tokens, ends) or request.max_tokens

    def _leave_out(
        self, request: Request, output: EngineCoreOutput, trace: dict[str, Any] | None
    ) -> dict[str, Any] | None:
        """Take what ends open holes, and is behind their ends, out of an output and its trace; returns that."""
        template = self._spec(request).pinned
        assert template is not None
        flags = kept(template, request.output_token_ids, request.sampling_params.all_stop_token_ids)
        flags = flags[-len(output.new_token_ids) :]
        output.new_token_ids = [token for token, is_kept in zip(output.new_token_ids, flags, strict=True) if is_kept]
        return None if trace is None else select(trace, flags)

    def _trace(self, report: StepReport) -> None:
        """Take in what is traced; the step that is reported is not counted yet."""
        if report.recorded is None:
            return
        requests = (self.requests.get(req_id) for req_id in report.recorded.req_ids)
        forwards = {
            request.request_id: num_forwards(request) + 1
            for request in requests
            if request is not None and self._spec(request).options.return_trace
        }
        self._tracer.hear(report.recorded, forwards)

    def _fail(self, req_ids: list[str], model_runner_output: ModelRunnerOutput) -> None:
        """End requests with an error, as those whose grammar fails to compile, and without this step's tokens."""
        failed: Any = self.grammar_compile_error_reqs
        if isinstance(failed, dict):  # vLLM 0.33 keeps what a client is told
            from vllm.outputs import RequestError

            failed.update((req_id, RequestError("validation_error", NO_TOKEN)) for req_id in req_ids)
        else:
            failed.update(req_ids)
        for req_id in req_ids:
            logger.info("Request %s ends: %s", req_id, NO_TOKEN)
            model_runner_output.sampled_token_ids[model_runner_output.req_id_to_index[req_id]] = []

    def _count_run_ahead(self, report: StepReport, drafts: dict[str, list[int]]) -> None:
        """Count steps behind others: those that were of use are forwards of their requests like others.

        Args:
            report: Of the step before them.
            drafts: Its placeholders, by request; theirs are as many.
        """
        self._ran_ahead = report.ran_ahead
        for req_id, num_used in report.ran_ahead.items():
            self.calibrator.statistics.counts["run_ahead", "used" if num_used else "wasted"] += max(num_used, 1)
            request = self.requests.get(req_id)
            if request is not None and request.spec_decode_metrics is not None:
                for _ in range(num_used):
                    request.spec_decode_metrics.observe(num_draft_tokens=len(drafts.get(req_id, ())), num_accepted=0)

    def _count_commits(self, scheduler_output: SchedulerOutput, requests: dict[str, Request]) -> None:
        """Count the forwards that write a finished block's keys and values and have no drafts, which vLLM counts."""
        if len(scheduler_output.scheduled_spec_decode_tokens) == len(scheduler_output.num_scheduled_tokens):
            return
        for req_id, request in requests.items():
            read_end = getattr(request, "canvas_read_end", request.num_prompt_tokens)
            is_generated = request.num_computed_tokens > read_end
            is_counted = is_generated or req_id in getattr(scheduler_output, CANVAS_STEP).first_position
            if req_id not in scheduler_output.scheduled_spec_decode_tokens and is_counted:
                request.spec_decode_metrics.observe(num_draft_tokens=0, num_accepted=0)

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        """vLLM's without audits, with what happened to profiles and requests since the last ones."""
        stats = super().make_stats(*args, **kwargs)
        news = self.calibrator.take_statistics()
        if stats is not None:
            stats.num_running_reqs -= sum(request.request_id in self._auditor.running for request in self.running)
        if stats is not None and news:
            stats.kv_connector_stats = {KEY: news}
        return stats

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        ended_well = _ended_well(request)
        if request.request_id in self._auditor.running:
            result = self._auditor.end(request, ended_well=ended_well)
            if result is not None:
                self.calibrator.hear_audit(result[0], is_same=result[1])
        elif ended_well:
            subject = self.calibrator.subject(request.request_id)
            if subject is not None and not self._auditor.consider(request, self._spec(request), subject):
                self.calibrator.statistics.counts["audits", "dropped"] += 1
            about = self.calibrator.about(request.request_id)
            self.calibrator.statistics.ended(about, num_forwards(request), request.num_output_tokens)
        self.calibrator.finish_request(request.request_id, ended_well=ended_well)
        self._grammars.forget(request.request_id)
        self._pool.release(request.request_id)
        self._branchers.pop(request.request_id, None)
        return super()._free_request(request, *args, **kwargs)

    def shutdown(self) -> None:
        """As vLLM does, once every profile is on disk."""
        self.calibrator.registry.flush()
        super().shutdown()
