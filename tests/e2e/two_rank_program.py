"""Decodes requests on two ranks: reads engine arguments and requests as JSON, writes their tokens."""

import json
import sys
from pathlib import Path


def main(work: Path, outcome: Path) -> None:
    from vllm import LLM

    from tests.e2e.engine import generate, sampling, tokens

    task = json.loads(work.read_text())
    llm = LLM(tensor_parallel_size=2, additional_config={"osdt": {"profile_dir": ""}}, **task["engine"])
    params = [sampling(**options) for options in task["options"]]
    outcome.write_text(json.dumps(tokens(generate(llm, task["prompts"], params))))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
