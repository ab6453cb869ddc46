"""What some policies do in a step, as one compiled loop each: on a CPU a small tensor operation takes longer than that.

Each is the twin of its policy's ``adjust_by_tensors`` and writes the same. Arrays share the memory of the step's
tensors.
"""

import numpy as np

from csrc_triton.cpu import ONE, _best, _choose, _quota, compiled
from vllm_osdt.geometry import MAX_BLOCK_LENGTH
from vllm_osdt.policies.base import Step
from vllm_osdt.policies.ccd import IS_DYNAMIC, NOWHERE, NUM_POSITIONS, QUOTA, WINDOW
from vllm_osdt.policies.early_exit import ADAPTIVE, EVERY
from vllm_osdt.policies.klass import NUM_STEPS
from vllm_osdt.policies.klass import QUOTA as KLASS_QUOTA
from vllm_osdt.policies.less import DIVERGENCE, PERSISTENCE
from vllm_osdt.policies.less import QUOTA as LESS_QUOTA
from vllm_osdt.policies.prophet import (
    COUNTS_ITSELF,
    EARLY,
    FIRST,
    KNOWN,
    LATE,
    MIDDLE,
    REGION_LENGTH,
    REGION_START,
    SECOND,
)
from vllm_osdt.policies.sched import COSINE, LINEAR

ZERO, HALF, PI = np.float32(0), np.float32(0.5), np.float32(np.pi)
NOTHING, LEFT_OUT = np.float32(-np.inf), np.float32(NOWHERE)
FIRST_STAGE, SECOND_STAGE = np.float32(FIRST), np.float32(SECOND)
WHOLE_BLOCK, EVERYTHING = np.float32(MAX_BLOCK_LENGTH), np.float32(EVERY)


def prophet(step: Step) -> None:
    """See ``policies.prophet``."""
    _exit(False, *_of_exit(step))


def sched(step: Step) -> None:
    """See ``policies.sched``."""
    _exit(True, *_of_exit(step))


def _of_exit(step: Step) -> tuple[np.ndarray, ...]:
    """What an early exit reads and writes of a step."""
    own = (step.constants, step.state, step.carry, step.parameter, step.is_open, step.reading, step.memory)
    counts = (step.step_index, step.block_index, step.num_left, step.num_positions, step.num_alone, step.output_index)
    return tuple(one.numpy() for one in (*own, *counts))


@compiled()
def _needed_gap(constants: np.ndarray, progress: np.float32) -> np.float32:
    """The mean gap that ``sched`` asks for."""
    high, low, rate = constants[2], constants[3], constants[4]
    if rate == LINEAR:
        falling = ONE - progress
    elif rate == COSINE:
        falling = (ONE + np.cos(PI * progress)) * HALF
    else:
        falling = np.exp(-rate * progress)
    return low + (high - low) * falling


@compiled()
def _is_calm(
    constants: np.ndarray,
    state: np.ndarray,
    is_open: np.ndarray,
    reading: np.ndarray,
    memory: np.ndarray,
    progress: np.float32,
) -> bool:
    """Whether steps enough of ``sched`` have changed little enough; best tokens and their number are kept."""
    patience, min_progress, max_change = constants[5], constants[6], constants[7]
    num_changed, num_open = 0, 0
    for k in range(is_open.size):
        num_open += is_open[k]
        num_changed += is_open[k] and reading[k, 2] != memory[k, 0]
        memory[k, 0] = reading[k, 2]
    change = np.float32(num_changed) / np.float32(max(num_open, 1)) if state[2] != 0 else ONE
    is_calm = progress >= min_progress and change <= max_change
    state[2] = ONE
    state[1] = state[1] + ONE if is_calm else ZERO
    return is_calm and state[1] > patience


