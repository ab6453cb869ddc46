"""The only place that patches vLLM. Each entry says what it changes, why no hook serves, and when it goes.

Every patch leaves other models alone: it looks at the model first and otherwise calls the original.

:func:`apply` lists those of every process. The others belong to one process or one object of it, whose owner asks for
them:

- ``server.patch_server``, ``patch_answers``, ``patch_parsers``: ``requests.patch_early_refusals``, where an engine of
  ours starts behind an HTTP server;
- ``engine.patch_page_allocation`` and ``patch_page_caching``: our scheduler, for its own KV cache manager;
- ``engine.patch_scheduler_metadata``: our GPU worker, for its own attention backends;
- ``cpu.patch_host_kernels`` and ``patch_cpu_lora``: our CPU worker.
"""

from vllm_osdt.host.compat.cpu import patch_runner_choice, patch_top_k_top_p
from vllm_osdt.host.compat.engine import patch_engine_core
from vllm_osdt.host.compat.front_end import FrontEnd
from vllm_osdt.host.compat.outputs import patch_metrics, patch_response_field
from vllm_osdt.host.compat.requests import (
    patch_admission,
    patch_beam_search,
    patch_early_refusals,
    patch_sampling_validation,
    patch_structured_output_validation,
)
from vllm_osdt.host.compat.settings import patch_command_line, patch_config_parser, patch_engine_arguments


def apply(front_end: FrontEnd) -> None:
    """Apply the patches of every process; safe to call twice.

    Args:
        front_end: What the patches of the front end call.
    """
    patch_sampling_validation(front_end.parameters.check_sampling_params)
    patch_structured_output_validation()
    patch_admission(front_end.admission.admit)
    patch_early_refusals(front_end)
    patch_beam_search(front_end.parameters.refuse)
    patch_response_field()
    patch_metrics(front_end.prometheus_metrics)
    patch_command_line()
    patch_engine_arguments()
    patch_engine_core()
    patch_config_parser()
    patch_runner_choice()
    patch_top_k_top_p()
