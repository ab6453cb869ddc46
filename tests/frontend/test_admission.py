"""What the front end refuses before a request reaches the engine, and how it names tasks."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
from vllm import SamplingParams

from tests.calibration.records import recorded, same
from tests.engine.test_engine_config import CONFIG, configure
from vllm_osdt.calibration.profile import CACHE_KEY, ProfileKey
from vllm_osdt.calibration.store import open_store
from vllm_osdt.errors import InvalidOptionError
from vllm_osdt.frontend import admission, pins, sent
from vllm_osdt.frontend.admission import FrontEnd, admit
from vllm_osdt.frontend.auto_task import NUM_REQUESTS, prefix_names
from vllm_osdt.frontend.parameters import check_sampling_params
from vllm_osdt.messages import RESOLVED_KEY, RequestSpec
from vllm_osdt.options import UNDECIDED_TASK
from vllm_osdt.options.operator import default_decoding_options, server_options
from vllm_osdt.options.parsing import parse_options

KEY = ProfileKey("gsm", 8, "dual", 0.9)
SYSTEM = list(range(1, 17))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder with a config and nothing else."""
    folder = tmp_path_factory.mktemp("checkpoint")
    (folder / "config.json").write_text(json.dumps({**CONFIG, "block_length": KEY.block_length}))
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("profiles")


@pytest.fixture(scope="module")
def vllm_config(checkpoint, folder):
    return configure(checkpoint, additional_config={"osdt": {"profile_dir": str(folder)}})


@pytest.fixture(scope="module")
def profile(vllm_config):
    """The task's profile on disk."""
    made = recorded(KEY)
    open_store(server_options(vllm_config).profile_dir, vllm_config).save(made)
    return made


def request(token_ids=(1, 2, 3), adapter=None, **options):
    """A request as vLLM's input processor makes it."""
    return SimpleNamespace(
        prompt_token_ids=list(token_ids),
        lora_request=SimpleNamespace(lora_name=adapter) if adapter else None,
        resumable=False,
        sampling_params=SamplingParams(
            temperature=0.0, max_tokens=16, extra_args={f"osdt_{name}": value for name, value in options.items()}
        ),
    )


def resolve(front_end, vllm_config, token_ids=(1, 2, 3), adapter=None, **values):
    """The options of a request after the front end."""
    asked = request(token_ids, adapter, **values)
    options, *_ = front_end.check(asked.sampling_params, asked.sampling_params, len(token_ids), adapter or "")
    return front_end.name_task(options, asked.prompt_token_ids, adapter or "")


def refusal(front_end, vllm_config, **values):
    """Why a request is refused."""
    with pytest.raises(InvalidOptionError) as refused:
        resolve(front_end, vllm_config, **values)
    return str(refused.value)


def test_a_pin_that_holds_changes_no_option(vllm_config, profile):
    pin = {"task": "gsm", "profile": profile.profile_id}
    options = parse_options(pin, base=default_decoding_options(vllm_config))
    assert resolve(FrontEnd(vllm_config), vllm_config, **pin) == replace(options, gen_length=16)


def test_a_request_that_names_no_task_has_none(vllm_config):
    assert resolve(FrontEnd(vllm_config), vllm_config).task is None
    assert resolve(FrontEnd(vllm_config), vllm_config, adapter="lora").task is None
    assert resolve(FrontEnd(vllm_config), vllm_config, adapter="lora", task="gsm").task == "gsm@lora"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"policy": "factor"}, ["policy 'factor' uses none", "leave it out"]),
        ({"recalibrate": True}, ["recalibrate contradicts", "leave recalibrate out"]),
        ({"task": "auto"}, ["task 'auto' contradicts", "profile's own task"]),
        ({"task": "other"}, ["task 'other'", "no such profile", "profiles list", "profiles import"]),
        ({"profile": "0" * 16}, ["'0000000000000000'", "task 'gsm'", "no such profile", "profiles list"]),
        ({"block_length": 4}, ["block_length 8", "the request has 4", "osdt_block_length = 8"]),
        ({"cache_mode": "none"}, ["cache_mode 'dual'", "the request has 'none'", "osdt_cache_mode = 'dual'"]),
        ({"threshold": 0.8}, ["threshold 0.9", "the request has 0.8", "osdt_threshold = 0.9"]),
    ],
)
def test_a_pin_that_cannot_hold_is_refused_with_value_limit_and_remedy(vllm_config, profile, changes, words):
    message = refusal(FrontEnd(vllm_config), vllm_config, **{"task": "gsm", "profile": profile.profile_id, **changes})
    pinned = changes.get("profile", profile.profile_id)
    assert repr(pinned) in message
    assert all(word in message for word in words), message


