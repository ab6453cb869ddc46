"""What a draft saves and costs: forward passes and right answers, by how many of its tokens are wrong.

Decodes held-out problems of every task of a model without a draft, then with drafts: the model's own answers with a
share of their tokens replaced, the answer of another problem of the task, and n-grams of prompt and output.

    python benchmarks/bench_drafts.py --model llada-mini --prompts 50 --json results.jsonl

- Replaced tokens are drawn from the tokens of the task's answers.
- A draft without an error is what a server would have that answers a request again; its answer is right as often as
  without a draft. Answers of other problems have the right form and wrong content.
- p is the exact two-sided McNemar p-value that the answers are as often right as without a draft.
"""

import argparse
import random
from typing import Any

from common import environment, write_lines
from decoding import Bench, add_engine_arguments, mcnemar, wilson
from problems import Problem, find_source

from vllm_osdt.engine.statistics import num_forwards

SHARES = (0.0, 0.1, 0.3, 1.0)
THRESHOLDS = (0.1, 0.3, 0.5)
SEED = 11


def corrupt(answers: list[list[int]], share: float, seed: int) -> list[list[int]]:
    """Answers with a share of their tokens replaced by others of the same task."""
    rng = random.Random(seed)
    pool = sorted({token for answer in answers for token in answer})
    return [[rng.choice(pool) if rng.random() < share else token for token in answer] for answer in answers]


def measure(
    bench: Bench, problems: list[Problem], options: list[dict[str, Any]]
) -> tuple[list[bool], float, list[Any]]:
    """Right or not by problem, forwards a problem, and the completions."""
    completions = bench.generate(problems, options)
    right = [problem.is_right(one.text) for problem, one in zip(problems, completions, strict=True)]
    nfe = sum(map(num_forwards, completions)) / len(problems)
    return right, nfe, completions


def main() -> None:
    """Measure, print, and write lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_engine_arguments(parser)
    parser.add_argument("--model", default="llada-mini", help="see problems.find_source")
    parser.add_argument("--prompts", type=int, default=50, help="of each task")
    parser.add_argument("--threshold", type=float, default=0.9, help="static threshold")
    args = parser.parse_args()
    source = find_source(args.model)
    bench = Bench(args, source.path, source.gen_length)
    base = {"policy": "static_threshold", "threshold": args.threshold}
    lines = []
    print("| task | draft | draft_threshold | NFE | right | p |\n| --- | --- | --- | --- | --- | --- |")
    for task, draw in source.tasks.items():
        problems = draw(args.prompts, SEED)
        reference, nfe, completions = measure(bench, problems, [base] * len(problems))
        answers = [list(one.token_ids) for one in completions]
        others = answers[1:] + answers[:1]
        found: list[tuple[str, float | None, list[bool], float]] = [("none", None, reference, nfe)]
        for threshold in THRESHOLDS:
            kinds = {f"{share:.0%} wrong": corrupt(answers, share, SEED) for share in SHARES}
            for name, drafts in {**kinds, "another problem's": others}.items():
                options = [{**base, "draft": draft, "draft_threshold": threshold} for draft in drafts]
                found.append((name, threshold, *measure(bench, problems, options)[:2]))
        for n in (2, 3):
            options = [{**base, "draft_ngram": n}] * len(problems)
            found.append((f"{n}-grams", 0.3, *measure(bench, problems, options)[:2]))
        for name, threshold_of, right, nfe in found:
            p = mcnemar(reference, right)
            words = "" if threshold_of is None else f"{threshold_of:g}"
            print(f"| {task} | {name} | {words} | {nfe:.1f} | {sum(right)} of {len(right)} | {p:.2f} |", flush=True)
            low, high = wilson(sum(right), len(right))
            lines.append(
                {
                    **environment(dtype=args.dtype, model=source.label, benchmark="drafts"),
                    "task": task,
                    "prompts": len(problems),
                    "policy": base,
                    "cache_mode": args.cache or "default",
                    "draft": name,
                    "draft_threshold": threshold_of,
                    "nfe": nfe,
                    "accuracy": sum(right) / len(right),
                    "interval": [low, high],
                    "p": p,
                }
            )
    if args.json:
        write_lines(args.json, lines)


if __name__ == "__main__":
    main()
