#!/usr/bin/env python3
"""Say what changed in vLLM where this project overrides, patches, replaces or otherwise relies on its internals.

    python tools/check_host.py [WHEEL_OR_VLLM_DIR] [--update]

`host_symbols.json` beside this file lists every such symbol: its use, the reason in one line, and what each reviewed
release has there, where that differs from the one before. The target, a wheel, an unpacked tree or an installed package
(default: the installed one), is parsed and never imported. It is compared with its own release in the record, or else
with the last. The exit code is 1 when a symbol is missing or its signature changed; changed bodies are for a person to
read.

A new entry needs "use" and "reason"; `--update` fills in the rest from the target, a new release at the end.
"""

import argparse
import ast
import hashlib
import importlib.util
import json
import re
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

RECORD = Path(__file__).with_name("host_symbols.json")
USES_WITH_BODY = {"override", "patch", "replace", "follow"}
"""Uses that lean on what the host does inside; `follow` is code of ours that fits in with it. The others, `call` and
`read`, lean on signature or members only."""


class Host:
    """The source files of one vLLM release."""

    def __init__(self, path: Path):
        self._archive = zipfile.ZipFile(path) if path.is_file() else None
        self._root = path.parent if path.name == "vllm" else path
        match = re.search(r"\bversion = '([^'+]+)", self.read("vllm/_version.py") or "")
        if match is None:
            raise SystemExit(f"{path} is neither a vLLM wheel nor a folder that has or is the package vllm")
        self.release = match.group(1)

    def read(self, name: str) -> str | None:
        """Return the text of a file named from the root of the import path, or None if there is none."""
        if self._archive is None:
            file = self._root / name
            return file.read_text(encoding="utf-8") if file.is_file() else None
        try:
            return self._archive.read(name).decode()
        except KeyError:
            return None

    @cache  # noqa: B019  one Host lives as long as the process
    def module(self, parts: tuple[str, ...]) -> ast.Module | None:
        """Parse a module or package, or return None if there is none of this name."""
        path = "/".join(parts)
        source = self.read(f"{path}.py") or self.read(f"{path}/__init__.py")
        return None if source is None else ast.parse(source)

    def find(self, symbol: str) -> ast.stmt | None:
        """Find the definition of a dotted name where it is written: inherited and imported names do not count."""
        parts = tuple(symbol.split("."))
        for split in range(len(parts) - 1, 0, -1):
            node: Any = self.module(parts[:split])
            if node is None:
                continue
            for name in parts[split:]:
                node = next((child for child in _statements(node.body) if _name(child) == name), None)
                if node is None:
                    break
            return node
        return None


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Walk the definitions of a body, those inside `if` and `try` included; of overloads the last one first."""
    for statement in reversed(body):
        yield statement
        for inner in ("body", "orelse", "finalbody"):
            if isinstance(statement, ast.If | ast.Try):
                yield from _statements(getattr(statement, inner, []))


def _name(statement: ast.stmt) -> str | None:
    """The name that a statement defines."""
    match statement:
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            return statement.name
        case ast.AnnAssign(target=ast.Name(id=name)) | ast.Assign(targets=[ast.Name(id=name)]):
            return name
    return None


def _function(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """A function's signature without its annotations, which bind no caller."""
    arguments = ast.parse(ast.unparse(node)).body[0].args  # type: ignore[attr-defined]
    for argument in ast.walk(arguments):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    decorators = "".join(f"@{ast.unparse(decorator)} " for decorator in node.decorator_list)
    return f"{decorators}{node.name}({ast.unparse(arguments)})"


def signature(node: ast.stmt) -> str | list[str]:
    """What users of a definition rely on: a function's parameters, or one line for each member of a class."""
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            return _function(node)
        case ast.ClassDef():
            members = (child for child in node.body if not isinstance(child, ast.Expr))
            return [
                _function(child) if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) else ast.unparse(child)
                for child in members
                if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.AnnAssign)
            ]
    return ""


def body_hash(node: ast.stmt) -> str:
    """Hash what a definition does: comments, layout and docstrings do not count, nor does the version of Python."""
    return hashlib.sha256(repr(_canonical(node)).encode()).hexdigest()[:16]


def _canonical(node: Any) -> Any:
    if isinstance(node, list):
        return [_canonical(item) for item in node if not _is_docstring(item)]
    if isinstance(node, ast.AST):
        fields = ((name, value) for name, value in ast.iter_fields(node) if value not in (None, []))
        return type(node).__name__, [(name, _canonical(value)) for name, value in fields]
    return node


