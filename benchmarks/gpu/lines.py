"""How the stages report: a JSON line for each part, with its time, whether it succeeded, and the card.

Lines are appended to ``RESULTS``; tracebacks, logs and traces go to the folder ``OUT``.
"""

import contextlib
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.sizes import IS_STAND_IN

# The checkout: that of this file, unless it was installed apart from the recorded decisions.
HERE = Path(__file__).resolve().parents[2]
ROOT = HERE if (HERE / "tests" / "golden").is_dir() else Path.cwd()
OUT = Path(os.environ["OUT"]) if "OUT" in os.environ else ROOT / "build" / "gpu_check"
RESULTS = (OUT if IS_STAND_IN or "OUT" in os.environ else ROOT / "benchmarks" / "results") / "gpu.jsonl"


def emit(stage: str, what: str, **fields: Any) -> None:
    """Write a line, to the results and to standard output."""
    torch = sys.modules.get("torch")
    card = torch.cuda.get_device_name() if torch is not None and torch.cuda.is_available() else None
    line = json.dumps({"stage": stage, "what": what, "gpu": card, **fields}, default=str)
    print(line, flush=True)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(line + "\n")


@contextlib.contextmanager
def part(stage: str, what: str, **fields: Any) -> Iterator[dict[str, Any]]:
    """Time a part; what the block puts into the dictionary is on its line.

    A failure is on the line, too. The stage goes on, unless the GPU is lost.
    """
    start, found = time.perf_counter(), dict(fields)
    try:
        yield found
    except Exception as error:
        text = traceback.format_exc()
        seconds = round(time.perf_counter() - start, 2)
        emit(stage, what, ok=False, seconds=seconds, error=f"{type(error).__name__}: {str(error)[:400]}", **found)
        OUT.mkdir(parents=True, exist_ok=True)
        with (OUT / "tracebacks.txt").open("a") as file:
            file.write(f"==== {stage}: {what}\n{text}\n")
        if "CUDA error" in text or "illegal memory access" in text:
            raise SystemExit(3) from error
    else:
        emit(stage, what, ok=True, seconds=round(time.perf_counter() - start, 2), **found)


def median_us(call: Callable[[], object], rep_ms: int = 40) -> float | None:
    """Median of a call on the GPU in microseconds; None on the stand-in, which has no speed."""
    if IS_STAND_IN:
        return None
    import triton.testing

    return round(1e3 * triton.testing.do_bench(call, warmup=10, rep=rep_ms, return_mode="median"), 1)


def spread(values: Sequence[float]) -> dict[str, float]:
    """First decile, median and ninth decile, rounded."""
    if not values:
        return {}
    deciles = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else [values[0]] * 9
    return {"p10": round(deciles[0], 2), "median": round(deciles[4], 2), "p90": round(deciles[8], 2)}


def gib(num_bytes: float) -> float:
    """Bytes in GiB, rounded."""
    return round(num_bytes / 2**30, 2)
