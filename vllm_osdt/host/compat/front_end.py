"""What the patches call of the front end, which is above this package and so hands it over."""

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple


class FrontEnd(NamedTuple):
    """Modules of ``vllm_osdt.frontend``, each with its own name, and the class of its metrics."""

    admission: ModuleType
    parameters: ModuleType
    parsing: ModuleType
    response: ModuleType
    sent: ModuleType
    prometheus_metrics: Callable[..., Any]
