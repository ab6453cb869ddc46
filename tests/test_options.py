"""Options: what is refused, with which message, and how a canvas is fixed."""

import re
from dataclasses import replace

import pytest

from vllm_osdt.errors import InvalidOptionError
from vllm_osdt.geometry import Limits
from vllm_osdt.options import (
    FORMER_NAMES,
    OPTION_NAMES,
    REQUEST_FIELDS,
    SERVER_OPTION_NAMES,
    DecodingOptions,
    ServerOptions,
)
from vllm_osdt.options.canvas import resolve_canvas as find_canvas
from vllm_osdt.options.parsing import parse_options, parse_server_options

BASE = DecodingOptions(task="quiz")
LIMITS = {"max_model_len": 256, "max_num_batched_tokens": 200}

BAD_VALUES = [
    ("task", ""),
    ("task", "x" * 201),
    ("task", "two\nlines"),
    ("task", 7),
    ("task", "maths@tuned"),
    ("policy", "greedy"),
    ("policy", None),
    ("threshold", 0),
    ("threshold", 1.0001),
    ("threshold", -0.5),
    ("threshold", "0.9"),
    ("threshold", True),
    ("threshold", None),
    ("threshold", float("nan")),
    ("threshold", float("inf")),
    ("factor", 0.0),
    ("delta", 1.0),
    ("floor", 1.01),
    ("delta", -0.1),
    ("factor", False),
    ("factor", float("inf")),
    ("factor", float("nan")),
    ("entropy", 0),
    ("entropy", -0.1),
    ("entropy", float("inf")),
    ("entropy", float("nan")),
    ("entropy", "0.3"),
    ("steps", 0),
    ("steps", 1.5),
    ("steps", True),
    ("block_length", 0),
    ("block_length", 129),
    ("block_length", True),
    ("block_length", None),
    ("block_length", "32"),
    ("block_length", 32.0),
    ("gen_length", 0),
    ("gen_length", -32),
    ("gen_length", False),
    ("cache_mode", "full"),
    ("granularity", "step"),
    ("statistic", "q4"),
    ("threshold_cap", 0.0),
    ("threshold_cap", 1.5),
    ("threshold_cap", True),
    ("slack", 1.0),
    ("slack", -0.1),
    ("slack", False),
    ("record", "all"),
    ("recalibrate", 2),
    ("recalibrate", "yes"),
    ("recalibrate", None),
    ("recalibrate", 1.0),
    ("statistic", None),
    ("risk", 0),
    ("risk", 1),
    ("risk", float("nan")),
    ("risk", "0.1"),
    ("risk", True),
    ("num_calibration_requests", 0),
    ("num_calibration_requests", 1025),
    ("num_calibration_requests", 1.0),
    ("num_calibration_requests", True),
    ("num_calibration_requests", None),
    ("profile", ""),
    ("profile", 7),
    ("profile", "0123456789abcde"),
    ("profile", "0123456789abcdef0"),
    ("profile", "0123456789ABCDEF"),
    ("profile", "0123456789abcdeg"),
    ("profile", "0123456789abcdef\n"),
]


@pytest.mark.parametrize(("name", "value"), BAD_VALUES, ids=lambda value: repr(value)[:20])
def test_a_bad_value_is_refused_by_name_and_value(name, value):
    for prefix in ("", "osdt_"):
        with pytest.raises(InvalidOptionError) as error:
            parse_options({prefix + name: value}, base=BASE, prefix=prefix)
        assert str(error.value).startswith(f"{prefix}{name} is ") and repr(value) in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("threshold", 1),
        ("threshold", 1e-6),
        ("threshold_cap", 1.0),
        ("slack", 0),
        ("slack", 0.999),
        ("factor", 100),
        ("delta", 0),
        ("floor", 1),
        ("block_length", 1),
        ("block_length", 128),
        ("steps", None),
        ("gen_length", None),
        ("gen_length", 4096),
        ("task", "x" * 200),
        ("task", "Aufgabe 7, größer"),
        ("num_calibration_requests", 1024),
        ("risk", 0.999),
        ("profile", None),
        ("profile", "0123456789abcdef"),
    ],
)
def test_values_at_the_edge_are_taken(name, value):
    assert getattr(parse_options({name: value}, base=BASE), name) == value


