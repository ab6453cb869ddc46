"""What an installation offers: names, versions, entry points, and a Triton that is usable in every process."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, distribution, entry_points, version
from pathlib import Path

import pytest

import vllm_osdt
from vllm_osdt.mini import MODELS

ROOT = Path(__file__).parents[1]


def run(code: str, **env: str) -> str:
    """Run code in a new interpreter, outside the repository; return what it printed last."""
    environment = {**{k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}, **env}
    result = subprocess.run([sys.executable, "-c", code], cwd="/", env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def installed():
    try:
        return distribution("vllm-osdt")
    except PackageNotFoundError:
        pytest.skip("vllm-osdt is not installed; make install")


def test_version_has_one_source(installed):
    assert installed.version == vllm_osdt.__version__


def test_requirements_name_a_tested_range_of_vllm(installed):
    requirements = [re.sub(r"\s", "", requirement) for requirement in installed.requires]
    assert "vllm<0.34,>=0.32" in requirements or "vllm>=0.32,<0.34" in requirements


def test_metadata_has_one_source():
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert set(pyproject) == {"build-system", "project", "tool"}
    assert pyproject["project"]["dynamic"] == ["version"]
    [call] = [node for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())) if isinstance(node, ast.Call)]
    assert ast.unparse(call) == "setup()"


BUILD = """
import sys
from setuptools import build_meta
name = build_meta.build_wheel(sys.argv[1])
print(name, "vllm_osdt" in sys.modules)
"""
NOT_SOURCE = (".git", ".venv*", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of a copy of this source tree; its name, as the build says it, and whether that imported the package."""
    folder = tmp_path_factory.mktemp("wheel")
    source = shutil.copytree(ROOT, folder / "source", ignore=shutil.ignore_patterns(*NOT_SOURCE))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", BUILD, str(folder)]
    built = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    name, has_imported = built.stdout.split()[-2:]
    with zipfile.ZipFile(folder / name) as archive:
        yield archive, name, has_imported == "True"


def test_a_build_reads_the_version_without_importing_the_package(wheel):
    _, name, has_imported = wheel
    assert name == f"vllm_osdt-{vllm_osdt.__version__}-py3-none-any.whl"
    assert not has_imported


def test_the_wheel_holds_the_two_packages_with_their_checkpoints_and_license(wheel):
    archive, _, _ = wheel
    names = archive.namelist()
    metadata = f"vllm_osdt-{vllm_osdt.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"vllm_osdt", "csrc_triton", metadata}
    for needed in (
        "__init__.py",
        "tokenizer.py",
        "tasks/code.py",
        *(f"checkpoints/{name}/model.safetensors" for name in MODELS),
    ):
        assert f"vllm_osdt/mini/{needed}" in names
    assert {"vllm_osdt/py.typed", "csrc_triton/py.typed", f"{metadata}/licenses/LICENSE"} <= set(names)


def test_the_wheel_has_neither_trainer_nor_learning_curves_nor_recordings(wheel):
    archive, _, _ = wheel
    names = archive.namelist()
    assert sorted(name for name in names if re.fullmatch(r"vllm_osdt/mini/[^/]*", name)) == [
        "vllm_osdt/mini/__init__.py",
        "vllm_osdt/mini/tokenizer.py",
    ]
    assert not [name for name in names if re.search(r"(^|/)(tests|examples|golden|benchmarks|learning_curve)", name)]
    assert not [name for name in names if name.endswith(".py") and b"import examples" in archive.read(name)]
    assert not [name for name in names if name.endswith(".py") and b"from examples" in archive.read(name)]


def test_types_are_declared_and_the_marker_exists(installed):
    for package in ("vllm_osdt", "csrc_triton"):
        assert (ROOT / package / "py.typed").exists()


def test_the_demo_writes_no_file_that_is_kept():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("no git checkout: nothing tells which files are kept")
    from vllm_osdt.demo import PICTURE

    assert str(PICTURE) not in tracked.stdout.splitlines()
    ignored = subprocess.run(["git", "check-ignore", "-q", str(PICTURE)], cwd=ROOT)
    assert ignored.returncode == 0


