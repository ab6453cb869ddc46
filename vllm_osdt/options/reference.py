"""The options as documentation shows them: ``vllm-osdt options``, ``--help`` and ``docs/options.md``."""

import json
from typing import NamedTuple

from vllm_osdt.declaration import defaults
from vllm_osdt.options import DECLARED, DEFAULTS, SERVER_DECLARED, SHARED, ServerOptions, readers_of


class ReferenceRow(NamedTuple):
    """An option as documentation shows it.

    Attributes:
        name: Without the prefix.
        values: Words for the values it may have.
        default: Words for its default.
        meaning: One or two sentences, in Markdown.
        unit: Of a number; "" for none.
        policies: The policies that it means something to; empty for all.
        of_operator: Whether the operator alone may set it.
        formerly: Its name in the last release; "" for the same.
        has_words_for_default: Whether ``default`` is words, where it depends on the model or the request; else JSON.
    """

    name: str
    values: str
    default: str
    meaning: str
    unit: str
    policies: tuple[str, ...]
    of_operator: bool
    formerly: str
    has_words_for_default: bool


def reference_rows() -> list[ReferenceRow]:
    """Every option, in order, for ``vllm-osdt options`` and the documentation."""
    rows = []
    for name, one in {**DECLARED, **SERVER_DECLARED}.items():
        of_operator = name in SERVER_DECLARED
        default = defaults(ServerOptions)[name] if of_operator else DEFAULTS[name]
        owners = () if of_operator or name in SHARED else readers_of(name)
        text = one.default_text or json.dumps(default)
        about = (one.expectation, text, one.meaning, one.unit, owners, of_operator, one.formerly)
        rows.append(ReferenceRow(name, *about, bool(one.default_text)))
    return rows


def operator_help() -> str:
    """What ``--help`` says of ``--osdt-config``: every name with its values."""
    names = [f"{name} ({one.expectation})" for name, one in {**DECLARED, **SERVER_DECLARED}.items()]
    return (
        'Default decoding options and options of the operator as JSON, e.g. \'{"policy": "osdt", "threshold": 0.9}\'. '
        f"`vllm-osdt options` explains them: {'; '.join(names)}."
    )