def test_without_a_folder_there_is_nothing_to_pin(checkpoint):
    vllm_config = configure(checkpoint, additional_config={"osdt": {"profile_dir": ""}})
    message = refusal(FrontEnd(vllm_config), vllm_config, task="gsm", profile="0" * 16)
    assert "'0000000000000000'" in message and "in memory only" in message and "profile_dir" in message


def test_a_refused_pin_is_looked_for_again_and_found_once_it_is_there(vllm_config):
    front_end, late = FrontEnd(vllm_config), recorded(replace(KEY, task="late"))
    pin = {"task": "late", "profile": late.profile_id}
    assert "no such profile" in refusal(front_end, vllm_config, **pin)
    open_store(server_options(vllm_config).profile_dir, vllm_config).save(late)
    assert resolve(front_end, vllm_config, **pin).profile == late.profile_id


def test_a_replaced_profile_can_still_be_pinned(vllm_config):
    store, key = open_store(server_options(vllm_config).profile_dir, vllm_config), replace(KEY, task="replaced")
    for seed in (1, 2):
        store.save(recorded(key, seed))
    assert same(store.load(key), replace(recorded(key, 2), created=store.load(key).created))
    pin = recorded(key, 1).profile_id
    assert resolve(FrontEnd(vllm_config), vllm_config, task="replaced", profile=pin).profile == pin


def test_a_pin_is_read_once_and_only_so_many_are_remembered(vllm_config, profile, monkeypatch):
    front_end, reads = FrontEnd(vllm_config), []
    monkeypatch.setattr(pins, "MAX_PINS", 2)
    monkeypatch.setattr(
        type(front_end._store), "load_id", lambda self, *pin: reads.append(pin) or replace(profile, key=KEY)
    )
    ids = [f"{index:016x}" for index in (0, 0, 1, 2, 2, 1, 0)]
    for one in ids:
        resolve(front_end, vllm_config, task="gsm", profile=one)
    assert [one for _, one in reads] == [ids[0], ids[2], ids[3], ids[6]]
    assert len(front_end._pins._keys) == 2


def test_a_template_sees_all_of_itself_whatever_suffix_window_the_operator_has(checkpoint):
    windowed = configure(checkpoint, additional_config={"osdt": {"profile_dir": "", "suffix_window": 1}})
    front_end = FrontEnd(windowed)
    options = resolve(front_end, windowed)
    assert (options.suffix_window, options.cache_key) == (1, "dual:w1")
    assert re.fullmatch(CACHE_KEY, replace(options, refresh_interval=2, credit=True).cache_key)
    assert resolve(front_end, windowed, suffix_window=None).cache_key == "dual"
    assert resolve(front_end, windowed, infill=[3, [5]]).suffix_window is None
    message = refusal(front_end, windowed, infill=[3, [5]], suffix_window=1)
    assert message.startswith("suffix_window cannot be sent with osdt_infill: a hole sees all that follows it")


def test_a_named_task_keeps_its_name_and_other_policies_need_none(vllm_config):
    front_end = FrontEnd(vllm_config)
    assert resolve(front_end, vllm_config, task="gsm").task == "gsm"
    assert resolve(front_end, vllm_config, task="auto", policy="static_threshold").task == "auto"


def test_an_auto_task_is_undecided_first_and_then_told_by_adapter_and_prefix(vllm_config):
    front_end = FrontEnd(vllm_config)
    names = {}
    for index in range(2 * NUM_REQUESTS):
        for adapter in (None, "lora"):
            prompt = [*SYSTEM, 20 + index]
            options = resolve(front_end, vllm_config, prompt, adapter, task="auto")
            names.setdefault(adapter, []).append(options.task)
    assert [own[0] for own in names.values()] == [UNDECIDED_TASK] * 2
    assert [own[-1] for own in names.values()] == [prefix_names(SYSTEM)[-1], prefix_names(SYSTEM, "lora")[-1]]


def test_a_task_with_a_profile_on_disk_is_named_at_once_and_the_view_grows_stale(vllm_config, monkeypatch):
    now = 100.0
    monkeypatch.setattr(admission.time, "monotonic", lambda: now)
    front_end, prompt = FrontEnd(vllm_config), [*SYSTEM, 5, 6, 7]
    assert resolve(front_end, vllm_config, prompt, task="auto").task == UNDECIDED_TASK
    name = prefix_names(SYSTEM)[-1]
    open_store(server_options(vllm_config).profile_dir, vllm_config).save(recorded(replace(KEY, task=name)))
    assert resolve(front_end, vllm_config, prompt, task="auto").task == UNDECIDED_TASK  # the folder is not listed again
    now += FrontEnd.REFRESH_S + 0.1
    assert resolve(front_end, vllm_config, prompt, task="auto").task == name
    assert resolve(FrontEnd(vllm_config), vllm_config, prompt, task="auto").task == name
    open_store(server_options(vllm_config).profile_dir, vllm_config).remove(recorded(replace(KEY, task=name)))


