"""How fast are the matrix products of a model's layers on this CPU, with vLLM's own linear kernel?

The bound for everything else: at high concurrency an engine cannot be faster than its products.

    OMP_NUM_THREADS=1 python benchmarks/bench_matmul.py --model CHECKOUT --rows 32 256 1024
"""

import argparse
import json
import time
from pathlib import Path

import torch
import vllm._C  # noqa: F401  registers the operators
from common import environment, percentiles, write_lines
from vllm import _custom_ops as ops


def rate(rows: int, inner: int, outer: int, dtype: torch.dtype, repetitions: int) -> float:
    """GFLOP/s of ``[rows, inner] @ [inner, outer]``, median."""
    weight = torch.randn(outer, inner, dtype=dtype)
    handler = ops.create_onednn_mm(weight.t(), 32)
    inputs = torch.randn(rows, inner, dtype=dtype)
    seconds = []
    for _ in range(repetitions + 3):
        start = time.perf_counter()
        ops.onednn_mm(handler, inputs, None)
        seconds.append(time.perf_counter() - start)
    return 2 * rows * inner * outer / percentiles(seconds[3:])[1] / 1e9


def main() -> None:
    """Parse arguments, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="LLaDA checkpoint folder; default: the bundled llada-mini")
    parser.add_argument("--rows", type=int, nargs="+", default=[32, 256, 1024])
    parser.add_argument("--repetitions", type=int, default=100)
    parser.add_argument("--json", help="append JSON lines to this file")
    args = parser.parse_args()
    if args.model is None:
        from vllm_osdt.mini import model_path

        args.model = model_path("llada-mini")
    config = json.loads((Path(args.model) / "config.json").read_text())
    width, hidden = config["d_model"], config["mlp_hidden_size"]
    record = environment(threads=torch.get_num_threads())
    print(record)
    print(f"{'rows':>6}{'product':>16}{'float32':>10}{'bfloat16':>10}  GFLOP/s")
    lines = []
    for rows in args.rows:
        for inner, outer in ((width, 3 * width), (width, width), (width, 2 * hidden), (hidden, width)):
            rates = {
                name: rate(rows, inner, outer, getattr(torch, name), args.repetitions)
                for name in ("float32", "bfloat16")
            }
            print(f"{rows:>6}{f'{inner} x {outer}':>16}{rates['float32']:>10.0f}{rates['bfloat16']:>10.0f}")
            lines.append({**record, "bench": "matmul", "rows": rows, "inner": inner, "outer": outer, **rates})
    if args.json:
        write_lines(args.json, lines)


if __name__ == "__main__":
    main()
