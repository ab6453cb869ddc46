"""Errors that this package raises on purpose; each message names the value, the limit and the remedy."""

from typing import Any

MAX_SHOWN = 300  # characters of a value in a message


class OSDTError(ValueError):
    """Base of all errors of this package; vLLM's server answers HTTP 400 to it."""


class InvalidOptionError(OSDTError):
    """A request or server option is unknown, has the wrong type or is out of range.

    Args:
        message: One sentence: parameter, value, limit, remedy.
        refusal: Its row in ``vllm_osdt.refusals``, from which the page of all refusals is made.
        parameter: What is refused, an option by its name without the prefix; None where nothing can be named.
        value: What it was; None for nothing.
    """

    def __init__(self, message: str, *, refusal: str = "", parameter: str | None = None, value: Any = None) -> None:
        super().__init__(message)
        self.refusal = refusal
        self.parameter = parameter
        self.value = value


class UnsupportedModelError(OSDTError):
    """A checkpoint asks for something that our model code does not implement."""


def shown(value: Any) -> str:
    """A value as messages show it: a long one is cut."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