def test_auto_needs_no_folder(checkpoint, tmp_path):
    for profile_dir in ("", str(tmp_path / "absent")):
        vllm_config = configure(checkpoint, additional_config={"osdt": {"profile_dir": profile_dir}})
        assert resolve(FrontEnd(vllm_config), vllm_config, task="auto").task == UNDECIDED_TASK


def test_the_operator_bounds_the_auto_tasks(checkpoint):
    vllm_config = configure(checkpoint, additional_config={"osdt": {"profile_dir": "", "max_auto_tasks": 1}})
    front_end = FrontEnd(vllm_config)
    names = {resolve(front_end, vllm_config, SYSTEM, task="auto").task for _ in range(3 * NUM_REQUESTS)}
    assert names == {UNDECIDED_TASK, prefix_names([])[0]}


def test_admission_leaves_the_resolved_options_in_the_request(vllm_config, profile):
    one = request(task="gsm", profile=profile.profile_id)
    admit(one, vllm_config)
    resolved = one.sampling_params.extra_args
    assert resolved.keys() == {RESOLVED_KEY}
    spec = RequestSpec.of(one.sampling_params)
    assert (spec.options.task, spec.options.profile) == ("gsm", profile.profile_id)
    assert spec.options.gen_length == spec.canvas.length == one.sampling_params.max_tokens == 16


@pytest.mark.parametrize(
    ("asked", "follows"),
    [
        ({}, True),
        ({"task": "gsm"}, True),
        ({"task": "gsm", "block_length": 8, "cache_mode": "none", "gen_length": 16}, True),
        ({"task": "gsm", "num_calibration_requests": 64}, True),
        ({"task": "gsm", "calibrations": 64}, True),
        ({"task": "gsm", "policy": "osdt"}, False),
        ({"task": "gsm", "threshold": 0.9}, False),
        ({"task": "gsm", "cap": 0.8}, False),
        ({"task": "gsm", "risk": 0.04}, False),
    ],
)
def test_a_request_that_names_no_policy_and_no_option_of_one_follows_its_tasks_choice(vllm_config, asked, follows):
    one = request(**asked)
    admit(one, vllm_config)
    assert RequestSpec.of(one.sampling_params).follows_choice is follows


@pytest.mark.parametrize(
    ("changed", "barred"),
    [
        ({}, ()),
        ({"logprobs": 1}, ("freedave",)),
        ({"repetition_penalty": 1.2}, ("freedave", "s2d2")),
    ],
)
def test_a_request_tells_which_policies_its_tasks_choice_may_not_be(vllm_config, changed, barred):
    one = request(task="gsm")
    for name, value in changed.items():
        setattr(one.sampling_params, name, value)
    admit(one, vllm_config)
    assert sorted(RequestSpec.of(one.sampling_params).barred) == sorted(barred)


@pytest.mark.parametrize(
    ("options", "follows"),
    [
        ({"task": "chat", "cache_mode": "none", "drift": "warn"}, True),
        ({"policy": "osdt"}, False),
        ({"slack": 0.1}, False),
    ],
)
def test_an_operator_that_names_a_policy_or_an_option_of_one_decides_for_all_requests(checkpoint, options, follows):
    vllm_config = configure(checkpoint, additional_config={"osdt": {"profile_dir": "", **options}})
    one = request(task="gsm")
    admit(one, vllm_config)
    assert RequestSpec.of(one.sampling_params).follows_choice is follows


def test_options_at_the_top_of_a_body_are_the_requests_own(vllm_config):
    one = request(task="gsm")
    asked = one.sampling_params.clone()
    setattr(asked, sent.SENT, sent.Sent(16, options={"osdt_threshold": 0.8}))
    admit(one, vllm_config, asked)
    assert RequestSpec.of(one.sampling_params).follows_choice is False


def test_a_refused_request_keeps_its_options(vllm_config):
    one = request(task="gsm", profile="0" * 16)
    before = dict(one.sampling_params.extra_args)
    with pytest.raises(InvalidOptionError, match="no such profile"):
        admit(one, vllm_config)
    assert one.sampling_params.extra_args == before


