"""One run of ``vllm-osdt tune``: decodes prompts with the reference and with candidates, and tests the candidates.

``calibration.selection`` has the tests, ``cli.candidates`` what is tried, ``cli.decoders`` what decodes.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from vllm_osdt.calibration.fingerprint import ModelFingerprint
from vllm_osdt.calibration.profile import CalibrationProfile, Choice, OptionValue, setting_in_words
from vllm_osdt.calibration.registry import LOOK_INTERVAL_S
from vllm_osdt.calibration.selection import (
    cheapest,
    fixed_sequence,
    is_hopeless,
    num_needed,
    p_value,
    upper_bound,
)
from vllm_osdt.calibration.store import ProfileStore, UnusableFileError, read_file
from vllm_osdt.cli.common import CommandError
from vllm_osdt.cli.tuning.candidates import REFERENCE, Setting, calibrates, candidates_of
from vllm_osdt.cli.tuning.decoders import Decoded, Decoder, RefusedError
from vllm_osdt.cli.tuning.judge import Verdict
from vllm_osdt.cli.tuning.plan import Plan
from vllm_osdt.cli.tuning.state import State

BATCH = 64  # prompts that are decoded at a time
POLL_S = 0.25
NUM_LOOKS = 3  # at whether a server has noticed the profile
SKIPPED = "a more cautious one was not accepted"

Progress = Callable[[str, int, int], None]  # what is decoded, prompts done, prompts


@dataclass(frozen=True)
class Row:
    """What came of a candidate.

    Attributes:
        policy, setting: The candidate, and its options in words.
        status: ``reference``, ``accepted``, ``rejected``, ``given up``, ``not tested`` or ``refused``.
        prompts: That were decoded with it.
        lost, won, changed: Of those; changed are all that got another text than the reference's.
        upper_bound: The share of requests that loses at most, at the policy's level; None where it was not tested to
            the end.
        nfe, reference_nfe: Forward passes of a request, and of the reference on the same prompts.
        tokens_per_forward: Output tokens for each of them.
        reason: Why it was not tested.
    """

    policy: str
    setting: str
    status: str
    prompts: int = 0
    lost: int = 0
    won: int = 0
    changed: int = 0
    upper_bound: float | None = None
    nfe: float | None = None
    reference_nfe: float | None = None
    tokens_per_forward: float | None = None
    reason: str = ""

    @property
    def is_accepted(self) -> bool:
        """Whether it may be used."""
        return self.status in ("reference", "accepted")

    @property
    def cost(self) -> float:
        """Forward passes, for each of the reference's on the same prompts."""
        return self.nfe / self.reference_nfe if self.nfe and self.reference_nfe else 1.0


@dataclass(frozen=True)
class Calibrated:
    """The record of the calibrating prompts, under the name of the run, and the model that it is for."""

    fingerprint: ModelFingerprint
    model: str
    profile: CalibrationProfile


