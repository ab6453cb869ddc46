"""Audits: some requests that used a profile are decoded once more with the static threshold, and compared.

An audit is a request of the engine's own. It runs alone among its kind and only where a place is free, makes room for
any that lacks one, and gives nothing to a client. Sampled requests are not audited: their tokens differ by chance.
"""

import random
from collections import deque
from dataclasses import dataclass, replace

from vllm.v1.request import Request, RequestStatus

from vllm_osdt.calibration.profile import CalibrationProfile
from vllm_osdt.messages import RequestSpec
from vllm_osdt.options import DecodingOptions

MAX_WAITING = 8  # audits that wait for a quiet moment
LOWEST_PRIORITY = 2**31 - 1


@dataclass(frozen=True)
class Subject:
    """The use of a profile that an audit looks at.

    Attributes:
        profile: The one that decoded the request.
        allowed: Share of requests that may have other tokens, in [0, 1]; None where the guard does not judge it.
    """

    profile: CalibrationProfile
    allowed: float | None


@dataclass(frozen=True)
class _Audit:
    request: Request  # that has ended
    spec: RequestSpec
    subject: Subject


class Auditor:
    """The audits of one engine.

    Args:
        share: Of the requests that used a profile, in [0, 1].
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self._chance = random.Random(0)
        self._waiting: deque[_Audit] = deque()
        self._running: dict[str, _Audit] = {}
        self._num_started = 0
        self._num_offered = 0  # requests among which those that wait were drawn

    @property
    def num_waiting(self) -> int:
        """Audits that are to run."""
        return len(self._waiting)

    @property
    def running(self) -> frozenset[str]:
        """Ids of the audits that the engine has as requests."""
        return frozenset(self._running)

    def consider(self, request: Request, spec: RequestSpec, subject: Subject) -> bool:
        """A request has ended; perhaps it is to be audited.

        Where more are to be than may wait, those that wait are drawn from all (reservoir sampling): the first to end
        are those that the model is sure of.

        Returns:
            False where an audit was dropped, this one or one that waited.
        """
        params = request.sampling_params
        is_whole = request.status in (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED)
        if params.temperature or not is_whole or self._chance.random() >= self._share:
            return True
        audit = _Audit(request, spec, subject)
        self._num_offered += 1
        if len(self._waiting) < MAX_WAITING:
            self._waiting.append(audit)
            return True
        place = self._chance.randrange(self._num_offered)
        if place < MAX_WAITING:
            self._waiting[place] = audit
        return False

    def start(self) -> Request:
        """The next audit as a request of lowest priority."""
        audit = self._waiting.popleft()
        self._num_offered = len(self._waiting)
        request = audit.request
        self._num_started += 1
        req_id = f"osdt-audit-{self._num_started}-{request.request_id}"
        self._running[req_id] = audit
        static = {"policy": "static_threshold", "task": None, "profile": None, "recalibrate": False}
        static |= {"return_trace": False}
        options = DecodingOptions(**{**audit.spec.options.as_dict(), **static})
        params = request.sampling_params.clone()
        params.logprobs = None  # nobody gets them
        params.extra_args = {
            **(params.extra_args or {}),
            **replace(audit.spec, options=options, follows_choice=False).as_extra_args(),
        }
        return Request(
            req_id,
            request.prompt_token_ids,
            params,
            None,
            client_index=request.client_index,
            lora_request=request.lora_request,
            cache_salt=request.cache_salt,
            priority=LOWEST_PRIORITY,
            block_hasher=request._block_hasher,
        )

    def put_back(self) -> list[str]:
        """Have all audits that run wait again; their ids as requests."""
        stopped = list(self._running)
        self._waiting.extendleft(reversed(self._running.values()))
        self._running.clear()
        return stopped

    def forget(self) -> None:
        """Drop all audits that wait: their requests were decoded by other weights."""
        self._waiting.clear()
        self._num_offered = 0

    def end(self, request: Request, *, ended_well: bool) -> tuple[Subject, bool] | None:
        """A request of the engine's own has ended.

        Returns:
            Whose audit it was and whether the tokens are the same; None where it was stopped.
        """
        audit = self._running.pop(request.request_id, None)
        if audit is None or not ended_well:
            return None
        return audit.subject, list(audit.request.output_token_ids) == list(request.output_token_ids)
