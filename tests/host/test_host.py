"""vLLM's internals are what the record in `tools/host_symbols.json` says, and the check notices when they are not."""

import importlib.util
import json
import sys
import zipfile
from importlib import import_module
from pathlib import Path

import pytest

pytest.importorskip("vllm")

TOOL = Path(__file__).parents[2] / "tools" / "check_host.py"


def load_tool():
    spec = importlib.util.spec_from_file_location("check_host", TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


check_host = load_tool()
RECORD = json.loads(check_host.RECORD.read_text())


@pytest.fixture(scope="module")
def installed():
    host = check_host.Host(check_host.installed())
    if host.release not in RECORD["vllm"]:
        pytest.skip(f"the record is of vLLM {RECORD['vllm']}, installed is {host.release}")
    return host


def test_installed_vllm_matches_the_record(installed):
    assert check_host.check(installed, RECORD) == []


def test_every_entry_says_why_it_is_there():
    for name, entry in RECORD["symbols"].items():
        assert entry["use"] in check_host.USES_WITH_BODY | {"call", "read"}, name
        assert entry["reason"], name


def test_everything_replaced_on_the_cpu_is_recorded():
    pytest.importorskip("triton")
    for replacement in import_module("vllm_osdt.host.cpu.numpy_kernels").REPLACEMENTS:
        if not replacement.module.endswith(("model_runner", "sample.states")):  # imported names
            assert RECORD["symbols"][f"{replacement.module}.{replacement.attribute}"]["use"] == "replace"


SYMBOL = "vllm.v1.worker.gpu.input_batch.post_update"
SOURCE = "vllm/v1/worker/gpu/input_batch.py"


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "wheel"])
@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("\n", "\n", None),
        ("def post_update(\n", "def post_update(  # a comment\n", None),
        ("def post_update(\n", "def post_update_2(\n", "missing"),
        ("def post_update(\n", "def post_update(\n    first: int,\n", "signature changed"),
        ("        num_warps=1,\n", "        num_warps=2,\n", "body changed"),
    ],
    ids=["as it was", "comment", "renamed", "parameter", "body"],
)
def test_a_doctored_file_is_reported(installed, tmp_path: Path, old: str, new: str, expected: str | None, packed: bool):
    source = installed.read(SOURCE)
    assert old in source
    files = {
        "vllm/_version.py": installed.read("vllm/_version.py"),
        SOURCE: source.replace(old, new),
    }
    target = tmp_path / "vllm-0-none-any.whl" if packed else tmp_path
    if packed:
        with zipfile.ZipFile(target, "w") as wheel:
            for name, text in files.items():
                wheel.writestr(name, text)
    else:
        for name, text in files.items():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_text(text)
    record = {"vllm": RECORD["vllm"], "symbols": {SYMBOL: RECORD["symbols"][SYMBOL]}}
    changes = check_host.check(check_host.Host(target), record)
    assert [change.what for change in changes] == ([expected] if expected else [])
    assert any(change.is_breaking for change in changes) == (expected in ("missing", "signature changed"))


def write_release(folder: Path, release: str, source: str):
    (folder / "vllm").mkdir(parents=True)
    (folder / "vllm" / "_version.py").write_text(f"__version__ = version = '{release}'\n")
    (folder / "vllm" / "module.py").write_text(source)
    return check_host.Host(folder)


def test_the_record_keeps_releases_apart_and_compares_a_new_one_with_the_last(tmp_path: Path):
    sources = {"1.0": "def f(a): ...", "1.1": "def f(a): ...", "1.2": "def f(a, b): ..."}
    hosts = {release: write_release(tmp_path / release, release, source) for release, source in sources.items()}
    record = {"vllm": [], "symbols": {"vllm.module.f": {"use": "call", "reason": "a test"}}}
    for host in hosts.values():
        record = check_host.update(host, record)
    assert record["vllm"] == ["1.0", "1.1", "1.2"]
    assert list(record["symbols"]["vllm.module.f"]["found"]) == ["1.0", "1.2"]
    assert all(check_host.check(host, record) == [] for host in hosts.values())
    assert check_host.update(hosts["1.0"], record) == record
    newer = write_release(tmp_path / "1.3", "1.3", "def f(a): ...")
    assert [change.what for change in check_host.check(newer, record)] == ["signature changed"]


def test_members_of_a_class_are_compared():
    def found(*lines: str) -> dict:
        return {"signature": list(lines)}

    def what(before: dict, after: dict) -> str | None:
        change = check_host.compare("x", before, after)
        return change and change.what

    before = found("f(self)", "size: int")
    assert what(before, before) is None
    assert what(before, found("f(self)")) == "signature changed"
    assert what(before, found("f(self, x)", "size: int")) == "signature changed"
    assert what(before, found("f(self)", "size: int", "g(self)")) == "members added"
    assert what(before, found("f(self)", "size: int", "n: int = 0")) == "members added"
    assert what(before, found("f(self)", "size: int", "n: int")) == "signature changed"
    assert what(before, found("f(self)", "size: int", "@abstractmethod g(self)")) == "signature changed"


def test_what_is_no_vllm_is_refused(tmp_path: Path):
    with pytest.raises(SystemExit, match="neither a vLLM wheel nor a folder"):
        check_host.Host(tmp_path)