@pytest.mark.parametrize(
    ("group", "name", "value"),
    [
        ("vllm.general_plugins", "osdt", "vllm_osdt.plugin:register"),
        ("triton.backends", "cpu", "vllm_osdt.host.cpu.triton_backend"),
    ],
)
def test_entry_point(installed, group: str, name: str, value: str):
    assert value in [entry.value for entry in entry_points(group=group) if entry.name == name]


def test_importing_the_package_loads_neither_torch_nor_vllm():
    loaded = run("import sys, vllm_osdt; print(sorted({'torch', 'triton', 'vllm'} & set(sys.modules)))")
    assert loaded == "[]"


def is_cpu_vllm() -> bool:
    try:
        return "cpu" in version("vllm")
    except PackageNotFoundError:
        return False


on_cpu = pytest.mark.skipif(not is_cpu_vllm(), reason="not the CPU build of vLLM")


@on_cpu
def test_the_vllm_command_knows_its_version():
    command = Path(sys.executable).with_name("vllm")
    result = subprocess.run([command, "--version"], cwd="/", capture_output=True, text=True)
    assert result.stdout.strip().splitlines()[-1] == version("vllm"), result.stderr


@on_cpu
def test_importing_triton_turns_the_interpreter_on(installed):
    code = (
        "import triton, triton.language as tl\n"
        "print(triton.knobs.runtime.interpret, type(triton.runtime.driver.active).__name__, type(tl.sum).__name__)"
    )
    assert run(code) == "True InterpreterDriver InterpretedFunction"


@on_cpu
def test_the_backend_can_be_imported_before_triton(installed):
    code = "import vllm_osdt.host.cpu.triton_backend.driver, triton; print(triton.knobs.runtime.interpret)"
    assert run(code) == "True"


@on_cpu
def test_vllm_uses_triton(installed):
    assert run("from vllm.triton_utils import HAS_TRITON; print(HAS_TRITON)") == "True"


@on_cpu
def test_an_interpreter_switched_off_by_hand_stays_off(installed):
    code = "import triton; print(triton.knobs.runtime.interpret, triton.backends.backends['cpu'].driver.is_active())"
    assert run(code, TRITON_INTERPRET="0") == "False False"


FAKE_GPU = """
import torch
torch.cuda.is_available = lambda: True
import triton
print(triton.knobs.runtime.interpret, triton.backends.backends['cpu'].driver.is_active())
"""


@on_cpu
@pytest.mark.parametrize("interpret", [None, "1"])
def test_the_backend_stands_aside_for_a_gpu(installed, interpret: str | None):
    env = {} if interpret is None else {"TRITON_INTERPRET": interpret}
    assert run(FAKE_GPU, **env) == f"{interpret == '1'} False"


FAKE_TRITON_CPU = """
import importlib.abc, importlib.util, sys

REAL = {
    "compiler": "from triton.backends.compiler import BaseBackend\\nclass CPUBackend(BaseBackend): pass\\n"
                "CPUBackend.__abstractmethods__ = frozenset()",
    "driver": "from triton.backends.driver import DriverBase\\nclass CPUDriver(DriverBase): pass\\n"
              "CPUDriver.__abstractmethods__ = frozenset()",
}

class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        if name == "triton.backends.cpu" or name.startswith("triton.backends.cpu."):
            return importlib.util.spec_from_loader(name, self, is_package=name == "triton.backends.cpu")

    def exec_module(self, module):
        exec(REAL.get(module.__name__.rpartition(".")[2], ""), module.__dict__)

sys.meta_path.insert(0, Finder())
import triton
backend = triton.backends.backends["cpu"]
print(triton.knobs.runtime.interpret, backend.compiler.__name__, backend.driver.__name__)
"""


@on_cpu
def test_a_real_triton_cpu_takes_the_name(installed):
    assert run(FAKE_TRITON_CPU) == "False CPUBackend CPUDriver"
