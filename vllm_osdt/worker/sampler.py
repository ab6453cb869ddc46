"""Logits -> proposal and confidence -> unmask -> canvas -> vLLM's ``SamplerOutput``.

Source: LLaDA (arXiv 2502.09992) for proposals and confidence; Fast-dLLM (arXiv 2505.22618) and OSDT (arXiv
2511.02077) for the rules, which ``vllm_osdt.policies`` turns into parameters.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from csrc_triton import Proposals, Rules, UnmaskResult, implementations
from csrc_triton.adjusting import grids
from csrc_triton.draft import confirm
from csrc_triton.edit import edit
from csrc_triton.types import Grids
from vllm_osdt.policies import Step
from vllm_osdt.policies.adablock import ADABLOCK
from vllm_osdt.policies.base import MAX_CONSTANTS, MAX_READINGS, Verification, places
from vllm_osdt.worker.drafting import read_states, verify_and_draft
from vllm_osdt.worker.logprobs import LogprobStore
from vllm_osdt.worker.modifying import CHUNK_ELEMENTS, LogitModifying, StepLogits
from vllm_osdt.worker.reading import ComputeLogits, PolicyReader
from vllm_osdt.worker.recorder import Decision, StepRecorder, grids_to_record
from vllm_osdt.worker.shaping import LogitShaping
from vllm_osdt.worker.slots import NUMBERS, CanvasStates
from vllm_osdt.worker.step.batch import AdjustedRows, CutRows, DenoiseBatch, PolicyRequests

Readings = Sequence[torch.Tensor | None]  # of each policy that adjusts a step


class Numbers(NamedTuple):
    """What policies keep of some requests, rows of ``CanvasStates.policy_numbers`` and parts of these."""

    all: torch.Tensor  # float32 [R, sum(NUMBERS)]
    constants: torch.Tensor
    state: torch.Tensor
    carry: torch.Tensor

    @classmethod
    def of(cls, rows: torch.Tensor) -> "Numbers":
        """The parts of some rows."""
        constants, state, carry = rows.split(NUMBERS, dim=1)
        return cls(rows, constants, state, carry)


class CanvasSampler:
    """Takes one denoising step of every request in the batch.

    Emits nothing for a block that is not finished, and the block's tokens in the step that finishes it. Works on
    whole tensors: no host synchronization and no loop over requests.
    """

    # The runner reads this to keep penalty counts; there are none.
    penalties_state = SimpleNamespace(output_bin_counts=None)
    compute_nans = False

    def __init__(self, sampler: Any, states: CanvasStates, recorder: StepRecorder) -> None:
        """Take the place of a sampler.

        Args:
            sampler: vLLM's own.
            states: Tables of the canvases.
            recorder: Of what a step saw.
        """
        self.states = states
        self.recorder = recorder
        self.shaping = LogitShaping(sampler, states)
        self._modifying = LogitModifying(states)
        self._reader = PolicyReader(states, self.shaping)
        mode = sampler.logprobs_mode
        self._reads_processed = mode.startswith("processed")
        self._logprobs = LogprobStore(
            states.host.block_length.size, states.device, is_normalized=mode.endswith("logprobs")
        )
        self._confidence, self._unmask, *_ = implementations(states.device)
        self._no_reading = torch.zeros(1, 1, 1, device=states.device)
        self._no_memory = torch.zeros(1, 1, 0, device=states.device)
        self._no_rejected = torch.zeros(states.host.block_length.size, dtype=torch.int32, device=states.device)

    def add_request(self, req_idx: int, sampling_params: Any) -> None:
        """Take in the parameters that ``CanvasStates.add_request`` has not read."""
        self.shaping.add_request(req_idx, sampling_params)
        num_logprobs = sampling_params.logprobs
        self.states.host.num_logprobs[req_idx] = -1 if num_logprobs is None else num_logprobs
        if num_logprobs is not None:
            self._logprobs.make_room(num_logprobs)

    def apply_staged_writes(self) -> None:
        """Bring new parameters to the device."""
        self.shaping.apply_staged_writes()

    def __call__(self, logits: torch.Tensor, input_batch: Any, draft_logits: Any = None) -> SamplerOutput:
        """What vLLM measures the memory of, with a dummy batch.

        Args:
            logits: ``[M, vocabulary]``.
            input_batch: vLLM's.
            draft_logits: Unused, part of vLLM's interface.
        """
        token, _ = self._confidence(logits, self.states.mask_token_id, None, None)
        self.shaping.measure()
        none = torch.zeros(logits.shape[0], dtype=torch.int32, device=logits.device)
        return SamplerOutput(token[:, None], None, None, num_sampled=none, num_rejected=none)

    def decide_by_logits(
        self,
        logits: torch.Tensor,
        batch: DenoiseBatch,
        proposals: Proposals | None,
        hidden: torch.Tensor,
        compute_logits: ComputeLogits,
    ) -> Decision:
        """Propose and decide, and keep the log probabilities that are asked for.

        Args:
            logits: ``[M, vocabulary]``, one row per position of the active blocks that is masked or may be edited.
            batch: The step.
            proposals: What the model proposes by itself, where that is known; changed in place.
            hidden: ``[at least M, hidden_size]``, of which the logits were made.
            compute_logits: The model's output layer.
        """
        proposals, modified = self._propose(logits, batch, proposals)
        readings = self._reader.read(modified, batch, proposals, hidden, compute_logits)
        blocks, scored = batch.blocks, batch.scored
        keeps_masks = batch.recorded is not None
        if scored is None:
            return self.decide(batch, proposals, keeps_masks=keeps_masks, readings=readings)
        offset = proposals.position[scored.rows] % blocks.canvas_index.shape[1]
        before = written = None
        if batch.edit_threshold is not None:
            before, written = self._logprobs.read(scored.slots, offset), blocks.cells[blocks.canvas_index]
        self._keep_logprobs(logits, batch, proposals)
        decision = self.decide(batch, proposals, keeps_masks=keeps_masks, readings=readings)
        if before is not None and written is not None:  # a written token that stays keeps its own
            assert decision.is_masked is not None
            is_new = decision.is_masked | (proposals.of_grid(written) != proposals.of_grid(decision.canvas))
            self._logprobs.restore(before, scored.slots, offset, is_new[scored.rows])
        return decision

    def _keep_logprobs(self, logits: torch.Tensor, batch: DenoiseBatch, proposals: Proposals) -> None:
        """Keep what the tokens of this step are chosen from; those that stay masked are asked about again.

        Before the step decides, since penalties count the tokens that are there when it begins.

        Args:
            logits: ``[M, vocabulary]``.
            batch: The step.
            proposals: Its proposals.
        """
        scored, width = batch.scored, batch.blocks.canvas_index.shape[1]
        assert scored is not None
        step = max(1, CHUNK_ELEMENTS // logits.shape[1])
        for start in range(0, scored.rows.shape[0], step):
            part = scored.part(start, start + step)
            own = logits.index_select(0, part.rows).float()
            if self._reads_processed:
                temperature = None if batch.temperature is None else batch.temperature[part.rows]
                own = self.shaping.shape(own, part, temperature, batch.grammar)
                own[:, self.states.mask_token_id] = -torch.inf
                if temperature is not None:
                    own = own / torch.where(temperature > 0, temperature, 1.0)[:, None]
            offset, token = proposals.position[part.rows] % width, proposals.token[part.rows]
            self._logprobs.keep(own, part.slots, offset, token, batch.num_scores)

    def propose(self, logits: torch.Tensor, batch: DenoiseBatch, proposals: Proposals | None = None) -> Proposals:
        """What the model proposes where logits were read; arguments of :meth:`decide_by_logits`."""
        return self._propose(logits, batch, proposals)[0]

    def _propose(
        self, logits: torch.Tensor, batch: DenoiseBatch, proposals: Proposals | None
    ) -> tuple[Proposals, StepLogits]:
        """As :meth:`propose`, and the logits with what modifiers add."""
        logits = logits[: batch.position.shape[0]]
        noise, are_read = (batch.temperature, batch.noise_key), proposals is None
        if proposals is None:
            found = self._confidence(logits, self.states.mask_token_id, *noise, batch.by_entropy)
            proposals = Proposals(batch.position, *found)
        modified = self._modifying.modify(logits, batch, proposals, are_read=are_read)
        if batch.shaped is not None:
            found = proposals.token, proposals.confidence
            self.shaping.propose(modified, batch.shaped, *noise, *found, batch.by_entropy, batch.grammar)
        return proposals, modified

    def decide(
        self, batch: DenoiseBatch, proposals: Proposals, *, keeps_masks: bool, readings: Readings = ()
    ) -> Decision:
        """Edit and unmask, by the requests' rules.

        Args:
            batch: The step.
            proposals: Of :meth:`propose`.
            keeps_masks: Whether the masks before the step are kept.
            readings: What policies have read off logits; empty where no policy has.
        """
        if batch.cut:
            batch = self._cut_blocks(batch, proposals)
        states, blocks = self.states, batch.blocks
        width = blocks.canvas_index.shape[1]
        before = states.masked[blocks.slots, :width] if keeps_masks else None
        is_open = is_masked = drafted = None
        if batch.edit_threshold is not None:
            is_open, is_masked = edit(blocks, proposals, states.num_post_steps, batch.edit_threshold)
        branches = None if batch.drafting is None else read_states(batch.drafting, blocks)
        if batch.adjusted:
            canvas, confidence, result, drafted = self._unmask_adjusted(batch, proposals, readings)
        elif batch.grammar is not None:
            token, confidence = proposals.to_grids(*blocks.canvas_index.shape)
            score, rules = batch.grammar.restrict(token, confidence, batch.rules)
            allowed = proposals._replace(confidence=proposals.of_grid(score))
            canvas, _, result = self._unmask_and_confirm(batch, allowed, rules, proposals)
        else:
            canvas, confidence, result = self._unmask_and_confirm(batch, proposals, batch.rules, proposals)
        ahead = None
        if batch.drafting is not None and branches is not None:
            outcome = canvas, confidence, result
            found = verify_and_draft(states, batch.drafting, branches, blocks, proposals, outcome)
            canvas, confidence, result, ahead = found
        after = None if states.device.type == "cpu" else states.masked.index_select(0, batch.slots)
        num_ready = result.num_ready if is_open is None else result.num_ready.masked_fill(is_open, 0)
        return Decision(proposals, is_masked, before, after, canvas, confidence, num_ready, drafted, ahead)

    def finish(self, input_batch: Any, decision: Decision, ran_ahead: torch.Tensor | None = None) -> SamplerOutput:
        """Tell the host what was decided.

        Args:
            input_batch: A ``CanvasInputBatch``.
            decision: Of :meth:`decide`; a graph's has requests behind those of the step.
            ran_ahead: bool or int64 ``[R]``, how many steps behind this one were of use; None without any.
        """
        batch: DenoiseBatch = input_batch.denoise
        num_reqs, width = batch.slots_np.size, decision.canvas.shape[1]
        if batch.drafting is not None:
            self.states.hear_accepted(batch.drafting.slots_np, batch.drafting.slots)
        if decision.after is not None:
            limit = self.states.block_limit.index_select(0, batch.slots) if batch.has_cuts else None
            self.states.copy_masks_to_host(batch.slots_np, decision.after, width, limit)
        recorded = None
        if batch.recorded is not None:
            recorded = grids_to_record(self.states, batch, decision)
        self.recorder.see(input_batch.req_ids, batch, decision, recorded, ran_ahead)
        logprobs = None
        if batch.asking is not None:
            asks = self.states.host.num_logprobs[batch.slots_np] >= 0
            logprobs = self._logprobs.take(batch.asking, asks, width, batch.num_scores)
        return SamplerOutput(
            sampled_token_ids=decision.canvas[:num_reqs],
            logprobs_tensors=logprobs,
            num_nans=None,
            num_sampled=decision.num_ready[:num_reqs],
            num_rejected=self._no_rejected[:num_reqs],
        )

    def _unmask_and_confirm(
        self, batch: DenoiseBatch, changed: Proposals, rules: Rules, proposals: Proposals
    ) -> tuple[torch.Tensor, torch.Tensor, UnmaskResult]:
        """Unmask by the rules, and take drafted tokens that the model proposes.

        Args:
            batch: The step.
            changed: With the scores that the rules read.
            rules: By block.
            proposals: With the model's own confidence.
        """
        canvas, confidence, result = self._unmask(batch.blocks, changed, rules)
        if batch.draft_threshold is not None:
            drafts = self.states.drafts
            canvas, result = confirm(batch.blocks, proposals, drafts, batch.draft_threshold, result)
        return canvas, confidence, result

    def _unmask_adjusted(
        self, batch: DenoiseBatch, proposals: Proposals, readings: Readings
    ) -> tuple[torch.Tensor, torch.Tensor, Any, torch.Tensor | None]:
        """Unmask where some requests' policies change the step first; tensor operations on the rows of each policy.

        Returns:
            Tokens, confidences, counts, and ``Decision.drafted``.
        """
        states, width = self.states, batch.blocks.canvas_index.shape[1]
        # A request that edits has logits of written positions too, which the grids leave out.
        found = grids(proposals, states.masked, batch.blocks.slots, width)
        parameter = batch.rules.parameter
        steps: list[tuple[AdjustedRows, Step, Numbers]] = []
        for adjusted, reading in zip_longest(batch.adjusted, readings):
            requests = adjusted.requests
            numbers = Numbers.of(requests.take(states.policy_numbers))
            step = self._step(batch, adjusted, numbers, found, parameter, reading)
            adjusted.policy.adjust(step)
            if step.score is not found.score:
                found.score.index_copy_(0, requests.rows, step.score)
                parameter.index_copy_(0, requests.rows, step.parameter)
                if step.verification is not None:
                    found.token.index_copy_(0, requests.rows, step.token)
            steps.append((adjusted, step, numbers))
        drafted = None
        if any(one.policy.verifies for one in batch.adjusted):
            proposals.token.copy_(proposals.of_grid(found.token))
            batch, drafted = self._without_drafted(batch, steps)
        allowed, rules = found.score, batch.rules
        if batch.grammar is not None:
            allowed, rules = batch.grammar.restrict(found.token, allowed, rules)
        # Positions without logits are as good as none.
        every = places(allowed.numel(), states.device)
        changed = Proposals(every, found.token.view(-1), allowed.view(-1))
        canvas, _, result = self._unmask_and_confirm(batch, changed, rules, proposals)
        for adjusted, step, numbers in steps:
            policy, requests = adjusted.policy, adjusted.requests
            if policy.observes:
                after = requests.take(states.masked)[:, :width]
                policy.observe(step, self._own(found.masked, requests) ^ after)
            requests.put(states.policy_numbers, numbers.all)
            if policy.memory_size:
                requests.put(states.policy_memory[:, :width, : policy.memory_size], step.memory)
            if step.verification is not None:
                self._write_drafted(batch.blocks.canvas_index[requests.rows], requests.slots, step)
        return canvas, found.confidence, result, drafted

    @staticmethod
    def _own(grid: torch.Tensor, requests: PolicyRequests) -> torch.Tensor:
        """The rows of some requests; the grid itself where they are all of them, in order."""
        return grid if requests.rows.shape[0] == grid.shape[0] else grid.index_select(0, requests.rows)

    def _without_drafted(
        self, batch: DenoiseBatch, steps: Sequence[tuple[AdjustedRows, Step, Numbers]]
    ) -> tuple[DenoiseBatch, torch.Tensor]:
        """The step without the requests that have it verified first, which decide nothing; and ``Decision.drafted``."""
        blocks = batch.blocks
        drafted = torch.zeros(blocks.slots.shape[0], 2, dtype=torch.int64, device=self.states.device)
        for adjusted, step, _ in steps:
            if step.verification is not None:
                drafted[adjusted.requests.rows] = step.verification.asked
        if self.states.verifies_by_branches and not self.states.has_branches:
            drafted[:, 1].clamp_(max=1)
        waits = drafted[:, 1] > 0
        slots = blocks.slots.masked_fill(waits, self.states.idle_row)
        num_output_positions = blocks.num_output_positions.masked_fill(waits, 0)
        blocks = blocks._replace(slots=slots, num_output_positions=num_output_positions)
        return replace(batch, blocks=blocks), drafted

    def _write_drafted(self, canvas_index: torch.Tensor, slots: torch.Tensor, step: Step) -> None:
        """Put drafted tokens in their positions, which stay masked, where they are to be verified; else mask tokens.

        Args:
            canvas_index: int64 ``[S, W]``, of the requests of a policy that verifies.
            slots: int64 ``[S]``, theirs.
            step: Theirs, decided.
        """
        states, verification = self.states, step.verification
        assert verification is not None
        shown = step.is_open & (verification.asked[:, 1:] > 0)
        token = torch.where(shown, step.token, states.mask_token_id).to(states.cells.dtype)
        is_masked = states.masked[slots, : token.shape[1]]
        states.cells[canvas_index] = torch.where(is_masked, token, states.cells[canvas_index])

    def _cut_blocks(self, batch: DenoiseBatch, proposals: Proposals) -> DenoiseBatch:
        """The step with the blocks that are entered as long as their cutters say; positions behind them are left."""
        states, blocks, width = self.states, batch.blocks, batch.blocks.canvas_index.shape[1]
        found = grids(proposals, states.masked, blocks.slots, width)
        num_output_positions = blocks.num_output_positions.clone()
        place = places(width, states.device)
        for cutter, requests in batch.cut:
            slots, rows = requests.slots, requests.rows
            constants = states.cut_constants.index_select(0, slots)
            if cutter is not ADABLOCK:
                constants = constants[:, :MAX_CONSTANTS]
            numbers = Numbers.of(states.policy_numbers.index_select(0, slots))._replace(constants=constants)
            own = CutRows(cutter, requests)
            step = self._step(batch, own, numbers, found, batch.rules.parameter)
            length = cutter.cut(step).clamp(1, width).to(torch.int32)
            states.block_limit[slots] = length
            states.masked[slots, :width] &= place < length[:, None]
            num_output_positions[rows] = torch.minimum(num_output_positions[rows], length)
        return replace(batch, blocks=blocks._replace(num_output_positions=num_output_positions))

    def _step(
        self,
        batch: DenoiseBatch,
        of: AdjustedRows | CutRows,
        numbers: Numbers,
        found: Grids,
        parameter: torch.Tensor,
        reading: torch.Tensor | None = None,
    ) -> Step:
        """What the requests of a policy or cutter see of a step.

        Args:
            batch: The step.
            of: The requests.
            numbers: Of them.
            found, parameter: Of the whole batch. Where all of its requests are meant, the step has these themselves.
            reading: See ``policies.Step``.
        """
        states, requests = self.states, of.requests
        num_requests, width = requests.rows.shape[0], found.score.shape[1]
        token, confidence, score, is_open, _ = found
        end_token_ids = batch.blocks.end_token_ids
        if num_requests < found.score.shape[0]:  # else they are all of them, in order
            own = (token, confidence, score, is_open, parameter, end_token_ids)
            token, confidence, score, is_open, parameter, end_token_ids = (
                one.index_select(0, requests.rows) for one in own
            )
        policy = of.policy if isinstance(of, AdjustedRows) else None
        if policy is None or not policy.memory_size:
            memory = self._no_memory.expand(num_requests, width, 0)
        else:
            memory = requests.take(states.policy_memory[:, :width, : policy.memory_size])
        if reading is None:
            reading = self._no_reading.expand(num_requests, width, MAX_READINGS)
        elif batch.cut:  # what was read behind the cut is of no position now
            reading = reading * is_open.unsqueeze(-1)
        verification = None
        if isinstance(of, AdjustedRows) and of.policy.verifies:
            none = requests.slots.new_zeros(num_requests, 2)
            span = none if of.span is None else of.span
            verification = Verification(span, none.clone(), batch.rules.min_unmask[requests.rows])
        return Step(
            score=score,
            parameter=parameter,
            constants=numbers.constants,
            state=numbers.state,
            step_index=requests.step_index,
            confidence=confidence,
            token=token,
            is_open=is_open,
            memory=memory,
            reading=reading,
            carry=numbers.carry,
            block_index=requests.block_index,
            num_left=requests.num_left,
            num_positions=requests.num_positions,
            end_token_ids=end_token_ids[:, 1:],  # without the one that ends thinking
            num_alone=requests.num_alone,
            output_index=requests.output_index,
            tensors={} if policy is None else states.policy_tensors.get(policy.name, {}),
            verification=verification,
        )
