"""What a worker tells the scheduler between two steps."""

import json

from vllm_osdt.worker import report as report_module
from vllm_osdt.worker.report import Report


def test_news_are_told_once_and_nothing_when_there_are_none():
    report = Report()
    assert report.take() is None
    report.counts["requests", "static"] += 2
    report.counts["fallbacks", "pin"] += 1
    report.requests["a"] = {"policy": "osdt", "task": "gsm", "profile": None, "calibrating": True}
    report.uses("gsm", "0123", 0.5)
    news = report.take()
    assert sorted(news["counts"]) == [["fallbacks", "pin", 1], ["requests", "static", 2]]
    assert list(news["requests"]) == ["a"] and news["thresholds"] == {"gsm": 0.5}
    assert json.loads(json.dumps(news)) == news  # it crosses processes
    assert report.take() is None
    report.counts["requests", "static"] += 1
    assert report.take() == {"counts": [["requests", "static", 1]], "requests": {}, "thresholds": {}}


def test_a_threshold_is_told_once_for_each_profile_of_a_task():
    report = Report()
    report.uses("gsm", "first", 0.5)
    report.uses("gsm", "first", 0.9)
    report.uses("code", "first", 0.6)
    assert report.take()["thresholds"] == {"gsm": 0.5, "code": 0.6}
    report.uses("gsm", "first", 0.5)
    assert report.take() is None
    report.uses("gsm", "second", 0.4)
    assert report.take()["thresholds"] == {"gsm": 0.4}


def test_only_so_many_tasks_are_remembered(monkeypatch):
    monkeypatch.setattr(report_module, "MAX_TASKS_REMEMBERED", 3)
    report = Report()
    for index in range(10):
        report.uses(f"task {index}", "profile", 0.5)
    assert len(report._profile_of) == 3
    report.take()
    report.uses("task 9", "profile", 0.5)
    assert report.take() is None
    report.uses("task 0", "profile", 0.5)  # forgotten, so told again
    assert report.take()["thresholds"] == {"task 0": 0.5}
