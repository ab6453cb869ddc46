"""See ``vllm_osdt.cpu``."""

from vllm_osdt.host.cpu.triton_backend.driver import *  # noqa: F403
