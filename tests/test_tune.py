"""``vllm-osdt tune``, with a decoder that answers from a table."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.calibration.records import KEY, MODEL, recorded
from vllm_osdt.calibration.store import ProfileStore
from vllm_osdt.cli import main
from vllm_osdt.cli.common import CommandError
from vllm_osdt.cli.tuning.candidates import CANDIDATES, REFERENCE, candidates_of
from vllm_osdt.cli.tuning.decoders import Decoded, RefusedError, ServerDecoder
from vllm_osdt.cli.tuning.judge import Judge, Verdict, load_checker
from vllm_osdt.cli.tuning.plan import Plan, name_run
from vllm_osdt.cli.tuning.report import print_report, report
from vllm_osdt.cli.tuning.run import Tuning
from vllm_osdt.cli.tuning.state import State
from vllm_osdt.options import DecodingOptions
from vllm_osdt.options.parsing import check_operator_values, with_choice
from vllm_osdt.policies import POLICIES

NUM_CALIBRATING = 32
CALIBRATIONS = DecodingOptions().num_calibration_requests
PROMPTS = [f"prompt {index}" for index in range(120)]


class TableDecoder:
    """Takes 10 forwards for the reference and fewer for each further candidate; loses the prompts that it is told."""

    writing_limit_s = 0.0

    def __init__(self, folder, lost=None, refused=(), fails_after=None):
        self.folder = folder
        self.lost = lost or {}  # policy and value -> indices
        self.refused = refused
        self.fails_after = fails_after
        self.asked = []

    def decode(self, prompts, max_tokens, options):
        if options["policy"] in self.refused:
            raise RefusedError("this model has none")
        if self.fails_after is not None and len(self.asked) >= self.fails_after:
            raise KeyboardInterrupt
        self.asked.append((dict(options), len(prompts)))
        if options.get("recalibrate"):
            key = KEY.__class__(options["task"], 4, "dual", 0.9)
            ProfileStore(self.folder, MODEL, "mini").write(recorded(key, 1, num_requests=len(prompts)))
        policy = options["policy"]
        values = [options[name] for name in options if name in ("threshold", "factor", "margin", "relaxed_threshold")]
        candidates = candidates_of("freedave_osdt" if options.get("calibrated") else policy, NUM_CALIBRATING)
        place = next((i for i, one in enumerate(candidates) if one.items() <= options.items()), None)
        nfe = 10 if place is None else 9 - place
        lost = self.lost.get((policy, values[0] if values else None), ())
        texts = ["wrong" if int(prompt.split()[1]) in lost else f"so {prompt}" for prompt in prompts]
        profile = "0" * 16 if policy == "osdt" or options.get("calibrated") else None
        return [Decoded(text, 20, nfe, profile) for text in texts]

    def flush(self):
        pass


class HoldingDecoder(TableDecoder):
    """Has a profile of the task in memory, or finds the newest on disk."""

    held = "0" * 16

    def decode(self, prompts, max_tokens, options):
        if options.get("task") != "quiz":
            return super().decode(prompts, max_tokens, options)
        assert options == {"task": "quiz"} and len(prompts) == 1
        return [Decoded("so", 2, 1, self.held)]


def plan(policies=("static_threshold",), risk=0.1, prompts=PROMPTS, judge=None, **changes):
    judge = judge or Judge(prompts)
    values = {"num_calibrating": NUM_CALIBRATING, "max_tokens": 8, "options": {}, "risk": risk, **changes}
    return Plan("quiz", "mini", prompts, judge, policies, **values)


@pytest.fixture
def tune(tmp_path):
    def tune(asked, state="state.jsonl", **table):
        decoder = TableDecoder(tmp_path / "scratch", **table)
        tuning = Tuning(asked, decoder, State(tmp_path / state, name_run("mini", None, asked)))
        return tuning, tuning.run(), decoder

    return tune


def test_the_boldest_setting_before_the_first_that_loses_too_much_is_chosen(tune, tmp_path):
    tuning, rows, decoder = tune(plan(), lost={("static_threshold", 0.7): range(40)})
    status = {row.setting: row.status for row in rows}
    assert list(status.values()) == ["reference", "accepted", "accepted", "accepted", "given up"] + ["not tested"] * 6
    sent = {options["threshold"] for options, _ in decoder.asked if "recalibrate" not in options}
    assert sent == {0.9, 0.85, 0.8, 0.75, 0.7}
    row, profile = tuning.write(rows, tmp_path / "profiles")
    assert (row.setting, row.nfe, row.reference_nfe, row.lost) == ("threshold=0.75", 7, 10, 0)
    stored = ProfileStore(tmp_path / "profiles", MODEL).load(KEY.__class__("quiz", 4, "dual", 0.9))
    assert stored.profile_id == profile.profile_id and stored.choice == profile.choice
    assert (stored.choice.policy, stored.choice.options) == ("static_threshold", {"threshold": 0.75})
    assert (stored.choice.risk, stored.choice.confidence, stored.choice.num_prompts) == (0.1, 0.95, 120)
    assert stored.num_requests == NUM_CALIBRATING and stored.choice.decoding == {"max_tokens": 8}


def test_where_nothing_is_accepted_the_reference_stays_and_nothing_is_promised(tune, tmp_path):
    lost = {("static_threshold", 0.85): range(120)}
    tuning, rows, _ = tune(plan(), lost=lost)
    row, profile = tuning.write(rows, tmp_path / "profiles")
    assert row.status == "reference" and profile.choice.risk == 0.0
    assert profile.choice.options == {"threshold": 0.9} and profile.choice.policy == "static_threshold"
    found = report(tuning.plan, rows, row, profile, None)
    assert "nothing is lost" in found["promise"] and found["choice"]["policy"] == "static_threshold"


def test_a_policy_that_calibrates_is_tested_on_other_prompts_than_it_calibrated_with(tune):
    _, rows, decoder = tune(plan(("osdt", "factor")))
    tested = {row.policy: row.prompts for row in rows if row.status == "accepted"}
    assert tested == {"osdt": len(PROMPTS) - NUM_CALIBRATING, "factor": len(PROMPTS)}
    calibrating = [(options, number) for options, number in decoder.asked if options.get("recalibrate")]
    assert [number for _, number in calibrating] == [NUM_CALIBRATING]
    scratch = calibrating[0][0]["task"]
    for options, _ in decoder.asked:
        assert options.get("task") in ((scratch,) if options["policy"] == "osdt" else (None, scratch))
    few = plan(("osdt", "factor"), prompts=PROMPTS[:50])
    assert few.check() is None
    _, rows, _ = tune(few, "few.jsonl")
    assert {row.status for row in rows if row.policy == "osdt"} == {"not tested"}
    assert "18 prompts beside those that calibrate" in next(row.reason for row in rows if row.policy == "osdt")


def test_a_profile_may_carry_freedave_over_its_own_thresholds(tune, tmp_path):
    tuning, rows, decoder = tune(plan(("freedave", "freedave_osdt")), lost={("freedave", 0.9): range(60)})
    statuses = {row.setting: row.status for row in rows if row.policy == "freedave"}
    assert len(statuses) == 7 + len(candidates_of("freedave_osdt", NUM_CALIBRATING))
    assert [one for name, one in statuses.items() if "calibrated" in name] == ["accepted"] * 5
    assert statuses["freedave_base=threshold threshold=0.9"] == "given up"
    [(options, _), *_] = [one for one in decoder.asked if one[0].get("calibrated")]
    assert options["policy"] == "freedave" and options["task"].startswith("tuning-")
    assert {row.prompts for row in rows if "calibrated" in row.setting} == {len(PROMPTS) - NUM_CALIBRATING}
    row, profile = tuning.write(rows, tmp_path / "profiles")
    stored = ProfileStore(tmp_path / "profiles", MODEL).load(profile.key)
    assert row.policy == stored.choice.policy == "freedave" and stored.choice.options["calibrated"] is True
    followed = with_choice(DecodingOptions(task="quiz", block_length=8, gen_length=8), stored.choice)
    assert followed.calibrates and (followed.policy, followed.freedave_base) == ("freedave", "threshold")
    assert (followed.risk, followed.margin) == (stored.choice.options["risk"], stored.choice.options["margin"])


def test_whether_a_server_follows_the_choice_is_asked(tmp_path):
    asked = plan()
    decoder = HoldingDecoder(tmp_path)
    tuning = Tuning(asked, decoder, State(tmp_path / "state.jsonl", "run"))
    _, profile = tuning.write(tuning.run(), tmp_path)
    tuning.clean_up()
    assert [path.name.split(".")[0] for path in tmp_path.rglob("*.json")] == ["quiz"]
    assert not tuning.is_followed(profile)
    decoder.held = profile.profile_id
    assert tuning.is_followed(profile)


def test_an_interrupted_run_goes_on_where_it_was(tune):
    with pytest.raises(KeyboardInterrupt):
        tune(plan(), fails_after=4)
    _, rows, decoder = tune(plan())
    asked = sum(number for _, number in decoder.asked)
    assert asked == 11 * len(PROMPTS) - (32 + 64 + 24 + 64) and not any(
        "recalibrate" in one for one, _ in decoder.asked
    )
    _, again, decoder = tune(plan(risk=0.2))
    assert decoder.asked == [] and [row.lost for row in again] == [row.lost for row in rows]


def test_a_state_file_may_hold_other_runs_and_end_in_the_middle_of_a_line(tune, tmp_path):
    tune(plan())
    path = tmp_path / "state.jsonl"
    path.write_text(path.read_text()[:-20])
    _, _, decoder = tune(plan())
    assert sum(number for _, number in decoder.asked) == 1
    _, _, decoder = tune(plan(max_tokens=9))
    assert sum(number for _, number in decoder.asked) == 11 * len(PROMPTS)


def test_a_policy_that_the_model_refuses_is_left_out(tune):
    _, rows, _ = tune(plan(("entropy_bound", "factor")), refused=("entropy_bound",))
    assert next(row.status for row in rows if row.policy == "entropy_bound") == "refused"
    assert any(row.status == "accepted" for row in rows)
    with pytest.raises(CommandError, match=r"reference .* is refused: this model has none"):
        tune(plan(), "other.jsonl", refused=("osdt",))


def test_too_few_prompts_are_refused_with_the_risk_that_they_can_certify():
    with pytest.raises(CommandError) as refused:
        plan(risk=0.01, prompts=PROMPTS[:100]).check()
    assert "there are 100 prompts" in str(refused.value) and "needs 299" in str(refused.value)
    assert "0.0296" in str(refused.value)
    with pytest.raises(CommandError, match="there are 20 prompts, but num_calibration_requests is 32"):
        plan(prompts=PROMPTS[:20]).check()


def test_the_report_says_what_is_promised_for_which_requests_with_what_confidence(tune, tmp_path, capsys):
    judge = Judge(PROMPTS, [f"so {prompt}" for prompt in PROMPTS])
    tuning, rows, _ = tune(plan(judge=judge, options={"block_length": 16}), lost={("static_threshold", 0.8): [5]})
    row, profile = tuning.write(rows, tmp_path / "profiles")
    found = report(tuning.plan, rows, row, profile, tuning.accuracy())
    print_report(found, rows)
    said = " ".join(capsys.readouterr().out.split())
    for words in ("confidence 0.95", "share 0.1 of requests", "a wrong answer where the reference has a right one",
                  "max_tokens 8, block_length 16", "needs 29", "right in 100.0%", profile.profile_id,
                  "says nothing of other requests"):  # fmt: skip
        assert words in said, words
    assert json.loads(json.dumps(found)) == found and found["reference_accuracy"] == 1.0
    assert [one["lost"] for one in found["candidates"]][:4] == [0, 0, 1, 0]


@pytest.mark.parametrize("policy", CANDIDATES)
def test_candidates_are_options_of_their_policy(policy):
    base = DecodingOptions(task="quiz", block_length=8, gen_length=8)
    name = policy.removesuffix("_osdt")  # of freedave over the task's thresholds
    for setting in candidates_of(policy, 32):
        assert setting["policy"] == name
        options = check_operator_values(setting)
        assert options.policy == name and base.policy == "osdt"
    assert all(len(candidates_of(policy, 32)) == len(set(map(str, candidates_of(policy, 32)))) for policy in POLICIES
               if policy in CANDIDATES)  # fmt: skip
    assert len(candidates_of("osdt", 9)) == 3 and REFERENCE["threshold"] == base.threshold


def test_a_choice_that_is_not_known_here_is_refused():
    from vllm_osdt.calibration.profile import Choice
    from vllm_osdt.errors import InvalidOptionError

    base = DecodingOptions(task="quiz", block_length=8, gen_length=8)
    assert with_choice(base, Choice("factor", {"factor": 1.5}, {}, "", 0.1, 0.9, 1, 0)).factor == 1.5
    for policy, options in (("gone", {}), ("factor", {"gone": 1}), ("factor", {"factor": -1.0})):
        with pytest.raises(InvalidOptionError):
            with_choice(base, Choice(policy, options, {}, "", 0.1, 0.9, 1, 0))


def test_what_loses_without_answers_is_another_text_or_another_last_match():
    judge = Judge(["a"])
    assert judge.compare(0, "1 + 1\n= 2", "1 + 1 = 2 ") is Verdict.SAME
    assert judge.compare(0, "2", "3") is Verdict.LOST
    judge = Judge(["a"], pattern=re.compile(r"answer is (\w+)"))
    assert judge.compare(0, "answer is B, no: answer is C", "so the answer is C") is Verdict.SAME
    assert judge.compare(0, "the answer is C", "none") is Verdict.LOST
    assert Judge(["a"], pattern=re.compile(r"\d+")).answer("12 or 13.") == "13"


def test_what_loses_with_answers_is_a_right_answer():
    judge = Judge(["a"], answers=["C"], pattern=re.compile(r"answer is (\w+)"))
    right, wrong, other = "answer is C", "answer is A", "answer is B"
    assert judge.compare(0, right, wrong) is Verdict.LOST and judge.compare(0, wrong, right) is Verdict.WON
    assert judge.compare(0, wrong, other) is Verdict.SAME and judge.compare(0, right, "so " + right) is Verdict.SAME


def test_a_checker_is_found_and_its_failures_are_told(tmp_path, monkeypatch):
    (tmp_path / "my_checks.py").write_text(
        "def ends(prompt, text): return text.endswith(prompt)\n"
        "def fails(prompt, text): return 1 / 0\n"
        "def silent(prompt, text): pass\n"
    )
    monkeypatch.chdir(tmp_path)
    judge = Judge(["b"], checker=load_checker("my_checks:ends"))
    assert judge.compare(0, "ab", "a") is Verdict.LOST
    for name, words in (("fails", "ZeroDivisionError"), ("silent", "returned None")):
        with pytest.raises(CommandError, match=f"failed on prompt 1, 'b': .*{words}"):
            Judge(["b"], checker=load_checker(f"my_checks:{name}")).is_right(0, "a")
    for name in ("my_checks", "my_checks:gone", "gone:ends", ":", "my_checks:__name__"):
        with pytest.raises(CommandError, match="checker"):
            load_checker(name)


@pytest.fixture
def arguments(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
    return ["tune", "llada-mini", "--task", "t", "--prompts", str(file), "--dir", str(tmp_path / "p")]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--risk", "1.5"], "'1.5' is no number in (0, 1)"),
        (["--confidence", "high"], "'high' is no number in (0, 1)"),
        (["--answer-pattern", "(a"], "'(a' is no regular expression: missing )"),
        (["--limit", "0"], "'0' is no integer of at least 1"),
        (["--policies", "factor,beam"], "'beam' is none of osdt, static_threshold"),
        (["--osdt-config", '{"threshold": 2}'], "threshold is 2"),
        (["--answers", "a", "--checker", "b:c"], "not allowed with"),
    ],
)
def test_wrong_arguments_end_with_status_2_and_what_is_wrong(arguments, more, words, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([*arguments, *more])
    assert words in capsys.readouterr().err


def test_input_that_does_not_fit_is_refused_before_an_engine_starts(arguments, tmp_path, capsys):
    files = {name: tmp_path / name for name in ("empty.txt", "answers.txt", "bad.jsonl")}
    files["empty.txt"].write_text("\n")
    files["answers.txt"].write_text("A\n")
    files["bad.jsonl"].write_text('{"text": 1}\n')
    for more, words in (
        ([], "needs 492, where no request loses; the smallest risk that 120 prompts can certify is 0.0404"),
        (["--limit", "5"], f"there are 5 prompts, but num_calibration_requests is {CALIBRATIONS}; give more prompts"),
        (["--prompts", str(files["empty.txt"])], "empty.txt holds no prompt"),
        (["--prompts", str(tmp_path / "gone")], "the prompts cannot be read"),
        (["--prompts", str(files["bad.jsonl"])], "field prompt"),
        (["--answers", str(files["answers.txt"])], "holds 1 answers, but"),
        (["--answers", str(files["empty.txt"])], "empty.txt holds no answer"),
        (["--checker", "nothing"], "expected MODULE:FUNCTION"),
        (["--checker", "math:gcd", "--answer-pattern", "a"], "leave --answer-pattern out"),
        (["--osdt-config", '{"slack": 0.1}'], "--osdt-config sets slack"),
        (["--task", "auto"], "--task is 'auto'"),
        (["--block-length", "200"], "--block-length is 200; expected an integer from 1 to 128"),
        (["--cache-mode", "all"], "--cache-mode is 'all'"),
        (["--risk", "0.2", "--server", "http://127.0.0.1:9"], "the server http://127.0.0.1:9 cannot be reached"),
        (["--risk", "0.2", "--server", "localhost"], "expected its URL"),
    ):
        assert main([*arguments, *more]) == 1
        assert words in capsys.readouterr().err, words


class Handler(BaseHTTPRequestHandler):
    """As much of a server as the command asks for."""

    def log_message(self, *_):
        pass

    def _answer(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        self._answer(200, {"data": [{"id": "mini"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if body["vllm_xargs"]["osdt_policy"] == "bacd":
            return self._answer(400, {"error": {"message": "no such policy"}})
        if body["prompt"] == "broken":
            return self._answer(500, {"error": {"message": "out of memory"}})
        about = {"nfe": body["max_tokens"], "profile": None, "policy": body["vllm_xargs"]["osdt_policy"]}
        told = {"osdt": about} if body["prompt"] != "plain" else {}
        text = f"{body['prompt']} at {body['temperature']:g}"
        return self._answer(200, {"choices": [{"text": text}], "usage": {"completion_tokens": 3}, **told})


@pytest.fixture
def url():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_server_is_asked_greedily_and_its_errors_are_told(url, tmp_path):
    decoder = ServerDecoder(url + "/v1/", "mini", tmp_path)
    options = {"policy": "factor", "factor": 1.0}
    assert decoder.decode(["a", "b"], 7, options) == [Decoded("a at 0", 3, 7), Decoded("b at 0", 3, 7)]
    with pytest.raises(RefusedError, match="no such policy"):
        decoder.decode(["a"], 7, {"policy": "bacd"})
    with pytest.raises(CommandError, match="500: out of memory"):
        decoder.decode(["broken"], 7, options)
    with pytest.raises(CommandError, match="--plugin osdt"):
        decoder.decode(["plain"], 7, options)
    with pytest.raises(CommandError, match="has no model 'other'; it serves mini"):
        ServerDecoder(url, "other", tmp_path)


def test_a_picture_of_the_candidates_is_drawn(tune, tmp_path):
    from vllm_osdt.calibration.plot import draw_candidates

    tuning, rows, _ = tune(plan(("osdt", "factor")), lost={("factor", 0.75): range(30)})
    row, profile = tuning.write(rows, tmp_path / "profiles")
    draw_candidates(report(tuning.plan, rows, row, profile, None), tmp_path / "a" / "b.png")
    assert (tmp_path / "a" / "b.png").read_bytes().startswith(b"\x89PNG")
