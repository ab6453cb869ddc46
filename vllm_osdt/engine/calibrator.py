"""Where a threshold is decided: gives each request its schedule, makes profiles of what is recorded, runs the guard.

The scheduler asks for an :class:`Assignment` when it first plans a request, tells what a step reported, and how a
request ended. Everything here is NumPy on the engine core's host; workers fill slots, decide positions and report.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from csrc_triton.types import Rule
from vllm_osdt.calibration.guard import AgreementGuard, DriftGuard
from vllm_osdt.calibration.profile import CalibrationProfile, Choice, ProfileKey, Setting
from vllm_osdt.calibration.recording import Recorder
from vllm_osdt.calibration.registry import ProfileRegistry
from vllm_osdt.calibration.selection import upper_bound
from vllm_osdt.calibration.store import ProfileStore, open_store
from vllm_osdt.calibration.thresholds import CONFORMAL, Fallback
from vllm_osdt.engine.audit import Subject
from vllm_osdt.engine.canvas_plan import decides_first_alone
from vllm_osdt.engine.statistics import About, EngineStatistics
from vllm_osdt.errors import OSDTError
from vllm_osdt.geometry import CanvasRequest, DecodeShape
from vllm_osdt.messages import Assignment, RecordedStep, RequestSpec, StepReport, answer_start
from vllm_osdt.models.traits import Traits
from vllm_osdt.options import UNDECIDED_TASK, DecodingOptions, ServerOptions
from vllm_osdt.options.family import validate_for_family
from vllm_osdt.options.operator import server_options
from vllm_osdt.options.parsing import with_choice
from vllm_osdt.policies import MODIFIERS, POLICIES

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(f"vllm.{__name__}")  # below vLLM's own, whose handlers it uses

_COUNTED = (Fallback.BLOCK, Fallback.STEP, Fallback.CELL)
_TUNING_LEVEL = 0.05  # of the bound on the texts that a tuned choice changes


@dataclass
class _Decoding:
    """What holds for a request until it ends, across preemption."""

    options: DecodingOptions
    key: ProfileKey
    shape: DecodeShape
    about: About
    assignment: Assignment
    profile: CalibrationProfile | None = None
    is_early: bool = False  # the profile is one that is being made
    is_usual: bool = True  # its text is the model's own, by one set of weights
    recorder: Recorder | None = None
    entries: dict[int, float] = field(default_factory=dict)  # mean confidence at block entry, by block


def setting_of(options: DecodingOptions) -> Setting:
    """How a request's thresholds are made from a profile."""
    return Setting(options.granularity, options.statistic, options.record, options.risk)


def _modifiers(options: DecodingOptions) -> list[bool]:
    """Which modifiers are on; workers read them, and token editing, from what admission made of a request."""
    return [modifier.is_on(options) for modifier in MODIFIERS]


def _has_early_thresholds(options: DecodingOptions) -> bool:
    """Whether a request may profit from a calibration that is not finished."""
    return options.early and options.statistic == CONFORMAL


