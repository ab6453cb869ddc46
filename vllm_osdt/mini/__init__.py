"""The bundled tiny models: their tasks, tokenizer and checkpoints. Importing it loads no torch.

The trainer is in `examples/mini` of the repository.
"""

from pathlib import Path

from vllm_osdt.mini.tasks import TASKS, TEXT_TASKS

CHECKPOINTS = Path(__file__).parent / "checkpoints"
MODELS = ("llada-mini", "sdar-mini", "text-mini")


def tasks_of(name: str) -> tuple[str, ...]:
    """The tasks that a bundled model was trained on."""
    return tuple(TEXT_TASKS if name == "text-mini" else TASKS)


def model_path(name: str) -> str:
    """The folder of a bundled checkpoint, for vLLM's `model` argument.

    Raises:
        ValueError: No bundled model has this name.
    """
    if name not in MODELS:
        raise ValueError(f"unknown bundled model {name!r}; known models: {', '.join(MODELS)}")
    return str(CHECKPOINTS / name)
