"""Asks a server for objects and choices by one client library; prints what came, as JSON. No package of ours is needed.

python structured_clients.py LIBRARY URL MODEL LOGIT_BIAS
"""

import json
import sys
from enum import Enum
from typing import Any, Literal

import openai
from pydantic import BaseModel, Field


class Trip(BaseModel):
    """A journey."""

    city: Literal["oslo", "rome"]
    days: int = Field(ge=1, le=30)


class Choice(Enum):
    """What a choice may be."""

    YES = "yes"
    NO = "no"


MESSAGES: Any = [{"role": "user", "content": "yes no"}]


def ask_instructor(url: str, model: str, logit_bias: dict[str, int]) -> dict[str, Any]:
    """``instructor`` by JSON schema, and by tools that a hook makes strict: vLLM lets others' arguments be any JSON."""
    import instructor

    def make_strict(*args: Any, **body: Any) -> None:
        for tool in body.get("tools", ()):
            tool["function"]["strict"] = True

    own = {"model": model, "max_tokens": 96, "max_retries": 0, "logit_bias": logit_bias}
    found = {}
    for mode in (instructor.Mode.JSON_SCHEMA, instructor.Mode.TOOLS):
        client = instructor.from_openai(openai.OpenAI(base_url=url, api_key="none"), mode=mode)
        client.on("completion:kwargs", make_strict)
        trip = client.chat.completions.create(response_model=Trip, messages=MESSAGES, **own)
        found[mode.name] = trip.model_dump()
    return found


def ask_langchain(url: str, model: str, logit_bias: dict[str, int]) -> dict[str, Any]:
    """LangChain's ``with_structured_output``."""
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(base_url=url, api_key="none", model=model, max_tokens=96, logit_bias=logit_bias, max_retries=0)
    found = {}
    for method in ("json_schema", "function_calling"):
        trip = chat.with_structured_output(Trip, method=method, strict=True).invoke("yes no")
        found[method] = trip.model_dump()
    return found


def ask_outlines(url: str, model: str, logit_bias: dict[str, int]) -> dict[str, Any]:
    """``outlines``: an object and a choice."""
    import outlines

    client = outlines.from_vllm(openai.OpenAI(base_url=url, api_key="none"), model)
    found: dict[str, Any] = {"object": json.loads(client("yes no", Trip, max_tokens=96))}
    found["choice"] = client("yes no", Choice, max_tokens=16)
    return found


ASK = {"instructor": ask_instructor, "langchain": ask_langchain, "outlines": ask_outlines}

if __name__ == "__main__":
    library, *where, biases = sys.argv[1:]
    print(json.dumps(ASK[library](where[0], where[1], json.loads(biases))))