def test_numbers_become_floats():
    assert isinstance(parse_options({"threshold": 1}, base=BASE).threshold, float)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("policy", "osdt"),
        ("recalibrate", True),
        ("statistic", "q1"),
        ("threshold_cap", 0.8),
        ("granularity", "step_block"),
    ],
)
def test_what_only_a_task_has_is_refused_without_one(name, value):
    message = re.escape(f"osdt_{name} is {value!r}, but the request names no task")
    with pytest.raises(InvalidOptionError, match=message):
        parse_options({f"osdt_{name}": value}, base=DecodingOptions(), prefix="osdt_")
    assert getattr(parse_options({f"osdt_{name}": value}, base=BASE, prefix="osdt_"), name) == value
    assert getattr(parse_options({name: value}, base=DecodingOptions()), name) == value  # the operator's, for all tasks


@pytest.mark.parametrize(
    ("key", "value", "meant"),
    [
        ("osdt_treshold", 0.5, "osdt_threshold"),
        ("osdt_tasks", "a", "osdt_task"),
        ("osdt_policy", "ostd", "osdt"),
        ("osdt_infil", "a", "osdt_infill"),  # a field of requests that is no option
    ],
)
def test_a_word_that_is_nearly_right_is_told_the_right_one(key, value, meant):
    with pytest.raises(InvalidOptionError, match=f"did you mean '{meant}'"):
        parse_options({key: value}, base=BASE, prefix="osdt_")


@pytest.mark.parametrize(("given", "meant"), [(0, False), (1, True), (False, False), (True, True)])
def test_a_flag_may_arrive_as_zero_or_one(given, meant):
    assert parse_options({"osdt_recalibrate": given}, base=BASE, prefix="osdt_").recalibrate is meant


@pytest.mark.parametrize(
    ("key", "close"),
    [
        ("treshold", "osdt_threshold"),
        ("threshold", "osdt_threshold"),
        ("OSDT_threshold", "osdt_threshold"),
        ("osdt_", "osdt_task"),
        ("kv_transfer_params", None),
    ],
)
def test_an_unknown_name_is_refused_with_the_one_that_is_close_or_else_all(key, close):
    with pytest.raises(InvalidOptionError, match=r"`vllm-osdt options` explains them\.$") as error:
        parse_options({key: 0.5}, base=BASE, prefix="osdt_")
    assert repr(key) in str(error.value)
    named = set(re.findall(r"\bosdt_\w+", str(error.value))) - {key}
    known = {f"osdt_{name}" for name in (*OPTION_NAMES, *REQUEST_FIELDS)}
    assert named == ({close} if close else known)


def test_values_lie_over_the_base_and_leave_it_alone():
    base = parse_options({"threshold": 0.5, "cache_mode": "none"}, base=BASE)
    options = parse_options({"osdt_threshold": 0.7}, base=base, prefix="osdt_")
    assert (options.threshold, options.cache_mode, options.policy) == (0.7, "none", "osdt")
    assert base.threshold == 0.5 and BASE.threshold == 0.9


def test_options_survive_the_journey_through_extra_args():
    options = parse_options({"task": "gsm", "steps": 4, "recalibrate": 1}, base=BASE)
    assert DecodingOptions(**options.as_dict()) == options


def resolve_canvas(options, *, prompt_length, max_tokens, limits):
    """The resolved options, and the output tokens that the request may get."""
    resolved, found = find_canvas(options, prompt_length=prompt_length, max_tokens=max_tokens, limits=limits)
    assert found.length == resolved.gen_length and found.num_blocks == resolved.num_blocks
    assert found.start == (prompt_length // found.block_length * found.block_length if options.is_block_causal else
                           prompt_length)  # fmt: skip
    return resolved, found.max_output_end - prompt_length


def canvas(prompt_length, max_tokens, limits=LIMITS, **changes):
    options = parse_options(changes, base=BASE)
    return resolve_canvas(options, prompt_length=prompt_length, max_tokens=max_tokens, limits=Limits(**limits))


@pytest.mark.parametrize(
    ("max_tokens", "block_length", "gen_length"),
    [(1, 32, 32), (32, 32, 32), (33, 32, 64), (7, 7, 7), (8, 7, 14), (5, 1, 5)],
)
def test_the_canvas_is_max_tokens_in_whole_blocks(max_tokens, block_length, gen_length):
    options, output = canvas(10, max_tokens, block_length=block_length)
    assert (options.gen_length, output) == (gen_length, max_tokens)


