"""Tables and pictures of what ``bench_policies.py`` has written, without decoding again.

    python benchmarks/policy_report.py benchmarks/results/policies.jsonl --pictures pictures

Tables are in Markdown: every rule on every model, the rules that others dominate, how much a rule's result depends on
the value of its option, and what a step costs. A later row of the same model, task and setting replaces an earlier one,
so that files of several runs can be appended to each other.
"""

import argparse
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STATIC = "static 0.9"
MARGIN = 0.01  # accuracy that a setting may lose and still count as losing nothing
DEFAULTS, TUNED = "defaults", "tuned"
CALIBRATED = "calibrated"  # with a profile's thresholds: in the file, but in no table
NONE, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Row:
    """A setting of a policy on a task of a model.

    Attributes:
        kind: ``STATIC``, ``DEFAULTS``, ``CALIBRATED`` or ``TUNED``; a row of the search is ``TUNED`` too.
        setting: In words.
    """

    model: str
    task: str
    policy: str
    kind: str
    setting: str
    accuracy: float
    nfe: float
    num_problems: int

    @classmethod
    def of(cls, line: Mapping[str, Any]) -> "Row":
        """From a JSON line."""
        name = line["name"] or STATIC  # the search's own static threshold has no name
        _, _, setting = name.partition(", ")
        kind = STATIC if name == STATIC else setting if setting in (DEFAULTS, CALIBRATED) else TUNED
        policy = str(line["policy"] if "policy" in line else line["options"]["policy"])
        return cls(
            line["model"], line["task"], policy, kind, setting, line["accuracy"], line["nfe"], line["num_problems"]
        )


@dataclass(frozen=True)
class Results:
    """What a file holds.

    Attributes:
        rows: Of held-out problems.
        searched: What the search decoded, in its order; of a model on which it was let try all settings, only that.
        overhead: Lines of the processor's time.
    """

    rows: list[Row]
    searched: list[Row]
    overhead: list[dict[str, Any]]

    @property
    def models(self) -> list[str]:
        """In the file's order."""
        return list(dict.fromkeys(row.model for row in self.rows))

    def static(self, row: Row, *, in_search: bool = False) -> Row:
        """Static 0.9 on the same problems."""
        for one in self.searched if in_search else self.rows:
            if (one.model, one.task, one.kind) == (row.model, row.task, STATIC):
                return one
        raise SystemExit(f"there is no row of {STATIC} for {row.model}, {row.task}")


def read(lines: Iterable[Mapping[str, Any]]) -> Results:
    """The rows of JSON lines."""
    found: dict[str, dict[tuple[str, ...], Row]] = {"policies": {}, "policies_search": {}}
    overhead: dict[tuple[str, int], dict[str, Any]] = {}
    lines = list(lines)
    whole = {line["model"] for line in lines if line.get("whole")}
    for line in lines:
        if line["bench"] == "policies_search" and line["model"] in whole and not line.get("whole"):
            continue
        if line["bench"] in found:
            row = Row.of(line)
            if row.kind == CALIBRATED:
                continue
            found[line["bench"]][row.model, row.task, row.policy, row.kind, row.setting] = row
        elif line["bench"] == "policies_overhead":
            overhead[line["model"], line["requests"]] = dict(line)
    rows, searched = (list(one.values()) for one in found.values())
    return Results(_without_replaced(rows), searched, list(overhead.values()))


def _without_replaced(rows: list[Row]) -> list[Row]:
    """One tuned row for each policy and task, the latest."""
    kept = {(row.model, row.task, row.policy, row.kind): row for row in rows}
    return list(kept.values())


def in_all(results: Results, rows: list[Row], *, in_search: bool = False) -> tuple[float, float]:
    """Forwards over static 0.9's, the geometric mean over tasks, and accuracy less its, over all problems."""
    pairs = [(row, results.static(row, in_search=in_search)) for row in rows]
    ratio = math.exp(statistics.fmean(math.log(row.nfe / static.nfe) for row, static in pairs))
    right = sum((row.accuracy - static.accuracy) * row.num_problems for row, static in pairs)
    return ratio, right / sum(row.num_problems for row in rows)


def cell(ratio: float, difference: float) -> str:
    """In words: forwards over static 0.9's, and percentage points of accuracy where they are others."""
    points = f"{100 * difference:+.0f}".replace("-", MINUS)
    if points[1:] == "0":
        points = points[0] + "<1"
    return f"{ratio:.2f}" if abs(difference) < 0.0005 else f"{ratio:.2f} ({points})"