def test_every_engine_of_a_process_learns_its_own_tasks(checkpoint):
    configs = [configure(checkpoint, additional_config={"osdt": {"profile_dir": ""}}) for _ in range(2)]

    def name(vllm_config):
        one = request(SYSTEM, task="auto")
        admit(one, vllm_config)
        return RequestSpec.of(one.sampling_params).options.task

    learned = [name(configs[0]) for _ in range(NUM_REQUESTS)]
    assert learned[-1] == prefix_names(SYSTEM)[-1]
    assert name(configs[1]) == UNDECIDED_TASK


def test_a_clients_cache_salt_never_is_that_of_another_block_length(tmp_path):
    from tests.reference.block_causal_checkpoints import SDAR_FIELDS

    (tmp_path / "config.json").write_text(json.dumps({**SDAR_FIELDS, "block_size": 4}))
    config = configure(str(tmp_path), additional_config={"osdt": {"profile_dir": ""}})
    salts = {}
    for block_length in (4, 8, 16, 24):  # pages cut blocks of 24
        for salt in (None, "a", "osdt:8:", "osdt:8:a", "osdt:4:", "osdt:16:osdt:8:", "osdt::8:0", "20"):
            one = request(policy="static_threshold", block_length=block_length)
            one.cache_salt, one.request_id = salt, f"8:{len(salts)}"
            admit(one, config)
            salts[block_length, salt] = one.cache_salt
    assert len(set(salts.values())) == len(salts)
    assert salts[4, None] is None and salts[4, "a"] == "a"


def test_what_an_endpoint_makes_of_its_fields_is_named_as_the_client_sent_it():
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    asked = {"messages": [{"role": "user", "content": "a"}], "thinking_token_budget": 64, "max_tokens": 9}
    chat = ChatCompletionRequest(**asked, max_completion_tokens=9, osdt_task="quiz", other=1)
    told = sent.sent_by(chat)
    assert (told.max_tokens, told.max_tokens_name, told.options) == (9, "max_tokens", {"osdt_task": "quiz"})
    for names, word in (({}, "thinking_token_budget=64"), (sent.MESSAGES_NAMES, "thinking.budget_tokens=64")):
        token = sent.FIELD_NAMES.set(names)
        params = SamplingParams(thinking_token_budget=64)
        setattr(params, sent.SENT, sent.sent_by(chat))
        sent.FIELD_NAMES.reset(token)
        with pytest.raises(InvalidOptionError, match=rf"model: {word} \(leave it out\)"):
            check_sampling_params(params)
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    for fields, name, of_client in (
        ({"response_format": {"type": "json_object"}}, "structured_outputs", "response_format"),
        ({"tools": [tool], "tool_choice": "required"}, "structured_outputs", "tools"),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs", "structured_outputs"),
        ({"logprobs": True, "top_logprobs": 3}, "logprobs", "top_logprobs"),
    ):
        chat = ChatCompletionRequest(messages=asked["messages"], **fields)
        assert sent.sent_by(chat).name_of(name) == of_client


@pytest.mark.parametrize(
    ("asked", "bounded", "output", "canvas"),
    [
        (96, 96, 96, 96),
        (96, 50, 50, 56),  # the operator's max_new_tokens bounds every request, as for other models
        (None, 50, 50, 56),
        (None, 253, 253, 253),  # vLLM fills in the rest of the context: 256 do not fit
        (253, 253, 253, 253),
        (254, 253, None, "max_tokens is 254, but the prompt of 3 tokens leaves 253"),
        (300, 253, None, "max_tokens is 300, but the prompt of 3 tokens leaves 253"),
    ],
)
def test_what_vllm_makes_of_a_limit_is_told_from_what_was_asked(vllm_config, asked, bounded, output, canvas):
    one = request()
    one.sampling_params.max_tokens = bounded
    setattr(one.sampling_params, sent.SENT, sent.Sent(asked))
    if output is None:
        with pytest.raises(InvalidOptionError, match=canvas):
            admit(one, vllm_config, one.sampling_params)
        return
    admit(one, vllm_config, one.sampling_params)
    assert one.sampling_params.max_tokens == output
    assert RequestSpec.of(one.sampling_params).canvas.length == canvas


@pytest.mark.parametrize(("asked", "output"), [(None, 192), (100, 100), (200, 192)])
def test_a_canvas_of_the_requests_own_is_not_cut_by_the_checkpoints_length(tmp_path, asked, output):
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "block_length": 8}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"max_new_tokens": 96}))
    config = configure(str(tmp_path), additional_config={"osdt": {"profile_dir": ""}})
    one = request(gen_length=192)
    one.sampling_params.max_tokens = 96 if asked is None else asked  # as vLLM bounds it
    setattr(one.sampling_params, sent.SENT, sent.Sent(asked))
    admit(one, config, one.sampling_params)
    assert one.sampling_params.max_tokens == output
    assert RequestSpec.of(one.sampling_params).canvas.length == 192
