"""What some policies do in a step, as one compiled loop each: on a CPU a small tensor operation takes longer than that.

Each is the twin of its policy's ``adjust_by_tensors`` and writes the same. Arrays share the memory of the step's
tensors.
"""

import numpy as np

from csrc_triton.cpu import _best, _choose, _quota, compiled
from vllm_osdt.policies.base import Step
from vllm_osdt.policies.ccd import IS_DYNAMIC, NOWHERE, NUM_POSITIONS, QUOTA, WINDOW
from vllm_osdt.policies.klass import NUM_STEPS
from vllm_osdt.policies.klass import QUOTA as KLASS_QUOTA
from vllm_osdt.policies.less import DIVERGENCE, PERSISTENCE
from vllm_osdt.policies.less import QUOTA as LESS_QUOTA

LEFT_OUT = np.float32(NOWHERE)


def ccd(step: Step) -> None:
    """See ``policies.ccd``, the paper's rule."""
    own = (step.constants, step.step_index, step.score, step.parameter, step.is_open, step.reading, step.memory)
    _ccd(*(one.numpy() for one in own))


@compiled("(f4[:, :], i8[:], f4[:, :], f4[:], b1[:, :], f4[:, :, :], f4[:, :, :])")
def _ccd(
    constants: np.ndarray,
    step_index: np.ndarray,
    score: np.ndarray,
    parameter: np.ndarray,
    is_open: np.ndarray,
    reading: np.ndarray,
    memory: np.ndarray,
) -> None:
    """Chooses and notes; writes ``score``, ``parameter`` and ``memory``."""
    num_requests, width = score.shape
    quota, number = np.empty(num_requests, np.int64), np.empty(num_requests, np.int64)
    _quota(constants[:, QUOTA : QUOTA + 4], step_index, quota)
    value = np.empty(score.shape, np.float32)
    noted, first = np.empty(score.shape, np.bool_), np.empty(score.shape, np.bool_)
    for row in range(num_requests):
        number[row] = max(np.int64(constants[row, NUM_POSITIONS]), quota[row])
        for k in range(width):
            value[row, k] = reading[row, k, 0] if is_open[row, k] else LEFT_OUT
    _best(value, number, noted)
    for row in range(num_requests):
        for k in range(width):
            noted[row, k] &= is_open[row, k]
            value[row, k] = reading[row, k, 1] if noted[row, k] else LEFT_OUT
    _best(value, quota, first)
    agrees = np.empty(width, np.bool_)
    for row in range(num_requests):
        is_short, num_agreeing = constants[row, WINDOW] < 3, 0
        for k in range(width):
            token, old = reading[row, k, 2], memory[row, k]
            stays = is_open[row, k] and old[1] > 0 and old[0] == token
            agrees[k] = noted[row, k] and stays and (is_short or (old[3] > 0 and old[2] == token))
            num_agreeing += agrees[k]
            old[2], old[3] = old[0], old[1]
            old[0], old[1] = token, noted[row, k]
        if num_agreeing >= quota[row] and constants[row, IS_DYNAMIC] > 0:
            first[row] = agrees
    _choose(score, parameter, reading[:, :, 1], first, is_open)


def klass(step: Step) -> None:
    """See ``policies.klass``."""
    _choose_steady(False, KLASS_QUOTA, *_of_steady(step))


def less(step: Step) -> None:
    """See ``policies.less``."""
    _choose_steady(True, LESS_QUOTA, *_of_steady(step))


def _of_steady(step: Step) -> tuple[np.ndarray, ...]:
    """What a choice of stable positions reads and writes of a step."""
    own = (step.constants, step.step_index, step.score, step.parameter, step.confidence, step.is_open, step.reading)
    return tuple(one.numpy() for one in own)


@compiled("(b1, i8, f4[:, :], i8[:], f4[:, :], f4[:], f4[:, :], b1[:, :], f4[:, :, :])")
def _choose_steady(
    is_less: bool,
    first_of_quota: int,
    constants: np.ndarray,
    step_index: np.ndarray,
    score: np.ndarray,
    parameter: np.ndarray,
    confidence: np.ndarray,
    is_open: np.ndarray,
    reading: np.ndarray,
) -> None:
    """Chooses; writes ``score`` and ``parameter``."""
    num_requests, width = score.shape
    quota, chosen = np.empty(num_requests, np.int64), np.empty(score.shape, np.bool_)
    _quota(constants[:, first_of_quota : first_of_quota + 4], step_index, quota)
    _best(confidence, quota, chosen)
    passes = np.empty(width, np.bool_)
    for row in range(num_requests):
        is_any = False
        for k in range(width):
            if is_less:
                is_steady = reading[row, k, 0] <= constants[row, DIVERGENCE]
                is_steady &= reading[row, k, 1] > constants[row, PERSISTENCE]
            else:
                is_steady = reading[row, k, 0] >= constants[row, NUM_STEPS]
            passes[k] = is_open[row, k] and confidence[row, k] >= parameter[row] and is_steady
            is_any |= passes[k]
        if is_any:
            chosen[row] = passes
    _choose(score, parameter, confidence, chosen, is_open)