def overview(results: Results, models: list[str]) -> str:
    """Every rule on some models: at its defaults, and tuned."""
    by_policy: dict[str, dict[tuple[str, str], list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in results.rows:
        if row.kind != STATIC:
            by_policy[row.policy][row.model, row.kind].append(row)
    lines = [
        "| Policy | " + " | ".join(f"{model}: defaults, tuned" for model in models) + " |",
        "|---" * (len(models) + 1) + "|",
    ]
    for policy, own in by_policy.items():
        if not any(model in models for model, _ in own):
            continue
        cells = []
        for model in models:
            num_tasks = len({row.task for row in results.rows if row.model == model})
            parts = []
            for kind in (DEFAULTS, TUNED):
                rows = own[model, kind]
                part = cell(*in_all(results, rows)) if rows else NONE
                if rows and len(rows) < num_tasks:
                    part += f" on {len(rows)} of {num_tasks}"
                parts.append(part)
            cells.append(", ".join(parts))
        lines.append(f"| `{policy}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def beats(left: Row, right: Row) -> bool:
    """Whether a row has no more forwards and no fewer answers, and is better in one of them."""
    is_no_worse = left.nfe <= right.nfe and left.accuracy >= right.accuracy
    return is_no_worse and (left.nfe, left.accuracy) != (right.nfe, right.accuracy)


def dominance(results: Results, without: Collection[str] = ()) -> str:
    """On how many tasks of all models a rule has a row that no other rule's row beats, and which rules beat it.

    Fewest forwards are counted among the rows that lose at most ``MARGIN`` against static 0.9.

    Args:
        results: The rows.
        without: Policies that are left out.
    """
    by_task: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in results.rows:
        if row.policy not in without:
            by_task[row.model, row.task].append(row)
    number: dict[str, int] = defaultdict(int)
    front, fewest = number.copy(), number.copy()
    beaten_by: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for rows in by_task.values():
        lossless = [row for row in rows if row.accuracy >= results.static(row).accuracy - MARGIN]
        least = min(row.nfe for row in lossless)
        for policy in {row.policy for row in lossless if row.nfe == least}:
            fewest[policy] += 1
        for policy in policies(rows):
            own = [row for row in rows if row.policy == policy]
            others = [row for row in rows if row.policy != policy]
            number[policy] += 1
            front[policy] += any(not any(beats(other, row) for other in others) for row in own)
            for rival in {row.policy for row in others}:
                theirs = [row for row in others if row.policy == rival]
                beaten_by[policy][rival] += all(any(beats(other, row) for other in theirs) for row in own)
    lines = [
        "| Policy | fewest forwards without a loss | on the front | beaten by, on as many tasks |",
        "|---|---|---|---|",
    ]
    for policy in sorted(
        number, key=lambda policy: (-fewest[policy] / number[policy], -front[policy] / number[policy])
    ):
        rivals = sorted(beaten_by[policy].items(), key=lambda item: (-item[1], item[0]))[:3]
        words = ", ".join(f"`{rival}` {count}" for rival, count in rivals if count)
        counts = f"{fewest[policy]} of {number[policy]} | {front[policy]}"
        lines.append(f"| `{policy}` | {counts} | {words or NONE} |")
    return "\n".join(lines)


def by_setting(results: Results, model: str) -> dict[str, dict[str, tuple[float, float, int]]]:
    """What the search saw on a model, by policy and setting: ratio of forwards, difference of accuracy, and tasks."""
    grouped: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in results.searched:
        if row.model == model and row.kind == TUNED:
            grouped[row.policy][row.setting].append(row)
    return {
        policy: {setting: (*in_all(results, rows, in_search=True), len(rows)) for setting, rows in own.items()}
        for policy, own in grouped.items()
    }


def sensitivity(results: Results, model: str) -> str:
    """Of each rule's settings from cautious to bold: the fewest forwards without a loss, and what bolder ones do."""
    lines = [
        "| Policy | settings, and those that lose | boldest without loss | the next one | boldest |",
        "|---|---|---|---|---|",
    ]
    num_tasks = len({row.task for row in results.searched if row.model == model})
    for policy, own in by_setting(results, model).items():
        tried = [(setting, *found[:2]) for setting, found in own.items() if found[2] == num_tasks]
        if not tried:
            continue
        losing = [index for index, (_, _, difference) in enumerate(tried) if difference < -MARGIN]
        first = losing[0] if losing else len(tried)
        cells = []
        for index in (first - 1, first, len(tried) - 1):
            is_there = 0 <= index < len(tried)
            cells.append(f"{values_of(tried[index][0])}: {cell(*tried[index][1:])}" if is_there else NONE)
        names = ", ".join(f"`{name}`" for name in tried[0][0].split()[::2])
        lines.append(f"| `{policy}`: {names} | {len(tried)}, {len(losing)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def values_of(setting: str) -> str:
    """A setting in words without the names of its options."""
    return " / ".join(setting.split()[1::2])


def costs(results: Results) -> str:
    """The processor's time of a rule's step over that of static_threshold."""
    lines = []
    for found in results.overhead:
        lines += [
            f"{found['model']}, {found['requests']} at once, a step of {found['ms_per_step']:.1f} ms:",
            "",
            "| Policy | step, 95 % interval |",
            "|---|---|",
        ]
        for name, (ratio, low, high) in found["ratios"].items():
            words = (f"{100 * (one - 1):+.1f}".replace("-", MINUS) for one in (ratio, low, high))
            lines.append("| `{}` | {} % ({} to {}) |".format(name, *words))
        lines.append("")
    return "\n".join(lines)


def draw(results: Results, folder: Path) -> None:
    """Pictures: accuracy over forwards of each task, and of each model's search."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    by_task: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in results.rows:
        by_task[row.model, row.task].append(row)
    for (model, task), rows in by_task.items():
        figure, axis = plt.subplots(figsize=(8, 5.5))
        points = {
            policy: [(row.nfe, row.accuracy) for row in rows if row.policy == policy] for policy in policies(rows)
        }
        draw_lines(axis, points)
        front = [row for row in rows if not any(beats(other, row) for other in rows)]
        front.sort(key=lambda row: row.nfe)
        axis.plot([row.nfe for row in front], [row.accuracy for row in front], ":", color="black", label="Pareto front")
        axis.set(title=f"{model}: {task}", xlabel="forward passes a request", ylabel="right answers")
        save(figure, axis, folder / f"pareto_{model}_{task}.png")
        plt.close(figure)
    for model in dict.fromkeys(row.model for row in results.searched):
        figure, axis = plt.subplots(figsize=(8, 5.5))
        num_tasks = len({row.task for row in results.searched if row.model == model})
        draw_lines(
            axis,
            {
                policy: [found[:2] for found in own.values() if found[2] == num_tasks]
                for policy, own in by_setting(results, model).items()
            },
        )
        axis.axhline(0, color="grey", linewidth=0.5)
        axis.set(
            title=f"{model}: the settings of the search",
            xlabel="forward passes over static 0.9's",
            ylabel="right answers less static 0.9's",
        )
        save(figure, axis, folder / f"sensitivity_{model}.png")
        plt.close(figure)


def policies(rows: list[Row]) -> list[str]:
    """In the order of the rows."""
    return list(dict.fromkeys(row.policy for row in rows))


def draw_lines(axis: Any, points: Mapping[str, list[tuple[float, float]]]) -> None:
    """A line for each policy."""
    import matplotlib.pyplot as plt

    colors = plt.get_cmap("tab20").colors
    for index, (policy, own) in enumerate(points.items()):
        if own:
            x, y = zip(*sorted(own), strict=True)
            marker, color = "os^vD<>pP*Xhd"[index % 13], colors[index % len(colors)]
            axis.plot(x, y, "-", marker=marker, color=color, label=policy, linewidth=1, markersize=5)


def save(figure: Any, axis: Any, path: Path) -> None:
    """Write a picture, with forwards on a logarithmic axis."""
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("{x:g}")
    axis.tick_params(axis="x", which="minor", labelsize="x-small")
    axis.legend(fontsize="x-small", ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=75)


def main() -> None:
    """Parse arguments, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="JSON lines of bench_policies.py")
    parser.add_argument("--table", action="append", metavar="MODEL,MODEL", help="side by side (default: each alone)")
    parser.add_argument("--without", action="append", metavar="POLICY", help="who dominates whom without it")
    parser.add_argument("--pictures", type=Path, help="folder for the pictures")
    args = parser.parse_args()
    lines = [json.loads(line) for file in args.files for line in file.read_text().splitlines()]
    results = read(lines)
    tables = [names.split(",") for names in args.table or []] or [[model] for model in results.models]
    for models in tables:
        print(f"\nForwards over static 0.9's, percentage points of accuracy\n\n{overview(results, models)}")
    print(f"\nRules that others dominate, over all tasks of all models\n\n{dominance(results)}")
    if args.without:
        print(f"\nThe same without {', '.join(args.without)}\n\n{dominance(results, args.without)}")
    for model in dict.fromkeys(row.model for row in results.searched):
        print(f"\nSensitivity, {model}\n\n{sensitivity(results, model)}")
    if results.overhead:
        print(f"\nTime of a step over that of static_threshold\n\n{costs(results)}")
    if args.pictures:
        draw(results, args.pictures)


if __name__ == "__main__":
    main()
