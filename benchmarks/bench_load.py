"""What depends on the load: thresholds that fall with it, drafts that give way to it, and what audits cost beside it.

SmartSpec (arXiv 2406.14066) lets a server speculate less the more requests it has, since rejected drafts waste compute
that others need. This decodes so many requests at a time, one of which begins when another ends.

    python benchmarks/bench_load.py --problems 48
    python benchmarks/bench_load.py --what drafts --tasks code --problems 48
    python benchmarks/bench_load.py --what audits --tasks code --problems 200

- ``thresholds``: a static threshold that falls from ``--high`` with one request to ``--low`` with the most, in a line.
  Under a constant load that is one constant threshold, so that it needs no code of the engine.
- ``drafts``: ``fixed_steps``, ``freedave`` over it, and that with the operator's ``load_aware`` of ``--bounds``.
  Forwards and rows are those that an engine computed, prompts among them, a problem. ``units`` are what they would
  take where a forward of up to ``--knee`` rows takes one unit and one of more rows as much more, as on a GPU that waits
  for weights up to there: of all requests together a problem, and the median of a request from beginning to end.
- ``audits``: requests of a calibrated task on engines that audit shares of them. One audit at a time runs beside them.

Seconds are those of the process on its processors, so that other work beside matters less; use one thread.
"""

import argparse
import time
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from bench_verification import RowCounter
from common import environment, write_lines
from decoding import Bench, add_engine_arguments, mcnemar, wilson
from problems import Problem, Source, find_source

from vllm_osdt.engine.statistics import num_forwards

SEED = 77
AUDITS = (0.0, 0.02, 0.1, 1.0)  # shares of the requests
CALIBRATING = 96  # problems that calibrate a task before its requests are timed


@dataclass
class Run:
    """Problems decoded under a load.

    Attributes:
        load: Requests at a time.
        options: Of each request.
        right, nfe, tokens: Problem by problem.
        begun, ended: Likewise: how many steps and processor seconds there were before a request, and at its end.
        rows: Computed in each step.
        seconds: Of the process, all together.
    """

    load: int
    options: dict[str, Any]
    right: list[bool]
    nfe: list[int]
    tokens: list[list[int]]
    begun: list[tuple[int, float]]
    ended: list[tuple[int, float]]
    rows: list[int] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def mean_nfe(self) -> float:
        """Forward passes of a request."""
        return sum(self.nfe) / len(self.nfe)

    @property
    def requests_per_second(self) -> float:
        """Of all together."""
        return len(self.nfe) / self.seconds

    @property
    def latency_ms(self) -> float:
        """Median of a request's time."""
        return 1e3 * median(end - begin for (_, begin), (_, end) in zip(self.begun, self.ended, strict=True))

    def units(self, knee: int) -> tuple[float, float]:
        """What a problem takes of all together, and the median that a request takes, by the rows of steps alone."""
        clock = [0.0]
        for rows in self.rows:
            clock.append(clock[-1] + max(1.0, rows / knee))
        taken = [clock[end] - clock[begin] for (begin, _), (end, _) in zip(self.begun, self.ended, strict=True)]
        return clock[-1] / len(taken), median(taken)


