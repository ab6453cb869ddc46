"""Runs the tests in several processes at a time and prints the output of each process in one piece.

    python tools/run_tests.py unit engine            # all tests
    python tools/run_tests.py unit                   # those that start no engine
    python tools/run_tests.py engine --shard 2/3     # the second of three shares of the others
    python tools/run_tests.py unit engine -- -k name # pytest's own arguments

Tests that start an engine or a server have the marker ``e2e``. A module of them has a process of its own, because an
engine that ends takes the process groups of all engines in its process along; ``TOGETHER`` names the modules that share
one. The other tests are divided among as many processes as run at a time.

A process runs as soon as there is a place for it, the longest first. ``tests/durations.json`` says how long each module
took; ``--record`` writes it. The first failure keeps further processes from starting, and those that run come to their
end. Standard library only.
"""

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DURATIONS = Path("tests/durations.json")
KINDS = ("unit", "engine")
# Tests of an environment of their own: make test-cuda, make test-clients.
APART = ("tests/cuda_stand_in/", "tests/clients/")
# Modules whose engines all live to the end of the process (the fixture start_llm), with models of experts first: vLLM
# makes the process groups of experts with a process's first engine.
TOGETHER: tuple[tuple[str, ...], ...] = (
    (
        "tests/e2e/test_experts.py",
        "tests/e2e/test_llada_moe.py",
        "tests/e2e/test_llada2.py",
    ),
    (
        "tests/e2e/test_start.py",
        "tests/models/test_block_causal.py",
        "tests/models/test_rope.py",
    ),
    (
        "tests/e2e/test_golden.py",
        "tests/e2e/test_requests.py",
        "tests/e2e/test_osdt.py",
        "tests/e2e/test_context_end.py",
        "tests/e2e/test_run_ahead.py",
        "tests/test_scheduler.py",
        "tests/policies/test_local_leap.py",
        "tests/policies/test_bacd.py",
        "tests/policies/test_selection.py",
        "tests/e2e/test_cache_modes.py",
        "tests/e2e/test_compiled.py",
    ),
    (
        "tests/policies/test_credit.py",
        "tests/policies/test_several_at_once.py",
        "tests/policies/test_learned_filter.py",
        "tests/policies/test_stability.py",
        "tests/policies/test_block_cuts.py",
        "tests/policies/test_early_exit.py",
        "tests/e2e/test_drafts.py",
        "tests/e2e/test_infill.py",
    ),
    (
        "tests/e2e/test_illada.py",
        "tests/e2e/test_stable_diffcoder.py",
        "tests/e2e/test_a2d.py",
        "tests/e2e/test_nemotron_labs_diffusion.py",
        "tests/models/test_illada.py",
        "tests/models/test_a2d.py",
        "tests/models/test_stable_diffcoder.py",
        "tests/models/test_public_checkpoints.py",
    ),
    (
        "tests/e2e/test_block_causal.py",
        "tests/e2e/test_dream.py",
        "tests/e2e/test_fast_dllm_v2.py",
        "tests/e2e/test_random_traffic.py",
        "tests/e2e/test_random_options.py",
        "tests/e2e/test_lora.py",
    ),
    (
        "tests/e2e/test_service.py",
        "tests/models/test_dream.py",
        "tests/models/test_llada.py",
        "tests/models/test_quantization.py",
    ),
    # Those that start servers and programs: one process imports vLLM for all of them (tests/forked.py).
    (
        "tests/e2e/test_examples.py",
        "tests/e2e/test_clients.py",
        "tests/test_cli.py",
        "tests/e2e/test_tensor_parallel.py",
    ),
    (
        "tests/e2e/test_server_block_causal.py",
        "tests/e2e/test_server.py",
        "tests/e2e/test_text.py",
        "tests/e2e/test_golden_server.py",
        "tests/e2e/test_structured_server.py",
    ),
)
# How a module says that all or some of its tests start engines.
WHOLE_MODULE = re.compile(r"^pytestmark = .*\bpytest\.mark\.e2e\b", re.MULTILINE)
SOME_TESTS = re.compile(r"^ *@pytest\.mark\.e2e\b", re.MULTILINE)
# Importing vLLM and starting a process's first engine, whatever the module.
START_S = 13.0
# What a module takes that was never recorded.
UNKNOWN_S = {"unit": 2.0, "engine": 60.0}
# Memory that a process with engines may take.
GIB_PER_PROCESS = 7
# pytest's exit status where no test is left after selection.
NOTHING_SELECTED = 5


@dataclass(frozen=True)
class Job:
    """One process: a name, its command, how long it is expected to take in seconds, and the kind of its tests."""

    name: str
    command: tuple[str, ...]
    seconds: float
    kind: str | None = None
    report: Path | None = None

    def reporting_to(self, report: Path) -> "Job":
        """The job with pytest's report in a file; a command without tests stays as it is."""
        if self.kind is None:
            return self
        return replace(self, command=(*self.command, f"--junitxml={report}"), report=report)


@dataclass
class Result:
    """What became of a job: exit status, wall clock and CPU time in seconds, peak memory in GiB."""

    job: Job
    status: int
    seconds: float
    cpu_seconds: float
    peak_gib: float


