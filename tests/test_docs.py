"""The generated pages say what the declarations say."""

import ast
import json
import re
import subprocess
import sys
from importlib import metadata

from packaging.requirements import Requirement

from tests.conftest import REPOSITORY
from vllm_osdt.declaration import defaults
from vllm_osdt.options import DEFAULTS, OPTION_NAMES, SERVER_OPTION_NAMES, ServerOptions
from vllm_osdt.options.reference import operator_help
from vllm_osdt.refusals import REFUSALS
from vllm_osdt.sampling import UNSUPPORTED_SAMPLING_PARAMS


def test_the_pages_are_up_to_date():
    command = [sys.executable, "tools/generate_docs.py", "--check"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_options_page_is_complete_and_has_the_defaults():
    page = (REPOSITORY / "docs" / "options.md").read_text().split("## Renamed options")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", page, flags=re.MULTILINE))
    values = {**DEFAULTS, **defaults(ServerOptions)}
    assert rows.keys() == values.keys() == {*OPTION_NAMES, *SERVER_OPTION_NAMES}
    in_words = {"steps", "block_length", "sub_block_length", "gen_length", "cache_mode", "profile_dir"}
    in_words |= {"adablock_delimiters", "think_end_token"}
    told = {name: json.loads(text.strip("`")) for name, text in rows.items() if name not in in_words}
    assert told == {name: value for name, value in values.items() if name not in in_words}


def test_help_names_every_option_and_its_values():
    text = operator_help()
    assert all(f"{name} (" in text for name in (*OPTION_NAMES, *SERVER_OPTION_NAMES))
    assert "threshold (a number in (0, 1])" in text and "drift_window (an integer of at least 8)" in text


def test_pages_name_the_range_of_vllm_that_the_package_asks_for():
    [asked] = [one for one in metadata.requires("vllm-osdt") if Requirement(one).name == "vllm"]
    bounds = {str(one) for one in Requirement(asked).specifier}
    for page in ("README.md", "docs/index.md"):
        [named] = re.findall(r"\(`(>=[^`]*)`\)", (REPOSITORY / page).read_text())
        assert set(named.split(",")) == bounds


def refusals_in_code():
    """Place and keywords of every refusal that the package can raise."""
    for path in sorted((REPOSITORY / "vllm_osdt").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "InvalidOptionError":
                keywords = {keyword.arg: keyword.value for keyword in node.keywords}
                yield f"{path.relative_to(REPOSITORY)}:{node.lineno}", keywords


def test_every_refusal_has_its_row_and_names_the_parameter():
    found = dict(refusals_in_code())
    rows = {place: getattr(keywords.get("refusal"), "value", None) for place, keywords in found.items()}
    assert [place for place, row in rows.items() if row not in REFUSALS] == []
    assert set(rows.values()) == set(REFUSALS)  # no row of a refusal that is gone
    assert [place for place, keywords in found.items() if "parameter" not in keywords] == []


def test_the_page_of_refusals_has_every_row():
    page = (REPOSITORY / "docs" / "refusals.md").read_text()
    assert all(f"| {' | '.join(row)} |" in page for row in REFUSALS.values())
    refused = page.split("## Sampling parameters")[1].split("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", refused, flags=re.MULTILINE) == list(UNSUPPORTED_SAMPLING_PARAMS)
