"""What the engine core tells between two messages."""

import json

from vllm_osdt.engine import statistics as statistics_module
from vllm_osdt.engine.statistics import About, EngineStatistics


def test_news_are_told_once_and_nothing_when_there_are_none():
    statistics = EngineStatistics()
    assert statistics.take() == {}
    statistics.counts["requests", "static"] += 2
    statistics.counts["fallbacks", "pin"] += 1
    statistics.uses("gsm", "0123", 0.5)
    news = statistics.take()
    assert sorted(news["counts"]) == [["fallbacks", "pin", 1], ["requests", "static", 2]]
    assert news["thresholds"] == {"gsm": 0.5}
    assert json.loads(json.dumps(news)) == news  # it crosses processes
    assert statistics.take() == {}
    statistics.counts["requests", "static"] += 1
    assert statistics.take() == {"counts": [["requests", "static", 1]], "thresholds": {}, "ended": []}


def test_a_threshold_is_told_once_for_each_profile_of_a_task():
    statistics = EngineStatistics()
    statistics.uses("gsm", "first", 0.5)
    statistics.uses("gsm", "first", 0.9)
    statistics.uses("code", "first", 0.6)
    assert statistics.take()["thresholds"] == {"gsm": 0.5, "code": 0.6}
    statistics.uses("gsm", "first", 0.5)
    assert statistics.take() == {}
    statistics.uses("gsm", "second", 0.4)
    assert statistics.take()["thresholds"] == {"gsm": 0.4}


def test_only_so_many_tasks_are_remembered(monkeypatch):
    monkeypatch.setattr(statistics_module, "MAX_TASKS_REMEMBERED", 3)
    statistics = EngineStatistics()
    for index in range(10):
        statistics.uses(f"task {index}", "profile", 0.5)
    assert len(statistics._profile_of) == 3
    statistics.take()
    statistics.uses("task 9", "profile", 0.5)
    assert statistics.take() == {}
    statistics.uses("task 0", "profile", 0.5)  # forgotten, so told again
    assert statistics.take()["thresholds"] == {"task 0": 0.5}


def test_requests_that_ended_well_are_told_with_their_policy():
    statistics = EngineStatistics()
    statistics.ended(About("osdt", "gsm"), 4, 32)
    statistics.ended(About(), 4, 32)  # no request of ours
    assert statistics.take()["ended"] == [("osdt", 4, 32)]