def find_modules(root: Path = ROOT) -> dict[str, list[str]]:
    """Test modules by kind, as paths relative to the root; one with tests of both kinds is in both lists."""
    found: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for path in sorted((root / "tests").rglob("test_*.py")):
        source, name = path.read_text(encoding="utf-8"), path.relative_to(root).as_posix()
        if name.startswith(APART):
            continue
        is_all = WHOLE_MODULE.search(source) is not None
        if is_all or SOME_TESTS.search(source):
            found["engine"].append(name)
        if not is_all:
            found["unit"].append(name)
    return found


def read_durations(root: Path = ROOT) -> dict[str, dict[str, float]]:
    """Recorded seconds of each module, by kind."""
    recorded = json.loads((root / DURATIONS).read_text()) if (root / DURATIONS).exists() else {}
    return {kind: recorded.get(kind, {}) for kind in KINDS}


def divide(seconds: dict[str, float], num_shares: int) -> list[list[str]]:
    """Divides names into shares of about equal sums: the longest first, each to the share that has the least."""
    shares: list[list[str]] = [[] for _ in range(num_shares)]
    sums = [0.0] * num_shares
    for name in sorted(seconds, key=lambda name: (-seconds[name], name)):
        least = sums.index(min(sums))
        shares[least].append(name)
        sums[least] += seconds[name]
    return shares


def group(modules: Sequence[str]) -> list[tuple[str, ...]]:
    """Modules by process, those of TOGETHER in its order."""
    together = [tuple(name for name in names if name in modules) for names in TOGETHER]
    alone = [(module,) for module in modules if not any(module in names for names in together)]
    return [names for names in together if names] + alone


def record(reports: Iterable[tuple[str, Path]], root: Path = ROOT) -> None:
    """Writes DURATIONS from pytest's reports, each with its kind; modules that are not in them keep what they have."""
    durations = {kind: dict(known) for kind, known in read_durations(root).items()}
    for kind, report in reports:
        found: dict[str, float] = {}
        for case in ElementTree.parse(report).iter("testcase"):
            module = case.attrib["classname"].replace(".", "/") + ".py"
            found[module] = found.get(module, 0.0) + float(case.attrib["time"])
        durations[kind] |= found
    there = find_modules(root)
    kept = {
        kind: {module: round(seconds, 1) for module, seconds in sorted(known.items()) if module in there[kind]}
        for kind, known in durations.items()
    }
    (root / DURATIONS).write_text(json.dumps(kept, indent=2) + "\n")


