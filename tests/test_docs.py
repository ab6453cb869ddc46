"""The generated pages say what the declarations say."""

import json
import re
import subprocess
import sys
from importlib import metadata

from packaging.requirements import Requirement

from tests.conftest import REPOSITORY
from vllm_osdt.declaration import defaults
from vllm_osdt.options import DEFAULTS, OPTION_NAMES, SERVER_OPTION_NAMES, ServerOptions, operator_help


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
