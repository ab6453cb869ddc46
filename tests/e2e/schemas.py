"""Random JSON schemas whose documents are short."""

import random
from typing import Any

NAMES = ("a", "id", "name", "age", "ok", "x_1", "B c", 'q"')
CHOICES = ("red", "no", 'say "hi"', "a\\b", "", 0, -7, 1.5, True, None)


def make_schema(rng: random.Random, depth: int = 2) -> dict[str, Any]:
    """A schema of objects and arrays at most ``depth`` deep."""
    kinds = ["enum", "const", "boolean", "null", "string", "integer", "pattern"]
    kinds += ["object", "object", "array", "anyOf"] if depth else []
    kind = rng.choice(kinds)
    if kind == "enum":
        return {"enum": rng.sample(CHOICES, rng.randint(1, 4))}
    if kind == "const":
        return {"const": rng.choice(CHOICES)}
    if kind == "string":
        return {"type": "string", "minLength": rng.randint(0, 1), "maxLength": rng.randint(1, 5)}
    if kind == "pattern":
        return {"type": "string", "pattern": rng.choice(["^[ab]{2,4}$", "^x?-\\d{1,2}$", "^(yes|no)$"])}
    if kind == "integer":
        low = rng.randint(-20, 20)
        return {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 200)}
    if kind == "object":
        names = rng.sample(NAMES, rng.randint(0, 3))
        return {
            "type": "object",
            "properties": {name: make_schema(rng, depth - 1) for name in names},
            "required": [name for name in names if rng.random() < 0.7],
            "additionalProperties": False,
        }
    if kind == "array":
        low = rng.randint(0, 2)
        return {
            "type": "array",
            "items": make_schema(rng, depth - 1),
            "minItems": low,
            "maxItems": low + rng.randint(0, 2),
        }
    if kind == "anyOf":
        return {"anyOf": [make_schema(rng, depth - 1) for _ in range(rng.randint(1, 3))]}
    return {"type": kind}
