"""All package metadata of vllm-osdt. Tool settings are in pyproject.toml, tested pins in requirements/."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def read_version() -> str:
    """Read `__version__` out of the package's source: a build must not import it."""
    source = (ROOT / "vllm_osdt" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__\s*=\s*"([^"]+)"', source, re.MULTILINE)
    if match is None:
        raise RuntimeError('vllm_osdt/__init__.py has no line __version__ = "X.Y.Z"')
    return match.group(1)


readme = ROOT / "README.md"

setup(
    name="vllm-osdt",
    version=read_version(),
    description="One-Shot Dynamic Thresholding for masked diffusion language models, served by vLLM",
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["vllm_osdt", "vllm_osdt.*", "csrc_triton", "csrc_triton.*"]),
    # One package directory: an editable install is then a plain path that finds packages added later.
    package_dir={"": "."},
    package_data={"vllm_osdt": ["py.typed", "mini/checkpoints/**/*"], "csrc_triton": ["py.typed"]},
    # vLLM's internals are overridden here, so the range is what tools/check_host.py was run on.
    # On a CPU the name `vllm` is given by requirements/vllm-metadata.
    install_requires=["vllm>=0.32,<0.34", "torch", "triton", "transformers", "numpy", "numba", "pydantic", "rich"],
    extras_require={
        "xformers": ["xformers"],
        "demo": ["matplotlib"],
        "test": ["pytest", "hypothesis", "ruff", "mypy", "matplotlib", "openai", "httpx"],
    },
    entry_points={
        "console_scripts": ["vllm-osdt = vllm_osdt.cli:main"],
        "vllm.general_plugins": ["osdt = vllm_osdt.plugin:register"],
        "triton.backends": ["cpu = vllm_osdt.host.cpu.triton_backend"],
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