@pytest.mark.parametrize(
    ("limits", "gen_length", "output"),
    [
        ({}, 190, 190),  # 256 do not fit 200 rows with a prompt of 10
        ({"open_ended": 96}, 96, 96),
        ({"open_ended": 100}, 128, 100),
        ({"open_ended": 96, "gen_length": 64}, 96, 96),
        ({"open_ended": 96, "gen_length": 160}, 160, 96),
        ({"max_model_len": 100}, 90, 90),
    ],
)
def test_without_max_tokens_the_output_is_the_checkpoints_or_what_fits(limits, gen_length, output):
    options, got = canvas(10, None, {**LIMITS, **limits})
    assert (options.gen_length, got) == (gen_length, output)


@pytest.mark.parametrize(
    ("limits", "max_tokens", "options", "first"),
    [
        ({}, None, {}, 128),
        ({}, 400, {}, 128),
        ({}, 100, {}, 128),
        ({}, 40, {}, 64),
        ({"usual_length": 96}, None, {}, 96),
        ({"usual_length": 90}, 400, {}, 96),
        ({"open_ended": 50}, None, {}, 64),
        ({"open_ended": 1000}, None, {}, 128),
        ({"usual_length": 96, "gen_length": 256}, 400, {}, 256),  # the operator's
        ({}, 400, {"gen_length": 320}, 320),  # a request's own is exact
        ({}, 416, {"policy": "fixed_steps", "steps": 26}, 416),  # steps are shared out among all blocks
        ({}, None, {"policy": "fixed_steps", "steps_per_block": 4}, 128),
    ],
)
def test_a_canvas_begins_as_long_as_the_model_is_used_to(limits, max_tokens, options, first):
    engine = {"max_model_len": 1024, "max_num_batched_tokens": 1024}
    found = find_canvas(
        parse_options(options, base=BASE), prompt_length=10, max_tokens=max_tokens, limits=Limits(**engine, **limits)
    )[1]
    assert found.end_at(10) == 10 + first
    assert found.end_at(10 + first - 1) == 10 + first
    for blocks in range(1, 4):
        assert found.end_at(10 + first + 32 * blocks - 1) == min(10 + first + 32 * blocks, found.end)
        assert found.end_at(10 + first + 32 * (blocks - 1)) == min(10 + first + 32 * blocks, found.end)


@pytest.mark.parametrize(
    ("max_tokens", "gen_length"), [(1, 96), (48, 96), (96, 96), (97, 128), (180, 190), (190, 190), (None, 190)]
)
def test_the_operators_canvas_is_the_shortest_and_cuts_no_output(max_tokens, gen_length):
    options, output = canvas(10, max_tokens, {**LIMITS, "gen_length": 96})
    assert (options.gen_length, output) == (gen_length, max_tokens or 190)


@pytest.mark.parametrize(
    ("gen_length", "max_tokens", "output"), [(64, 40, 40), (64, 64, 64), (64, 100, 64), (64, None, 64)]
)
def test_a_given_canvas_bounds_the_output(gen_length, max_tokens, output):
    options, got = canvas(10, max_tokens, gen_length=gen_length)
    assert (options.gen_length, got) == (gen_length, output)


