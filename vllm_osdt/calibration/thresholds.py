"""Recorded confidences -> thresholds; pure functions of NumPy arrays.

Source: OSDT (arXiv 2511.02077), CALIBRATE. The paper's text does not settle what is recorded, the quantile method or
what holds beyond the recorded steps; ours: all masked positions by default, linear quantiles, and the fallbacks of
:func:`calibrate`.

Ours: the statistic ``conformal``, split conformal prediction over requests (Vovk, Gammerman and Shafer 2005;
Angelopoulos and Bates, arXiv 2107.07511, section 1). A request's score in a block is the highest confidence of a
*wrong* proposal: a masked position whose best token is not the one that the calibration finally put there. With k
requests that reached the block, T is the ceil((k + 1)(1 - risk))-th smallest score. The score of one more exchangeable
request exceeds T with probability at most ``risk``, so at most that share of requests would see a wrong proposal pass
in the block, judged along the calibration's own steps. Blocks shorter than ``GROUP_LENGTH`` positions share a
threshold with their neighbors, and a score is that of all of them. The bound is then for each group: a canvas of many
short blocks would have as many chances to fail.

Also ours: thresholds while a task still calibrates (:func:`early`). Fewer requests than ``conformal`` needs promise
nothing, so their highest score is shrunk towards the static threshold.
"""

import math
from collections.abc import Callable
from enum import IntEnum
from typing import NamedTuple

import numpy as np


def min_whisker(samples: np.ndarray) -> float:
    """Lower whisker of the box plot: the smallest sample that is >= Q1 - 1.5 (Q3 - Q1)."""
    q1, q3 = np.quantile(samples, (0.25, 0.75))
    return float(samples[samples >= q1 - 1.5 * (q3 - q1)].min())


STATISTICS: dict[str, Callable[[np.ndarray], float]] = {
    "mean": lambda samples: float(samples.mean()),
    "q1": lambda samples: float(np.quantile(samples, 0.25)),
    "q2": lambda samples: float(np.quantile(samples, 0.5)),
    "q3": lambda samples: float(np.quantile(samples, 0.75)),
    "min_whisker": min_whisker,
}
CONFORMAL = "conformal"
GROUP_LENGTH = 32  # positions whose blocks share a conformal threshold
DEFAULT_RISK = 0.02


class Fallback(IntEnum):
    """Where a threshold comes from when not from samples of its own."""

    NONE = 0
    BLOCK = 1  # a block beyond the profile: its last block
    STEP = 2  # a step beyond those recorded in the block: the last of them
    CELL = 3  # no sample, or for conformal too few requests: the block's value, or the static threshold


class Thresholds(NamedTuple):
    """A calibrated table.

    Attributes:
        values: T, float32 ``[blocks, steps]``; NaN where nothing is known and the static threshold holds.
        fallback: int8, same shape, of :class:`Fallback`.
    """

    values: np.ndarray
    fallback: np.ndarray


def conformal(scores: np.ndarray, risk: float) -> float:
    """The ceil((k + 1)(1 - risk))-th smallest of k scores, NaN when k is too small for the risk."""
    rank = math.ceil((scores.size + 1) * (1 - risk) - 1e-9)
    return float(np.sort(scores)[rank - 1]) if 1 <= rank <= scores.size else math.nan


def early(scores: np.ndarray, risk: float, static: float) -> float:
    """A threshold from fewer scores than :func:`conformal` needs: the least that is cautious enough for k requests.

    The posterior predictive chance that the next request's score exceeds t, where t is above all k scores, is S(t) /
    (k + 1), with one request's worth of prior S(t) = P(score > t) (a Dirichlet process, Ferguson 1973). T is where that
    chance is ``risk``, but not below any score; at (k + 1) risk >= 1 it is the highest score, as ``conformal``'s is.

    The prior is S(t) = (3 (1 - t))^5, and 1 below 2 / 3: proposals that are right one by one can be wrong together
    only if their chances to be wrong add up to one, which takes 1 / (1 - t) of them. Five tokens and more seldom hang
    on one another, three or fewer often do. So thresholds fall to about 0.8 after a few requests, to 2 / 3 with many,
    and below only once ``conformal`` has enough. The numbers are chosen by measurement
    (``benchmarks/bench_osdt.py``).

    Args:
        scores: ``[k]``, k >= 1.
        risk: In (0, 1).
        static: The static threshold, in (0, 1], which is not exceeded.
    """
    exact = conformal(scores, risk)
    if not math.isnan(exact):
        return exact
    prior = 1 - ((scores.size + 1) * risk) ** 0.2 / 3
    return min(max(float(scores.max()), prior), static)


