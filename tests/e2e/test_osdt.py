"""One-Shot Dynamic Thresholding in the engine equals a plain offline implementation, and keeps its books."""

from itertools import product

import pytest

import vllm_osdt
from tests.e2e.engine import assert_idle, drive, generate, nfe, registry, sampling, scheduler, submit, tokens
from tests.reference.decode import calibrate, decode, osdt, static_threshold
from vllm_osdt.calibration.profile import Setting

pytestmark = pytest.mark.e2e

GEN_LENGTH, BLOCK_LENGTH, THRESHOLD = 32, 8, 0.9
SETTINGS = list(product(("block", "step_block"), ("mean", "q1", "q2", "q3", "min_whisker"), ("masked", "committed")))
# Without slack a cutoff near 1 lies among the many confidences near 1, closer than rounding.
CAPS_AND_SLACKS = [(0.9, 0.1), (1.0, 0.3), (0.75, 0.2), (1.0, 0.1)]
# float32 sums in another order move a confidence by about 1e-6; a prompt whose path comes closer to a cutoff or a tie
# says nothing.
MIN_MARGIN = 1e-5
# One calibrating request and the paper's statistics; the conformal metric is in test_service.py.
ONE_SHOT = {"num_calibration_requests": 1, "statistic": "q1", "slack": 0.1}
OPTIONS = {
    "block_length": BLOCK_LENGTH,
    "gen_length": GEN_LENGTH,
    "threshold": THRESHOLD,
    "cache_mode": "dual",
    **ONE_SHOT,
}
Q1 = Setting(statistic="q1")


@pytest.fixture(scope="module")
def prompts(golden_tasks):
    distinct = {tuple(case["prompt_token_ids"]): None for case in golden_tasks.cases}
    return [list(prompt) for prompt in distinct]


@pytest.fixture(scope="module")
def offline(tasks_twin):
    """Decodes one request without vLLM."""

    def run(prompt, rule, **changes):
        return decode(
            tasks_twin,
            prompt,
            rule,
            **{"gen_length": GEN_LENGTH, "block_length": BLOCK_LENGTH, "cache_mode": "dual", **changes},
        )

    return run


@pytest.fixture(scope="module")
def both(prompts, offline, tasks_llm):
    """For every setting: what the engine and the offline decoder make of a calibration and of three later requests."""
    jobs = []
    for index, (mode, metric, record) in enumerate(SETTINGS):
        cap, slack = CAPS_AND_SLACKS[index % len(CAPS_AND_SLACKS)]
        first = prompts[index % len(prompts)]
        phase_1 = offline(first, static_threshold(THRESHOLD))
        table = calibrate(phase_1.record, mode, metric, record == "committed")
        later = []
        for prompt in prompts[index + 1 :] + prompts[: index + 1]:
            result = offline(prompt, osdt(table, cap, slack))
            if min(result.rule_margin, result.proposal_margin) > MIN_MARGIN:
                later.append((prompt, result))
            if len(later) == 3:
                break
        params = sampling(
            GEN_LENGTH,
            **{**OPTIONS, "statistic": metric, "slack": slack},
            task=f"{mode} {metric} {record}",
            mode=mode,
            record=record,
            threshold_cap=cap,
        )
        jobs.append((first, phase_1, later, params))
    calibrated = generate(tasks_llm, [job[0] for job in jobs], [job[3] for job in jobs])
    requests = [(prompt, params) for _, _, later, params in jobs for prompt, _ in later]
    decoded = iter(generate(tasks_llm, [r[0] for r in requests], [r[1] for r in requests]))
    return {
        setting: (completion, job[1], [(next(decoded), expected) for _, expected in job[2]])
        for setting, completion, job in zip(SETTINGS, calibrated, jobs, strict=True)
    }


@pytest.mark.parametrize(("mode", "metric", "record"), SETTINGS)
def test_engine_equals_the_offline_implementation(both, mode, metric, record):
    calibrated, phase_1, later = both[mode, metric, record]
    assert list(calibrated.token_ids) == phase_1.tokens and nfe(calibrated) == phase_1.nfe
    assert len(later) == 3
    for completion, expected in later:
        assert list(completion.token_ids) == expected.tokens
        assert nfe(completion) == expected.nfe