@compiled(
    "(b1, f4[:, :], f4[:, :], f4[:, :], f4[:], b1[:, :], f4[:, :, :], f4[:, :, :], "
    "i8[:], i8[:], i8[:], i8[:], i8[:], i8[:])"
)
def _exit(
    is_sched: bool,
    all_constants: np.ndarray,
    all_state: np.ndarray,
    carry: np.ndarray,
    parameter: np.ndarray,
    is_open: np.ndarray,
    reading: np.ndarray,
    memory: np.ndarray,
    step_index: np.ndarray,
    block_index: np.ndarray,
    num_left: np.ndarray,
    num_positions: np.ndarray,
    num_alone: np.ndarray,
    output_index: np.ndarray,
) -> None:
    """The step of an early exit."""
    for row in range(parameter.size):
        constants, state = all_constants[row], all_state[row]
        last, per_block = constants[0], constants[1]
        region_start = np.int64(0) if is_sched else np.int64(constants[REGION_START]) - output_index[row]
        region_length = np.int64(0) if is_sched else np.int64(constants[REGION_LENGTH])
        number, num_open, num_watched, last_open, total = ZERO, 0, 0, -1, 0.0
        for k in range(is_open.shape[1]):
            num_open += is_open[row, k]
            last_open = k if is_open[row, k] else last_open
            is_inside = region_length == 0 or 0 <= k - region_start < region_length
            if is_open[row, k] and is_inside:
                total += reading[row, k, 0]
                number += reading[row, k, 1]
                num_watched += 1
        if not state[0] > 0:
            state[0] = num_open + num_alone[row]
        gap = np.float32(total / max(number, ONE)) if number > 0 else NOTHING
        if not is_sched:
            state[KNOWN] = max(state[KNOWN], np.float32(last_open + 1))
            if region_length > 0 and num_watched == 0 and region_start + region_length <= state[KNOWN]:
                gap = np.float32(np.inf)  # nothing is asked for any more
        index = np.float32(block_index[row]) * per_block + np.float32(step_index[row])
        if last == ADAPTIVE:
            left = np.float32(num_open) / max(state[0], ONE)
            if per_block > 0:
                left = np.float32(num_left[row]) / np.float32(num_positions[row])
            progress = ONE - left
        elif is_sched:
            progress = index / max(last, ONE) if last > 0 else ONE
        else:
            progress = (index + constants[COUNTS_ITSELF]) / max(last + ONE, ONE)
        progress = min(max(progress, ZERO), ONE)
        if is_sched:
            is_calm = _is_calm(constants, state, is_open[row], reading[row], memory[row], progress)
            is_sure = is_calm and gap >= _needed_gap(constants, progress)
        elif progress < FIRST_STAGE:
            is_sure = gap >= constants[EARLY]
        else:
            is_sure = gap >= (constants[MIDDLE] if progress < SECOND_STAGE else constants[LATE])
        fills = is_sure or carry[row, 0] > 0
        carry[row, 0] = fills and per_block > 0
        if fills:
            parameter[row] = EVERYTHING if last == ADAPTIVE else WHOLE_BLOCK


def multi_block(step: Step) -> None:
    """See ``policies.multi_block``."""
    own = (step.constants, step.score, step.parameter, step.confidence, step.is_open)
    _multi_block(*(one.numpy() for one in own))


@compiled("(f4[:, :], f4[:, :], f4[:], f4[:, :], b1[:, :])")
def _multi_block(
    all_constants: np.ndarray,
    score: np.ndarray,
    parameter: np.ndarray,
    confidence: np.ndarray,
    is_open: np.ndarray,
) -> None:
    """Chooses; writes ``score`` and ``parameter``."""
    num_requests, width = score.shape
    chosen, rank = np.zeros(score.shape, np.bool_), np.zeros(score.shape, np.float32)
    for row in range(num_requests):
        constants = all_constants[row]
        length, is_release = int(constants[0]), constants[3] > 0
        enters = is_full = is_first = True
        before, surest_of_all = ONE, -1
        for start in range(0, width, length):
            end = min(start + length, width)
            enters &= before >= constants[1]
            is_full &= before >= constants[2]
            num_open, surest = 0, -1
            for k in range(start, end):
                if not is_open[row, k]:
                    continue
                num_open += 1
                if enters:
                    rank[row, k] = confidence[row, k]
                    chosen[row, k] = confidence[row, k] >= parameter[row]
                    if surest < 0 or confidence[row, k] > confidence[row, surest]:
                        surest = k
            if surest >= 0:
                if is_full and (is_first or not is_release):
                    chosen[row, surest], is_first = True, False
                if surest_of_all < 0 or confidence[row, surest] > confidence[row, surest_of_all]:
                    surest_of_all = surest
            before = np.float32(end - start - num_open) / np.float32(end - start)
        if is_release and surest_of_all >= 0:
            chosen[row, surest_of_all] = True
    _choose(score, parameter, rank, chosen, is_open)


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