def num_requests_needed(risk: float) -> int:
    """The fewest requests k from which ``conformal`` gives a threshold: ceil((k + 1)(1 - risk)) <= k."""
    return math.ceil(1 / risk - 1e-9) - 1


def calibrate(
    confidence: np.ndarray,
    wrong: np.ndarray | None,
    granularity: str,
    statistic: str,
    risk: float = DEFAULT_RISK,
    static: float | None = None,
    block_length: int | None = None,
) -> Thresholds:
    """Thresholds T of recorded sequences.

    Args:
        confidence: float ``[requests, blocks, steps, positions]``, NaN where nothing was recorded. A block's steps are
            recorded from the first on; a block without a record in any request ends the table.
        wrong: bool, same shape: the proposal was not the token finally chosen. Read by ``conformal`` alone.
        granularity: ``block`` (one T per block, over all its steps) or ``step_block``.
        statistic: Name in :data:`STATISTICS`, or ``conformal``. Samples of all requests are pooled; ``conformal`` has
            one score for each request.
        risk: Of ``conformal``, in (0, 1).
        static: The static threshold, in (0, 1], where a block that too few requests reached is to have an
            :func:`early` threshold.
        block_length: Of the blocks that ``conformal`` groups; None for as many as there are positions.

    Returns:
        ``[recorded blocks, steps]``. With ``step_block``, steps beyond the last recorded one of a block repeat it,
        and a recorded step without a sample (or, for ``conformal``, with too few requests) has the block's value.

    Raises:
        ValueError: The first block holds no sample.
    """
    num_steps = confidence.shape[2]
    values, fallbacks = [], []
    for block in range(confidence.shape[1]):
        seen = confidence[:, block].astype(np.float64)  # [requests, steps, positions]
        recorded = ~np.isnan(seen)
        if not recorded.any():
            break
        group = (
            _group(block, block_length or confidence.shape[3]) if statistic == CONFORMAL else slice(block, block + 1)
        )
        near, near_wrong = confidence[:, group].astype(np.float64), None if wrong is None else wrong[:, group]
        value = _threshold(near, near_wrong, statistic, risk, static)
        row = np.full(num_steps, value, dtype=np.float32)
        kinds = np.full(num_steps, Fallback.CELL if math.isnan(value) else Fallback.NONE, dtype=np.int8)
        if granularity == "step_block":
            last = int(np.flatnonzero(recorded.any(axis=(0, 2)))[-1])
            for step in range(last + 1):
                its_wrong = None if near_wrong is None else near_wrong[:, :, step]
                own = _threshold(near[:, :, step], its_wrong, statistic, risk)
                kinds[step] = Fallback.CELL if math.isnan(own) else Fallback.NONE
                row[step] = value if math.isnan(own) else own
            row[last + 1 :], kinds[last + 1 :] = row[last], Fallback.STEP
        values.append(row)
        fallbacks.append(kinds)
    if not values:
        raise ValueError("Nothing was recorded in the first block; a profile needs at least one denoising step.")
    return Thresholds(np.stack(values), np.stack(fallbacks))


def _group(block: int, block_length: int) -> slice:
    """The blocks that share a conformal threshold with one."""
    size = max(1, GROUP_LENGTH // block_length)
    first = block - block % size
    return slice(first, first + size)


def _threshold(
    confidence: np.ndarray, wrong: np.ndarray | None, statistic: str, risk: float, static: float | None = None
) -> float:
    """The statistic of ``[requests, ...]``; NaN where there are no samples, or too few requests."""
    recorded = ~np.isnan(confidence)
    if statistic != CONFORMAL:
        samples = confidence[recorded]
        return STATISTICS[statistic](samples) if samples.size else math.nan
    assert wrong is not None
    inside = tuple(range(1, confidence.ndim))
    scores = np.where(wrong & recorded, confidence, 0.0).max(axis=inside)[recorded.any(axis=inside)]
    return conformal(scores, risk) if static is None or not scores.size else early(scores, risk, static)
