"""Serve masked diffusion language models with vLLM and One-Shot Dynamic Thresholding (arXiv 2511.02077).

Importing this package loads neither torch nor vLLM; vLLM finds the plugin through the entry point
``vllm.general_plugins: osdt``.
"""

__version__ = "0.1.0"


def register() -> None:
    """Register the plugin with vLLM (see :func:`vllm_osdt.plugin.register`)."""
    from vllm_osdt.plugin import register as register_plugin

    register_plugin()
