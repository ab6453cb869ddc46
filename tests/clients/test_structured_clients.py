"""Client libraries with an environment of their own ask our server for objects; ``make test-clients`` runs this."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.clients import structured_clients
from tests.conftest import REPOSITORY
from tests.e2e.serving import Server
from tests.e2e.test_structured_server import TRIP, server  # noqa: F401  a fixture

jsonschema = pytest.importorskip("jsonschema")
PYTHON = REPOSITORY / ".venv-clients" / "bin" / "python"


@pytest.mark.parametrize("library", sorted(structured_clients.ASK))
def test_objects_and_choices_are_what_was_asked_for(server: Server, library: str) -> None:  # noqa: F811
    words = json.loads((server.log.with_name("tokenizer") / "tokenizer.json").read_text())["model"]["vocab"]
    biases = {str(words[space]): -100 for space in ("\u0120", "\u010a")}  # vLLM's grammar of a call has any number
    biases[str(words["<|eos|>"])] = 100  # and any number of calls
    program = Path(structured_clients.__file__)
    command = [str(PYTHON), str(program), library, f"{server.url}/v1", server.model, json.dumps(biases)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    if library == "outlines":
        assert found.pop("choice") in ("yes", "no")
    assert found
    for trip in found.values():
        jsonschema.validate(trip, TRIP)
