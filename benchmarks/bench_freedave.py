"""How many forward passes FreeDave saves, and whether its tokens are those of the decoder that it drafts.

Decodes held-out problems of every task of a model with a base decoder, and with ``freedave`` over it, by number of
drafts. Counts the answers whose tokens are all the same.

    python benchmarks/bench_freedave.py --model llada-mini --prompts 200 --json results.jsonl

- ``fixed_steps``: one position a step, and two (``--steps``, denoising steps of a block). All answers must be the same.
- ``static_threshold`` (``--threshold``): FreeDave++, which may take another path.
- A forward pass over all drafts counts as one, so this says nothing of seconds.
"""

import argparse
from typing import Any

from common import environment, write_lines
from decoding import Bench, add_engine_arguments, wilson
from problems import find_source

from vllm_osdt.engine.statistics import num_forwards

SEED = 11


def main() -> None:
    """Measure, print, and write lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_engine_arguments(parser)
    parser.add_argument("--model", default="llada-mini", help="see problems.find_source")
    parser.add_argument("--prompts", type=int, default=200, help="of each task")
    parser.add_argument("--threshold", type=float, default=0.9, help="static threshold")
    parser.add_argument("--steps", type=int, nargs="*", help="denoising steps of a block; default: one token a step")
    parser.add_argument("--drafts", type=int, nargs="*", default=[2, 4, 8], help="states of a block in one forward")
    parser.add_argument("--only", choices=("steps", "threshold"), help="one kind of base decoder; default: both")
    args = parser.parse_args()
    source = find_source(args.model)
    bench = Bench(args, source.path, source.gen_length)
    bases: list[tuple[str, dict[str, Any], dict[str, Any]]] = [("one position a step", {"policy": "fixed_steps"}, {})]
    bases += [(f"{n} steps a block", {"policy": "fixed_steps", "steps_per_block": n}, {}) for n in args.steps or ()]
    threshold = {"threshold": args.threshold}
    bases.append(
        (f"threshold {args.threshold:g}", {"policy": "static_threshold", **threshold}, {"freedave_base": "threshold"})
    )
    if args.only:
        bases = [one for one in bases if (one[1]["policy"] == "static_threshold") == (args.only == "threshold")]
    print("| task | base | drafts | NFE | same tokens | right |\n| --- | --- | --- | --- | --- | --- |")
    for task, draw in source.tasks.items():
        problems, lines = draw(args.prompts, SEED), []
        for name, base, own in bases:
            reference: list[list[int]] = []
            for drafts in (0, *args.drafts):
                options = {**base, **own, "policy": "freedave", "freedave_drafts": drafts} if drafts else base
                completions = bench.generate(problems, [options] * len(problems))
                tokens = [list(one.token_ids) for one in completions]
                reference = reference or tokens
                same = sum(one == other for one, other in zip(tokens, reference, strict=True))
                nfe = sum(map(num_forwards, completions)) / len(problems)
                right = sum(problem.is_right(one.text) for problem, one in zip(problems, completions, strict=True))
                number = drafts or "none"
                cells = f"{nfe:.1f} | {same} of {len(problems)} | {right} of {len(problems)}"
                print(f"| {task} | {name} | {number} | {cells} |", flush=True)
                lines.append(
                    {
                        **environment(dtype=args.dtype, model=source.label, benchmark="freedave"),
                        "task": task,
                        "prompts": len(problems),
                        "policy": options,
                        "cache_mode": args.cache or "default",
                        "drafts": drafts,
                        "nfe": nfe,
                        "same_tokens": same,
                        "accuracy": right / len(problems),
                        "interval": list(wilson(right, len(problems))),
                    }
                )
        if args.json:
            write_lines(args.json, lines)


if __name__ == "__main__":
    main()
