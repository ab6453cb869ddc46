"""Turns the stand-in on before a test module imports vLLM; ``make test-cuda`` runs these tests."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cuda_stand_in import cuda

cuda.install()


@pytest.fixture(scope="session")
def cpu_tokens() -> dict[str, list[dict[str, Any]]]:
    """What the CPU engine gave, by bundled model: see ``record_cpu_tokens.py``."""
    return json.loads(Path(__file__).with_name("cpu_tokens.json").read_text())


@pytest.fixture(scope="session", params=["llada-mini", "sdar-mini"])
def mini(request: pytest.FixtureRequest) -> str:
    """A bundled model of each kind of attention: over the whole canvas, and block-causal."""
    return request.param
