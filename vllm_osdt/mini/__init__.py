"""The bundled tiny models: their tasks, tokenizer and checkpoints. Importing it loads no torch.

The trainer is in `examples/mini` of the repository.
"""

from collections.abc import Iterable
from pathlib import Path

from vllm_osdt.mini.tasks import LIST_TASKS, TASKS, TEXT_TASKS

CHECKPOINTS = Path(__file__).parent / "checkpoints"
MODELS = ("llada-mini", "sdar-mini", "text-mini", "lists-mini", "sdar-lists-mini")
# Models of other tasks than `TASKS`, and their canvases where they differ from GEN_LENGTH.
TASKS_OF: dict[str, Iterable[str]] = {"text-mini": TEXT_TASKS, "lists-mini": LIST_TASKS, "sdar-lists-mini": LIST_TASKS}
GEN_LENGTHS = {"text-mini": 64, "lists-mini": 16, "sdar-lists-mini": 16}
GEN_LENGTH = 96


def tasks_of(name: str) -> tuple[str, ...]:
    """The tasks that a bundled model was trained on."""
    return tuple(TASKS_OF.get(name, TASKS))


def gen_length_of(name: str) -> int:
    """The canvas, in tokens, that holds every answer of a bundled model; a multiple of its block length."""
    return GEN_LENGTHS.get(name, GEN_LENGTH)


def model_path(name: str) -> str:
    """The folder of a bundled checkpoint, for vLLM's `model` argument.

    Raises:
        ValueError: No bundled model has this name.
    """
    if name not in MODELS:
        raise ValueError(f"unknown bundled model {name!r}; known models: {', '.join(MODELS)}")
    return str(CHECKPOINTS / name)
