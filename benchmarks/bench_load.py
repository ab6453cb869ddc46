"""Whether a threshold that falls with the batch's load would pay: throughput, latency and accuracy by load.

SmartSpec (arXiv 2406.14066) lets a server speculate less the more requests it has, since rejected drafts waste compute
that others need. The like of it here is a static threshold that falls from ``--high`` with one request to ``--low``
with the most, in a line. Under a constant load that is one constant threshold, so that it needs no code of the engine:
this decodes with constant thresholds, so many requests at a time, one of which begins when another ends.

    python benchmarks/bench_load.py --problems 48

Seconds are those of the process on its processors, so that other work beside matters less; use one thread.
"""

import argparse
import time
from typing import Any

from common import environment, write_lines
from decoding import Bench, add_engine_arguments, mcnemar, wilson
from problems import Problem, find_source

from vllm_osdt.engine.statistics import num_forwards


def decode(bench: Bench, problems: list[Problem], load: int, threshold: float) -> dict[str, Any]:
    """Decode problems, ``load`` at a time."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine, waiting, begun, latencies = bench.llm.llm_engine, list(enumerate(problems)), {}, []
    right, nfe, num_tokens = [False] * len(problems), 0, 0
    params = SamplingParams(
        temperature=0.0,
        max_tokens=bench.gen_length,
        output_kind=RequestOutputKind.FINAL_ONLY,
        extra_args={"osdt_policy": "static_threshold", "osdt_threshold": threshold},
    )
    start = time.process_time()
    while waiting or begun:
        while waiting and len(begun) < load:
            index, problem = waiting.pop(0)
            begun[str(index)] = time.process_time()
            engine.add_request(str(index), problem.prompt, params.clone())
        for output in engine.step():
            if output.finished:
                latencies.append(time.process_time() - begun.pop(output.request_id))
                index, completion = int(output.request_id), output.outputs[0]
                right[index] = problems[index].is_right(completion.text)
                nfe += num_forwards(completion)
                num_tokens += len(completion.token_ids)
    seconds = time.process_time() - start
    return {
        "load": load,
        "threshold": threshold,
        "right": right,
        "nfe": nfe / len(problems),
        "tokens_per_second": num_tokens / seconds,
        "requests_per_second": len(problems) / seconds,
        "latency_ms": 1e3 * sorted(latencies)[len(latencies) // 2],
    }


def main() -> None:
    """Print a table, and append JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llada-mini", help="a bundled model, a rung of the ladder, or weak")
    parser.add_argument("--tasks", nargs="*", help="default: all")
    parser.add_argument("--problems", type=int, default=64, help="of each task")
    parser.add_argument("--loads", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--high", type=float, default=0.9)
    parser.add_argument("--low", type=float, default=0.5)
    add_engine_arguments(parser)
    args = parser.parse_args()
    source = find_source(args.model)
    bench = Bench(args, source.path, source.gen_length)
    lines = []
    for task in args.tasks or source.tasks:
        problems = source.tasks[task](args.problems, 77)
        decode(bench, problems[:4], max(args.loads), args.high)
        print(task)
        print(f"{'at once':>8}{'threshold':>11}{'right':>8}{'95 %':>10}{'p':>7}{'NFE':>7}{'req/s':>8}{'median':>10}")
        for load in args.loads:
            share = (load - min(args.loads)) / max(max(args.loads) - min(args.loads), 1)
            thresholds = {args.high, args.low, round(args.high - share * (args.high - args.low), 3)}
            outcomes = [decode(bench, problems, load, threshold) for threshold in sorted(thresholds, reverse=True)]
            for one in outcomes:
                low, high = wilson(sum(one["right"]), len(problems))
                p = mcnemar(one["right"], outcomes[0]["right"])
                print(
                    f"{load:>8}{one['threshold']:>11g}{sum(one['right']) / len(problems):>8.1%}"
                    f"{f'{low:.0%}-{high:.0%}':>10}{p:>7.3f}{one['nfe']:>7.2f}{one['requests_per_second']:>8.2f}"
                    f"{one['latency_ms']:>7.0f} ms",
                    flush=True,
                )
                lines.append(
                    {"bench": "load", "model": source.label, "task": task, **one, **environment(dtype=args.dtype)}
                )
    if args.json:
        write_lines(args.json, lines)


if __name__ == "__main__":
    main()
