"""When each token was decided: the trace that a request may ask for.

Workers report every step of such a request (``RecordedStep``); a block's entries leave with its tokens.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
from vllm.v1.request import Request

from csrc_triton.types import NO_CONFIDENCE, Rule
from vllm_osdt.geometry import MAX_BLOCK_LENGTH
from vllm_osdt.messages import RecordedStep
from vllm_osdt.policies import Schedule

_UNKNOWN = -1  # no token id


class Tracer:
    """The active blocks of the requests that are traced, one row each.

    Args:
        max_num_reqs: Requests that can run.
    """

    def __init__(self, max_num_reqs: int) -> None:
        shape = (max_num_reqs, MAX_BLOCK_LENGTH)
        self._token = np.full(shape, _UNKNOWN, dtype=np.int32)
        self._step = np.zeros(shape, dtype=np.int32)
        self._forward = np.zeros(shape, dtype=np.int32)
        self._confidence = np.zeros(shape, dtype=np.float32)
        self._block = np.zeros(max_num_reqs, dtype=np.int64)
        self._num_steps = np.zeros(max_num_reqs, dtype=np.int64)
        self._row_of: dict[str, int] = {}
        self._schedules: dict[str, Schedule] = {}
        self._free = list(range(max_num_reqs))

    def begin(self, req_id: str, schedule: Schedule) -> None:
        """Trace a request that starts or resumes; its block begins anew."""
        if req_id not in self._row_of:
            self._row_of[req_id] = self._free.pop()
        self._schedules[req_id] = schedule
        self._token[self._row_of[req_id]] = _UNKNOWN

    def keep(self, requests: Iterable[Request]) -> None:
        """Forget all requests but these: the others have ended, or lost their places and begin their blocks again."""
        if self._row_of:
            running = {request.request_id for request in requests}
            for req_id in [req_id for req_id in self._row_of if req_id not in running]:
                self._free.append(self._row_of.pop(req_id))
                del self._schedules[req_id]

    def hear(self, recorded: RecordedStep, forwards: dict[str, int]) -> None:
        """Take in a step.

        Args:
            recorded: The step of C requests, traced or not.
            forwards: The forward that it was for each traced one, from 1.
        """
        found = [(index, self._row_of[req_id]) for index, req_id in enumerate(recorded.req_ids) if req_id in forwards]
        if not found:
            return
        chosen, rows = np.array(found).T
        width, step = recorded.tokens.shape[1], recorded.step[chosen]
        self._token[rows[step == 0]] = _UNKNOWN
        tokens = recorded.tokens[chosen]
        is_new = ~recorded.after[chosen] & (tokens != self._token[rows, :width])  # unmasked, or edited
        at, place = is_new.nonzero()
        self._token[rows[at], place] = tokens[at, place]
        self._step[rows[at], place] = (
            step[at] if recorded.ahead is None else step[at] + recorded.ahead[chosen][at, place]
        )
        self._forward[rows[at], place] = np.array([forwards[recorded.req_ids[index]] for index, _ in found])[at]
        self._confidence[rows[at], place] = recorded.confidence[chosen][at, place]
        self._block[rows], self._num_steps[rows] = recorded.block[chosen], step + 1

    def take(self, req_id: str, num_tokens: int, num_given: int = 0) -> dict[str, Any] | None:
        """The trace of tokens that are emitted, the first ones of the active block; None without one.

        The last ``num_given`` of them are none of the block's, but take the place of the one behind the others.

        Returns:
            Lists with an entry for each token: ``step``, the denoising step of its block that decided it, from 0;
            ``forward``, the same among the request's forwards, from 1; ``confidence``, that of the step, None for a
            token that was given. ``blocks`` has one dict: ``num_tokens`` of the block in this output, ``rule`` and
            ``thresholds``, the parameter of the rule in each of the block's steps.
        """
        row = self._row_of.get(req_id)
        if row is None or not num_tokens:
            return None
        schedule, num_steps = self._schedules[req_id], int(self._num_steps[row])
        place = np.arange(num_tokens).clip(max=num_tokens - num_given)
        if schedule.drafts is not None:  # a forward may have taken steps behind the one that finished the output
            num_steps = int(self._step[row, place].max()) + 1
        parameters = schedule.parameters[self._block[row], :num_steps]
        confidence = self._confidence[row, place]
        confidence[num_tokens - num_given :] = NO_CONFIDENCE
        self._token[row] = _UNKNOWN  # the next block may begin with a step that decides nothing, and is not told
        return {
            "step": self._step[row, place].tolist(),
            "forward": self._forward[row, place].tolist(),
            "confidence": [None if one == NO_CONFIDENCE else one for one in confidence.tolist()],
            "blocks": [
                {
                    "num_tokens": num_tokens,
                    "rule": Rule(schedule.rule).name.lower(),
                    "thresholds": parameters.tolist(),
                }
            ],
        }
