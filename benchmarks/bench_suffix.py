"""Does it pay to leave out the masks far behind the active block? Streaming-dLLM's suffix window, in a plain loop.

Source: Streaming-dLLM (arXiv 2601.17917), suffix pruning; ``generate_with_prefix_cache`` of the authors' code
(xiaoshideta/Streaming-dLLM, c4320c2): of the masks behind the active block, those of a window take part, and the last
one of the canvas, at its own place. Here the window is counted in blocks. Decodes held-out problems one by one with the
static threshold, greedily, and prints right answers, forward passes (NFE) and computed rows of a problem.

    python benchmarks/bench_suffix.py --model llada-mini --model text-mini --json results.jsonl

- ``all``: all masks of the canvas, as Fast-dLLM has it. This package serves a longer limit with the usual canvas, which
  grows by a block once it is full; these answers fit the usual one.
- ``w``: the next w blocks. ``w + last``: and the last position.
- p is the exact two-sided McNemar p-value that the answers are as often right as with ``all`` of the usual length.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import REPOSITORY, environment, write_lines
from decoding import mcnemar
from problems import find_source

sys.path.insert(0, str(REPOSITORY))
from tests.reference.llada import KV, ReferenceLLaDA

SEED = 11


@dataclass(frozen=True)
class Suffix:
    """Which masks behind the active block take part.

    Attributes:
        name: For the table.
        window: Blocks; None for all.
        has_last: Whether the last position of the canvas does, too.
    """

    name: str
    window: int | None = None
    has_last: bool = False


def suffixes(gen_length: int, block_length: int) -> Iterator[Suffix]:
    """Those that differ in a canvas of this length."""
    yield Suffix("all")
    for window in (0, 1, 2, 4):
        if (window + 1) * block_length < gen_length:
            yield Suffix(str(window), window)
            yield Suffix(f"{window} + last", window, has_last=True)


def decode(
    model: ReferenceLLaDA, prompt: list[int], suffix: Suffix, *, gen_length: int, block_length: int, cache: str,
    threshold: float, end_token_id: int,
) -> tuple[list[int], int, int]:  # fmt: skip
    """Tokens before the end of the answer, forward passes, and rows of one request."""
    start = len(prompt)
    end = start + gen_length
    ids = torch.tensor(prompt + [model.mask_token_id] * gen_length)
    forwards = rows = 0
    for first in range(start, end, block_length):
        last = first + block_length
        seen = end if suffix.window is None else min(end, last + suffix.window * block_length)
        place = torch.arange(seen)
        if suffix.has_last and seen < end:
            place = torch.cat([place, torch.tensor([end - 1])])
        kept: KV = []
        while (ids[first:last] == model.mask_token_id).any():
            if not kept:
                logits, kept = model.forward(ids[place], place)
                logits, computed = logits[first:last], place.numel()
            else:
                own = place[first:last] if cache == "dual" else place[first:]
                behind = last if cache == "dual" else place.numel()
                rest = [tuple(torch.cat([one[:first], one[behind:]]) for one in pair) for pair in kept]
                logits, _ = model.forward(ids[own], own, rest)
                logits, computed = logits[:block_length], own.numel()
            forwards, rows = forwards + 1, rows + computed
            share = logits.double().softmax(dim=-1)
            logits[:, model.mask_token_id] = -torch.inf
            token = logits.argmax(dim=-1)
            is_open = ids[first:last] == model.mask_token_id
            confidence = share.gather(1, token[:, None])[:, 0].masked_fill(~is_open, -1.0)
            chosen = is_open & (confidence >= threshold)
            chosen[confidence.argmax()] = True
            ids[first:last] = torch.where(chosen, token, ids[first:last])
            block = ids[first:last].tolist()
            if end_token_id in block and model.mask_token_id not in block[: block.index(end_token_id)]:
                return ids[start:last].tolist()[: first - start + block.index(end_token_id)], forwards, rows
    return ids[start:].tolist(), forwards, rows


def main() -> None:
    """Measure, print, and write lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help="see problems.find_source (default: llada-mini)")
    parser.add_argument("--problems", type=int, default=60, help="of each task")
    parser.add_argument("--gen-length", type=int, nargs="*", default=[256], help="beside the usual length")
    parser.add_argument("--cache", nargs="+", choices=("prefix", "dual"), default=["dual", "prefix"])
    parser.add_argument("--block-length", type=int, default=32)
    parser.add_argument("--threshold", type=float, default=0.9)
    parser.add_argument("--json", type=Path, help="append JSON lines to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    from tokenizers import Tokenizer

    lines: list[dict[str, Any]] = []
    print(f"{'model':<16}{'task':<16}{'cache':<8}{'canvas':>6} {'suffix':<10}{'right':>9}{'p':>7}{'NFE':>8}{'rows':>8}")
    for name in args.model or ["llada-mini"]:
        source = find_source(name)
        model = ReferenceLLaDA.load(Path(source.path))
        tokenizer = Tokenizer.from_file(str(Path(source.path) / "tokenizer.json"))
        end_token_id = model.config["eos_token_id"]
        for task, draw in source.tasks.items():
            problems = draw(args.problems, SEED)
            prompts = [tokenizer.encode(problem.prompt).ids for problem in problems]
            for cache in args.cache:
                usual: list[bool] = []
                for gen_length in (source.gen_length, *args.gen_length):
                    for suffix in suffixes(gen_length, args.block_length):
                        found = [
                            decode(model, prompt, suffix, gen_length=gen_length, block_length=args.block_length,
                                   cache=cache, threshold=args.threshold, end_token_id=end_token_id)
                            for prompt in prompts
                        ]  # fmt: skip
                        texts = [tokenizer.decode(tokens) for tokens, *_ in found]
                        right = [problem.is_right(text) for problem, text in zip(problems, texts, strict=True)]
                        usual = usual or right
                        nfe, rows = (sum(one[which] for one in found) / len(found) for which in (1, 2))
                        p = mcnemar(usual, right)
                        print(
                            f"{source.label:<16}{task:<16}{cache:<8}{gen_length:>6} {suffix.name:<10}"
                            f"{f'{sum(right)}/{len(right)}':>9}{p:>7.3f}{nfe:>8.2f}{rows:>8.0f}",
                            flush=True,
                        )
                        about = {"cache": cache, "gen_length": gen_length, "suffix": suffix.name}
                        values = {"right": sum(right), "asked": len(right), "p": p, "nfe": nfe, "rows": rows}
                        line = {"bench": "suffix", "model": source.label, "task": task, **about, **values}
                        lines.append({**line, "threshold": args.threshold, "block_length": args.block_length})
    if args.json:
        write_lines(args.json, [{"bench": "suffix_run", **environment(dtype="float32", batch=1)}, *lines])


if __name__ == "__main__":
    main()
