"""Turns the stand-in on before a test module imports vLLM; ``make test-cuda`` runs these tests."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cuda_stand_in import cuda

cuda.install()


# Rows of the graphs that most tests capture: kernels of 1024 rows take the interpreter minutes.
CAPTURE_SIZES = [8, 16, 32, 64, 96, 192]


@pytest.fixture(scope="session")
def start_llm(start_llm: Any) -> Any:
    """As in other tests, with small graphs unless a test says otherwise."""

    def start(model: Path, **arguments: Any) -> Any:
        arguments.setdefault("compilation_config", {"cudagraph_capture_sizes": CAPTURE_SIZES})
        with cuda.starting():
            return start_llm(model, **arguments)

    return start


@pytest.fixture(scope="session")
def cpu_tokens() -> dict[str, list[dict[str, Any]]]:
    """What the CPU engine gave, by bundled model: see ``record_cpu_tokens.py``."""
    return json.loads(Path(__file__).with_name("cpu_tokens.json").read_text())


@pytest.fixture(scope="session", params=["llada-mini", "sdar-mini"])
def mini(request: pytest.FixtureRequest) -> str:
    """A bundled model of each kind of attention: over the whole canvas, and block-causal."""
    return request.param
