"""Patches of what vLLM's front end makes of an engine's outputs and figures."""

from collections.abc import Callable
from typing import Any

from vllm_osdt.host.compat.wrapping import wrap
from vllm_osdt.messages import KEY, TRACE, join_traces
from vllm_osdt.models.registry import is_canvas_model

TRACE_SO_FAR = "osdt_trace"  # attribute of vLLM's state of a request in the front end


def patch_response_field() -> None:
    """A completion says how it was decoded: ``CompletionOutput.osdt``, which is None for other models.

    The engine's message has no field for it, so it travels in that of KV connectors. Here it is moved to vLLM's
    per-request figures, which reach the finished completion however its pieces are merged. Its plain values are also
    told among them (``metrics.speculative_decoding.osdt``), which goes with the next release. The rest goes when
    vLLM's per-request metrics carry a plugin's values.
    """
    from vllm.outputs import CompletionOutput
    from vllm.v1.engine.output_processor import RequestState
    from vllm.v1.metrics.stats import RequestSpecDecodeMetrics

    def make_request_output(original):
        def make_request_output(self, new_token_ids, pooling_output, finish_reason, stop_reason, *args, **kwargs):
            params, rest = (args[0], args[1:]) if args else (kwargs.pop("kv_transfer_params", None), ())
            if params is not None and KEY in params:
                about = params[KEY]
                if TRACE in about:  # the engine sends that of new tokens
                    before = getattr(self, TRACE_SO_FAR, None)
                    about[TRACE] = about[TRACE] if before is None else join_traces(before, about[TRACE])
                    setattr(self, TRACE_SO_FAR, about[TRACE])
                setattr(self.spec_decode_metrics, KEY, about)
                params = None
            return original(self, new_token_ids, pooling_output, finish_reason, stop_reason, params, *rest, **kwargs)

        return make_request_output

    def make_to_dict(original):
        def to_dict(self):
            found = getattr(self, KEY, None)
            if found is None:
                return original(self)
            plain = {name: value for name, value in found.items() if not isinstance(value, list | dict)}
            return {**original(self), KEY: plain}

        return to_dict

    wrap(RequestState, "make_request_output", make_request_output)
    wrap(RequestSpecDecodeMetrics, "to_dict", make_to_dict)
    setattr(CompletionOutput, KEY, property(lambda self: getattr(self.spec_decode_metrics, KEY, None)))


def patch_metrics(prometheus_metrics: Callable[..., Any]) -> None:
    """Our Prometheus metrics, made and fed by vLLM's own logger as those of a KV connector are.

    vLLM's hook for other loggers (``vllm.stat_logger_plugins``) is told nothing that the engine's stats lack, and
    ``LLM`` does not load it. Goes when engine stats carry a plugin's values.
    """
    from prometheus_client import Counter, Gauge, Histogram
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorLogging, KVConnectorProm

    def make_init(original):
        def __init__(self, vllm_config, labelnames, per_engine_labelvalues):
            original(self, vllm_config, labelnames, per_engine_labelvalues)
            if is_canvas_model(vllm_config.model_config):
                types = {Gauge: self._gauge_cls, Counter: self._counter_cls, Histogram: self._histogram_cls}
                self.prom_metrics = prometheus_metrics(vllm_config, types, labelnames, per_engine_labelvalues)

        return __init__

    def make_observe(original):
        def observe(self, transfer_stats_data):
            if KEY not in transfer_stats_data:
                original(self, transfer_stats_data)

        return observe

    wrap(KVConnectorProm, "__init__", make_init)
    wrap(KVConnectorLogging, "observe", make_observe)
