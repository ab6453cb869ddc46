"""The Grafana dashboard shows metrics that exist."""

import json
import re
from itertools import combinations
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

prometheus_client = pytest.importorskip("prometheus_client")

DASHBOARD = json.loads((REPOSITORY / "docs" / "grafana_dashboard.json").read_text())
# vLLM's own, of its diffusion models.
FOREIGN = {"vllm:diffusion_num_committed_tokens_total", "vllm:diffusion_num_denoising_steps_total"}


def own_metrics():
    """The names under which Prometheus collects ours."""
    from vllm_osdt.frontend.metrics import PrometheusMetrics

    registry = prometheus_client.CollectorRegistry()

    def make(kind):
        return lambda *args, **values: kind(*args, **values, registry=registry)

    kinds = (prometheus_client.Counter, prometheus_client.Gauge, prometheus_client.Histogram)
    metrics = PrometheusMetrics(None, {kind: make(kind) for kind in kinds}, ["model_name", "engine"], {0: ["m", "0"]})
    metrics.observe({"osdt": {"counts": [], "thresholds": {"task": 0.5}, "ended": [("osdt", 3, 30)]}})
    return {sample.name for metric in registry.collect() for sample in metric.samples}


def test_every_query_names_a_metric_that_exists():
    expressions = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    expressions += [variable["definition"] for variable in DASHBOARD["templating"]["list"] if "definition" in variable]
    named = {name for expression in expressions for name in re.findall(r"vllm:\w+", expression)}
    assert len(named) >= 9 and named <= own_metrics() | FOREIGN


def test_foreign_metrics_are_vllms():
    module = pytest.importorskip("vllm.v1.spec_decode.metrics")
    text = Path(module.__file__).read_text()
    assert all(name.removesuffix("_total") in text for name in FOREIGN)


def test_panels_have_ids_of_their_own_and_do_not_overlap():
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for one, other in combinations([panel["gridPos"] for panel in panels], 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        assert beside or one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
    assert all(target["datasource"]["uid"] == "${datasource}" for panel in panels for target in panel["targets"])