def _is_docstring(node: Any) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def describe(host: Host, symbol: str, use: str) -> dict[str, Any] | None:
    """Return what the record keeps of a symbol, or None if the host has no such symbol."""
    node = host.find(symbol)
    if node is None:
        return None
    found: dict[str, Any] = {"signature": signature(node)}
    if use in USES_WITH_BODY:
        found["body"] = body_hash(node)
    return found


@dataclass(frozen=True)
class Change:
    """One difference between the record and a host."""

    symbol: str
    what: str
    """missing, signature changed, body changed, or members added."""
    detail: str = ""

    @property
    def is_breaking(self) -> bool:
        """Whether code written for the recorded release cannot be expected to work."""
        return self.what in ("missing", "signature changed")


def compare(symbol: str, recorded: dict[str, Any], found: dict[str, Any] | None) -> Change | None:
    """Compare one symbol's record with what a host has."""
    if found is None:
        return Change(symbol, "missing")
    before, after = recorded["signature"], found["signature"]
    if isinstance(before, list) and isinstance(after, list):
        gone = [line for line in before if line not in after]
        new = [line for line in after if line not in before]
        detail = "".join(f"\n      - {line}" for line in gone) + "".join(f"\n      + {line}" for line in new)
        # A new member breaks nothing unless whoever subclasses or constructs must supply it.
        if gone or any("abstractmethod" in line or re.fullmatch(r"\w+: [^=]+", line) for line in new):
            return Change(symbol, "signature changed", detail)
        if new:
            return Change(symbol, "members added", detail)
    elif before != after:
        return Change(symbol, "signature changed", f"\n      - {before}\n      + {after}")
    if recorded.get("body") != found.get("body"):
        return Change(symbol, "body changed")
    return None


def recorded(record: dict[str, Any], symbol: str, release: str) -> dict[str, Any]:
    """Return what a release has of a symbol by the record."""
    releases = record["vllm"][: record["vllm"].index(release) + 1]
    found = record["symbols"][symbol].get("found", {})
    return next((found[one] for one in reversed(releases) if one in found), {"signature": ""})


def baseline(host: Host, record: dict[str, Any]) -> str:
    """Return the release of the record that a host is compared with."""
    return host.release if host.release in record["vllm"] else record["vllm"][-1]


def check(host: Host, record: dict[str, Any]) -> list[Change]:
    """Compare every recorded symbol with a host."""
    release = baseline(host, record)
    changes = (
        compare(name, recorded(record, name, release), describe(host, name, entry["use"]))
        for name, entry in record["symbols"].items()
    )
    return [change for change in changes if change is not None]


def update(host: Host, record: dict[str, Any]) -> dict[str, Any]:
    """Return the record with a host's release in it.

    Raises:
        SystemExit: the host lacks a symbol.
    """
    releases = [*record["vllm"], *([host.release] if host.release not in record["vllm"] else [])]
    symbols = {}
    for name, entry in sorted(record["symbols"].items()):
        found = describe(host, name, entry["use"])
        if found is None:
            raise SystemExit(f"vLLM {host.release} has no {name}: mend or remove its entry in {RECORD.name} first")
        known = {one: recorded(record, name, one) for one in record["vllm"]} | {host.release: found}
        kept = {releases[0]: known[releases[0]]}
        kept |= {one: known[one] for before, one in pairwise(releases) if known[one] != known[before]}
        symbols[name] = {"use": entry["use"], "reason": entry["reason"], "found": kept}
    return {"vllm": releases, "symbols": symbols}


def installed() -> Path:
    """Find the installed package without importing it."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        raise SystemExit("vLLM is not installed here: name a wheel or a folder")
    return Path(spec.origin).parent


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path, nargs="?", help="a wheel, or a folder that has or is the package vllm")
    parser.add_argument("--update", action="store_true", help="rewrite the record from the target")
    options = parser.parse_args()

    host = Host(options.target or installed())
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    if options.update:
        RECORD.write_text(json.dumps(update(host, record), indent=1) + "\n", encoding="utf-8")
        return 0
    changes = check(host, record)
    for change in changes:
        entry = record["symbols"][change.symbol]
        print(f"{change.what}: {change.symbol}\n    {entry['use']}: {entry['reason']}{change.detail}")
    num_breaking = sum(change.is_breaking for change in changes)
    print(
        f"vLLM {host.release} against the record of {baseline(host, record)}: {len(record['symbols'])} symbols, "
        f"{len(changes)} changed, {num_breaking} of them missing or with another signature"
    )
    return 1 if num_breaking else 0


if __name__ == "__main__":
    sys.exit(main())
