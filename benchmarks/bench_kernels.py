"""How fast is every kernel op, how near to its floor, and is it right? Needs PyTorch and Triton only.

Each case is checked against the readable twin in ``csrc_triton.reference``, then timed beside it. On a GPU the Triton
kernels run; without one the CPU path. ``python benchmarks/bench_kernels.py --json results.jsonl``

The floor of a case is the time that its bytes or its tensor operations take at the card's rates, whichever is longer;
its share is the floor divided by the time. ``benchmarks/NOTES.md`` derives both.

On a GPU ``lm_head_confidence`` is timed beside the matrix product with ``confidence`` of its logits, over the number of
rows. The crossover is the most rows at which it is as fast.
"""

import argparse
import functools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

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

# bytes and dense 16-bit tensor operations per second, from the makers' data sheets; the first name that fits counts
RATES = {"H200": (4.8e12, 989e12), "H100 PCIe": (2.0e12, 756e12), "H100": (3.35e12, 989e12), "A100": (2.04e12, 312e12)}
LM_HEAD_ROWS = (1, 8, 32, 64, 128, 256, 512, 1024, 2048, 4096)
LM_HEAD = (126464, 4096)  # vocabulary and hidden size of LLaDA-8B
# A logit near 20 of bf16 may be its neighbor, 1/8 away, in a product that is summed in another order.
NEIGHBOR_RTOL = 0.15

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


def floor_of(device: str, num_bytes: int, num_operations: int = 0) -> dict:
    """Bytes, operations and, for a card whose rates are known, the floor in microseconds."""
    record: dict = {"bytes": num_bytes, "operations": num_operations}
    if device == "cuda":
        card = torch.cuda.get_device_name()
        for bytes_per_s, operations_per_s in (rates for name, rates in RATES.items() if name in card):
            record["floor_us"] = 1e6 * max(num_bytes / bytes_per_s, num_operations / operations_per_s)
            break
    return record


