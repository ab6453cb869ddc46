"""What the scheduler passes on, and what Prometheus makes of it."""

import json
from functools import partial
from types import SimpleNamespace

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from vllm.outputs import CompletionOutput

import vllm_osdt
from vllm_osdt.engine.statistics import About, EngineStatistics, describe, num_forwards
from vllm_osdt.engine.weights import Weights
from vllm_osdt.frontend.metrics import (
    KEY,
    LABELS,
    MAX_TASK_LABELS,
    OTHER_TASKS,
    PrometheusMetrics,
)

ABOUT = {"policy": "osdt", "task": "gsm", "profile": "0123456789abcdef", "calibrating": False}


class Scraped:
    """Our metrics in a registry of their own, for two engines."""

    def __init__(self):
        self.registry = CollectorRegistry()
        types = {kind: partial(kind, registry=self.registry) for kind in (Counter, Gauge, Histogram)}
        engines = {0: ["mini", 0], 1: ["mini", 1]}
        self.metrics = PrometheusMetrics(None, types, ["model_name", "engine"], engines)

    def observe(self, engine=0, **news):
        self.metrics.observe({KEY: {"counts": [], "thresholds": {}, "ended": []} | news}, engine)

    def value(self, name, engine=0, **labels):
        return self.registry.get_sample_value(
            f"vllm:osdt_{name}", {"model_name": "mini", "engine": str(engine)} | labels
        )

    def labels(self, name, label):
        """Every value of a label."""
        samples = (sample for metric in self.registry.collect() for sample in metric.samples)
        return {sample.labels[label] for sample in samples if sample.name == f"vllm:osdt_{name}"}


@pytest.fixture
def scraped():
    return Scraped()


def request(req_id="a", histogram=(0, 2, 1), num_output_tokens=12):
    """A request that took part in as many forwards as the histogram has entries in all."""
    return SimpleNamespace(
        request_id=req_id,
        spec_decode_metrics=SimpleNamespace(histogram=list(histogram)),
        num_output_tokens=num_output_tokens,
    )


NAMES = {"requests": "requests_total", "calibrations": "calibrations_total", "fallbacks": "fallbacks_total",
         "drift": "drift_events_total", "audits": "audits_total", "run_ahead": "run_ahead_steps_total"}  # fmt: skip
LABEL = {"requests": "kind", "calibrations": "outcome", "fallbacks": "kind", "drift": "action", "audits": "outcome",
         "run_ahead": "outcome"}  # fmt: skip


@pytest.mark.parametrize("metric", LABELS)
def test_every_counter_is_there_from_the_start_and_counts_by_engine_and_label(scraped, metric):
    for label in LABELS[metric]:
        assert scraped.value(NAMES[metric], **{LABEL[metric]: label}) == 0
        assert scraped.value(NAMES[metric], engine=1, **{LABEL[metric]: label}) == 0
    first, *others = LABELS[metric]
    scraped.observe(counts=[[metric, first, 2]])
    scraped.observe(counts=[[metric, first, 3]], engine=1)
    scraped.observe(counts=[[metric, first, 5]])
    assert scraped.value(NAMES[metric], **{LABEL[metric]: first}) == 7
    assert scraped.value(NAMES[metric], engine=1, **{LABEL[metric]: first}) == 3
    assert all(scraped.value(NAMES[metric], **{LABEL[metric]: label}) == 0 for label in others)


def test_forward_passes_and_tokens_per_forward_are_distributions_by_policy(scraped):
    scraped.observe(ended=[("osdt", 4, 32), ("osdt", 9, 9), ("fixed_steps", 32, 32)])
    assert scraped.value("request_forward_passes_count", policy="osdt") == 2
    assert scraped.value("request_forward_passes_sum", policy="osdt") == 13
    bucket = partial(scraped.value, "request_forward_passes_bucket", policy="osdt")
    assert [bucket(le=le) for le in ("2.0", "4.0", "8.0", "12.0")] == [0, 1, 1, 2]
    assert scraped.value("request_tokens_per_forward_sum", policy="osdt") == 8 + 1
    assert scraped.value("request_tokens_per_forward_bucket", policy="osdt", le="1.0") == 1
    assert scraped.value("request_forward_passes_sum", policy="fixed_steps") == 32
    assert scraped.value("request_forward_passes_count", engine=1, policy="osdt") is None


def test_a_request_without_a_forward_has_no_tokens_per_forward(scraped):
    scraped.observe(ended=[("osdt", 0, 0)])
    assert scraped.value("request_forward_passes_count", policy="osdt") == 1
    assert scraped.value("request_tokens_per_forward_count", policy="osdt") is None


def test_a_tasks_threshold_is_the_last_one_told(scraped):
    scraped.observe(thresholds={"gsm": 0.6, "code": 0.7})
    scraped.observe(thresholds={"gsm": 0.5})
    assert scraped.value("threshold", task="gsm") == 0.5 and scraped.value("threshold", task="code") == 0.7


def test_task_labels_are_bounded_and_the_first_ones_stay(scraped):
    for index in range(3 * MAX_TASK_LABELS):
        scraped.observe(thresholds={f"task {index}": index / 1000}, engine=index % 2)
    assert scraped.labels("threshold", "task") == {f"task {i}" for i in range(MAX_TASK_LABELS)} | {OTHER_TASKS}
    scraped.observe(thresholds={"task 0": 0.75, "yet another": 0.25})
    assert scraped.value("threshold", task="task 0") == 0.75
    assert scraped.value("threshold", task=OTHER_TASKS) == 0.25


def test_a_request_is_described_by_what_was_decided_and_its_own_counts():
    first = Weights()
    weights = {"weights_version": 0, "weights_version_at_start": 0}
    about = describe(request("a"), About(**ABOUT), first, first)
    assert about == {**ABOUT, "nfe": 3, "tokens_per_forward": 4.0, **weights}
    unknown = {"policy": None, "task": None, "profile": None, "calibrating": False}
    other = request("b", histogram=(), num_output_tokens=0)
    assert describe(other, About(), first, first) == {**unknown, "nfe": 0, "tokens_per_forward": 0.0, **weights}


@pytest.mark.parametrize(("label", "version"), [(None, 3), ("step 3", "step 3"), ("", "")])
def test_weights_have_the_callers_label_or_else_a_number(label, version):
    about = describe(request("a"), About(**ABOUT), Weights(1), Weights(3, label))
    assert (about["weights_version_at_start"], about["weights_version"]) == (1, version)


def test_what_the_engine_tells_is_plain_enough_to_cross_processes_and_be_counted(scraped):
    news, mine = EngineStatistics(), request("a")
    news.counts["requests", "calibrated"] += 1
    news.uses("gsm", ABOUT["profile"], 0.5)
    news.ended(About(**ABOUT), num_forwards(mine), mine.num_output_tokens)
    scraped.metrics.observe(json.loads(json.dumps({KEY: news.take()})))
    assert scraped.value("requests_total", kind="calibrated") == 1
    assert scraped.value("request_forward_passes_sum", policy="osdt") == 3
    assert scraped.value("threshold", task="gsm") == 0.5


def test_a_request_of_which_no_step_was_counted_took_no_forward():
    assert num_forwards(SimpleNamespace(spec_decode_metrics=None)) == 0
    assert num_forwards(request(histogram=(1, 0, 4))) == 5


def test_a_completion_of_another_model_has_no_description():
    completion = CompletionOutput(0, "", [], None, None)
    assert vllm_osdt.describe(completion) is None
    completion.spec_decode_metrics = SimpleNamespace(osdt=ABOUT)
    assert vllm_osdt.describe(completion) == ABOUT