@pytest.mark.parametrize("prompt_length", [1, 14, 31, 32, 33, 199])
@pytest.mark.parametrize(
    "limits",
    [{"max_model_len": 256, "max_num_batched_tokens": 200}, {"max_model_len": 200, "max_num_batched_tokens": 256}],
)
def test_every_output_that_fits_is_served_and_no_other(prompt_length, limits):
    for max_tokens in range(1, 260):
        if prompt_length + max_tokens <= 200:
            options, output = canvas(prompt_length, max_tokens, limits)
            assert output == max_tokens
            assert max_tokens <= options.gen_length <= 200 - prompt_length
            assert options.gen_length % 32 == 0 or prompt_length + options.gen_length == 200
            assert options.num_blocks == -(-max_tokens // 32)
        else:
            name = "max_model_len" if limits["max_model_len"] == 200 else "max_num_batched_tokens"
            words = f"max_tokens is {max_tokens}, but the prompt of {prompt_length} tokens leaves {200 - prompt_length}"
            with pytest.raises(InvalidOptionError, match=f"{words} of {name} 200"):
                canvas(prompt_length, max_tokens, limits)


def test_a_canvas_that_a_request_asks_for_fits_whole_or_is_refused():
    assert canvas(200 - 64, 64, gen_length=64)[0].gen_length == 64
    with pytest.raises(InvalidOptionError, match="gen_length is 64, but the prompt of 137 tokens leaves 63 of"):
        canvas(137, 63, gen_length=64)


def test_a_prompt_that_leaves_no_room_is_refused_with_both_numbers():
    with pytest.raises(InvalidOptionError, match=r"prompt has 200 tokens and leaves no room .* 200, which holds"):
        canvas(200, None)
    assert canvas(199, None) == (replace(BASE, gen_length=1), 1)


def test_a_canvas_of_broken_blocks_is_refused_with_the_next_whole_one():
    with pytest.raises(InvalidOptionError, match=r"gen_length is 40, no multiple of block_length 32; use 64"):
        canvas(10, 32, gen_length=40)


@pytest.mark.parametrize("steps", [1, 3, 65, 66])
def test_steps_that_do_not_fit_the_blocks_are_refused(steps):
    with pytest.raises(InvalidOptionError, match=rf"steps is {steps}; with 2 blocks of 32"):
        canvas(10, 64, policy="fixed_steps", steps=steps)


def test_steps_default_to_one_token_a_step_of_fixed_steps_and_to_no_quota_of_a_threshold():
    assert canvas(10, 64, policy="static_threshold")[0].steps is None
    assert canvas(10, 64, policy="static_threshold", steps=2)[0].steps == 2
    with pytest.raises(InvalidOptionError, match="steps is 3; with 2 blocks of 32"):
        canvas(10, 64, policy="static_threshold", steps=3)
    assert canvas(10, 64, policy="fixed_steps")[0].steps == 64
    assert canvas(10, 64, policy="fixed_steps", steps=2)[0].steps == 2
    assert canvas(10, 64, policy="osdt", steps=3)[0].steps == 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"factor": 0.5},
            "osdt_factor is 0.5, which policy 'osdt' does not use: leave it out, or send osdt_policy = 'factor'",
        ),
        ({"entropy": 0.5, "policy": "factor"}, "osdt_entropy is 0.5, which policy 'factor' does not use"),
        ({"delta": 0.5, "policy": "factor"}, "osdt_delta is 0.5, which policy 'factor' does not use"),
        (
            {"threshold": 0.5, "policy": "fixed_steps"},
            "send osdt_policy = 'osdt', 'static_threshold', ",
        ),
        ({"recalibrate": True, "policy": "joint_bound"}, "osdt_recalibrate is True, which policy 'joint_bound'"),
    ],
)
def test_a_request_is_told_of_options_that_its_policy_does_not_use(values, message):
    with pytest.raises(InvalidOptionError, match=re.escape(message)):
        parse_options({f"osdt_{name}": value for name, value in values.items()}, base=BASE, prefix="osdt_")
    assert parse_options(values, base=BASE)  # the operator's defaults are for whatever policy a request asks for


def test_steps_per_block_hold_whatever_the_number_of_blocks():
    for policy in ("fixed_steps", "static_threshold"):
        assert canvas(10, 64, policy=policy, steps_per_block=5)[0].steps == 10
        assert canvas(10, 20, policy=policy, steps_per_block=32)[0].steps == 32
    with pytest.raises(InvalidOptionError, match=r"steps_per_block is 33; with 1 block of 32 it must be .* 1 to 32"):
        canvas(10, 64, policy="fixed_steps", steps_per_block=33)
    assert canvas(10, 64, policy="osdt", steps_per_block=5)[0].steps is None


