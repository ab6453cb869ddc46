"""What tests of policies that adjust their steps share."""

from collections.abc import Callable

import torch

from vllm_osdt.policies import Schedule, Step
from vllm_osdt.policies.base import MAX_CARRY, MAX_CONSTANTS, MAX_READINGS, MAX_STATE

NO_CONFIDENCE = -2.0


def make_step(score: torch.Tensor, schedule: Schedule, rows: int, *, memory_size: int = 0) -> Step:
    """The first step of ``rows`` requests of one schedule that enter their first block, which is all of the canvas.

    Args:
        score: float32 ``[rows, W]``, -2 where nothing is masked.
        schedule: Theirs.
        rows: How many there are.
        memory_size: The policy's.
    """
    constants = torch.zeros(rows, MAX_CONSTANTS)
    constants[:, : len(schedule.constants)] = torch.tensor(schedule.constants)
    width = score.shape[1]
    return Step(
        score,
        torch.full((rows,), float(schedule.parameters[0, 0])),
        constants,
        torch.zeros(rows, MAX_STATE),
        torch.zeros(rows, dtype=torch.int64),
        score.clone(),
        torch.zeros(rows, width, dtype=torch.int64),
        score != NO_CONFIDENCE,
        torch.zeros(rows, width, memory_size),
        torch.zeros(rows, width, MAX_READINGS),
        torch.zeros(rows, MAX_CARRY),
        torch.zeros(rows, dtype=torch.int64),
        (score != NO_CONFIDENCE).sum(dim=1),
        torch.full((rows,), width),
        torch.full((rows, 1), -1),
        torch.zeros(rows, dtype=torch.int64),
        torch.zeros(rows, dtype=torch.int64),
    )


def next_step(step: Step, score: torch.Tensor, **changes: torch.Tensor) -> Step:
    """The step behind another of the same block.

    Args:
        step: As ``adjust`` and ``observe`` left it.
        score: float32 ``[R, W]``, as in :func:`make_step`.
        changes: Other fields that are not what follows from these.
    """
    is_open = score != NO_CONFIDENCE
    later = step._replace(
        score=score.clone(),
        step_index=step.step_index + 1,
        confidence=score.clone(),
        is_open=is_open,
        num_left=step.num_left - (step.is_open.sum(dim=1) - is_open.sum(dim=1)),
    )
    return later._replace(**changes)


def chosen(step: Step) -> list[set[int]]:
    """The positions that each request of a step unmasks, once its policy has adjusted it (rule: threshold)."""
    found = []
    for score, parameter in zip(step.score.tolist(), step.parameter.tolist(), strict=True):
        is_open = [place for place, one in enumerate(score) if one != NO_CONFIDENCE]
        passing = {place for place in is_open if score[place] >= parameter}
        found.append(passing or set(is_open[:1] and [max(is_open, key=lambda place: (score[place], -place))]))
    return found


def policy_rule(choose: Callable[[dict[int, float]], set[int]]) -> Callable[[int, int, dict[int, float]], list[int]]:
    """A rule of the plain loop that looks at the masked confidences alone."""
    return lambda block, step, masked: sorted(choose(masked))
