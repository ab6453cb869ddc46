"""``vllm-osdt options``: what each option means, from its declaration."""

import argparse
import json
from typing import Any

from vllm_osdt.cli.common import print_table
from vllm_osdt.options.reference import reference_rows


def options(args: argparse.Namespace) -> None:
    """Every option of a request and of the operator: its values, default and meaning."""
    rows: list[dict[str, Any]] = [row._asdict() for row in reference_rows()]
    if args.json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    for title, of_operator in (("options of a request, and of the operator", False), ("of the operator alone", True)):
        shown = [row for row in rows if row["of_operator"] == of_operator]
        print_table(title, [{name: row[name] for name in ("name", "values", "default", "meaning")} for row in shown])