def decode(bench: Bench, counter: RowCounter, problems: list[Problem], load: int, options: dict[str, Any]) -> Run:
    """Decode problems, ``load`` at a time."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine, waiting, running = bench.llm.llm_engine, list(enumerate(problems)), 0
    cache = {} if bench.args.cache is None else {"cache_mode": bench.args.cache}
    params = SamplingParams(
        temperature=0.0,
        max_tokens=bench.gen_length,
        output_kind=RequestOutputKind.FINAL_ONLY,
        extra_args={"osdt_" + name: value for name, value in {**cache, **options}.items()},
    )
    size = len(problems)
    run = Run(load, options, [False] * size, [0] * size, [[]] * size, [(0, 0.0)] * size, [(0, 0.0)] * size)
    bench.llm.reset_prefix_cache()
    counter.take()
    start = time.process_time()
    while waiting or running:
        while waiting and running < load:
            index, problem = waiting.pop(0)
            run.begun[index] = len(run.rows), time.process_time()
            engine.add_request(str(index), problem.prompt, params.clone())
            running += 1
        outputs = engine.step()
        rows = counter.take()
        if rows:
            run.rows.append(rows)
        for output in outputs:
            if output.finished:
                index, completion = int(output.request_id), output.outputs[0]
                run.ended[index] = len(run.rows), time.process_time()
                run.right[index] = problems[index].is_right(completion.text)
                run.nfe[index] = num_forwards(completion)
                run.tokens[index] = list(completion.token_ids)
                running -= 1
    run.seconds = time.process_time() - start
    return run


def line_of(run: Run, **about: Any) -> dict[str, Any]:
    """What is written of a run."""
    return {
        **about,
        "load": run.load,
        "options": run.options,
        "right": run.right,
        "nfe": run.mean_nfe,
        "tokens_per_second": sum(map(len, run.tokens)) / run.seconds,
        "requests_per_second": run.requests_per_second,
        "latency_ms": run.latency_ms,
        "forwards": len(run.rows) / len(run.nfe),
        "rows": sum(run.rows) / len(run.nfe),
    }


def compare_thresholds(args: argparse.Namespace, source: Source) -> list[dict[str, Any]]:
    """Print a table, and return lines."""
    bench = Bench(args, source.path, source.gen_length)
    counter, lines, loads = RowCounter(bench.llm), [], args.loads or [1, 8, 32]
    for task in args.tasks or source.tasks:
        problems = source.tasks[task](args.problems, SEED)
        decode(bench, counter, problems[:4], max(loads), {"policy": "static_threshold", "threshold": args.high})
        print(task)
        print(f"{'at once':>8}{'threshold':>11}{'right':>8}{'95 %':>10}{'p':>7}{'NFE':>7}{'req/s':>8}{'median':>10}")
        for load in loads:
            share = (load - min(loads)) / max(max(loads) - min(loads), 1)
            thresholds = {args.high, args.low, round(args.high - share * (args.high - args.low), 3)}
            settings = [{"policy": "static_threshold", "threshold": one} for one in sorted(thresholds, reverse=True)]
            runs = [decode(bench, counter, problems, load, setting) for setting in settings]
            for one in runs:
                low, high = wilson(sum(one.right), len(problems))
                p = mcnemar(one.right, runs[0].right)
                print(
                    f"{load:>8}{one.options['threshold']:>11g}{sum(one.right) / len(problems):>8.1%}"
                    f"{f'{low:.0%}-{high:.0%}':>10}{p:>7.3f}{one.mean_nfe:>7.2f}{one.requests_per_second:>8.2f}"
                    f"{one.latency_ms:>7.0f} ms",
                    flush=True,
                )
                lines.append(line_of(one, bench="load", model=source.label, task=task))
    return lines


def compare_drafts(args: argparse.Namespace, source: Source) -> list[dict[str, Any]]:
    """Print a table, and return lines.

    Raises:
        SystemExit: A request has other tokens than ``fixed_steps`` gives it alone.
    """
    bounds = dict(zip(("low", "high"), args.bounds, strict=True))
    plain = Bench(args, source.path, source.gen_length)
    aware = Bench(args, source.path, source.gen_length, load_aware=bounds)
    counters = {id(bench): RowCounter(bench.llm) for bench in (plain, aware)}
    drafts = {"policy": "freedave", "freedave_drafts": args.drafts}
    settings = [
        ("no drafts", plain, {"policy": "fixed_steps"}),
        ("drafts", plain, drafts),
        ("load_aware", aware, drafts),
    ]
    lines: list[dict[str, Any]] = []
    head = (
        "| task | at once | | NFE | forwards | rows | rows a forward | units | units of a request | req/s | tokens/s "
    )
    print(f"{head}| median ms |\n| {' | '.join(['---'] * 12)} |")
    for task in args.tasks or source.tasks:
        problems = source.tasks[task](args.problems, SEED)
        for bench in (plain, aware):
            decode(bench, counters[id(bench)], problems[:2], 2, drafts)
        expected: list[list[int]] = []
        for load in args.loads or [1, 2, 4, 8, 16, 32]:
            for name, bench, options in settings:
                run = decode(bench, counters[id(bench)], problems, load, options)
                expected = expected or run.tokens
                if run.tokens != expected:
                    raise SystemExit(f"{name}, {load} at once, has other tokens than {settings[0][0]} one at a time")
                line = line_of(run, bench="load", model=source.label, task=task, setting=name)
                units = run.units(args.knee)
                line |= {"bounds": bounds, "knee": args.knee, "units": units}
                lines.append(line)
                print(
                    f"| {task} | {load} | {name} | {run.mean_nfe:.1f} | {line['forwards']:.1f} | {line['rows']:.0f} | "
                    f"{line['rows'] / line['forwards']:.0f} | {units[0]:.1f} | {units[1]:.0f} | "
                    f"{run.requests_per_second:.2f} | {line['tokens_per_second']:.0f} | {run.latency_ms:.0f} |",
                    flush=True,
                )
    return lines


def compare_audits(args: argparse.Namespace, source: Source) -> list[dict[str, Any]]:
    """Print a table, and return lines.

    Raises:
        SystemExit: An audit has changed the tokens of a request.
    """
    benches = {share: Bench(args, source.path, source.gen_length, audit=share, drift="warn") for share in AUDITS}
    counters, lines = {share: RowCounter(bench.llm) for share, bench in benches.items()}, []
    print("| task | at once | audit | audits ended | NFE | forwards | rows | req/s | median ms |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for task in args.tasks or source.tasks:
        options = {"policy": "osdt", "task": task}
        for share, bench in benches.items():
            decode(bench, counters[share], source.tasks[task](CALIBRATING, SEED + 1), 8, options)
        for load in args.loads or [1, 8, 32]:
            expected: list[list[int]] = []
            for share, bench in benches.items():
                problems = source.tasks[task](args.problems, SEED)
                auditor, ended = bench.llm.llm_engine.engine_core.engine_core.scheduler._auditor, 0
                end = type(auditor).end

                def count(request: Any, *, ended_well: bool) -> Any:
                    nonlocal ended
                    found = end(auditor, request, ended_well=ended_well)  # noqa: B023
                    ended += found is not None
                    return found

                while bench.llm.llm_engine.has_unfinished_requests():  # audits of the run before
                    bench.llm.llm_engine.step()
                auditor.end = count
                run = decode(bench, counters[share], problems, load, options)
                del auditor.end
                expected = expected or run.tokens
                if run.tokens != expected:
                    raise SystemExit(f"a share of {share} audited, {load} at once: requests have other tokens")
                line = line_of(run, bench="load", model=source.label, task=task, audit=share, audits=ended)
                lines.append(line)
                print(
                    f"| {task} | {load} | {share} | {ended} | {run.mean_nfe:.1f} | {line['forwards']:.2f} | "
                    f"{line['rows']:.0f} | {run.requests_per_second:.2f} | {run.latency_ms:.0f} |",
                    flush=True,
                )
    return lines


COMPARISONS = {"thresholds": compare_thresholds, "drafts": compare_drafts, "audits": compare_audits}


def main() -> None:
    """Print a table, and append JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=COMPARISONS, default="thresholds", help="what is compared")
    parser.add_argument("--model", default="llada-mini", help="a bundled model, a rung of the ladder, or weak")
    parser.add_argument("--tasks", nargs="*", help="default: all")
    parser.add_argument("--problems", type=int, default=64, help="of each task")
    parser.add_argument("--loads", type=int, nargs="+", help="default: 1 8 32; of drafts 1 2 4 8 16 32")
    parser.add_argument("--high", type=float, default=0.9, help="threshold with one request")
    parser.add_argument("--low", type=float, default=0.5, help="threshold with the most")
    parser.add_argument("--drafts", type=int, default=8, help="states of a block that a forward computes at most")
    parser.add_argument("--bounds", type=int, nargs=2, default=(32, 256), help="low and high of load_aware, in rows")
    parser.add_argument("--knee", type=int, default=256, help="rows up to which a forward takes one unit")
    add_engine_arguments(parser)
    args = parser.parse_args()
    source = find_source(args.model)
    lines = COMPARISONS[args.what](args, source)
    if args.json:
        about = environment(dtype=args.dtype)
        write_lines(args.json, [line | about for line in lines])


if __name__ == "__main__":
    main()
