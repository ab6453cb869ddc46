"""Writes the generated parts of the documentation from the declarations: options, refusals, metrics, composition.

    python tools/generate_docs.py           # write
    python tools/generate_docs.py --check   # fail when a page is not up to date

Text between ``<!-- generated: NAME -->`` and ``<!-- end -->`` is replaced; all else is written by hand.
"""

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from vllm_osdt.frontend.metrics import LABELS, METRICS
from vllm_osdt.options import FORMER_NAMES, policies_of
from vllm_osdt.options.reference import ReferenceRow, reference_rows
from vllm_osdt.policies import OWN
from vllm_osdt.refusals import REFUSALS, sampling_rows
from vllm_osdt.sampling import UNSUPPORTED_SAMPLING_PARAMS

_SECTION = re.compile(r"(<!-- generated: ([a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table in Markdown."""
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _options(rows: list[ReferenceRow]) -> str:
    return table(
        ("Option", "Default", "Values", "Meaning"),
        [
            (
                f"`{row.name}`",
                row.default if row.has_words_for_default else f"`{row.default}`",
                row.values.replace("|", "\\|") + (f", in {row.unit}" if row.unit else ""),
                row.meaning.replace("|", "\\|"),
            )
            for row in rows
        ],
    )


def _of_policy(rows: list[ReferenceRow]) -> str:
    """One table for each set of policies that share options."""
    parts = []
    for owners in dict.fromkeys(row.policies for row in rows if row.policies):
        title = " and ".join(f"`{name}`" for name in owners)
        own = [row for row in rows if row.policies == owners]
        parts.append(f"### Of {'policies' if len(owners) > 1 else 'policy'} {title}\n\n{_options(own)}")
    return "\n".join(parts)


def _composition() -> str:
    """What a task's profile gives each policy, those first that it gives something."""
    composed = policies_of("calibrated")
    rows = [
        (f"`{policy.name}`", "yes" if policy.name in composed else "no", policy.with_profile)
        for policy in sorted(OWN, key=lambda one: one.name not in composed)
    ]
    return table(("Policy", "`calibrated`", "What it replaces, or why not"), rows)


def _metrics() -> str:
    rows = []
    for key, (name, label, meaning, *_) in METRICS.items():
        values = ", ".join(f"`{value}`" for value in LABELS.get(key, ()))
        rows.append((f"`vllm:osdt_{name}`", f"`{label}`" + (f": {values}" if values else ""), meaning))
    return table(("Metric", "Further label", "Meaning"), rows)


def _sections() -> dict[str, Callable[[], str]]:
    rows = reference_rows()
    request = [row for row in rows if not row.of_operator]
    return {
        "common-options": lambda: _options([row for row in request if not row.policies]),
        "policy-options": lambda: _of_policy(request),
        "operator-options": lambda: _options([row for row in rows if row.of_operator]),
        "renamed-options": lambda: table(
            ("Former name", "Name"), [(f"`{former}`", f"`{name}`") for former, name in FORMER_NAMES.items()]
        ),
        "refused-parameters": lambda: ", ".join(f"`{name}`" for name in UNSUPPORTED_SAMPLING_PARAMS) + ".\n",
        "refusals": lambda: table(("Parameter", "When", "What to do"), list(REFUSALS.values())),
        "refused-values": lambda: table(("Parameter", "Refused", "What to do"), sampling_rows()),
        "composition": _composition,
        "metrics": _metrics,
    }


def fill(text: str) -> str:
    """A page with its generated sections as the declarations have them."""
    sections = _sections()
    return _SECTION.sub(lambda found: f"{found[1]}\n{sections[found[2]]()}\n{found[3]}", text)


def main() -> int:
    """Write the pages, or check them; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail when a page is not up to date")
    args = parser.parse_args()
    status = 0
    for page in (ROOT / "docs" / f"{name}.md" for name in ("options", "refusals", "metrics", "calibration")):
        before = page.read_text(encoding="utf-8")
        after = fill(before)
        if after != before and args.check:
            print(f"{page.relative_to(ROOT)} is not up to date; run python tools/generate_docs.py", file=sys.stderr)
            status = 1
        elif after != before:
            page.write_text(after, encoding="utf-8")
            print(f"wrote {page.relative_to(ROOT)}")
    return status


if __name__ == "__main__":
    sys.exit(main())
