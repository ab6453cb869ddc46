"""What operators are told: Prometheus metrics in vLLM's registry, fed by ``engine.statistics`` through
``host.compat``."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vllm_osdt.messages import KEY

if TYPE_CHECKING:
    from vllm.config import VllmConfig

MAX_TASK_LABELS = 64  # further tasks share one
OTHER_TASKS = "other"
NFE_BUCKETS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024)
TOKENS_PER_FORWARD_BUCKETS = (0.5, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


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
        self._counters = {
            "requests": counter(
                "vllm:osdt_requests",
                "Requests of policy osdt: calibrated (with a profile), calibrating, static (neither).",
                labelnames=[*names, "kind"],
            ),
            "calibrations": counter(
                "vllm:osdt_calibrations",
                "Profiles made and loaded, calibrating requests that failed, profile files rejected.",
                labelnames=[*names, "outcome"],
            ),
            "fallbacks": counter(
                "vllm:osdt_fallbacks",
                "Denoising steps whose threshold is of another block, another step or a coarser cell; pinned profiles "
                "that were gone.",
                labelnames=[*names, "kind"],
            ),
            "drift": counter(
                "vllm:osdt_drift_events",
                "Tasks that no longer looked like their profile, by what was done about it.",
                labelnames=[*names, "action"],
            ),
        }
        self._nfe = histogram(
            "vllm:osdt_request_forward_passes",
            "Forward passes (NFE) of a request.",
            buckets=NFE_BUCKETS,
            labelnames=[*names, "policy"],
        )
        self._tokens_per_forward = histogram(
            "vllm:osdt_request_tokens_per_forward",
            "Output tokens of a request for each of its forward passes.",
            buckets=TOKENS_PER_FORWARD_BUCKETS,
            labelnames=[*names, "policy"],
        )
        self._threshold = gauge(
            "vllm:osdt_threshold",
            f"Mean calibrated threshold in force, by task (the first {MAX_TASK_LABELS}).",
            labelnames=[*names, "task"],
            multiprocess_mode="mostrecent",
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


LABELS = {
    "requests": ("calibrated", "calibrating", "static"),
    "calibrations": ("made", "failed", "rejected", "loaded"),
    "fallbacks": ("block", "step", "cell", "pin"),
    "drift": ("recalibrate", "warn"),
}
