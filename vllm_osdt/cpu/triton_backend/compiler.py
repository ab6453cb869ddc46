"""See ``vllm_osdt.cpu``."""

from vllm_osdt.host.cpu.triton_backend.compiler import *  # noqa: F403
