import ast
from pathlib import Path

import vllm_osdt.host.compat

FOLDER = Path(vllm_osdt.host.compat.__file__).parent


def test_the_list_of_patches_names_them_all():
    listed = (FOLDER / "__init__.py").read_text()
    trees = [ast.parse(path.read_text()) for path in FOLDER.glob("*.py")]
    names = [one.name for tree in trees for one in tree.body if isinstance(one, ast.FunctionDef)]
    patches = [name for name in names if name.startswith("patch_")]
    assert len(patches) > 20
    assert [name for name in patches if f"{name}`" not in listed and f"{name}(" not in listed] == []
