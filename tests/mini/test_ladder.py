"""Which snapshots of a training become the models of a ladder."""

import json

import pytest

from examples.mini import ladder
from examples.mini.ladder import CLOSE, LEVELS, MAX_MEASURED, choose, climb, screen, snapshot, table

STEPS = range(25, 726, 25)
TRUE = {step: min(98.0, step / 7) for step in STEPS}  # grows by 3.6 points a snapshot


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bias", [-15.0, 0.0, 15.0])
def test_a_snapshot_near_the_level_is_found_though_the_screening_is_off(level, bias):
    measured = []

    def measure(step):
        measured.append(step)
        return TRUE[step]

    step = choose({step: accuracy + bias for step, accuracy in TRUE.items()}, level, measure)
    assert abs(TRUE[step] - level) <= 2 * CLOSE
    assert len(measured) == len(set(measured)) <= MAX_MEASURED


def test_the_nearest_is_taken_where_none_is_close():
    accuracies = {100: 10.0, 200: 40.0, 300: 64.0, 400: 90.0}
    assert choose(accuracies, 50, accuracies.__getitem__) == 200
    assert choose(accuracies, 54, accuracies.__getitem__) == 300


def test_a_level_that_no_snapshot_reaches_is_left_out():
    accuracies = {100: 10.0, 200: 40.0}
    assert choose(accuracies, 70, accuracies.__getitem__) is None
    assert choose({}, 70, accuracies.__getitem__) is None


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run whose snapshots are folders with a note of what they will be measured at."""
    folder = tmp_path / "runs" / "sdar-mini"
    lines = []
    for step, accuracy in TRUE.items():
        snapshot(folder, step).mkdir(parents=True)
        (snapshot(folder, step) / "generation_config.json").touch()
        lines += [{"step": step - 5}, {"step": step, "decoded_accuracy": {"code": accuracy / 100}}]
    (folder / "learning_curve.jsonl").write_text("\n".join(map(json.dumps, lines)))

    def measure(name, path, num_problems):
        entry = {"step": int(path.name), "num_problems": num_problems, "accuracy": {"code": TRUE[int(path.name)] / 100}}
        (path / ladder.RECORD).write_text(json.dumps(entry))
        return entry["accuracy"]

    monkeypatch.setattr(ladder, "measure_snapshot", measure)
    return folder


def test_the_learning_curve_screens_the_snapshots_that_exist(run):
    assert screen(run) == pytest.approx(TRUE)
    (snapshot(run, 25) / "generation_config.json").unlink()
    assert sorted(screen(run)) == [*STEPS][1:]
    assert screen(run / "nowhere") == {}


def test_snapshots_that_were_not_evaluated_are_expected_between_their_neighbours(run):
    curve = run / "learning_curve.jsonl"
    curve.write_text("\n".join(line for line in curve.read_text().splitlines() if json.loads(line)["step"] % 100 == 0))
    assert screen(run) == pytest.approx(TRUE, abs=2.0)


def test_a_ladder_holds_a_checkpoint_by_level_and_makes_none_again(run, tmp_path):
    out = tmp_path / "ladder"
    (out / "sdar-mini-70").mkdir(parents=True)
    climb("sdar-mini", run, out, LEVELS, 10)
    assert sorted(path.name for path in out.iterdir()) == [f"sdar-mini-{level}" for level in LEVELS]
    assert not any((out / "sdar-mini-70").iterdir())
    lines = table(out).splitlines()
    assert [line.split()[0] for line in lines] == ["model", "sdar-mini-50", "sdar-mini-85", "sdar-mini-95"]
    assert lines[1].split()[1:] == ["350", "10", "50.0%", "50.0%"]


def test_a_table_has_a_head_for_each_set_of_tasks(tmp_path):
    for name, task in (("llada-mini-50", "code"), ("lists-mini-70", "copy"), ("lists-mini-50", "copy")):
        (tmp_path / name).mkdir()
        entry = {"step": 25, "num_problems": 10, "accuracy": {task: 0.5}}
        (tmp_path / name / ladder.RECORD).write_text(json.dumps(entry))
    assert [line.split()[0] for line in table(tmp_path).splitlines()] == [
        "model", "lists-mini-50", "lists-mini-70", "model", "llada-mini-50",
    ]  # fmt: skip
