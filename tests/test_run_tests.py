"""The runner of the tests: nothing is left out, what fails is told, output stays in one piece."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[1] / "tools"


def load_tool():
    spec = importlib.util.spec_from_file_location("run_tests", TOOLS / "run_tests.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


run_tests = load_tool()
DURATIONS: dict[str, dict[str, float]] = {kind: {} for kind in run_tests.KINDS}


def jobs_of(*kinds, shard=(1, 1), arguments=(), num_places=2):
    options = {"num_places": num_places, "shard": shard, "python": "python", "arguments": arguments}
    return run_tests.make_jobs(kinds, run_tests.find_modules(), DURATIONS, **options)


def modules_of(jobs):
    return sorted(word for job in jobs for word in job.command if word.startswith("tests/"))


def program(name, source, seconds=0.0):
    return run_tests.Job(name, (sys.executable, "-c", source), seconds, "unit")


def test_every_module_runs_once_with_each_kind_of_its_tests():
    everything = sorted(
        path.relative_to(run_tests.ROOT).as_posix()
        for path in (run_tests.ROOT / "tests").rglob("test_*.py")
        if not {"cuda_stand_in", "clients"} & set(path.parts)
    )
    modules = run_tests.find_modules()
    assert sorted({*modules["unit"], *modules["engine"]}) == everything
    for kind, markers in (("unit", "not e2e"), ("engine", "e2e")):
        jobs = jobs_of(kind)
        assert modules_of(jobs) == modules[kind]
        assert all(job.command[job.command.index("-m", 2) + 1] == markers for job in jobs)


def test_only_modules_whose_tests_all_start_engines_are_no_unit_tests():
    marked = [name for name in run_tests.find_modules()["engine"] if name not in run_tests.find_modules()["unit"]]
    assert "tests/e2e/test_golden.py" in marked and "tests/test_cli.py" not in marked
    for name in marked:
        assert "\npytestmark = pytest.mark.e2e\n" in (run_tests.ROOT / name).read_text()


def test_modules_that_share_a_process_exist_and_share_one_only():
    together = [module for names in run_tests.TOGETHER for module in names]
    assert len(set(together)) == len(together)
    assert set(together) <= set(run_tests.find_modules()["engine"])


def test_where_some_modules_of_a_process_are_gone_the_others_stay(monkeypatch):
    monkeypatch.setattr(run_tests, "TOGETHER", (("a", "b", "c"), ("x",)))
    assert run_tests.group(["a", "c", "d"]) == [("a", "c"), ("d",)]


@pytest.mark.parametrize("num_shares", [1, 2, 3, 7, 40])
def test_shards_leave_out_and_repeat_nothing(num_shares):
    shards = [jobs_of("engine", shard=(index, num_shares)) for index in range(1, num_shares + 1)]
    assert sorted(module for shard in shards for module in modules_of(shard)) == run_tests.find_modules()["engine"]


def test_shares_differ_by_no_more_than_one_of_their_parts():
    seconds = {f"m{number}": float(number % 7 + 1) for number in range(30)}
    shares = run_tests.divide(seconds, 4)
    sums = [sum(seconds[name] for name in share) for share in shares]
    assert sorted(name for share in shares for name in share) == sorted(seconds)
    assert max(sums) - min(sums) <= max(seconds.values())


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "1/0"])
def test_a_shard_that_is_none_is_refused(text, capsys):
    with pytest.raises(SystemExit, match="2"):
        run_tests.main(["engine", "--shard", text])
    assert "1 <= i <= n" in capsys.readouterr().err


def test_a_shard_is_read():
    assert run_tests.shard_of("2/3") == (2, 3)


def test_markers_that_the_caller_asks_for_hold_beside_ours():
    jobs = jobs_of("unit", "engine", arguments=["-k", "one or two", "-m", "gpu or e2e", "-x"])
    for job in jobs:
        assert job.command[:6] == ("python", "-m", "pytest", "-k", "one or two", "-x")
        assert job.command[6:8] == ("-m", f"(gpu or e2e) and {'e2e' if job.kind == 'engine' else 'not e2e'}")


@pytest.mark.parametrize(
    ("is_partial", "where", "there", "elsewhere", "status", "num_runs"),
    [
        (False, "none", 0, 0, 0, 4),
        (False, "two", 1, 0, 1, 3),
        (False, "two", 5, 0, 5, 3),  # a module without tests is a fault of the module
        (True, "two", 0, 5, 0, 4),
        (True, "two", 1, 5, 1, 3),
        (True, "none", 0, 5, 5, 4),  # a name that is nowhere
    ],
)
def test_a_run_goes_on_where_a_name_is_in_some_modules_only(is_partial, where, there, elsewhere, status, num_runs):
    jobs = [
        program(name, f"raise SystemExit({there if name == where else elsewhere})", 9.0 - number)
        for number, name in enumerate(["unit", "one", "two", "three"])
    ]
    runner = run_tests.Runner(1, is_partial)
    assert runner.run(jobs) == status
    assert [result.job.name for result in runner.results] == ["unit", "one", "two", "three"][:num_runs]


def test_make_hands_the_arguments_of_pytest_on():
    make = ["make", "-n", "test", "PYTEST_ARGS=-k 'one or two'", "JOBS=3", "KEEP_GOING=1"]
    outside = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    done = subprocess.run(make, cwd=run_tests.ROOT, env=outside, capture_output=True, text=True, check=True)
    assert "tools/run_tests.py --jobs 3 --keep-going unit engine" in done.stdout
    assert done.stdout.rstrip().endswith("-- -k 'one or two'")


def test_whatever_fails_the_rest_runs_where_that_is_asked_for():
    jobs = [program(name, f"raise SystemExit({status})", -status) for name, status in (("a", 1), ("b", 2), ("c", 0))]
    runner = run_tests.Runner(1, is_partial=False, keep_going=True)
    assert runner.run(jobs) == 1
    assert sorted(result.status for result in runner.results) == [0, 1, 2]
    assert "failed with status 2" in runner.summary() and "3 processes" in runner.summary()


def test_a_command_beside_the_tests_may_fail_as_they_may():
    command = run_tests.Job("lint", (sys.executable, "-c", "raise SystemExit(5)"), float("inf"))
    runner = run_tests.Runner(1, is_partial=True)
    assert runner.run([program("tests", "", 1.0), command]) == 5
    assert [result.job.name for result in runner.results] == ["lint"]


# Each waits for the other, and writes in turn with it.
MEETING = """
import sys, time
from pathlib import Path
own, other = map(Path, sys.argv[1:])
for number in range(3):
    print(own.name, number, flush=True)
    own.with_suffix(f".{number}").touch()
    while not other.with_suffix(f".{number}").exists():
        time.sleep(0.01)