class Tuning:
    """A run.

    Args:
        plan: What is asked for.
        decoder: What decodes.
        state: What was decoded before.
        progress: Told what is done.
    """

    def __init__(self, plan: Plan, decoder: Decoder, state: State, progress: Progress = lambda *_: None) -> None:
        self.plan = plan
        self._decoder = decoder
        self._state = state
        self._progress = progress
        self._scratch = f"tuning-{state.run}"  # the task under which the prompts calibrate
        self._reference: list[Decoded] = []
        self.calibrated: Calibrated | None = None

    def run(self) -> list[Row]:
        """Decode and test everything.

        Returns:
            The reference and every candidate, policy by policy.

        Raises:
            CommandError: The reference cannot be decoded, or the prompts make no profile.
        """
        try:
            self.calibrated = self._calibrate()
            reference, _ = self._decode("reference", self._setting(REFERENCE), range(len(self.plan.prompts)))
        except RefusedError as error:
            raise CommandError(f"the reference {setting_in_words(REFERENCE)} is refused: {error}") from None
        self._reference = reference
        name = {name: value for name, value in REFERENCE.items() if name != "policy"}
        rows = [self._row(REFERENCE["policy"], name, "reference", range(len(reference)), reference, {})]
        for policy in self.plan.policies:
            rows += self._test_list(policy)
        return rows

    def write(self, rows: Sequence[Row], folder: Path) -> tuple[Row, CalibrationProfile]:
        """Give the task the accepted setting with the fewest forward passes.

        Returns:
            The chosen row, and the profile that was written.
        """
        chosen = cheapest([row.cost for row in rows], [row.is_accepted for row in rows])
        assert chosen is not None and self.calibrated is not None  # the reference is accepted
        row, settings = rows[chosen], self._settings()
        setting = settings[row.policy, row.setting]
        options = {name: value for name, value in setting.items() if name != "policy"}
        is_reference = row.status == "reference"
        choice = Choice(
            row.policy,
            options,
            dict(REFERENCE),
            self.plan.judge.loss,
            0.0 if is_reference else self.plan.risk,
            self.plan.confidence,
            row.prompts,
            row.lost,
            self.plan.decoding,
            row.changed,
        )
        found = self.calibrated
        task = found.profile.key.task.replace(self._scratch, self.plan.task, 1)  # an adapter's name stays
        created = datetime.now(UTC).isoformat(timespec="seconds")
        profile = replace(
            found.profile, key=replace(found.profile.key, task=task), choice=choice, created=created, _thresholds={}
        )
        ProfileStore(folder, found.fingerprint, found.model).write(profile)
        return row, profile

    def is_followed(self, profile: CalibrationProfile) -> bool:
        """Whether the decoder uses the profile for a request that names the task alone, soon at least."""
        options = {**self.plan.options, "task": self.plan.task}
        for _ in range(NUM_LOOKS):
            [decoded] = self._decoder.decode(self.plan.prompts[:1], self.plan.max_tokens, options)
            if decoded.profile == profile.profile_id:
                return True
            time.sleep(LOOK_INTERVAL_S)
        return False

    def clean_up(self) -> None:
        """Remove the run's own profile from the decoder's folder."""
        if self.calibrated is not None:
            found = self.calibrated
            store = ProfileStore(self._decoder.folder, found.fingerprint, found.model)
            store.remove(found.profile)
            store.path(found.profile.key.task).with_suffix(".lock").unlink(missing_ok=True)

    def accuracy(self) -> float | None:
        """The share of prompts that the reference answers right; None where that is not known."""
        judge = self.plan.judge
        if not judge.knows_right:
            return None
        right = [judge.is_right(index, one.text) for index, one in enumerate(self._reference)]
        return sum(right) / len(right)

    def _settings(self) -> dict[tuple[str, str], Setting]:
        everything = [REFERENCE]
        for policy in self.plan.policies:
            everything += candidates_of(policy, self.plan.num_calibrating)
        return {(str(one["policy"]), _words(one)): one for one in everything}

    def _setting(self, setting: Setting) -> Setting:
        """What a request sends."""
        if calibrates(setting):
            setting = {**setting, "task": self._scratch, "num_calibration_requests": self.plan.num_calibrating}
        return {**self.plan.options, **setting}

    def _calibrate(self) -> Calibrated:
        """Have the first prompts calibrate, which decodes them with the reference."""
        number, needed = len(self.plan.prompts), self.plan.num_calibrating
        found = self._find_profile()
        if found is not None and self._state.num_calibrating is not None:
            return found
        options = self._setting({"policy": "osdt", "threshold": REFERENCE["threshold"], "recalibrate": True})
        for begin in range(0, number, needed):  # more than needed where some do not count
            indices = range(begin, min(begin + needed, number))
            prompts = [self.plan.prompts[index] for index in indices]
            decoded = self._decoder.decode(prompts, self.plan.max_tokens, options)
            self._state.add("reference", indices, [one._replace(profile=None) for one in decoded])
            self._progress("calibration", indices.stop, number)
            if len(indices) < needed and begin == 0:
                break
            found = self._wait_for_profile()
            if found is not None:
                self._state.calibrated(indices.stop)
                return found
        raise CommandError(
            f"none of the {number} prompts made a profile in {self._decoder.folder}; --max-tokens must be at least one "
            "block, and a server must have its profile_dir there (--dir)"
        )

    def _wait_for_profile(self) -> Calibrated | None:
        self._decoder.flush()
        deadline = time.monotonic() + self._decoder.writing_limit_s
        while True:
            found = self._find_profile()
            if found is not None or time.monotonic() >= deadline:
                return found
            time.sleep(POLL_S)

    def _find_profile(self) -> Calibrated | None:
        for path in self._decoder.folder.glob(f"*/{self._scratch}*.json"):
            try:
                fingerprint, model, profiles = read_file(path)
            except (UnusableFileError, OSError):
                continue
            return Calibrated(fingerprint, model, profiles[-1])
        return None

    def _decode(
        self,
        name: str,
        options: Setting,
        indices: Sequence[int],
        gives_up: Callable[[Sequence[Decoded]], bool] = lambda _: False,
    ) -> tuple[list[Decoded], bool]:
        """Decode prompts in batches; what was decoded, and whether it was given up before the last one."""
        done: list[Decoded] = []
        for begin in range(0, len(indices), BATCH):
            batch = indices[begin : begin + BATCH]
            missing = [index for index in batch if self._state.find(name, index) is None]
            if missing:
                prompts = [self.plan.prompts[index] for index in missing]
                self._state.add(name, missing, self._decoder.decode(prompts, self.plan.max_tokens, options))
            done += [one for index in batch if (one := self._state.find(name, index)) is not None]
            self._progress(name, len(done), len(indices))
            if gives_up(done):
                return done, True
        return done, False

    def _test_list(self, name: str) -> list[Row]:
        """The candidates of a list, tested in their order up to the first that is not accepted."""
        plan, number = self.plan, len(self.plan.prompts)
        candidates = candidates_of(name, plan.num_calibrating)
        begin = (self._state.num_calibrating or 0) if any(map(calibrates, candidates)) else 0
        indices = range(begin, number)
        needed = num_needed(plan.risk, plan.level)
        rows: list[Row] = []
        reason = ""
        if len(indices) < needed:
            reason = f"{len(indices)} prompts beside those that calibrate; {needed} needed"
        for setting in candidates:
            if reason:
                rows.append(Row(str(setting["policy"]), _words(setting), "not tested", reason=reason))
                continue
            row = self._test(setting, indices)
            rows.append(row)
            if not row.is_accepted:
                reason = SKIPPED
        tested = [row for row in rows if row.upper_bound is not None]
        p_values = [p_value(row.lost, row.prompts, plan.risk) for row in tested]
        assert fixed_sequence(p_values, plan.level) == sum(row.is_accepted for row in rows)
        return rows

    def _test(self, setting: Setting, indices: Sequence[int]) -> Row:
        plan, name = self.plan, setting_in_words(setting)
        policy = str(setting["policy"])

        def gives_up(decoded: Sequence[Decoded]) -> bool:
            lost = self._verdicts(indices, decoded)[Verdict.LOST]
            return is_hopeless(lost, len(decoded), len(indices), plan.risk, plan.level)

        try:
            decoded, is_given_up = self._decode(name, self._setting(setting), indices, gives_up)
        except RefusedError as error:
            return Row(policy, _words(setting), "refused", reason=str(error))
        if calibrates(setting) and any(one.profile is None for one in decoded):
            raise CommandError(f"{name} was decoded without the profile of the calibration; run the command again")
        verdicts = self._verdicts(indices, decoded)
        is_accepted = not is_given_up and p_value(verdicts[Verdict.LOST], len(decoded), plan.risk) <= plan.level
        status = (
            "accepted" if is_accepted else "given up" if is_given_up and len(decoded) < len(indices) else "rejected"
        )
        return self._row(policy, setting, status, indices, decoded, verdicts)

    def _verdicts(self, indices: Sequence[int], decoded: Sequence[Decoded]) -> dict[Verdict, int]:
        counts = dict.fromkeys(Verdict, 0)
        for index, one in zip(indices, decoded, strict=False):
            counts[self.plan.judge.compare(index, self._reference[index].text, one.text)] += 1
        return counts

    def _row(
        self,
        policy: OptionValue,
        setting: Setting,
        status: str,
        indices: Sequence[int],
        decoded: Sequence[Decoded],
        verdicts: dict[Verdict, int],
    ) -> Row:
        number, nfe = len(decoded), sum(one.nfe for one in decoded)
        lost = verdicts.get(Verdict.LOST, 0)
        bound = None
        if status in ("accepted", "rejected"):
            bound = upper_bound(lost, number, self.plan.level)
        elif status == "reference":
            bound = 0.0
        return Row(
            str(policy),
            _words(setting),
            status,
            prompts=number,
            lost=lost,
            won=verdicts.get(Verdict.WON, 0),
            changed=sum(self._reference[index].text != one.text for index, one in zip(indices, decoded, strict=False)),
            upper_bound=bound,
            nfe=nfe / number,
            reference_nfe=sum(self._reference[index].nfe for index in indices[:number]) / number,
            tokens_per_forward=sum(one.num_tokens for one in decoded) / max(1, nfe),
        )


def _words(setting: Setting) -> str:
    return setting_in_words({name: value for name, value in setting.items() if name != "policy"})
