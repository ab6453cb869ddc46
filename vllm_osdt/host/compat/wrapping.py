"""How an attribute of vLLM's is replaced: once, and so that it can be told."""

import functools
from typing import Any

MARK = "_vllm_osdt_patched"


def wrap(owner: Any, name: str, make: Any) -> None:
    """Replace attribute ``name`` of ``owner`` by ``make(original)``, once."""
    original = owner.__dict__[name]
    function = original.__func__ if isinstance(original, staticmethod) else original
    target: Any = function.fget if isinstance(function, property) else function
    if getattr(target, MARK, False):
        return
    wrapper = functools.wraps(target)(make(target))
    setattr(wrapper, MARK, True)
    if isinstance(original, property):
        setattr(owner, name, property(wrapper))
    elif isinstance(original, staticmethod):
        setattr(owner, name, staticmethod(wrapper))
    else:
        setattr(owner, name, wrapper)
