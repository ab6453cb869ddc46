"""Errors that this package raises on purpose; each message names the value, the limit and the remedy."""


class OSDTError(ValueError):
    """Base of all errors of this package; vLLM's server answers HTTP 400 to it."""


class InvalidOptionError(OSDTError):
    """A request or server option is unknown, has the wrong type or is out of range."""


class UnsupportedModelError(OSDTError):
    """A checkpoint asks for something that our model code does not implement."""