def test_the_settings_compared_are_not_all_one_static_threshold(both):
    counts = {sum(nfe(completion) for completion, _ in later) for _, _, later in both.values()}
    assert len(counts) >= 4, counts


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_every_cache_mode_keeps_its_own_profile(tasks_llm, prompts, offline, cache):
    params = sampling(
        GEN_LENGTH,
        **{**OPTIONS, "cache_mode": cache, "statistic": "q2"},
        task="by cache",
        granularity="step_block",
        threshold_cap=1.0,
    )
    phase_1 = offline(prompts[3], static_threshold(THRESHOLD), cache_mode=cache)
    rule = osdt(calibrate(phase_1.record, "step_block", "q2", False), 1.0, 0.1)
    expected = offline(prompts[4], rule, cache_mode=cache)
    assert min(expected.rule_margin, expected.proposal_margin) > MIN_MARGIN
    got = [generate(tasks_llm, [prompt], params)[0] for prompt in prompts[3:5]]
    assert tokens(got) == [phase_1.tokens, expected.tokens]
    assert [nfe(completion) for completion in got] == [phase_1.nfe, expected.nfe]


def test_a_later_request_may_have_more_blocks_than_the_profile(tasks_llm, prompts, offline):
    options = {"task": "short first", "granularity": "step_block", "threshold_cap": 1.0, "slack": 0.2}
    phase_1 = offline(prompts[0], static_threshold(THRESHOLD), gen_length=16)
    table = calibrate(phase_1.record, "step_block", "q1", False)
    assert len(table) == 2
    expected = offline(prompts[1], osdt(table, 1.0, 0.2), gen_length=48)
    assert min(expected.rule_margin, expected.proposal_margin) > MIN_MARGIN
    generate(tasks_llm, [prompts[0]], sampling(16, **{**OPTIONS, "gen_length": 16, **options}))
    [got] = generate(tasks_llm, [prompts[1]], sampling(48, **{**OPTIONS, "gen_length": 48, **options}))
    assert list(got.token_ids) == expected.tokens and nfe(got) == expected.nfe


