"""The Triton kernels against their readable twins, and how fast they are."""

import functools
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.lines import median_us, part
from benchmarks.gpu.sizes import SIZES


def check_kernels(stage: str) -> None:
    """Both Triton kernels against their readable twins, with their share of the bandwidth of a copy."""
    import torch

    import csrc_triton
    from csrc_triton import reference

    for vocabulary in SIZES.vocabularies:
        # In float16 nothing else is compiled but how logits are read: once is enough.
        in_half = (torch.float16,) if vocabulary == SIZES.vocabularies[0] else ()
        for dtype in (torch.float32, torch.bfloat16, *in_half):
            for case in ("greedy", "sampled", "entropy", "sampled, entropy", "margin", "sampled, entropy, margin"):
                what = {"vocabulary": vocabulary, "dtype": str(dtype)[6:], "case": case}
                with part(stage, "confidence", **what) as found:
                    for num_rows in SIZES.rows if case in ("greedy", "margin") else SIZES.rows[1:2]:
                        logits, options = _logits(num_rows, vocabulary, dtype, case)
                        start = time.perf_counter()
                        token, probability = csrc_triton.confidence(logits, **options)
                        torch.cuda.synchronize()
                        found.setdefault("first_call_s", round(time.perf_counter() - start, 2))
                        head = slice(min(num_rows, 32))  # the twin keeps fp64 copies of the logits
                        few = {name: v[head].clone() if torch.is_tensor(v) else v for name, v in options.items()}
                        expected, expected_probability = reference.confidence(logits[head], **few)
                        if "margin" in few:
                            assert torch.equal(options["margin"][head], few["margin"]), "margins differ from the twin's"
                        same = token[head] == expected
                        # Logarithms differ in the last bit: a sampled near-tie may fall the other way.
                        share = same.float().mean().item()
                        assert share >= (0.9 if "sampled" in case else 1.0), f"{share:.1%} of the twin's tokens"
                        both = (probability[head][same], expected_probability[same])
                        torch.testing.assert_close(*both, rtol=2e-5, atol=1e-30)
                        if (us := median_us(lambda: csrc_triton.confidence(logits, **options))) is not None:  # noqa: B023
                            copy_us = median_us(logits.clone)
                            num_bytes = logits.numel() * logits.element_size()
                            found[f"rows_{num_rows}"] = {
                                "us": us,
                                "GB_per_s": round(num_bytes / us / 1e3),
                                "copy_GB_per_s": round(2 * num_bytes / copy_us / 1e3) if copy_us else None,
                            }
    for num_blocks, block_length in SIZES.blocks:
        with part(stage, "unmask", num_blocks=num_blocks, block_length=block_length) as found:
            arguments = _decisions(num_blocks, block_length)
            on_device = [some._make(tensor.to("cuda") for tensor in some) for some in arguments]
            blocks, masked = on_device[0], on_device[0].masked.clone()
            start = time.perf_counter()
            canvas, _, result = csrc_triton.unmask(*on_device)
            torch.cuda.synchronize()
            found["first_call_s"] = round(time.perf_counter() - start, 2)
            expected_canvas, _, expected = reference.unmask(*arguments)
            for name, count in result._asdict().items():
                assert torch.equal(count.cpu(), getattr(expected, name)), f"{name} differs from the twin's"
            assert torch.equal(canvas.cpu(), expected_canvas), "tokens differ from the twin's"
            assert torch.equal(blocks.masked.cpu(), arguments[0].masked), "masks differ from the twin's"

            def run() -> None:
                blocks.masked.copy_(masked)  # noqa: B023
                csrc_triton.unmask(*on_device)  # noqa: B023

            found["us_with_copy"] = median_us(run)
            found["copy_us"] = median_us(functools.partial(blocks.masked.copy_, masked))


def _logits(num_rows: int, vocabulary: int, dtype: Any, case: str) -> tuple[Any, dict[str, Any]]:
    """Logits ``[num_rows, vocabulary]`` with one likely token, as of a trained model, and options of the op."""
    import torch

    torch.manual_seed(0)
    logits = (3 * torch.randn(num_rows, vocabulary, device="cuda")).to(dtype)
    logits[:, 7] += 20
    options: dict[str, Any] = {"excluded_token_id": 5}
    if "sampled" in case:
        options["temperature"] = torch.full((num_rows,), 0.7, device="cuda")
        options["noise_key"] = torch.arange(num_rows, device="cuda")
    if "entropy" in case:
        options["by_entropy"] = torch.ones(num_rows, dtype=torch.bool, device="cuda")
    if "margin" in case:
        options["margin"] = torch.empty(num_rows, device="cuda")
    return logits, options


def _decisions(num_blocks: int, block_length: int) -> list[Any]:
    """Arguments of ``unmask`` on the host: blocks one after the other in the tables, every rule in turn."""
    import torch

    from csrc_triton import Blocks, Proposals, Rule, Rules

    parameters = {Rule.THRESHOLD: 0.9, Rule.TOP_K: 3.0, Rule.FACTOR: 1.0, Rule.JOINT_BOUND: 0.75}
    parameters[Rule.ENTROPY_BOUND] = 0.01
    torch.manual_seed(0)
    number = num_blocks * block_length
    rule = [list(Rule)[index % len(Rule)] for index in range(num_blocks)]
    blocks = Blocks(
        cells=torch.randint(0, 1000, (number,), dtype=torch.int32),
        masked=torch.rand(num_blocks, block_length) < 0.7,
        slots=torch.arange(num_blocks),
        canvas_index=torch.arange(number).view(num_blocks, block_length),
        end_token_ids=torch.full((num_blocks, 8), 2),
        num_output_positions=torch.full((num_blocks,), block_length, dtype=torch.int32),
    )
    proposals = Proposals(torch.arange(number), torch.randint(0, 1000, (number,)), torch.rand(number))
    min_unmask = torch.zeros(num_blocks, dtype=torch.int32)
    rules = Rules(torch.tensor(rule, dtype=torch.int8), torch.tensor([parameters[one] for one in rule]), min_unmask)
    return [blocks, proposals, rules]


def check_kernel_tests(stage: str) -> None:
    """The tests of the kernels, which use a GPU where there is one."""
    import csrc_triton

    root = Path(csrc_triton.__file__).parent.parent
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels"]
    with part(stage, "pytest tests/kernels") as found:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True)
        found["tail"] = (done.stdout + done.stderr)[-400:]
        assert done.returncode == 0, f"status {done.returncode}"
