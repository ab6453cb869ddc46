"""What tests of policies that adjust their steps share."""

from collections.abc import Callable

import torch

from vllm_osdt.policies import Schedule, Step
from vllm_osdt.policies.base import MAX_CONSTANTS, MAX_STATE


def make_step(score: torch.Tensor, schedule: Schedule, rows: int) -> Step:
    """The first step of ``rows`` requests of one schedule that enter their first block."""
    constants = torch.zeros(rows, MAX_CONSTANTS)
    constants[:, : len(schedule.constants)] = torch.tensor(schedule.constants)
    parameter = torch.full((rows,), float(schedule.parameters[0, 0]))
    return Step(score, parameter, constants, torch.zeros(rows, MAX_STATE), torch.zeros(rows, dtype=torch.int64))


def policy_rule(choose: Callable[[dict[int, float]], set[int]]) -> Callable[[int, int, dict[int, float]], list[int]]:
    """A rule of the plain loop that looks at the masked confidences alone."""
    return lambda block, step, masked: sorted(choose(masked))
