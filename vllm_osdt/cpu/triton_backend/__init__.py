"""See ``vllm_osdt.cpu``."""

import vllm_osdt.host.cpu.triton_backend  # noqa: F401