def make_jobs(
    kinds: Iterable[str],
    modules: dict[str, list[str]],
    durations: dict[str, dict[str, float]],
    *,
    num_places: int,
    shard: tuple[int, int],
    python: str,
    arguments: Sequence[str],
) -> list[Job]:
    """The processes to run.

    Args:
        kinds: Of KINDS.
        modules: Test modules by kind, of :func:`find_modules`.
        durations: Recorded seconds of modules by kind.
        num_places: How many processes run at a time.
        shard: i and n: the i-th of n shares of the modules with engines, from 1.
        python: The interpreter.
        arguments: Of pytest; a ``-m`` among them holds beside ours.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-m", dest="markers")
    own, rest = parser.parse_known_args(arguments)

    def job(kind: str, name: str, files: Sequence[str]) -> Job:
        markers = "e2e" if kind == "engine" else "not e2e"
        if own.markers:
            markers = f"({own.markers}) and {markers}"
        return Job(name, (python, "-m", "pytest", *rest, "-m", markers, *files), expected(kind, files), kind)

    def expected(kind: str, files: Iterable[str]) -> float:
        return START_S + sum(durations[kind].get(file, UNKNOWN_S[kind]) for file in files)

    jobs = []
    if "unit" in kinds:
        shares = divide({file: expected("unit", [file]) - START_S for file in modules["unit"]}, num_places)
        shares = [sorted(share) for share in shares if share]
        for number, files in enumerate(shares, 1):
            jobs.append(job("unit", f"unit tests {number}/{len(shares)}", files))
    if "engine" in kinds:
        index, num_shares = shard
        groups = {" ".join(files): files for files in group(modules["engine"])}
        seconds = {name: expected("engine", files) for name, files in groups.items()}
        for name in divide(seconds, num_shares)[index - 1]:
            jobs.append(job("engine", name, groups[name]))
    return jobs


def default_places() -> int:
    """As many processes at a time as there are cores, and as memory allows."""
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return max(1, min(len(os.sched_getaffinity(0)), int(gib / GIB_PER_PROCESS)))


def environment(num_places: int) -> dict[str, str]:
    """Of the processes: with several at a time, one thread each, on any core."""
    if num_places == 1:
        return dict(os.environ)
    # Left to itself, vLLM binds the threads of every server to the same cores.
    return {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", **os.environ}


@dataclass
class Runner:
    """Runs jobs at `num_places` places; `is_partial` says that a selection may leave a module without tests."""

    num_places: int
    is_partial: bool
    keep_going: bool = False
    results: list[Result] = field(default_factory=list)
    _running: dict[int, Job] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _is_stopping: bool = False

    def run(self, jobs: Sequence[Job]) -> int:
        """Run the jobs; returns the exit status of them all."""
        ordered = sorted(jobs, key=lambda job: -job.seconds)
        with ThreadPoolExecutor(self.num_places) as pool:
            futures = [pool.submit(self._run_one, job) for job in ordered]
            try:
                for future in futures:
                    future.result()
            except KeyboardInterrupt:
                self._stop()
                return 130
        failed = [result.status for result in self.results if self._is_failure(result)]
        if failed:
            return failed[0]
        tests = [result for result in self.results if result.job.kind]
        return NOTHING_SELECTED if tests and all(result.status for result in tests) else 0

    def _is_failure(self, result: Result) -> bool:
        nothing = NOTHING_SELECTED if self.is_partial and result.job.kind else 0
        return result.status not in (0, nothing)

    def _run_one(self, job: Job) -> None:
        with self._lock:
            if self._is_stopping:
                return
            output = tempfile.TemporaryFile()  # noqa: SIM115  closed where the process has ended
            begin = time.monotonic()
            # In a session of its own: an interrupt comes from here, once, so that fixtures end their servers.
            process = subprocess.Popen(
                job.command, stdout=output, stderr=subprocess.STDOUT, env=environment(self.num_places),
                start_new_session=True,
            )  # fmt: skip
            self._running[process.pid] = job
            print(f"-- {job.name}", flush=True)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        cpu_seconds, peak_gib = usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20
        result = Result(job, process.returncode, time.monotonic() - begin, cpu_seconds, peak_gib)
        with self._lock, output:
            del self._running[process.pid]
            self.results.append(result)
            self._is_stopping |= self._is_failure(result) and not self.keep_going
            output.seek(0)
            print(f"\n== {job.name}", flush=True)
            sys.stdout.buffer.write(output.read())
            print(f"== {job.name}: {self._outcome(result)}\n", flush=True)

    def _outcome(self, result: Result) -> str:
        outcome = "failed" if self._is_failure(result) else "nothing selected" if result.status else "passed"
        return (
            f"{outcome} with status {result.status} after {result.seconds:.0f} s"
            f" ({result.cpu_seconds:.0f} CPU s, {result.peak_gib:.1f} GiB)"
        )

    def _stop(self) -> None:
        """Interrupt what runs, as Ctrl-C would; the pool then waits for it."""
        with self._lock:
            self._is_stopping = True
            for pid in self._running:
                os.kill(pid, signal.SIGINT)

    def summary(self) -> str:
        """One line per process, the longest last, and the sums."""
        lines = [
            f"{result.seconds:6.0f} s  {self._outcome(result)}  {result.job.name}"
            for result in sorted(self.results, key=lambda result: result.seconds)
        ]
        cpu_seconds = sum(result.cpu_seconds for result in self.results)
        return "\n".join([*lines, f"{len(self.results)} processes, {cpu_seconds:.0f} CPU s"])


def heed_interrupts() -> None:
    """Lets SIGINT and SIGTERM interrupt this process and those it starts; a shell's background jobs ignore SIGINT."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)


def shard_of(text: str) -> tuple[int, int]:
    """Reads ``i/n``."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is no i/n with 1 <= i <= n")
    return int(match[1]), int(match[2])


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse arguments, run, print a summary."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    own, pytest_arguments = arguments, []
    if "--" in arguments:
        own, pytest_arguments = arguments[: arguments.index("--")], arguments[arguments.index("--") + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="+", choices=KINDS, help="which tests")
    parser.add_argument("--jobs", type=int, help="processes at a time (default: by cores and memory)")
    parser.add_argument("--shard", type=shard_of, default=(1, 1), metavar="I/N", help="a share of the engine tests")
    parser.add_argument("--beside", action="append", default=[], metavar="COMMAND", help="run this too, first")
    parser.add_argument("--keep-going", action="store_true", help="run everything, whatever fails")
    parser.add_argument("--record", action="store_true", help=f"write {DURATIONS}")
    parser.add_argument("--list", action="store_true", help="print the commands and run nothing")
    options = parser.parse_args(own)
    os.chdir(ROOT)
    heed_interrupts()
    num_places = options.jobs or default_places()
    jobs = [Job(command, tuple(shlex.split(command)), float("inf")) for command in options.beside]
    jobs += make_jobs(
        options.kinds,
        find_modules(),
        read_durations(),
        num_places=num_places,
        shard=options.shard,
        python=sys.executable,
        arguments=pytest_arguments,
    )
    if options.list:
        print("\n".join(shlex.join(job.command) for job in jobs))
        return 0
    runner = Runner(num_places, is_partial=bool(pytest_arguments), keep_going=options.keep_going)
    with tempfile.TemporaryDirectory() as folder:
        if options.record:
            jobs = [job.reporting_to(Path(folder) / f"{number}.xml") for number, job in enumerate(jobs)]
        status = runner.run(jobs)
        if options.record and status == 0:
            record((job.kind, job.report) for job in jobs if job.kind and job.report)
    print(runner.summary(), flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
