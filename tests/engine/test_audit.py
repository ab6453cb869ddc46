"""Which requests are audited, without an engine."""

from types import SimpleNamespace

import numpy as np
from vllm.v1.request import RequestStatus

from vllm_osdt.engine.audit import MAX_WAITING, Auditor


def offer(auditor, number, temperature=0.0, status=RequestStatus.FINISHED_STOPPED):
    """A request ends; whether no audit was dropped."""
    params = SimpleNamespace(temperature=temperature)
    return auditor.consider(SimpleNamespace(number=number, sampling_params=params, status=status), None, None)


def test_a_share_of_requests_is_audited():
    auditor = Auditor(0.25)
    taken = 0
    for number in range(4000):
        before = auditor.num_waiting
        offer(auditor, number)
        taken += auditor.num_waiting > before
        auditor._waiting.clear()
    assert 900 < taken < 1100


def test_sampled_and_unfinished_requests_are_not():
    auditor = Auditor(1.0)
    assert offer(auditor, 0, temperature=0.7) and offer(auditor, 1, status=RequestStatus.FINISHED_ABORTED)
    assert auditor.num_waiting == 0


def test_of_a_burst_those_that_end_last_are_audited_as_often_as_the_first():
    """100 requests of which 8 may wait: each is among them in 8 % of 2000 trials, within five standard errors."""
    auditor, chosen = Auditor(1.0), np.zeros(100)
    for _ in range(2000):
        dropped = [not offer(auditor, number) for number in range(100)]
        assert sum(dropped) == 100 - MAX_WAITING and auditor.num_waiting == MAX_WAITING
        chosen[[audit.request.number for audit in auditor._waiting]] += 1
        auditor._waiting.clear()
        auditor._num_offered = 0
    assert abs(chosen / 2000 - 0.08).max() < 5 * np.sqrt(0.08 * 0.92 / 2000)
