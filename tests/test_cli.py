"""The vllm-osdt command."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import ANY

import numpy as np
import pytest

from tests import forked
from tests.calibration.records import KEY, MODEL, chosen, of_task, recorded
from vllm_osdt.calibration.profile import CalibrationProfile, Setting, as_lists
from vllm_osdt.calibration.recording import Recording
from vllm_osdt.calibration.store import ProfileStore
from vllm_osdt.cli import main
from vllm_osdt.cli.doctor import _memory
from vllm_osdt.cli.profiles import compare
from vllm_osdt.mini.tasks import generate
from vllm_osdt.options import DecodingOptions

OTHER = of_task("code")


@pytest.fixture
def folder(tmp_path):
    store = ProfileStore(tmp_path / "profiles", MODEL)
    store.save(recorded(KEY, 1))
    store.save(recorded(OTHER, 2))
    return tmp_path / "profiles"


@pytest.fixture
def run(folder, capsys):
    def run(*arguments, status=0):
        assert main([*arguments, "--dir", str(folder)]) == status
        return capsys.readouterr()

    return run


def test_list_shows_every_profile(run, tmp_path, capsys):
    listed = run("profiles", "list").out
    assert all(profile.profile_id in listed for profile in (recorded(KEY, 1), recorded(OTHER, 2)))
    rows = json.loads(run("profiles", "list", "--json").out)
    assert [row["task"] for row in rows] == ["code", "gsm"]
    used = ~np.isnan(recorded(OTHER, 2).record.confidence)
    assert rows[0]["samples"] == used.sum() and rows[0]["forwards"] == used.any(axis=3).sum()
    assert (rows[0]["requests"], rows[0]["blocks"], rows[0]["replaced"]) == (1, 2, False)
    assert main(["profiles", "list", "--dir", str(tmp_path / "none")]) == 1
    assert f"there is no folder {tmp_path / 'none'}" in capsys.readouterr().err


def test_the_users_own_folder_need_not_be_there_yet(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert main(["profiles", "list"]) == 0
    assert "no profiles" in capsys.readouterr().out


def test_models_have_names_and_are_told_apart_by_them(run, folder, tmp_path):
    other = replace(MODEL, dtype="float16")
    ProfileStore(folder, MODEL, "org/LLaDA-8B").save(recorded(KEY, 1))
    ProfileStore(folder, other, "sdar-mini").save(recorded(KEY, 3))
    rows = json.loads(run("profiles", "list", "--json").out)
    assert {(row["task"], row["model"]) for row in rows} == {
        ("gsm", "org/LLaDA-8B"), ("gsm", "sdar-mini"), ("code", MODEL.digest),
    }  # fmt: skip
    assert "org/LLaDA-8B" in run("profiles", "list").out
    refusal = run("profiles", "show", "gsm", status=1).err
    assert "org/LLaDA-8B" in refusal and "sdar-mini" in refusal and "--model" in refusal
    for name, seed in (("org/LLaDA-8B", 1), ("LLaDA-8B", 1), ("sdar-mini", 3), (other.digest[:6], 3)):
        shown = json.loads(run("profiles", "show", "gsm", "--model", name, "--json").out)
        assert shown["id"] == recorded(KEY, seed).profile_id
        assert name == other.digest[:6] or name in shown["model"]
    assert len(json.loads(run("profiles", "list", "--model", "sdar-mini", "--json").out)) == 1
    file = tmp_path / "gsm.json"
    run("profiles", "export", "gsm", str(file), "--model", "sdar-mini")
    run("profiles", "remove", "gsm", "--model", "sdar-mini")
    assert "for model sdar-mini" in run("profiles", "import", str(file)).out
    assert json.loads(run("profiles", "show", "gsm", "--model", "sdar-mini", "--json").out)["model"] == "sdar-mini"


def test_the_command_needs_no_torch_to_say_what_it_can():
    program = (
        "import sys, vllm_osdt.cli as c; c.make_parser(); c.main(['profiles', 'list']); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_show_names_a_profile_by_task_or_id(run):
    profile = recorded(KEY, 1)
    for name in ("gsm", profile.profile_id, profile.profile_id[:6]):
        assert profile.profile_id in run("profiles", "show", name).out
    shown = json.loads(run("profiles", "show", "gsm", "--json").out)
    expected = profile.thresholds(Setting("step_block", "q1", "masked")).values
    assert shown["thresholds"]["step_block/q1/masked"] == expected.tolist()
    assert len(shown["thresholds"]) == 2 * (1 + 5 * 2)  # conformal looks at masked positions alone


def test_show_and_list_say_what_was_chosen_and_what_is_promised(run, folder):
    tuned = replace(recorded(of_task("tuned"), 3), choice=chosen(factor=1.5))
    ProfileStore(folder, MODEL).save(tuned)
    shown = run("profiles", "show", "tuned").out
    assert "factor factor=1.5" in shown and "at most 0.01 of requests lose, with confidence 0.95" in shown
    assert "of 500 prompts 1 had another text" in shown and "max_tokens 96" in shown
    assert json.loads(run("profiles", "show", "tuned", "--json").out)["promised"]["num_prompts"] == 500
    rows = {row["task"]: row["choice"] for row in json.loads(run("profiles", "list", "--json").out)}
    assert rows == {"gsm": "", "code": "", "tuned": "factor factor=1.5"}
    assert "promised" not in run("profiles", "show", "gsm").out


def test_show_says_static_where_requests_are_too_few_for_the_risk(run, folder):
    assert "static" in run("profiles", "show", "gsm").out
    [name] = [name for name in thresholds(run, "gsm") if name.startswith("block/conformal/masked/")]
    assert thresholds(run, "gsm")[name] == as_lists(np.full_like(recorded(KEY, 1).mean_confidence, np.nan))
    many = recorded(of_task("many"), 3, num_requests=80)
    ProfileStore(folder, MODEL).save(many)
    assert all(value is not None for value in thresholds(run, "many")[name][0])


def thresholds(run, task):
    return json.loads(run("profiles", "show", task, "--json").out)["thresholds"]


def test_a_replaced_profile_is_listed_as_such_and_found_by_its_id_alone(run, folder):
    newer = recorded(KEY, 5, num_requests=2)
    ProfileStore(folder, MODEL).save(newer)
    rows = {row["id"]: row for row in json.loads(run("profiles", "list", "--json").out)}
    replaced = recorded(KEY, 1).profile_id
    assert {name for name, row in rows.items() if row["replaced"]} == {replaced}
    assert rows[newer.profile_id]["requests"] == 2
    for name, meant in (("gsm", newer.profile_id), (newer.profile_id, newer.profile_id), (replaced, replaced)):
        assert json.loads(run("profiles", "show", name, "--json").out)["id"] == meant
    run("profiles", "remove", "gsm")
    assert json.loads(run("profiles", "show", "gsm", "--json").out)["id"] == replaced


def test_a_name_that_fits_none_or_several_is_refused_with_what_there_is(run, folder):
    assert recorded(KEY, 1).profile_id in run("profiles", "show", "gone", status=1).err
    second = replace(KEY, cache="none")
    ProfileStore(folder, MODEL).save(recorded(second, 3))
    refusal = run("profiles", "show", "gsm", status=1).err
    assert "2 profiles" in refusal and recorded(second, 3).profile_id in refusal


def test_plot_draws_a_picture(run, tmp_path):
    run("profiles", "plot", "gsm", "--out", str(tmp_path / "a" / "gsm.png"))
    assert (tmp_path / "a" / "gsm.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_has_its_titles_whole_its_legend_in_words_and_says_where_there_is_no_threshold(tmp_path, monkeypatch):
    import matplotlib.figure

    from vllm_osdt.calibration.plot import draw_signatures

    drawn = []
    save = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda self, *a, **k: drawn.append(self) or save(self, *a, **k)
    )
    name = "a task whose name is as long as the names that people give to the tasks of their services"
    profile = recorded(of_task(name), 1)  # too few requests for the risk: no threshold anywhere
    profile.thresholds(Setting())
    draw_signatures([{**profile.as_dict(), "model": "org/LLaDA-8B"}], tmp_path / "one.png")
    [figure] = drawn
    box = figure.bbox
    top, bottom = figure.axes[0], figure.axes[1]
    for text in (top.title, figure._suptitle):
        extent = text.get_window_extent()
        assert box.x0 <= extent.x0 and extent.x1 <= box.x1 and extent.y1 <= box.y1
    assert " ".join(top.title.get_text().split()) == f"{name} of org/LLaDA-8B"
    legend = [text.get_text() for text in bottom.get_legend().get_texts()]
    assert legend == ["calibrated by block: conformal, risk 0.02", "static threshold"]
    assert [text.get_text() for text in bottom.texts] == ["static"] * len(profile.mean_confidence)


def test_an_exported_profile_comes_back_after_its_removal(run, folder, tmp_path):
    file = tmp_path / "out" / "gsm.json"
    run("profiles", "export", "gsm", str(file))
    run("profiles", "remove", "gsm", "code")
    assert json.loads(run("profiles", "list", "--json").out) == []
    assert run("profiles", "import", str(file)).out.startswith(recorded(KEY, 1).profile_id)
    assert ProfileStore(folder, MODEL).load(KEY).profile_id == recorded(KEY, 1).profile_id


def test_removing_one_entry_leaves_the_others_of_its_file(run, folder):
    second = recorded(replace(KEY, cache="none"), 3)
    ProfileStore(folder, MODEL).save(second)
    run("profiles", "remove", recorded(KEY, 1).profile_id)
    assert ProfileStore(folder, MODEL).load(KEY) is None
    assert ProfileStore(folder, MODEL).load(second.key).profile_id == second.profile_id


def test_import_refuses_a_damaged_file_by_its_field_and_changes_nothing(run, folder, tmp_path):
    file = tmp_path / "gsm.json"
    run("profiles", "export", "gsm", str(file))
    before = {path: path.read_bytes() for path in folder.rglob("*.json")}
    content = json.loads(file.read_text())
    content["profiles"][0]["threshold"] = 7
    file.write_text(json.dumps(content))
    assert "profiles.0.threshold" in run("profiles", "import", str(file), status=1).err
    assert "no file" in run("profiles", "import", str(tmp_path / "gone"), status=1).err
    assert {path: path.read_bytes() for path in folder.rglob("*.json")} == before


def test_a_folder_that_cannot_be_written_to_is_a_clear_refusal(run, folder, tmp_path, capsys):
    run("profiles", "export", "gsm", str(tmp_path / "gsm.json"))
    (tmp_path / "file").write_text("")
    assert main(["profiles", "import", str(tmp_path / "gsm.json"), "--dir", str(tmp_path / "file")]) == 1
    assert "Not a directory" in capsys.readouterr().err


def test_list_passes_over_damaged_files(run, folder):
    ProfileStore(folder, MODEL).path("gsm").write_text("{")
    assert [row["task"] for row in json.loads(run("profiles", "list", "--json").out)] == ["code"]
    assert ProfileStore(folder, MODEL).path("gsm").read_text() == "{"


def of_confidence(key, confidence):
    """A profile of one request."""
    values = np.array([confidence], np.float32)
    return CalibrationProfile(key, Recording(values, np.ones(values.shape, bool), np.zeros(values.shape, bool)))


def test_diff_compares_the_cells_that_both_have(run):
    left = of_confidence(KEY, [[[0.5, 0.7], [np.nan, 0.9]]])
    right = of_confidence(OTHER, [[[0.8, 0.8], [np.nan] * 2]])
    result = compare(left, right)
    assert result["cells"] == 1 and result["cosine"] == pytest.approx(1)
    assert result["mean_gap"] == pytest.approx(0.2) == result["largest_gap"]
    assert result["thresholds"] == [[pytest.approx(0.6), pytest.approx(0.8)]]
    same = json.loads(run("profiles", "diff", "gsm", "gsm", "--json").out)
    assert same["cosine"] == pytest.approx(1) and same["largest_gap"] == 0
    assert "cosine" in run("profiles", "diff", "gsm", "code").out


@pytest.mark.parametrize(
    "arguments", [[], ["profiles"], ["profiles", "show"], ["unknown"], ["calibrate", "m"], ["tune", "m"]]
)
def test_wrong_arguments_end_with_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert "usage" in capsys.readouterr().err


COMMAND = str(Path(sys.executable).with_name("vllm-osdt"))


def command(*arguments, **environment):
    """The installed command, in a process of its own."""
    return subprocess.run(
        [COMMAND, *arguments],
        env={**os.environ, **environment},  # the engine in the process itself, as the command has it by default
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def test_doctor_finds_a_working_installation_and_a_folder_it_cannot_write_to(tmp_path):
    found = command("doctor", "--json")
    assert found.returncode == 0, found.stdout + found.stderr
    names = [check["name"] for check in json.loads(found.stdout)]
    assert names == ["versions", "processor", "memory", "plugin", "triton", "kernels", "profile folder"]
    (tmp_path / "file").write_text("")
    sick = command("doctor", XDG_DATA_HOME=str(tmp_path / "file"))
    assert sick.returncode == 1 and "BAD  profile folder" in sick.stdout


def test_doctor_says_when_an_engine_would_not_find_its_memory(monkeypatch):
    import psutil

    memory = SimpleNamespace(available=16 * 2**30, total=24 * 2**30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    for space, ok, words in (
        ("", False, "16.0 of 24.0 GiB free, but vLLM does not start unless 92% are: set VLLM_CPU_KVCACHE_SPACE to"),
        ("17", False, "17 of them for KV pages"),
        ("1", True, "1 of them for KV pages"),
    ):
        monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", space)
        assert _memory() == (ok, ANY) and words in _memory()[1]
    memory.available = memory.total
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE")
    assert _memory() == (True, "24.0 of 24.0 GiB free, of which vLLM takes 92%")


@pytest.mark.parametrize(
    ("name", "words"),
    [("lada-mini", "(did you mean 'llada-mini'?)"), ("./weak", "neither"), ("/nowhere/weak", "neither")],
)
def test_a_model_that_is_no_folder_is_refused_before_anything_is_looked_up(name, words, capsys):
    assert main(["calibrate", name, "--task", "quiz", "--prompts", "prompts.txt"]) == 1
    message = capsys.readouterr().err
    assert repr(name) in message and words in message and "sdar-lists-mini" in message


ONE_SHOT = json.dumps({"num_calibration_requests": 1, "statistic": "q1"})


def calibrate(folder, prompts, *arguments):
    """``vllm-osdt calibrate`` of the bundled model, forked, as far as the options are common to the tests."""
    file = folder / "prompts.txt"
    file.write_text("".join(f"{prompt}\n" for prompt in prompts))
    options = ["--task", "quiz", "--prompts", str(file), "--dir", str(folder / "p"), "--dtype", "float32"]
    return forked.run([COMMAND, "calibrate", "llada-mini", *options, *arguments], env=os.environ, timeout=300)


@pytest.fixture
def listed(tmp_path, capsys):
    def listed(*names):
        capsys.readouterr()
        assert main(["profiles", *(names or ["list"]), "--json", "--dir", str(tmp_path / "p")]) == 0
        return json.loads(capsys.readouterr().out)

    return listed


@pytest.mark.e2e
def test_calibrate_makes_a_profile_that_a_server_of_the_same_dtype_would_find(tmp_path, listed):
    prompts = ["quiz : pick one beast . A saw B dog C plum . Answer:"]
    short = calibrate(tmp_path, prompts, "--osdt-config", ONE_SHOT, "--max-tokens", "8")
    assert short.returncode == 1 and "at least one block" in short.stderr
    made = calibrate(tmp_path, prompts, "--osdt-config", ONE_SHOT, "--max-tokens", "96")
    assert made.returncode == 0, made.stderr[-3000:]
    rows = listed()
    assert [(row["task"], row["dtype"], row["cache"], row["requests"]) for row in rows] == [
        ("quiz", "float32", "dual", 1)
    ]
    assert any(line.startswith(rows[0]["id"]) for line in made.stdout.splitlines())
    assert "osdt_num_calibration_requests = 1" in made.stdout
    again = calibrate(tmp_path, prompts, "--osdt-config", ONE_SHOT, "--max-tokens", "8")
    assert again.returncode == 1 and "at least one block" in again.stderr  # the old profile is not taken for a new one


@pytest.mark.e2e
def test_calibrate_takes_as_many_prompts_as_the_default_options_need(tmp_path, listed):
    needed = DecodingOptions().num_calibration_requests
    prompts = [problem.prompt for problem in generate("multiple_choice", "held_out", needed + 8, 0)]
    assert not any("\n" in prompt for prompt in prompts)
    made = calibrate(tmp_path, prompts, "--max-tokens", "96")
    assert made.returncode == 0, made.stderr[-3000:]
    [row] = listed()
    assert row["requests"] == needed and f"{row['id']}  task quiz: {needed} requests" in made.stdout
    tables = listed("show", "quiz")["thresholds"]
    conformal = next(table for name, table in tables.items() if name.startswith("block/conformal"))
    assert 0 <= conformal[0][0] <= 1


@pytest.mark.e2e
def test_tune_writes_the_choice_that_it_reports_and_goes_on_from_what_was_decoded(tmp_path, listed):
    file = tmp_path / "prompts.jsonl"
    problems = generate("multiple_choice", "held_out", 80, 0)
    file.write_text("".join(json.dumps({"prompt": problem.prompt}) + "\n" for problem in problems))
    arguments = [
        "tune", "llada-mini", "--task", "quiz", "--prompts", str(file), "--dir", str(tmp_path / "p"),
        "--max-tokens", "96", "--dtype", "float32", "--policies", "static_threshold",
        "--answer-pattern", r"answer is (\w)", "--json",
    ]  # fmt: skip
    picture = tmp_path / "picture.png"
    made = command(*arguments, "--risk", "0.08", "--picture", str(picture))
    assert made.returncode == 0, made.stderr[-3000:]
    report = json.loads(made.stdout)
    chosen = report["choice"]
    assert chosen["policy"] == "static_threshold" and chosen["options"]["threshold"] < 0.9
    assert "another answer than the reference" in report["promise"] and picture.stat().st_size > 1000
    [row] = listed()
    assert (row["id"], row["task"], row["requests"]) == (
        report["profile"],
        "quiz",
        DecodingOptions().num_calibration_requests,
    )
    assert listed("show", "quiz")["promised"] == chosen
    [state] = (tmp_path / "tuning").glob("*.jsonl")
    num_lines = len(state.read_text().splitlines())
    again = command(*arguments, "--risk", "0.07")
    assert json.loads(again.stdout)["risk"] == 0.07 and len(state.read_text().splitlines()) == num_lines


def test_calibrate_refuses_fewer_prompts_than_calibrations_before_it_starts_an_engine(tmp_path, capsys):
    file = tmp_path / "prompts.txt"
    file.write_text("a\n\nb\n")
    arguments = ["calibrate", "llada-mini", "--task", "t", "--prompts", str(file)]
    for options, calibrations in (({}, 64), ({"num_calibration_requests": 3, "statistic": "q1"}, 3)):
        assert main([*arguments, "--osdt-config", json.dumps(options)]) == 1
        error = capsys.readouterr().err
        assert (
            f"{file} holds 2 prompts, but num_calibration_requests is {calibrations}" in error
            and "--osdt-config" in error
        )


def test_calibrate_refuses_bad_options_and_prompts_before_it_starts_an_engine(tmp_path, capsys):
    empty = tmp_path / "prompts.jsonl"
    empty.write_text("")
    arguments = ["calibrate", "llada-mini", "--task", "t", "--prompts", str(empty)]
    assert main(arguments) == 1
    empty.write_text('{"question": 1}\n')
    assert main(arguments) == 1
    empty.write_text('{"prompt": "a"}\n')
    for options in ('{"threshold_cap": 2}', '{"drift_window": 2}', '{"threshold_cpa": 0.5}', "cap"):
        with pytest.raises(SystemExit, match="2"):
            main([*arguments, "--osdt-config", options])
    errors = capsys.readouterr().err
    assert "did you mean 'threshold_cap'?" in errors and "'cap' is no JSON" in errors and "_json" not in errors
    assert (
        "holds no prompt" in errors
        and "field prompt" in errors
        and "threshold_cap is 2" in errors
        and "drift_window is 2" in errors
    )