def bench_confidence(device: str, sizes: list[tuple[int, int]], dtypes: list[torch.dtype]) -> Iterator[dict]:
    for num_rows, vocabulary in sizes:
        for dtype in dtypes:
            for case in ("greedy", "sampled", "entropy", "margin"):
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
                if case == "margin":
                    options["margin"] = torch.empty(num_rows, device=device)
                    row_options = ["margin"]
                token, probability = csrc_triton.confidence(logits, **options)
                checked = min(num_rows, max(1, MAX_TWIN_ELEMENTS // vocabulary))
                some = options | {name: options[name][:checked].clone() for name in row_options}
                expected_token, expected = reference.confidence(logits[:checked], **some)
                same = token[:checked] == expected_token
                # logarithms differ in the last bit between devices, so a sampled near-tie may fall the other way
                assert same.float().mean().item() >= (0.99 if sampled else 1.0), "tokens differ from the twin's"
                if case == "margin":
                    assert torch.equal(options["margin"][:checked], some["margin"]), "margins differ from the twin's"
                torch.testing.assert_close(probability[:checked][same], expected[same], rtol=PROBABILITY_RTOL, atol=0)
                record: dict = {"op": "confidence", "shape": f"M {num_rows}, V {vocabulary}", "dtype": str(dtype)[6:]}
                record["case"] = case
                row_tensors = [token, probability, *(options[name] for name in row_options)]
                record |= floor_of(device, sum(tensor.nbytes for tensor in [logits, *row_tensors]))
                record["op_us"] = time_us(lambda: csrc_triton.confidence(logits, **options), device)  # noqa: B023
                if checked == num_rows:
                    record["twin_us"] = time_us(lambda: reference.confidence(logits, **options), device)  # noqa: B023
                yield record


def bench_lm_head(device: str, rows: Iterable[int], vocabulary: int, hidden_size: int) -> Iterator[dict]:
    torch.manual_seed(0)
    dtype = torch.bfloat16
    weight = (3 * torch.randn(vocabulary, hidden_size, device=device) / hidden_size**0.5).to(dtype)
    for num_rows in rows:
        hidden = (torch.randn(num_rows, hidden_size, device=device) + 20 / 9 * weight[7]).to(dtype)
        for case in ("greedy", "sampled"):
            options: dict = {"excluded_token_id": MASK_TOKEN_ID}
            if case == "sampled":
                options["temperature"] = torch.full((num_rows,), 0.7, device=device)
                options["noise_key"] = torch.arange(num_rows, device=device)

            def with_logits() -> tuple[torch.Tensor, torch.Tensor]:
                return csrc_triton.confidence(hidden @ weight.T, **options)  # noqa: B023

            token, probability = csrc_triton.lm_head_confidence(hidden, weight, **options)
            expected_token, expected = with_logits()
            same = token == expected_token
            assert same.float().mean().item() >= 0.9, "tokens differ from those of written logits"
            torch.testing.assert_close(probability[same], expected[same], rtol=NEIGHBOR_RTOL, atol=0)
            tensors = [hidden, weight, *(v for v in options.values() if isinstance(v, torch.Tensor)), token, expected]
            num_bytes, num_operations = sum(t.nbytes for t in tensors), 2 * num_rows * vocabulary * hidden_size
            logit_bytes = num_rows * vocabulary * weight.element_size()
            record: dict = {"op": "lm_head_confidence", "shape": f"M {num_rows}, V {vocabulary}", "dtype": "bfloat16"}
            record |= {"case": case, "num_rows": num_rows, "hidden_size": hidden_size}
            record |= floor_of(device, num_bytes, num_operations)
            product, reading = floor_of(device, num_bytes + logit_bytes, num_operations), floor_of(device, logit_bytes)
            record |= {f"with_logits_{name}": product[name] + reading[name] for name in product}
            record["op_us"] = time_us(
                lambda: csrc_triton.lm_head_confidence(hidden, weight, **options),  # noqa: B023
                device,
            )
            record["with_logits_us"] = time_us(with_logits, device)
            yield record


def crossover(records: list[dict], case: str) -> int:
    """The most rows at which ``lm_head_confidence`` is as fast as written logits, here and at fewer; 0 if at none."""
    most = 0
    for record in sorted((r for r in records if r["case"] == case), key=lambda r: r["num_rows"]):
        if record["op_us"][0] > record["with_logits_us"][0]:
            break
        most = record["num_rows"]
    return most


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
            # The twin reads position by position, which would be a wait each on a device: it stays on the host.
            arguments_of_twin = [some._make(tensor.clone() for tensor in some) for some in groups]
            fresh = masked.clone()
            canvas, grid, result = csrc_triton.unmask(*arguments)
            expected_canvas, expected_grid, expected = reference.unmask(*arguments_of_twin)
            for name, count in result._asdict().items():
                assert torch.equal(count.cpu(), getattr(expected, name)), f"{name} differs from the twin's"
            own, of_twin = arguments[0], arguments_of_twin[0]
            assert torch.equal(canvas.cpu(), expected_canvas), "canvas differs from the twin's"
            assert torch.equal(grid.cpu(), expected_grid), "confidence differs from the twin's"
            assert torch.equal(own.cells.cpu(), of_twin.cells), "cells differ from the twin's"
            assert torch.equal(own.masked.cpu(), of_twin.masked), "masked differs from the twin's"

            def run(op: Callable[..., object], arguments: list[Any], fresh: torch.Tensor) -> None:
                arguments[0].masked.copy_(fresh)
                op(*arguments)

            of_op = functools.partial(run, csrc_triton.unmask, arguments, fresh.to(device))
            of_reference = functools.partial(run, reference.unmask, arguments_of_twin, fresh)

            yield {
                "op": "unmask",
                "shape": f"R {num_blocks}, B {block_length}",
                "dtype": "int32",
                "case": case,
                "op_us": time_us(of_op, device),
                "twin_us": time_us(of_reference, "cpu"),
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
    parser.add_argument("--op", choices=["confidence", "lm_head_confidence", "unmask"], help="only this op")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    header = environment(device)
    print(", ".join(f"{name} {value}" for name, value in header.items()))
    print(
        f"{'op':18} {'shape':16} {'dtype':9} {'case':13} {'median us':>10} {'p20':>10} {'p80':>10} {'share':>6} "
        f"{'beside us':>11}"
    )

    sizes = [(m, v) for v in (32000, 126464) for m in (1, 8, 32, 256, 1024) if m <= arguments.max_rows]
    dtypes = [torch.float32, torch.bfloat16]
    records: list[Iterator[dict]] = []
    if arguments.op in (None, "confidence"):
        records.append(bench_confidence(device, sizes, dtypes))
    if arguments.op in (None, "lm_head_confidence") and device == "cuda":  # a CPU writes its logits
        records.append(bench_lm_head(device, LM_HEAD_ROWS, *LM_HEAD))
    if arguments.op in (None, "unmask"):
        records.append(bench_unmask(device, [(r, 32) for r in (1, 32, 256)]))
    of_lm_head = []
    for record in (record for group in records for record in group):
        times = " ".join(f"{value:10.1f}" for value in record["op_us"])
        if "floor_us" in record:
            record["share"] = record["floor_us"] / record["op_us"][0]
        share = f"{record['share']:6.0%}" if "share" in record else f"{'-':>6}"
        beside = record.get("with_logits_us") or record.get("twin_us")
        print(
            f"{record['op']:18} {record['shape']:16} {record['dtype']:9} {record['case']:13} {times} {share} "
            + (f"{beside[0]:11.1f}" if beside else f"{'-':>11}"),
            flush=True,
        )
        if record["op"] == "lm_head_confidence":
            of_lm_head.append(record)
        if arguments.json:
            with arguments.json.open("a") as file:
                file.write(json.dumps(header | record) + "\n")
    for case in dict.fromkeys(record["case"] for record in of_lm_head):
        print(f"lm_head_confidence, {case}: as fast as written logits up to {crossover(of_lm_head, case)} rows")


if __name__ == "__main__":
    main()
