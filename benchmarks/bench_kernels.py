"""How fast is every kernel op, and is it right? Needs PyTorch and Triton only.

Each case is checked against the readable twin in ``csrc_triton.reference``, then timed beside it. On a GPU the Triton
kernels run; without one the CPU path. ``python benchmarks/bench_kernels.py --json results.jsonl``
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # works from a checkout that is not installed
import csrc_triton
from csrc_triton import Blocks, Proposals, Rule, Rules, reference

# fp32 against the fp64 twin: exp(x) as 2 ** (x log2 e), and a sum that loses part of what is small beside the likely
# token: up to 1.07e-5 at a vocabulary of 126464
PROBABILITY_RTOL = 2e-5
CPU_SECONDS_PER_CASE = 0.5
MAX_TWIN_ELEMENTS = 32 * 126464  # the twin keeps fp64 copies of the logits
MASK_TOKEN_ID = 5
PARAMETERS = {
    Rule.THRESHOLD: 0.9,
    Rule.TOP_K: 3.0,
    Rule.FACTOR: 1.0,
    Rule.JOINT_BOUND: 0.75,
    Rule.ENTROPY_BOUND: 0.01,
}

Timing = tuple[float, float, float]  # median, 20th and 80th percentile, in microseconds


def time_us(call: Callable[[], object], device: str) -> Timing:
    if device == "cuda":
        import triton.testing

        median, p20, p80 = triton.testing.do_bench(call, quantiles=[0.5, 0.2, 0.8])
        return 1e3 * median, 1e3 * p20, 1e3 * p80
    call()
    samples: list[float] = []
    begin = time.perf_counter()
    while len(samples) < 5 or time.perf_counter() - begin < CPU_SECONDS_PER_CASE:
        start = time.perf_counter()
        call()
        samples.append(1e6 * (time.perf_counter() - start))
    fifths = statistics.quantiles(samples, n=5)
    return statistics.median(samples), fifths[0], fifths[3]


def bench_confidence(device: str, sizes: list[tuple[int, int]], dtypes: list[torch.dtype]) -> Iterator[dict]:
    for num_rows, vocabulary in sizes:
        for dtype in dtypes:
            for case in ("greedy", "sampled", "entropy"):
                sampled = case == "sampled"
                torch.manual_seed(0)
                logits = (3 * torch.randn(num_rows, vocabulary, device=device)).to(dtype)
                logits[:, 7] += 20  # one likely token, as in a trained model
                options: dict = {"excluded_token_id": MASK_TOKEN_ID}
                if sampled:
                    options["temperature"] = torch.full((num_rows,), 0.7, device=device)
                    options["noise_key"] = torch.arange(num_rows, device=device)
                row_options = ["temperature", "noise_key"] if sampled else []
                if case == "entropy":
                    options["by_entropy"] = torch.ones(num_rows, dtype=torch.bool, device=device)
                    row_options = ["by_entropy"]
                token, probability = csrc_triton.confidence(logits, **options)
                checked = min(num_rows, max(1, MAX_TWIN_ELEMENTS // vocabulary))
                some = options | {name: options[name][:checked] for name in row_options}
                expected_token, expected = reference.confidence(logits[:checked], **some)
                same = token[:checked] == expected_token
                # logarithms differ in the last bit between devices, so a sampled near-tie may fall the other way
                assert same.float().mean().item() >= (0.99 if sampled else 1.0), "tokens differ from the twin's"
                torch.testing.assert_close(probability[:checked][same], expected[same], rtol=PROBABILITY_RTOL, atol=0)
                record: dict = {"op": "confidence", "shape": f"M {num_rows}, V {vocabulary}", "dtype": str(dtype)[6:]}
                record["case"] = case
                record["op_us"] = time_us(lambda: csrc_triton.confidence(logits, **options), device)  # noqa: B023
                if checked == num_rows:
                    record["twin_us"] = time_us(lambda: reference.confidence(logits, **options), device)  # noqa: B023
                yield record


def bench_unmask(device: str, sizes: list[tuple[int, int]]) -> Iterator[dict]:
    for num_blocks, block_length in sizes:
        for case in (*(rule.name.lower() for rule in Rule), "mixed"):
            torch.manual_seed(0)
            shape = (num_blocks, block_length)
            rules = [r for r in Rule if case in (r.name.lower(), "mixed")]
            rule = torch.tensor(rules, dtype=torch.int8)[torch.arange(num_blocks) % len(rules)]
            masked = torch.rand(shape) < 0.7
            position = masked.flatten().nonzero().flatten()
            blocks = Blocks(
                cells=torch.randint(0, 1000, (masked.numel(),), dtype=torch.int32),
                masked=masked,
                slots=torch.arange(num_blocks),
                canvas_index=torch.arange(masked.numel()).view(shape),
                end_token_ids=torch.full((num_blocks, 8), 2),
                num_output_positions=torch.full((num_blocks,), block_length, dtype=torch.int32),
            )
            proposals = Proposals(position, torch.randint(0, 1000, position.shape), torch.rand(position.shape))
            parameter = torch.tensor([PARAMETERS[Rule(r)] for r in rule.tolist()])
            decisions = Rules(rule, parameter, torch.zeros(num_blocks, dtype=torch.int32))
            groups = (blocks, proposals, decisions)
            arguments = [some._make(tensor.to(device) for tensor in some) for some in groups]
            arguments_of_twin = [some._make(tensor.clone() for tensor in some) for some in arguments]
            own, fresh = arguments[0], arguments[0].masked.clone()
            canvas, grid, result = csrc_triton.unmask(*arguments)
            expected_canvas, expected_grid, expected = reference.unmask(*arguments_of_twin)
            for name, count in result._asdict().items():
                assert torch.equal(count, getattr(expected, name)), f"{name} differs from the twin's"
            assert torch.equal(canvas, expected_canvas), "canvas differs from the twin's"
            assert torch.equal(grid, expected_grid), "confidence differs from the twin's"
            assert torch.equal(own.cells, arguments_of_twin[0].cells), "cells differ from the twin's"
            assert torch.equal(own.masked, arguments_of_twin[0].masked), "masked differs from the twin's"

            def run(op: Callable[..., object]) -> None:
                own.masked.copy_(fresh)  # noqa: B023
                op(*arguments)  # noqa: B023

            yield {
                "op": "unmask",
                "shape": f"R {num_blocks}, B {block_length}",
                "dtype": "int32",
                "case": case,
                "op_us": time_us(lambda: run(csrc_triton.unmask), device),
                "twin_us": time_us(lambda: run(reference.unmask), device),
            }


def environment(device: str) -> dict:
    return {
        "torch": torch.__version__,
        "triton": metadata.version("triton"),
        "device": torch.cuda.get_device_name() if device == "cuda" else f"cpu ({platform.machine()})",
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="append one JSON line per case")
    parser.add_argument("--threads", type=int, default=1, help="PyTorch threads of the CPU path (default 1)")
    parser.add_argument("--max-rows", type=int, default=1024, help="skip confidence cases with more rows")
    parser.add_argument("--op", choices=["confidence", "unmask"], help="only this op")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    header = environment(device)
    print(", ".join(f"{name} {value}" for name, value in header.items()))
    print(f"{'op':10} {'shape':16} {'dtype':9} {'case':13} {'median us':>10} {'p20':>10} {'p80':>10} {'twin us':>11}")

    sizes = [(m, v) for v in (32000, 126464) for m in (1, 32, 256, 1024) if m <= arguments.max_rows]
    dtypes = [torch.float32, torch.bfloat16]
    records: list[Iterator[dict]] = []
    if arguments.op != "unmask":
        records.append(bench_confidence(device, sizes, dtypes))
    if arguments.op != "confidence":
        records.append(bench_unmask(device, [(r, 32) for r in (1, 32, 256)]))
    for record in (record for group in records for record in group):
        times = " ".join(f"{value:10.1f}" for value in record["op_us"])
        twin = f"{record['twin_us'][0]:11.1f}" if "twin_us" in record else f"{'-':>11}"
        print(
            f"{record['op']:10} {record['shape']:16} {record['dtype']:9} {record['case']:13} {times} {twin}", flush=True
        )
        if arguments.json:
            with arguments.json.open("a") as file:
                file.write(json.dumps(header | record) + "\n")


if __name__ == "__main__":
    main()
