"""A policy of another package: found by its entry point, asked for by name, refused where it cannot stand."""

import json
import os
import subprocess
import sys
from importlib import metadata

import pytest

from tests.conftest import REPOSITORY
from vllm_osdt import policies
from vllm_osdt.declaration import number, option
from vllm_osdt.policies import POLICIES, Policy, load_policies
from vllm_osdt.policies.factor import FactorOptions

PACKAGE = REPOSITORY / "examples" / "custom_policy"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the example package installed in it; nothing is fetched."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    source = tmp_path_factory.mktemp("source") / "package"
    source.mkdir()
    for name in ("pyproject.toml", "warm_start_policy.py"):
        (source / name).write_text((PACKAGE / name).read_text())
    subprocess.run([*command, "--target", str(folder), str(source)], check=True, capture_output=True)
    return folder


def run(folder, code):
    """Standard output of a program that finds the package."""
    path = os.pathsep.join([str(folder), str(REPOSITORY)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_its_options_are_checked_explained_and_refused_as_all_others(installed):
    code = """
import json
from vllm_osdt.errors import InvalidOptionError
from vllm_osdt.options import DecodingOptions, OPTION_NAMES
from vllm_osdt.options.parsing import parse_options
from vllm_osdt.options.reference import reference_rows

def refusal(**values):
    try:
        parse_options({"osdt_" + name: value for name, value in values.items()}, base=DecodingOptions(), prefix="osdt_")
    except InvalidOptionError as error:
        return str(error)

good = parse_options({"osdt_policy": "warm_start", "osdt_careful_steps": 3}, base=DecodingOptions(), prefix="osdt_")
print(json.dumps({
    "good": [good.policy, good.careful_steps, good.later_threshold],
    "range": refusal(policy="warm_start", careful_steps=129),
    "other": refusal(policy="factor", careful_steps=3),
    "rows": [row.name for row in reference_rows() if row.policies == ("warm_start",)],
}))
"""
    told = json.loads(run(installed, code))
    assert told["good"] == ["warm_start", 3, 0.8]
    assert told["range"] == "osdt_careful_steps is 129; expected an integer from 0 to 128."
    assert "osdt_careful_steps is 3, which policy 'factor' does not use" in told["other"]
    assert "osdt_policy = 'warm_start'" in told["other"]
    assert told["rows"] == ["careful_steps", "later_threshold"]


@pytest.mark.e2e
def test_an_engine_decodes_with_it(installed):
    code = """
import json, os
os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="1", VLLM_LOGGING_LEVEL="ERROR")  # the engine finds it in its process
from vllm import LLM
import vllm_osdt
from vllm_osdt.mini import model_path

if __name__ == "__main__":
    llm = LLM(model_path("llada-mini"), dtype="float32", additional_config={"osdt": {"profile_dir": ""}})
    prompt = "quiz : pick one beast . A saw B dog C plum . Answer:"
    canvas = {"block_length": 16, "gen_length": 32, "ignore_eos": True}
    ask = lambda **options: vllm_osdt.describe(
        llm.generate(prompt, vllm_osdt.sampling_params(**canvas, **options), use_tqdm=False)[0].outputs[0])
    careful = ask(policy="warm_start", careful_steps=16)
    print("OUTCOME", json.dumps([careful, ask(policy="warm_start", careful_steps=0),
                                 ask(policy="static_threshold", threshold=0.8)]))
"""
    outcome = run(installed, code).split("OUTCOME", 1)[1]
    careful, bold, static = json.loads(outcome.splitlines()[0])
    assert careful["policy"] == "warm_start" and careful["nfe"] == 32  # one position a step
    assert bold["nfe"] == static["nfe"] < 32


class Twice(Policy):
    name = "factor"
    Options = FactorOptions


class WithoutSchedule(Policy):
    name = "mine"
    Options = FactorOptions


class OtherName(Policy):
    name = "another"
    Options = FactorOptions


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("factor", Twice, "a policy of that name is there already"),
        ("mine", OtherName, "its class is named 'another'"),
        ("mine", WithoutSchedule, "schedule"),
        ("mine", 7, "no subclass of vllm_osdt.policies.Policy"),
    ],
)
def test_one_that_cannot_stand_is_named_in_the_log_and_left_out(monkeypatch, caplog, name, value, words):
    class Entry:
        def __init__(self):
            self.name, self.value = name, "package:thing"

        def load(self):
            return value

    monkeypatch.setattr(policies.metadata, "entry_points", lambda group: [Entry()])
    assert load_policies().keys() == POLICIES.keys()
    assert f"The decoding policy {name!r} of package:thing is left out" in caplog.text and words in caplog.text


def test_an_option_of_another_policy_cannot_be_declared_again(monkeypatch, caplog):
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Options:
        factor: float = option(2.0, number(gt=1), "Another factor.")

    taken = type("Taken", (Policy,), {"name": "taken", "Options": Options})
    entry = type("Entry", (), {"name": "taken", "value": "package:Taken", "load": lambda self: taken})()
    monkeypatch.setattr(policies.metadata, "entry_points", lambda group: [entry])
    assert "taken" not in load_policies()
    assert "its option 'factor' is one of policy 'factor'; give it another name" in caplog.text


def test_the_group_is_the_documented_one():
    text = (PACKAGE / "pyproject.toml").read_text()
    assert f'[project.entry-points."{policies.ENTRY_POINT_GROUP}"]' in text
    assert not [one for one in metadata.entry_points(group=policies.ENTRY_POINT_GROUP) if one.name in POLICIES]
