"""What operators are told.

Prometheus metrics in vLLM's registry, fed by ``engine.statistics`` through ``host.compat``.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from vllm_osdt.messages import KEY

if TYPE_CHECKING:
    from vllm.config import VllmConfig

MAX_TASK_LABELS = 64  # further tasks share one
OTHER_TASKS = "other"
NFE_BUCKETS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024)
TOKENS_PER_FORWARD_BUCKETS = (0.5, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


class Metric(NamedTuple):
    """A metric as operators and the documentation know it.

    Attributes:
        name: Behind ``vllm:osdt_``.
        label: Beside ``model_name`` and ``engine``.
        meaning: One sentence.
        kind: ``counter``, ``histogram`` or ``gauge``.
        options: Of Prometheus' class.
    """

    name: str
    label: str
    meaning: str
    kind: str
    options: tuple[tuple[str, Any], ...] = ()


METRICS = {
    "requests": Metric(
        "requests_total",
        "kind",
        "Requests of policy osdt or of a task's choice: calibrated (with a profile), early (with one that is being "
        "made), calibrating, static (neither).",
        "counter",
    ),
    "calibrations": Metric(
        "calibrations_total",
        "outcome",
        "Profiles made and loaded, calibrating requests that failed, profile files rejected.",
        "counter",
    ),
    "fallbacks": Metric(
        "fallbacks_total",
        "kind",
        "Denoising steps whose threshold is of another block, another step or a coarser cell; pinned profiles that "
        "were gone.",
        "counter",
    ),
    "drift": Metric(
        "drift_events_total",
        "action",
        "Tasks that no longer looked like their profile, or whose audits disagreed, by what was done about it.",
        "counter",
    ),
    "audits": Metric(
        "audits_total",
        "outcome",
        "Audited requests: same or changed (the static threshold gives other tokens), dropped (too many waited).",
        "counter",
    ),
    "run_ahead": Metric(
        "run_ahead_steps_total",
        "outcome",
        "Steps of a request that a worker took before the engine knew of the one before them: used, or wasted (it had "
        "finished the block; on a GPU only).",
        "counter",
    ),
    "forward_passes": Metric(
        "request_forward_passes",
        "policy",
        "Forward passes (NFE) of a request.",
        "histogram",
        (("buckets", NFE_BUCKETS),),
    ),
    "tokens_per_forward": Metric(
        "request_tokens_per_forward",
        "policy",
        "Output tokens of a request for each of its forward passes.",
        "histogram",
        (("buckets", TOKENS_PER_FORWARD_BUCKETS),),
    ),
    "threshold": Metric(
        "threshold",
        "task",
        f"Mean calibrated threshold in force, by task (the first {MAX_TASK_LABELS}).",
        "gauge",
        (("multiprocess_mode", "mostrecent"),),
    ),
}
LABELS = {
    "requests": ("calibrated", "early", "calibrating", "static"),
    "calibrations": ("made", "failed", "rejected", "loaded"),
    "fallbacks": ("block", "step", "cell", "pin"),
    "drift": ("recalibrate", "warn"),
    "audits": ("same", "changed", "dropped"),
    "run_ahead": ("used", "wasted"),
}


class PrometheusMetrics:
    """The front end's side, one for all engines of a server.

    Args:
        metric_types: vLLM's classes by Prometheus class, fit for its registry and its multi-process mode.
        label_names: ``model_name``, ``engine``.
        label_values: Of every engine.
    """

    def __init__(
        self,
        vllm_config: "VllmConfig",
        metric_types: Mapping[Any, Callable[..., Any]],
        label_names: Sequence[str],
        label_values: Mapping[int, Sequence[Any]],
    ) -> None:
        from prometheus_client import Counter as PrometheusCounter
        from prometheus_client import Gauge, Histogram

        counter, gauge, histogram = (metric_types[kind] for kind in (PrometheusCounter, Gauge, Histogram))
        names = list(label_names)
        self._label_values = {engine: [str(value) for value in values] for engine, values in label_values.items()}
        made = {}
        for key, (name, label, meaning, kind, options) in METRICS.items():
            more = dict(options)
            made[key] = {"counter": counter, "histogram": histogram, "gauge": gauge}[kind](
                f"vllm:osdt_{name.removesuffix('_total')}", meaning, labelnames=[*names, label], **more
            )
        self._counters = {key: made[key] for key in LABELS}
        self._nfe, self._tokens_per_forward, self._threshold = (
            made[key] for key in ("forward_passes", "tokens_per_forward", "threshold")
        )
        self._tasks: set[str] = set()
        for engine in self._label_values.values():  # so that a rate is there from the first event on
            for metric, labels in LABELS.items():
                for label in labels:
                    self._counters[metric].labels(*engine, label)

    def observe(self, stats: Mapping[str, Any], engine_idx: int = 0) -> None:
        """Count what ``EngineStatistics.take`` gave."""
        news, engine = stats[KEY], self._label_values[engine_idx]
        for metric, label, number in news["counts"]:
            self._counters[metric].labels(*engine, label).inc(number)
        for policy, nfe, num_tokens in news["ended"]:
            self._nfe.labels(*engine, policy).observe(nfe)
            if nfe:
                self._tokens_per_forward.labels(*engine, policy).observe(num_tokens / nfe)
        for task, threshold in news["thresholds"].items():
            if task not in self._tasks and len(self._tasks) >= MAX_TASK_LABELS:
                task = OTHER_TASKS
            self._tasks.add(task)
            self._threshold.labels(*engine, task).set(threshold)