def test_a_request_replaces_the_operators_steps_of_either_kind():
    operator = parse_options({"steps_per_block": 4, "policy": "fixed_steps"}, base=BASE)
    asked = parse_options({"osdt_steps": 32}, base=operator, prefix="osdt_")
    assert (asked.steps, asked.steps_per_block) == (32, None)
    back = parse_options({"osdt_steps_per_block": 8}, base=asked, prefix="osdt_")
    assert (back.steps, back.steps_per_block) == (None, 8)
    assert parse_options({}, base=operator, prefix="osdt_").steps_per_block == 4
    with pytest.raises(InvalidOptionError, match="osdt_steps is 32 and osdt_steps_per_block 8; send one of them"):
        parse_options({"osdt_steps": 32, "osdt_steps_per_block": 8}, base=operator, prefix="osdt_")


def test_what_the_operator_meant_for_one_policy_is_not_another_ones():
    fixed = parse_options({"policy": "fixed_steps", "steps": 6}, base=BASE)
    assert parse_options({"osdt_policy": "static_threshold"}, base=fixed, prefix="osdt_").steps is None
    assert parse_options({"osdt_policy": "fixed_steps"}, base=fixed, prefix="osdt_").steps == 6
    assert parse_options({"osdt_policy": "osdt"}, base=fixed, prefix="osdt_").steps == 6  # which osdt does not look at
    edits = parse_options({"edit_threshold": 0.5}, base=BASE)
    assert parse_options({"osdt_policy": "entropy_bound"}, base=edits, prefix="osdt_").edit_threshold is None
    assert parse_options({"osdt_policy": "factor"}, base=edits, prefix="osdt_").edit_threshold == 0.5


def test_a_default_value_may_be_sent_with_any_policy():
    values = {"osdt_policy": "factor", "osdt_threshold": 0.9, "osdt_recalibrate": False}
    assert parse_options(values, base=BASE, prefix="osdt_").policy == "factor"


def test_one_option_switches_osdt_off():
    values = {
        "osdt_task": "a",
        "osdt_statistic": "q1",
        "osdt_num_calibration_requests": 1,
        "osdt_threshold_cap": 0.5,
        "osdt_granularity": "step_block",
    }
    assert parse_options({**values, "osdt_policy": "static_threshold"}, base=BASE, prefix="osdt_").threshold_cap == 0.5


@pytest.mark.parametrize("prefix", ["", "osdt_"])
def test_the_conformal_statistic_cannot_use_committed_positions_alone(prefix):
    with pytest.raises(InvalidOptionError, match=r"record is 'committed'; statistic \"conformal\".*another statistic"):
        parse_options({f"{prefix}record": "committed"}, base=BASE, prefix=prefix)
    paper = parse_options({"record": "committed", "statistic": "q1"}, base=BASE)
    with pytest.raises(InvalidOptionError, match="record is 'committed'"):
        parse_options({"statistic": "conformal"}, base=paper)


@pytest.mark.parametrize(
    ("values", "given", "needed"),
    [
        ({"num_calibration_requests": 48}, 48, 49),
        ({"num_calibration_requests": 1}, 1, 49),
        ({"risk": 0.01}, 64, 99),
        ({"risk": 0.1, "num_calibration_requests": 8}, 8, 9),
        ({"risk": 0.0001, "num_calibration_requests": 1024}, 1024, 9999),
    ],
)
def test_too_few_calibrations_for_the_risk_are_refused_with_how_many_it_takes(values, given, needed):
    words = (
        rf"num_calibration_requests is {given}; .*risk {values.get('risk', 0.02):g} needs at least {needed}: .*\"q1\""
    )
    with pytest.raises(InvalidOptionError, match=words):
        parse_options(values, base=BASE)
    assert (
        parse_options({**values, "statistic": "q1"}, base=BASE).num_calibration_requests == given
    )  # a statistic takes any number
    if needed <= 1024:
        assert (
            parse_options({**values, "num_calibration_requests": needed}, base=BASE).num_calibration_requests == needed
        )


def test_a_risk_that_one_request_can_meet_needs_one():
    assert parse_options({"risk": 0.5, "num_calibration_requests": 1}, base=BASE).risk == 0.5


def test_what_contradicts_itself_is_refused_over_the_servers_values_too():
    server = parse_options({"num_calibration_requests": 1, "statistic": "q1"}, base=BASE)
    with pytest.raises(InvalidOptionError, match="num_calibration_requests is 1"):
        parse_options({"osdt_statistic": "conformal"}, base=server, prefix="osdt_")