def test_where_the_cap_binds_osdt_is_a_static_threshold(tasks_llm, prompts):
    generate(tasks_llm, prompts[:1], sampling(GEN_LENGTH, **OPTIONS, task="capped"))
    cap = 0.05  # below every confidence of a vocabulary whose best of 76 words leads
    [profile] = own_profiles(tasks_llm, "capped")
    assert profile.thresholds(Q1).values.min() > cap
    capped = generate(
        tasks_llm, prompts, sampling(GEN_LENGTH, **{**OPTIONS, "slack": 0.0}, task="capped", threshold_cap=cap)
    )
    static = sampling(GEN_LENGTH, **{**OPTIONS, "threshold": cap}, policy="static_threshold")
    expected = generate(tasks_llm, prompts, static)
    assert tokens(capped) == tokens(expected)
    assert [nfe(completion) for completion in capped] == [nfe(completion) for completion in expected]
    assert any(nfe(completion) == GEN_LENGTH // BLOCK_LENGTH for completion in capped)


def test_before_its_calibration_a_task_decodes_statically(tasks_llm, prompts):
    static = generate(tasks_llm, prompts[:6], sampling(GEN_LENGTH, **OPTIONS, policy="static_threshold"))
    params = [sampling(GEN_LENGTH, **OPTIONS, task=f"fresh {index}") for index in range(6)]
    assert tokens(generate(tasks_llm, prompts[:6], params)) == tokens(static)


def test_a_profile_can_be_read_right_after_its_request(tasks_llm, prompts):
    generate(tasks_llm, prompts[:1], sampling(GEN_LENGTH, **OPTIONS, task="read at once"))
    [profile] = [profile for profile in vllm_osdt.profiles(tasks_llm) if profile["task"] == "read at once"]
    assert profile["mean_confidence"][0][0] > 0


def own_profiles(llm, task):
    vllm_osdt.profiles(llm)  # waits until the worker has heard of the request's end
    return [profile for key, profile in registry(llm).profiles.items() if key.task == task]


def loose(task, **changes):
    """Options whose second phase differs visibly from the first: a low cap."""
    return sampling(GEN_LENGTH, **{**OPTIONS, "task": task, "threshold_cap": 0.3, "slack": 0.5, **changes})


@pytest.fixture(scope="module")
def telling(tasks_llm, prompts):
    """A prompt that the static threshold and :func:`loose` decode with different numbers of forwards; both numbers."""
    static = generate(tasks_llm, prompts, sampling(GEN_LENGTH, **OPTIONS, policy="static_threshold"))
    generate(tasks_llm, prompts[:1], loose("telling"))
    quick = generate(tasks_llm, prompts, loose("telling"))
    index = max(range(len(prompts)), key=lambda i: nfe(static[i]) - nfe(quick[i]))
    assert nfe(static[index]) > nfe(quick[index]) + 2
    return prompts[index], nfe(static[index]), nfe(quick[index])


def test_of_concurrent_first_requests_exactly_one_calibrates(tasks_llm, telling):
    prompt, slow, quick = telling
    req_ids = [submit(tasks_llm, prompt, loose("crowd")) for _ in range(5)]
    claims = set()

    def watch(step):
        claims.update(
            r for key, round_ in registry(tasks_llm)._rounds.items() if key.task == "crowd" for r in round_.req_ids
        )

    finished = drive(tasks_llm, watch)
    assert len(claims) == 1
    assert [nfe(finished[req_id]) for req_id in req_ids] == [slow] * 5
    assert [nfe(c) for c in generate(tasks_llm, [prompt] * 2, loose("crowd"))] == [quick] * 2
    assert len(own_profiles(tasks_llm, "crowd")) == 1


def test_two_tasks_at_once_keep_separate_profiles(tasks_llm, prompts, offline):
    pair = prompts[5], prompts[9]
    params = [
        sampling(GEN_LENGTH, **{**OPTIONS, "statistic": "mean"}, task=name, threshold_cap=1.0)
        for name in ("left", "right")
    ]
    generate(tasks_llm, pair, params)
    for name, prompt in zip(("left", "right"), pair, strict=True):
        [profile] = own_profiles(tasks_llm, name)
        record = offline(prompt, static_threshold(THRESHOLD)).record
        expected = [row[0] for row in calibrate(record, "block", "mean", False)]
        assert profile.thresholds(Setting(statistic="mean")).values[:, 0].tolist() == pytest.approx(
            expected, abs=MIN_MARGIN
        )
    left, right = (own_profiles(tasks_llm, name)[0].mean_confidence[0, 0] for name in ("left", "right"))
    assert abs(left - right) > 10 * MIN_MARGIN


def test_an_aborted_calibration_publishes_nothing_and_the_next_request_calibrates(tasks_llm, telling):
    prompt, slow, quick = telling
    req_id = submit(tasks_llm, prompt, loose("aborted"))

    def abort(step):
        if step == 2:
            assert any(key.task == "aborted" for key in registry(tasks_llm)._rounds)
            tasks_llm.llm_engine.abort_request([req_id])

    assert drive(tasks_llm, abort) == {}
    counts = [nfe(generate(tasks_llm, [prompt], loose("aborted"))[0]) for _ in range(2)]
    assert counts == [slow, quick]
    assert_idle(tasks_llm)


def test_recalibrate_replaces_the_profile(tasks_llm, prompts, telling):
    prompt, slow, _ = telling
    generate(tasks_llm, [prompts[0]], loose("renewed"))
    [before] = own_profiles(tasks_llm, "renewed")
    [again] = generate(tasks_llm, [prompt], loose("renewed", recalibrate=True))
    assert nfe(again) == slow
    generate(tasks_llm, [prompts[1]], loose("renewed"))
    [after] = own_profiles(tasks_llm, "renewed")
    assert after is not before and after.mean_confidence[0, 0] != before.mean_confidence[0, 0]


def test_a_failed_recalibration_keeps_the_old_profile(tasks_llm, prompts):
    generate(tasks_llm, [prompts[0]], loose("kept"))
    generate(tasks_llm, [prompts[1]], loose("kept"))
    [before] = own_profiles(tasks_llm, "kept")
    req_id = submit(tasks_llm, prompts[1], loose("kept", recalibrate=True))
    drive(tasks_llm, lambda step: tasks_llm.llm_engine.abort_request([req_id]) if step == 2 else None)
    generate(tasks_llm, [prompts[1]], loose("kept"))
    assert own_profiles(tasks_llm, "kept") == [before]


def test_a_request_shorter_than_a_block_does_not_calibrate(tasks_llm, telling):
    prompt, slow, quick = telling
    short = loose("short")
    short.max_tokens = BLOCK_LENGTH - 1
    generate(tasks_llm, [prompt], short)
    assert [nfe(generate(tasks_llm, [prompt], loose("short"))[0]) for _ in range(2)] == [slow, quick]


def test_a_preempted_calibration_makes_the_same_profile(tasks_llm, prompts):
    profiles = []
    for task, steps in (("undisturbed", ()), ("preempted", (1, 3, 6))):
        submit(tasks_llm, prompts[7], loose(task))

        def preempt(step, steps=steps):
            if step in steps:
                scheduler(tasks_llm).reset_prefix_cache(reset_running_requests=True)

        drive(tasks_llm, preempt)
        generate(tasks_llm, [prompts[7]], loose(task))
        profiles += own_profiles(tasks_llm, task)
    undisturbed, preempted = profiles
    left, right = undisturbed.record, preempted.record
    assert left.confidence == pytest.approx(right.confidence, abs=MIN_MARGIN, nan_ok=True)
    assert (left.committed == right.committed).all() and (left.wrong == right.wrong).all()


def test_calibration_stops_where_output_ends(tasks_llm, prompts, offline, golden_tasks):
    eos = golden_tasks.config["eos_token_id"]
    phase_1 = {i: offline(p, static_threshold(THRESHOLD), end_token_ids=(eos,)) for i, p in enumerate(prompts)}
    index = min(phase_1, key=lambda i: len(phase_1[i].tokens))
    assert phase_1[index].tokens[-1] == eos and len(phase_1[index].record) < GEN_LENGTH // BLOCK_LENGTH
    params = sampling(
        GEN_LENGTH, **OPTIONS, task="ends early", ignore_eos=False, granularity="step_block", threshold_cap=1.0
    )
    [first] = generate(tasks_llm, [prompts[index]], params)
    assert list(first.token_ids) == phase_1[index].tokens and nfe(first) == phase_1[index].nfe
    rule = osdt(calibrate(phase_1[index].record, "step_block", "q1", False), 1.0, 0.1)
    expected = [offline(prompt, rule, end_token_ids=(eos,)) for prompt in prompts[:8]]
    got = generate(tasks_llm, prompts[:8], params)
    rule_is_clear = rule.margin > MIN_MARGIN and min(e.proposal_margin for e in expected) > MIN_MARGIN
    assert rule_is_clear, "choose other prompts"
    assert tokens(got) == [e.tokens for e in expected]
    [profile] = own_profiles(tasks_llm, "ends early")
    assert profile.thresholds(Q1).values.shape[0] == len(phase_1[index].record)


def test_profiles_outlive_the_engine_and_the_memory(golden_tasks, start_llm, prompts, tmp_path):
    arguments = {"max_num_seqs": 4, "max_model_len": 256}
    arguments["additional_config"] = {"osdt": {"profile_dir": str(tmp_path), "max_profiles": 1}}

    def decode(llm, task, **changes):
        completions = generate(llm, prompts, loose(task, **changes))
        return tokens(completions), [nfe(completion) for completion in completions]

    first = start_llm(golden_tasks.folder, **arguments)
    generate(first, prompts[:1], loose("kept on disk"))
    calibrated = decode(first, "kept on disk")
    assert sum(calibrated[1]) < sum(decode(first, "any", policy="static_threshold")[1])
    generate(first, prompts[:1], loose("another"))  # its profile takes the other's place in memory
    [held] = vllm_osdt.profiles(first)
    assert held["task"] == "another"
    assert decode(first, "kept on disk") == calibrated
    restarted = start_llm(golden_tasks.folder, **arguments)
    assert decode(restarted, "kept on disk") == calibrated
    [loaded] = vllm_osdt.profiles(restarted)
    assert loaded["id"] == vllm_osdt.profiles(first)[0]["id"]
    assert sorted(path.name.split(".")[0] for path in tmp_path.rglob("*.json")) == ["another", "kept-on-disk"]


def test_a_model_of_other_weights_does_not_use_the_profile(golden_random, golden_tasks, start_llm, prompts, tmp_path):
    arguments = {"max_num_seqs": 4, "max_model_len": 256, "additional_config": {"osdt": {"profile_dir": str(tmp_path)}}}
    for golden in (golden_random, golden_tasks):
        llm = start_llm(golden.folder, **arguments)
        generate(llm, prompts[:1], loose("shared name"))
        assert len(vllm_osdt.profiles(llm)) == 1
    folders = [path.parent for path in tmp_path.rglob("*.json")]
    assert len(set(folders)) == 2
