"""What only a GPU shows, in stages: kernels, decisions, graphs, speed and memory.

    make gpu-check                                             # all stages
    python tools/gpu_check.py --only environment kernels       # some of them
    python tools/gpu_check.py --budget 560                     # stages that fit into 560 seconds
    python tools/gpu_check.py --from shape:sdar-8b             # this one and those behind it

Each stage is a process of its own with a time limit. Each part of a stage is a JSON line, with its time in seconds. A
part that fails is a line too; its traceback is kept, and the next part or stage begins. The status is 1 if one failed.

Lines are appended to ``benchmarks/results/gpu.jsonl``; tracebacks, logs and traces are in ``build/gpu_check``. Where
the environment variable ``OUT`` names a folder, all of it goes there. ``tools/gpu_report.py`` makes tables and plots of
the lines. ``--stand-in`` runs tiny sizes on the stand-in for CUDA of ``tests/cuda_stand_in``, in its environment. That
shows that the stages run, and no speed; its lines are in the other folder, too.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent  # of a copy elsewhere: the working folder is the checkout
sys.path.insert(0, str(HERE.parent if (HERE.parent / "vllm_osdt").is_dir() else Path.cwd()))
from benchmarks.gpu import decisions, graphs, kernels, lm_head, machine, speed
from benchmarks.gpu.lines import OUT, RESULTS, ROOT, emit, part
from benchmarks.gpu.shapes import SHAPES
from benchmarks.gpu.sizes import IS_STAND_IN

MIN_SECONDS = 20  # a stage with less time left is not started
SLOWER = 20  # the stand-in, whose kernels are interpreted, on a machine that does other work
MAX_BESIDE = 4  # stages at a time: each has an engine, and takes a core while that starts


@dataclass(frozen=True)
class Stage:
    """A stage: its function, the seconds that it may take, and whether it may run beside the stages next to it."""

    check: Callable[[str], None]
    limit_s: float
    is_beside: bool = False


# In the order of importance. Nothing that is timed runs beside another.
STAGES = {
    "environment": Stage(machine.check_environment, 90),
    "libraries": Stage(machine.check_libraries, 90),
    "kernels": Stage(kernels.check_kernels, 150),
    "defaults:llada-mini": Stage(decisions.check_defaults, 150, is_beside=True),
    "defaults:sdar-mini": Stage(decisions.check_defaults, 150, is_beside=True),
    "graphs:llada-mini": Stage(graphs.check_graphs, 240, is_beside=True),
    "graphs:sdar-mini": Stage(graphs.check_graphs, 240, is_beside=True),
    "shape:llada-8b": Stage(speed.check_shape, 240),
    "lm-head": Stage(lm_head.check_lm_head, 90),
    "bundled:llada-mini": Stage(decisions.check_bundled, 240, is_beside=True),
    "bundled:sdar-mini": Stage(decisions.check_bundled, 240, is_beside=True),
    "shape:sdar-8b": Stage(speed.check_shape, 240),
    "graphs:llada-8b": Stage(graphs.check_graphs, 180),
    "recorded:llada_random": Stage(decisions.check_recorded, 200, is_beside=True),
    "recorded:llada_tasks": Stage(decisions.check_recorded, 200, is_beside=True),
    "recorded:dream_random": Stage(decisions.check_recorded, 200, is_beside=True),
    "recorded:sdar_random": Stage(decisions.check_recorded, 200, is_beside=True),
    "recorded:llada2_random": Stage(decisions.check_recorded, 200, is_beside=True),
    "recorded:fast_dllm_v2_random": Stage(decisions.check_recorded, 200, is_beside=True),
    "shape:llada2-mini": Stage(speed.check_shape, 300),
    "shape:dream-7b": Stage(speed.check_shape, 240),
    "shape:sdar-4b": Stage(speed.check_shape, 240),
    "compiled:sdar-8b": Stage(speed.check_compiled, 300),
    "kernel-tests": Stage(kernels.check_kernel_tests, 200, is_beside=True),
}
assert {f"shape:{name}" for name in SHAPES} < STAGES.keys()


def run_stage(name: str) -> None:
    """The process of a stage."""
    if IS_STAND_IN:
        from tests.cuda_stand_in import cuda

        cuda.install()
    elif not machine.has_flash_attention_4():
        from vllm.vllm_flash_attn import flash_attn_interface

        flash_attn_interface.FA4_AVAILABLE = False  # FlashAttention 3 does it as well
    failed = True
    with part(name, "stage"):
        STAGES[name].check(name)
        failed = False
    sys.stdout.flush()
    os._exit(int(failed))  # an engine that goes takes seconds


def groups_of(names: Sequence[str]) -> list[list[str]]:
    """Names in order, those that may run beside each other together."""
    groups: list[list[str]] = []
    for name in names:
        last = groups[-1] if groups else []
        if last and len(last) < MAX_BESIDE and all(STAGES[one].is_beside for one in (name, *last)):
            last.append(name)
        else:
            groups.append([name])
    return groups


def run_group(names: Sequence[str], left_s: Callable[[], float]) -> None:
    """Run stages beside each other, each to its end or its limit."""
    running = []
    for name in names:
        if left_s() < MIN_SECONDS:
            emit(name, "not started: no time is left", ok=False)
            continue
        log = (OUT / f"log-{name.replace(':', '-')}.txt").open("w")
        command = [sys.executable, __file__, "--stage", name, *(["--stand-in"] if IS_STAND_IN else [])]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        running.append((name, time.monotonic(), process))
    for name, start, process in running:
        limit = min(start + STAGES[name].limit_s * (SLOWER if IS_STAND_IN else 1), time.monotonic() + left_s() - 5)
        try:
            status: int | str = process.wait(max(1.0, limit - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = "stopped at its limit"
        emit(name, "ended", ok=status == 0, status=status, seconds=round(time.monotonic() - start, 1))


def main() -> int:
    """Run stages; returns 1 if a part of one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=STAGES, metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--from", dest="first", choices=STAGES, metavar="STAGE", help="leave out those before it")
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS", help="no stage goes on longer")
    parser.add_argument("--stand-in", action="store_true", help="tiny sizes on the stand-in for CUDA")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))
    OUT.mkdir(parents=True, exist_ok=True)
    if options.stage:
        run_stage(options.stage)
    names = list(STAGES)
    names = options.only or names[names.index(options.first) if options.first else 0 :]
    start = time.monotonic()
    first_line = len(RESULTS.read_text().splitlines()) if RESULTS.exists() else 0
    for group in groups_of(names):
        run_group(group, lambda: options.budget - (time.monotonic() - start))
    with (OUT / "logs.txt").open("w") as file:  # one file, where only a few come back from the machine
        for log in sorted(OUT.glob("log-*.txt")):
            file.write(f"######## {log.name}\n{log.read_text(errors='replace')[-400000:]}\n")
            log.unlink()
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()[first_line:]]
    failed = [line for line in lines if not line["ok"]]
    for line in lines:
        print("ok    " if line["ok"] else "FAILED", line["stage"], line["what"], line.get("error", ""))
    print(f"{len(lines) - len(failed)} of {len(lines)} parts in {time.monotonic() - start:.0f} s; {RESULTS}, {OUT}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
