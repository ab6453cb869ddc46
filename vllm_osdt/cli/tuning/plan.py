"""What a run of ``vllm-osdt tune`` is asked for."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_osdt.calibration.profile import OptionValue
from vllm_osdt.calibration.selection import level_of_policy, num_needed, smallest_risk
from vllm_osdt.cli.common import CommandError
from vllm_osdt.cli.tuning.judge import Judge


@dataclass(frozen=True)
class Plan:
    """What is asked for.

    Attributes:
        task: That is tuned.
        model: In the report.
        prompts: Of the task.
        judge: Says which requests lose.
        policies: Names of the lists of candidates that are tried.
        num_calibrating: Prompts that calibrate the task, at the beginning; a policy that calibrates is tested on the
            others.
        max_tokens: Of every request.
        options: Sent with every request, such as ``block_length``.
        risk: The share of requests that may lose.
        confidence: The probability with which no more do.
    """

    task: str
    model: str
    prompts: Sequence[str]
    judge: Judge
    policies: tuple[str, ...]
    num_calibrating: int
    max_tokens: int
    options: dict[str, OptionValue]
    risk: float = 0.01
    confidence: float = 0.95

    @property
    def level(self) -> float:
        """At which every policy is tested."""
        return level_of_policy(self.confidence, len(self.policies))

    @property
    def decoding(self) -> dict[str, OptionValue]:
        """What else the prompts are decoded with."""
        return {"max_tokens": self.max_tokens, **self.options}

    def check(self) -> None:
        """Refuse prompts that are too few.

        Raises:
            CommandError: They cannot calibrate the task, or cannot certify the risk.
        """
        number, needed = len(self.prompts), num_needed(self.risk, self.level)
        if number < self.num_calibrating:
            raise CommandError(
                f"there are {number} prompts, but num_calibration_requests is {self.num_calibrating}; give more prompts"
            )
        if number < needed:
            raise CommandError(
                f"there are {number} prompts, but a risk of {self.risk:g} with confidence {self.confidence:g} over "
                f"{len(self.policies)} policies needs {needed}, where no request loses; the smallest risk that "
                f"{number} prompts can certify is {rounded_up(smallest_risk(number, self.level))}. Give more prompts, "
                "a larger --risk, or fewer --policies."
            )


def rounded_up(risk: float) -> float:
    """A risk to four digits that is no smaller."""
    return math.ceil(risk * 1e4) / 1e4


def name_run(model: str, weights: str | None, plan: Plan) -> str:
    """What tells a run apart: 16 hexadecimal digits of the model, the prompts and what they are decoded with."""
    content = [model, weights, list(plan.prompts), plan.decoding, plan.num_calibrating]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