class Calibrator:
    """The schedules, profiles and guard of one engine.

    Args:
        registry: The engine's profiles.
        guard: What watches them; None without.
        traits: Of the model.
        agreement: Share of audited requests that must have the tokens of the static threshold, in (0, 1).
        operator: What the operator alone decides.
    """

    def __init__(
        self,
        registry: ProfileRegistry,
        guard: DriftGuard | None,
        traits: Traits,
        agreement: float = 0.9,
        operator: ServerOptions | None = None,
    ) -> None:
        self.registry = registry
        self.guard = guard
        self._agreement_guard = AgreementGuard()
        self._agreement = agreement
        self.statistics = EngineStatistics()
        self._traits = traits
        self._operator = operator or ServerOptions()
        self._decodings: dict[str, _Decoding] = {}
        self._refused: set[str] = set()  # ids of profiles whose choice cannot be used here

    @classmethod
    def of_engine(cls, vllm_config: "VllmConfig") -> "Calibrator":
        """The calibrator that an engine's operator asks for."""
        options = server_options(vllm_config)
        store = open_store(options.profile_dir, vllm_config)
        guard = None
        if options.drift != "off":
            guard = DriftGuard(
                options.drift, options.drift_window, options.drift_gap, options.drift_cosine, options.max_profiles
            )
        registry = ProfileRegistry(options.max_profiles, store)
        return cls(registry, guard, vllm_config.model_config.hf_config.traits, options.audit_agreement, options)

    def assign(
        self, req_id: str, spec: RequestSpec, max_tokens: int, *, is_kept: bool = False, has_grammar: bool = False
    ) -> Assignment:
        """The schedule of a request and its part in calibration; decided once, when it is first planned.

        Args:
            req_id: Its id.
            spec: As admission made it.
            max_tokens: Output tokens that it may get.
            is_kept: Whether other weights have decided some of its tokens (:meth:`forget`). It is then neither recorded
                nor watched.
            has_grammar: Whether a grammar says which. It then uses its task's profile, but says nothing of the task: it
                neither calibrates nor is watched or audited.
        """
        found = self._decodings.get(req_id)
        if found is None:
            found = self._decodings[req_id] = self._decide(
                req_id, spec, max_tokens, is_kept=is_kept, has_grammar=has_grammar
            )
        return found.assignment

    def _decide(
        self, req_id: str, spec: RequestSpec, max_tokens: int, *, is_kept: bool, has_grammar: bool
    ) -> _Decoding:
        options, canvas = spec.options, spec.canvas
        policy = POLICIES[options.policy]
        shape = DecodeShape(
            canvas.num_blocks,
            canvas.block_length,
            options.sub_block_length,
            decides_first_alone(spec, self._traits),
            self._traits.is_threshold_strict,
            None if spec.pinned is None else answer_start(spec.pinned),
        )
        key = ProfileKey(options.task or "", options.block_length, options.cache_key, options.threshold)
        profile, recorder, is_early = None, None, False
        is_usual = not (is_kept or has_grammar) and spec.pinned is None and spec.draft is None
        asks_for_drafts = not has_grammar and (spec.draft is not None or options.draft_ngram is not None)
        if policy.calibrates(options):
            profile = self._find_profile(options, key)
            if spec.follows_choice and profile is not None and not options.recalibrate:
                options = self._choose(spec, max_tokens, profile)
                policy = POLICIES[options.policy]
            is_own = options.profile is None and options.task is not None
            if is_own and is_usual and self._calibrates(req_id, options, key, max_tokens, profile):
                profile, recorder = None, Recorder(canvas.num_blocks, canvas.block_length, key.num_positions)
            elif is_own and profile is None and _has_early_thresholds(options):
                profile, is_early = self.registry.early(key), True
            kind = "calibrating" if recorder else "static" if profile is None else "early" if is_early else "calibrated"
            if not is_kept:  # it was counted when it began
                self.statistics.counts["requests", kind] += 1
        thresholds = None
        if policy.calibrates(options):
            if profile is not None:
                thresholds = profile.thresholds(replace(setting_of(options), is_early=is_early))
            else:
                policy = POLICIES["osdt"]  # the static threshold alone
        schedule = policy.schedule(options, shape, thresholds)
        if profile is not None and schedule.rule == Rule.THRESHOLD:
            self.statistics.uses(key.task, profile.profile_id, float(schedule.parameters.mean()))
        about = About(
            options.policy, options.task, profile.profile_id if profile is not None else None, recorder is not None
        )
        has_drafts = asks_for_drafts and recorder is None  # a task's steps are recorded as they are without n-grams
        is_usual = is_usual and not has_drafts
        is_own_profile = profile is not None and options.profile is None and not is_early
        by_entropy = policy.looks_at_entropy(options)
        # A guard compares blocks, which others cut elsewhere.
        can_watch = is_own_profile and not by_entropy and not policy.cuts_blocks and not options.adablock
        is_watched = self.guard is not None and can_watch and is_usual
        if is_watched:
            assert self.guard is not None and profile is not None
            self.guard.begin(profile, req_id)
        assignment = Assignment(
            schedule,
            is_recorded=recorder is not None,
            is_watched=is_watched,
            policy=policy.name,
            has_grammar=has_grammar,
            has_drafts=has_drafts,
            by_entropy=by_entropy,
            reads_logits=policy.needs_logits(options),
        )
        return _Decoding(options, key, shape, about, assignment, profile, is_early, is_usual, recorder)

    def _choose(self, spec: RequestSpec, max_tokens: int, profile: CalibrationProfile) -> DecodingOptions:
        """The options of a request that leaves it to its profile how positions are chosen."""
        options = spec.options
        if profile.choice is None:
            return options
        try:
            chosen = self._with_choice(spec, max_tokens, profile.choice)
            if chosen.edit_threshold == options.edit_threshold and _modifiers(chosen) == _modifiers(options):
                return chosen
            raise OSDTError("It does not go with the token editing, or the credits, of the request.")
        except OSDTError as error:
            if profile.profile_id not in self._refused:
                self._refused.add(profile.profile_id)
                logger.warning(
                    "Task %r has the choice %s, which cannot be used here, so policy %r decodes it. %s",
                    profile.key.task,
                    profile.choice,
                    options.policy,
                    error,
                )
            return options

    def _with_choice(self, spec: RequestSpec, max_tokens: int, choice: Choice) -> DecodingOptions:
        """The options of a request with its profile's choice, as admission would make them.

        Raises:
            OSDTError: They do not go with the request, the model, or the operator's files.
        """
        options, canvas = spec.options, spec.canvas
        chosen = validate_for_family(with_choice(options, choice), self._traits)
        policy = POLICIES[chosen.policy]
        if policy.name in spec.barred:
            raise OSDTError(f"Policy {policy.name!r} has no place for some of the request's sampling parameters.")
        policy.check_operator(chosen, self._operator)
        asked = CanvasRequest(
            canvas.start,
            max_tokens,
            options.gen_length,
            canvas.block_length,
            sub_block_length=chosen.sub_block_length,
            is_block_causal=chosen.is_block_causal,
        )
        return replace(chosen, **policy.resolve(chosen, asked, canvas))

    def _find_profile(self, options: DecodingOptions, key: ProfileKey) -> CalibrationProfile | None:
        if options.profile is not None:
            profile = self.registry.find_pinned(key.task, options.profile)
            if profile is None:
                self.statistics.counts["fallbacks", "pin"] += 1
            return profile
        return None if options.task is None else self.registry.find(key, options.num_calibration_requests)

    def _calibrates(
        self, req_id: str, options: DecodingOptions, key: ProfileKey, max_tokens: int, profile: Any
    ) -> bool:
        """Whether a request is recorded. One that ends within its first block says too little of a task."""
        if max_tokens < options.block_length or options.task == UNDECIDED_TASK:
            return False
        if profile is not None and not options.recalibrate:
            return False
        is_shared = _has_early_thresholds(options) and not options.recalibrate
        return self.registry.claim(key, req_id, options.num_calibration_requests, is_shared=is_shared)

    def forget(self, store: ProfileStore | None = None) -> None:
        """The weights are others: forget profiles, calibrations under way, and what guards have seen.

        Requests that go on are assigned anew when they resume.

        Args:
            store: See :meth:`ProfileRegistry.forget`.
        """
        self.registry.forget(store)
        if self.guard is not None:
            self.guard.forget()
        self._agreement_guard = AgreementGuard()
        self._decodings.clear()
        self._refused.clear()

    def options(self, req_id: str) -> DecodingOptions:
        """The options of a request that was assigned, with its profile's choice."""
        return self._decodings[req_id].options

    def about(self, req_id: str) -> About:
        """How a request is decoded."""
        found = self._decodings.get(req_id)
        return About() if found is None else found.about

    def hear(self, report: StepReport) -> None:
        """Take in what a step reported."""
        for req_id, block, confidence in report.entries:
            if req_id in self._decodings:
                self._decodings[req_id].entries[block] = confidence
        if report.num_fallbacks is not None:
            for kind in _COUNTED:
                if report.num_fallbacks[kind]:
                    self.statistics.counts["fallbacks", kind.name.lower()] += int(report.num_fallbacks[kind])
        if report.recorded is not None:
            self._record(report.recorded)

    def _record(self, recorded: RecordedStep) -> None:
        for row, req_id in enumerate(recorded.req_ids):
            found = self._decodings.get(req_id)
            if found is not None and found.recorder is not None:
                length = found.shape.block_length
                confidence, proposal, before, after, tokens = (values[row, :length] for values in recorded[3:8])
                offset = 0 if recorded.offset is None else int(recorded.offset[row])
                where = int(recorded.block[row]), int(recorded.step[row])
                found.recorder.add(*where, confidence, proposal, before, after, tokens, offset=offset)

    def finish_request(self, req_id: str, *, ended_well: bool) -> None:
        """A request has ended.

        A calibration that went well is delivered; an aborted or failed one is not, and another request takes its place.
        """
        found = self._decodings.pop(req_id, None)
        if found is None:
            return
        if found.recorder is not None:
            self._end_calibration(req_id, found, ended_well)
        elif found.assignment.is_watched:
            self._watch(req_id, found, ended_well)

    def _end_calibration(self, req_id: str, found: _Decoding, ended_well: bool) -> None:
        assert found.recorder is not None
        options, recording = found.options, found.recorder.recording()
        if not ended_well or recording.is_empty:
            self.registry.release(found.key, req_id)
            return
        profile = self.registry.deliver(found.key, req_id, recording, options.num_calibration_requests)
        if profile is not None:
            schedule = POLICIES[options.policy].schedule(options, found.shape, profile.thresholds(setting_of(options)))
            before, after = profile.expected_forwards(schedule.parameters)
            logger.info(
                "Calibrated task %r on %d requests (profile %s): thresholds by block %s; about %.1f -> %.1f forwards "
                "a request expected.",
                found.key.task,
                profile.num_requests,
                profile.profile_id,
                " ".join(f"{value:.2f}" for value in schedule.parameters[:, 0]),
                before,
                after,
            )

    def subject(self, req_id: str) -> Subject | None:
        """What an audit of a request would look at; None where it uses no finished profile."""
        found = self._decodings.get(req_id)
        if found is None or found.profile is None or found.is_early:
            return None
        if not found.is_usual:
            return None
        return Subject(found.profile, self._share_that_may_change(found.options, found.profile))

    def _share_that_may_change(self, options: DecodingOptions, profile: CalibrationProfile) -> float | None:
        """Share of a profile's requests that may have other tokens than the static threshold gives."""
        share = 1.0 - self._agreement
        choice = profile.choice
        if choice is not None and options.policy == choice.policy:
            if choice.num_changed is None:
                return None
            return min(0.99, max(share, upper_bound(choice.num_changed, choice.num_prompts, _TUNING_LEVEL)))
        # Statistics of the paper, and policies that unmask more than the thresholds allow, bound no share of requests;
        # who asks for one accepts what it changes.
        is_bound = options.statistic == CONFORMAL and options.policy == "osdt"
        return max(share, options.risk) if is_bound else None

    def hear_audit(self, subject: Subject, *, is_same: bool) -> None:
        """An audit has ended: the static threshold gives the same tokens, or others."""
        self.statistics.counts["audits", "same" if is_same else "changed"] += 1
        profile = subject.profile
        if self.guard is None or subject.allowed is None:
            return
        seen = self._agreement_guard.observe(profile.profile_id, is_same=is_same, allowed=subject.allowed)
        if seen is None:
            return
        self._alarm(
            profile,
            f"Task {profile.key.task!r} no longer has the answers of the static threshold with its profile "
            f"{profile.profile_id}: {seen.num_changed} of {seen.num_audits} audited requests have other tokens, where "
            f"a share of {subject.allowed:.3g} may.",
        )

    def _alarm(self, profile: CalibrationProfile, words: str) -> None:
        """Do what the operator wants done about a profile that no longer fits."""
        assert self.guard is not None
        self.statistics.counts["drift", self.guard.action] += 1
        if self.guard.action == "recalibrate":
            self.registry.mark_stale(profile)
            words += " It calibrates again."
        logger.warning("%s", words)

    def _watch(self, req_id: str, found: _Decoding, ended_well: bool) -> None:
        """Tell the guard what a request saw of the profile it used."""
        assert self.guard is not None and found.profile is not None
        profile = found.profile
        seen = _by_block(found.entries.items(), found.shape.num_blocks) if ended_well else None
        drift = self.guard.end(profile, req_id, seen)
        if drift is None:
            return
        self._alarm(
            profile,
            f"Task {profile.key.task!r} no longer looks like its profile {profile.profile_id}: over "
            f"{drift.num_requests} requests, confidence at block entry differs by {drift.gap:.3f} and has cosine "
            f"{drift.cosine:.3f} with it.",
        )

    def profiles(self) -> list[dict[str, Any]]:
        """The profiles in memory as plain values, oldest first (see :func:`vllm_osdt.profiles`).

        All are on disk when this returns, where there is a store.
        """
        self.registry.flush()
        return [profile.as_dict() for profile in self.registry.profiles.values()]

    def take_statistics(self) -> dict[str, Any]:
        """The news since the last call."""
        for label, number in self.registry.counts.items():
            if number:
                self.statistics.counts["calibrations", label] += number
        self.registry.counts.clear()
        return self.statistics.take()


def _by_block(entries: Iterable[tuple[int, float]], num_blocks: int) -> np.ndarray:
    """Mean confidence at block entry, float32 ``[num_blocks]``, NaN where a block was not entered."""
    table = np.full(num_blocks, np.nan, dtype=np.float32)
    for block, confidence in entries:
        table[block] = confidence
    return table
