"""Decodes requests on two ranks: reads engine arguments and requests as JSON, writes their tokens."""

import json
import sys
from pathlib import Path
from typing import Any


def params_of(options: dict[str, Any]) -> Any:
    """Parameters of a request from plain values; its grammar is a regular expression."""
    from vllm.sampling_params import StructuredOutputsParams

    from tests.e2e.engine import sampling

    regex = options.get("regex")
    if regex is None:
        return sampling(**options)
    grammar = StructuredOutputsParams(regex=regex)
    others = {name: value for name, value in options.items() if name != "regex"}
    return sampling(structured_outputs=grammar, ignore_eos=False, **others)


def main(work: Path, outcome: Path) -> None:
    from vllm import LLM

    from tests.e2e.engine import generate, tokens

    task = json.loads(work.read_text())
    llm = LLM(tensor_parallel_size=2, additional_config={"osdt": {"profile_dir": ""}}, **task["engine"])
    params = [params_of(options) for options in task["options"]]
    outcome.write_text(json.dumps(tokens(generate(llm, task["prompts"], params))))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
