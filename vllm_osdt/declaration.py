"""How an option is declared: once, with its type, range, default, meaning and unit.

Checks, error messages, ``--help`` and the options page of the documentation come from the declaration. pydantic checks
the values; its JSON schema gives the words for what is expected.
"""

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import cached_property
from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from vllm_osdt.errors import InvalidOptionError, shown

_STRICT = ConfigDict(strict=True)


def _as_flag(value: Any) -> Any:
    # JSON booleans arrive as 0 and 1 through the server's vllm_xargs.
    return bool(value) if type(value) is int and value in (0, 1) else value


def _no_flag(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a flag is no number")
    return value


Flag = Annotated[bool, BeforeValidator(_as_flag)]


def number(**bounds: Any) -> Any:
    """The type of a finite number with pydantic's bounds (``gt``, ``ge``, ``lt``, ``le``)."""
    return Annotated[float, Field(allow_inf_nan=False, **bounds), BeforeValidator(_no_flag)]


def count(ge: int = 1, le: int | None = None) -> Any:
    """The type of an integer from ``ge`` to ``le``."""
    return Annotated[int, Field(ge=ge, le=le), BeforeValidator(_no_flag)]


@dataclass(frozen=True)
class Declaration:
    """What is known of an option besides its name and default.

    Attributes:
        of: Its type, as pydantic reads it.
        meaning: One or two sentences for users.
        unit: Of a number, such as "tokens"; "" for none.
        expected: Words for the values it may have, in error messages; made from ``of`` when empty.
        default_text: Words for the default, where that depends on the model or the request.
        formerly: The name it had in the last release, which is still accepted.
        excludes: Another option that one source of options may not set beside it.
        needs_task: Whether it says nothing to a request without a task.
        with_any_policy: Whether a request may send it with a policy that does not read it.
        follows_policy: Whether an operator's value holds for a request that asks for another policy.
        needs: Another option, a flag, without which it says nothing; with "=" and a word, that value of it.
    """

    of: Any
    meaning: str
    unit: str = ""
    expected: str = ""
    default_text: str = ""
    formerly: str = ""
    excludes: str = ""
    needs_task: bool = False
    with_any_policy: bool = False
    follows_policy: bool = True
    needs: str = ""

    @cached_property
    def _adapter(self) -> TypeAdapter:
        return TypeAdapter(self.of, config=_STRICT)

    @cached_property
    def schema(self) -> dict[str, Any]:
        """The JSON schema of its type, without null."""
        schema = self._adapter.json_schema()
        options = schema.get("anyOf")
        return next(one for one in options if one.get("type") != "null") if options else schema

    @cached_property
    def is_optional(self) -> bool:
        """Whether it may be null."""
        return "anyOf" in self._adapter.json_schema()

    @cached_property
    def expectation(self) -> str:
        """Words for the values it may have."""
        return self.expected or expectation(self.schema)

    def check(self, name: str, value: Any) -> Any:
        """The value as the option holds it.

        Raises:
            InvalidOptionError: A wrong type or a value out of range; names value, limit and, for a word, the one meant.
        """
        try:
            return self._adapter.validate_python(value)
        except ValidationError:
            pass
        hint = ""
        if isinstance(value, str) and "enum" in self.schema:
            hint = did_you_mean(value, self.schema["enum"])
        elif self.schema["type"] in ("number", "integer") and _is_wrong_type(self.schema["type"], value):
            hint = f" ({type(value).__name__})"
        raise InvalidOptionError(
            f"{name} is {shown(value)}{hint}; expected {self.expectation}.",
            refusal="option-value",
            parameter=name,
            value=value,
        ) from None


def _is_wrong_type(kind: str, value: Any) -> bool:
    return isinstance(value, bool) or not isinstance(value, int if kind == "integer" else int | float)


def expectation(schema: Mapping[str, Any]) -> str:
    """Words for what a JSON schema allows: a number in (0, 1], an integer from 1 to 128, one of ..., true or false."""
    if "enum" in schema:
        return f"one of {', '.join(map(str, schema['enum']))}"
    kind = schema["type"]
    if kind == "boolean":
        return "true or false"
    if kind == "integer":
        low, high = schema["minimum"], schema.get("maximum")
        return f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"
    if kind == "number":
        return f"a number in {interval(schema)}"
    return "text"


def interval(schema: Mapping[str, Any]) -> str:
    """The interval of a number, such as (0, 1]."""
    low_open, high_open = "exclusiveMinimum" in schema, "exclusiveMaximum" in schema
    low = schema.get("exclusiveMinimum", schema.get("minimum", -math.inf))
    high = schema.get("exclusiveMaximum", schema.get("maximum", math.inf))
    return f"{'(' if low_open else '['}{low:g}, {high:g}{')' if high_open or math.isinf(high) else ']'}"


def option(default: Any, of: Any, meaning: str, **about: Any) -> Any:
    """Declare a field of a frozen dataclass of options.

    Args:
        default: Its default.
        of: Its type, as pydantic reads it.
        meaning: One or two sentences for users.
        about: Further fields of :class:`Declaration`.
    """
    return field(default=default, metadata={"declaration": Declaration(of, meaning, **about)})


def declarations(cls: Any) -> dict[str, Declaration]:
    """The options that a dataclass declares, by name, in order."""
    return {one.name: one.metadata["declaration"] for one in fields(cls) if "declaration" in one.metadata}


def defaults(cls: Any) -> dict[str, Any]:
    """The default of each option of a dataclass."""
    return {one.name: one.default for one in fields(cls) if one.default is not MISSING}


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The part of a message that names the known word meant, if one is close."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def meant_or_known(word: str, known: Iterable[str]) -> str:
    """The part of a message that names the known word meant, or all of them where none is close."""
    known = list(known)
    return did_you_mean(word, known) or f"; send one of {', '.join(known)}"
