"""What leaving layers out costs: whole layers at every step, or feed-forward networks between refreshes.

Source: layer skipping in native diffusion models (arXiv 2603.07475: a fixed set of layers, at every step, for all
requests) and FFN-SkipLLM (arXiv 2404.03865: feed-forward networks of some steps). Nothing of the plugin skips layers;
this patches a loaded model from outside. Prints, for every layer, accuracy, forwards and tokens per second of the tasks
together, with the static threshold and with nothing else changed.

    python benchmarks/bench_skipping.py --model llada-mini --model sdar-mini --problems 100

``layer`` skips attention and feed-forward network. ``ffn`` skips the latter in steps that are no refresh and no
prefill, which are told apart by their number of rows; requests then run one at a time.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from common import environment, write_lines
from decoding import Bench, add_engine_arguments, mcnemar, wilson
from problems import find_source

STATIC = {"policy": "static_threshold", "threshold": 0.9}


def layers_of(bench: Bench) -> Any:
    """The decoder layers of the loaded model."""
    return bench.llm.llm_engine.model_executor.driver_worker.worker.model_runner.model.model.layers


@contextmanager
def skipped(layer: Any, kind: str, block_length: int) -> Iterator[None]:
    """A layer without some of its parts, whose outputs are added to what comes in."""
    parts = [layer.self_attn, layer.mlp] if kind == "layer" else [layer.mlp]
    own = [part.forward for part in parts]

    def without(forward: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> torch.Tensor:
            given = (*args, *kwargs.values())  # positions are integers
            hidden = next(one for one in given if isinstance(one, torch.Tensor) and one.is_floating_point())
            if kind == "ffn" and hidden.shape[0] > block_length:
                return forward(*args, **kwargs)
            return torch.zeros_like(hidden)

        return run

    for part, forward in zip(parts, own, strict=True):
        part.forward = without(forward)
    try:
        yield
    finally:
        for part in parts:
            del part.forward


def measure(bench: Bench, tasks: dict[str, Any], problems: int, seed: int) -> tuple[list[bool], int, float]:
    """Answers, forwards and seconds of all tasks together."""
    right: list[bool] = []
    forwards, seconds = 0, 0.0
    for draw in tasks.values():
        found, nfe, _, took = bench.decode(draw(problems, seed), **STATIC)
        right += found
        forwards, seconds = forwards + sum(nfe), seconds + took
    return right, forwards, seconds


def main() -> None:
    """Parse arguments, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help="a bundled model or a folder (default: llada-mini)")
    parser.add_argument("--problems", type=int, default=100, help="per task")
    parser.add_argument("--seed", type=int, default=0)
    add_engine_arguments(parser)
    args = parser.parse_args()
    args.concurrency = 1
    lines = []
    for model in args.model or ["llada-mini"]:
        source = find_source(model)
        bench = Bench(args, source.path, source.gen_length)
        record = environment(dtype=args.dtype, model=source.label, batch=1)
        lines.append({"bench": "skipping_run", **record})
        layers = layers_of(bench)
        block_length = bench.llm.llm_engine.vllm_config.model_config.hf_config.traits.block_length
        measure(bench, source.tasks, 2, args.seed)  # warm
        base, base_nfe, base_s = measure(bench, source.tasks, args.problems, args.seed)
        print(f"\n{source.label} {record}\n{'':<12}{'right':>8} {'95 %':>9}{'p':>8}{'forwards':>10}{'seconds':>9}")
        for kind in ("none", "layer", "ffn"):
            for index, layer in enumerate(layers if kind != "none" else layers[:1]):
                if kind == "none":
                    right, nfe, seconds = base, base_nfe, base_s
                else:
                    with skipped(layer, kind, block_length):
                        right, nfe, seconds = measure(bench, source.tasks, args.problems, args.seed)
                low, high = wilson(sum(right), len(right))
                p = mcnemar(right, base)
                name = "all layers" if kind == "none" else f"no {kind} {index}"
                print(
                    f"{name:<12}{sum(right) / len(right):>8.1%} {f'{low:.0%}-{high:.0%}':>9}{p:>8.3f}"
                    f"{nfe / base_nfe:>10.2f}{seconds / base_s:>9.2f}",
                    flush=True,
                )
                values = {"right": sum(right), "asked": len(right), "p": p, "nfe": nfe, "seconds": seconds}
                lines.append({"bench": "skipping", "model": source.label, "name": name, **values})
        del bench
    if args.json:
        write_lines(args.json, lines)


if __name__ == "__main__":
    main()