def test_options_of_the_operator_are_not_for_requests():
    for name in SERVER_OPTION_NAMES:
        with pytest.raises(InvalidOptionError, match=f"osdt_{name}.*operator.*--osdt-config"):
            parse_options({f"osdt_{name}": "/"}, base=DecodingOptions(), prefix="osdt_")
    assert parse_server_options({"profile_dir": "", "max_profiles": 3}) == ServerOptions("", 3)
    assert parse_server_options({}) == ServerOptions(None, 256)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("drift", "off"),
        ("drift", "warn"),
        ("drift_window", 8),
        ("drift_gap", 1),
        ("drift_gap", 1e-6),
        ("drift_cosine", 0),
        ("drift_cosine", 0.999),
        ("audit", 0),
        ("audit", 1),
        ("audit_agreement", 0.99),
        ("max_auto_tasks", 1),
        ("max_profiles", 1),
        ("profile_dir", None),
        ("load_aware", None),
    ],
)
def test_values_of_the_operator_at_the_edge_are_taken(name, value):
    assert getattr(parse_server_options({name: value}), name) == value


def test_bounds_of_the_load_are_read_from_a_mapping():
    assert parse_server_options({"load_aware": {"high": 2, "low": 1}}).load_aware == (1, 2)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"max_profiles": 0}, "max_profiles is 0; expected an integer of at least 1"),
        ({"max_profiles": "9"}, "max_profiles is '9'"),
        ({"profile_dir": 3}, "profile_dir is 3; expected the path of a folder"),
        ({"profile_dir": "a\nb"}, "profile_dir is"),
        ({"drift": "on"}, "drift is 'on'; expected one of recalibrate, warn, off"),
        ({"drift": False}, "drift is False; expected one of"),
        ({"drift_window": 7}, "drift_window is 7; expected an integer of at least 8"),
        ({"drift_window": 32.0}, r"drift_window is 32.0 \(float\)"),
        ({"drift_gap": 0}, r"drift_gap is 0; expected a number in \(0, 1\]"),
        ({"drift_gap": 1.5}, "drift_gap is 1.5"),
        ({"drift_cosine": 1}, r"drift_cosine is 1; expected a number in \[0, 1\)"),
        ({"drift_cosine": True}, "drift_cosine is True"),
        ({"audit": 1.1}, r"audit is 1.1; expected a number in \[0, 1\]"),
        ({"audit": True}, "audit is True"),
        ({"audit_agreement": 1}, r"audit_agreement is 1; expected a number in \(0, 1\)"),
        ({"max_auto_tasks": 0}, "max_auto_tasks is 0"),
        ({"max_auto_tasks": None}, "max_auto_tasks is None"),
        ({"load_aware": 5}, r'load_aware is 5; expected {"low": ROWS, "high": ROWS} with 1 <= low < high'),
        ({"load_aware": {"low": 8}}, r"load_aware is {'low': 8}"),
        ({"load_aware": {"low": 8, "high": 8}}, r"load_aware is {'low': 8, 'high': 8}"),
        ({"load_aware": {"low": 0, "high": 8}}, r"load_aware is {'low': 0, 'high': 8}"),
        ({"load_aware": {"low": 1.0, "high": 8}}, r"load_aware is {'low': 1.0, 'high': 8}"),
        ({"load_aware": {"low": True, "high": 8}}, r"load_aware is {'low': True, 'high': 8}"),
        ({"load_aware": {"low": 1, "high": 8, "top": 9}}, r"load_aware is .*'top': 9}"),
    ],
)
def test_bad_values_of_the_operator_are_refused(values, words):
    with pytest.raises(InvalidOptionError, match=words):
        parse_server_options(values)


BLOCK_CAUSAL = DecodingOptions(cache_mode="block", block_length=16)


@pytest.mark.parametrize(
    ("prompt_length", "max_tokens", "gen_length", "output"),
    [(32, 16, 16, 16), (32, 17, 32, 17), (20, 12, 16, 12), (20, 13, 32, 13), (5, 11, 16, 11), (40, None, 224, 216)],
)
def test_a_block_causal_canvas_begins_with_the_prompts_last_block(prompt_length, max_tokens, gen_length, output):
    options, got = resolve_canvas(
        BLOCK_CAUSAL, prompt_length=prompt_length, max_tokens=max_tokens, limits=Limits(256, 32)
    )
    assert (options.gen_length, got) == (gen_length, output)