"""


def test_processes_run_at_the_same_time_and_their_output_is_not_mixed(tmp_path, capfdbinary):
    names = {"left": "right", "right": "left"}
    jobs = [
        run_tests.Job(own, (sys.executable, "-c", MEETING, str(tmp_path / own), str(tmp_path / other)), 1.0, "unit")
        for own, other in names.items()
    ]
    assert run_tests.Runner(2, is_partial=False).run(jobs) == 0
    output = capfdbinary.readouterr().out.decode()
    for name in names:
        assert f"{name} 0\n{name} 1\n{name} 2\n" in output


INTERRUPTED = """
import sys
from run_tests import Job, Runner, heed_interrupts
heed_interrupts()
waiting = (sys.executable, "-c", sys.argv[1])
sys.exit(Runner(1, is_partial=False).run([Job("first", waiting, 2.0, "unit"), Job("second", waiting, 1.0, "unit")]))
"""
WAITING = """
import os, time
try:
    os.kill(os.getppid(), {signal})
    time.sleep(100)
finally:
    print("cleaned up")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("disposition", [signal.SIG_DFL, signal.SIG_IGN])  # in the foreground, in the background
def test_an_interrupt_lets_running_tests_clean_up_and_starts_no_others(number, disposition):
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, WAITING.format(signal=int(number))],
        cwd=run_tests.ROOT, env={**os.environ, "PYTHONPATH": str(TOOLS)}, capture_output=True, text=True, check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, disposition),
    )  # fmt: skip
    assert done.returncode == 130
    assert done.stdout.count("\ncleaned up\n") == 1 and "-- second" not in done.stdout


REPORT = """<testsuites><testsuite>
<testcase classname="tests.test_cli" name="a" time="1.26"/><testcase classname="tests.test_cli" name="b" time="2.0"/>
</testsuite></testsuites>"""


def test_a_recording_keeps_what_was_not_run_and_drops_modules_that_are_gone(tmp_path):
    for name in ("test_cli", "test_old"):
        (tmp_path / "tests").mkdir(exist_ok=True)
        (tmp_path / f"tests/{name}.py").write_text("@pytest.mark.e2e\n")
    recorded = {"unit": {"tests/test_cli.py": 9.0, "tests/test_gone.py": 9.0}, "engine": {"tests/test_old.py": 9.0}}
    (tmp_path / "tests/durations.json").write_text(json.dumps(recorded))
    report = tmp_path / "report.xml"
    report.write_text(REPORT)
    run_tests.record([("engine", report)], tmp_path)
    assert json.loads((tmp_path / "tests/durations.json").read_text()) == {
        "unit": {"tests/test_cli.py": 9.0},
        "engine": {"tests/test_cli.py": 3.3, "tests/test_old.py": 9.0},
    }


def test_the_longest_process_starts_first():
    jobs = [program(name, "", seconds) for name, seconds in (("short", 1.0), ("long", 3.0), ("middle", 2.0))]
    runner = run_tests.Runner(1, is_partial=False)
    assert runner.run(jobs) == 0
    assert [result.job.name for result in runner.results] == ["long", "middle", "short"]
    assert all(job.seconds >= run_tests.START_S for job in jobs_of("unit", "engine"))


def test_only_standard_library_is_needed():
    code = "import sys, run_tests; print(sorted({'pytest', 'torch', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=TOOLS, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