@pytest.mark.parametrize(("prompt_length", "gen_length", "output"), [(40, 112, 96), (250, 16, 6)])
def test_a_block_causal_checkpoints_own_length_is_that_of_a_request_without_a_limit(prompt_length, gen_length, output):
    limits = Limits(256, 64, open_ended=96)
    options, got = resolve_canvas(BLOCK_CAUSAL, prompt_length=prompt_length, max_tokens=None, limits=limits)
    assert (options.gen_length, got) == (gen_length, output)


@pytest.mark.parametrize(
    ("options", "limits", "message"),
    [
        ({}, {"max_num_batched_tokens": 31}, "block_length is 16; a step computes up to two blocks"),
        ({}, {"max_model_len": 47}, "max_tokens is 32, but the prompt of 12 tokens leaves 20 of max_model_len 47"),
        ({"policy": "fixed_steps", "steps": 3}, {}, "steps is 3; with 2 blocks of 16 it must be a multiple of 2"),
    ],
)
def test_what_a_block_causal_canvas_cannot_be_is_refused(options, limits, message):
    limits = {"max_model_len": 256, "max_num_batched_tokens": 64, **limits}
    with pytest.raises(InvalidOptionError, match=re.escape(message)):
        resolve_canvas(
            DecodingOptions(**{**BLOCK_CAUSAL.as_dict(), **options}),
            prompt_length=12,
            max_tokens=32,
            limits=Limits(**limits),
        )


@pytest.mark.parametrize(("prompt_length", "steps"), [(32, 8), (40, 12), (12, 12)])
def test_steps_are_of_the_blocks_of_new_tokens(prompt_length, steps):
    options = DecodingOptions(**{**BLOCK_CAUSAL.as_dict(), "policy": "fixed_steps", "steps": 8})
    resolved, _ = resolve_canvas(options, prompt_length=prompt_length, max_tokens=32, limits=Limits(256, 64))
    assert resolved.steps == steps  # 4 a block, whatever the prompt shares with the first one


@pytest.mark.parametrize(("base", "cache"), [(BASE, "block"), (BLOCK_CAUSAL, "dual"), (BLOCK_CAUSAL, "none")])
def test_a_cache_mode_of_the_other_attention_is_refused(base, cache):
    with pytest.raises(InvalidOptionError, match=f"osdt_cache_mode is '{cache}'; this model's attention allows"):
        parse_options({"osdt_cache_mode": cache}, base=base, prefix="osdt_")


def test_profiles_tell_sub_blocks_and_editing_apart():
    plain = replace(BLOCK_CAUSAL, sub_block_length=8)
    edited = replace(BLOCK_CAUSAL, edit_threshold=0.5)
    keys = {one.cache_key for one in (BLOCK_CAUSAL, plain, replace(plain, sub_block_cache=True), edited)}
    assert keys == {"block", "block:8", "block:8c", "block:e0.5"}


@pytest.mark.parametrize(
    ("former", "name", "value"),
    [
        ("mode", "granularity", "step_block"),
        ("metric", "statistic", "q1"),
        ("calibrations", "num_calibration_requests", 80),
        ("cap", "threshold_cap", 0.5),
        ("cache", "cache_mode", "none"),
    ],
)
@pytest.mark.parametrize("prefix", ["", "osdt_"])
def test_a_name_of_the_last_release_is_taken_with_a_warning(former, name, value, prefix, caplog, monkeypatch):
    monkeypatch.setattr("vllm_osdt.options.parsing._warned", set())
    assert FORMER_NAMES[former] == name
    for _ in range(2):
        assert getattr(parse_options({prefix + former: value}, base=BASE, prefix=prefix), name) == value
    assert caplog.text.count(f"The option '{former}' is now called '{name}'") == 1  # in a log, not in every request's
    with pytest.raises(InvalidOptionError, match=f"{prefix}{former} and {prefix}{name} are the same option"):
        parse_options({prefix + former: value, prefix + name: value}, base=BASE, prefix=prefix)
    with pytest.raises(InvalidOptionError, match=f"{prefix}{former} is \\(\\)"):
        parse_options({prefix + former: ()}, base=BASE, prefix=prefix)
