"""Requests of every kind come, go and lose their pages at random steps; each has the tokens it has alone."""

import random

import pytest
from safetensors.torch import save_file
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

import vllm_osdt
from tests.conftest import Golden, save_text_tokenizer
from tests.e2e.engine import assert_idle, generate, sampling, scheduler
from tests.policies.test_learned_filter import weights_of
from tests.reference.block_causal_checkpoints import make_fast_dllm_v2_checkpoint, make_sdar_checkpoint
from tests.reference.llada import make_checkpoint

pytestmark = pytest.mark.e2e

NUM_REQUESTS = 100
PROFILE = {"osdt_block_length": 8, "osdt_statistic": "q1", "osdt_num_calibration_requests": 1, "osdt_threshold": 0.4}
GRAMMARS = [
    {"regex": r"[a-c]{2,30}-\d{3}"},
    {"choice": ["yes", "no", "maybe not"]},
    {"json": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}},
    {"grammar": 'root ::= "a" root "b" | "ab"'},
]
FILTERED = 8  # length of the blocks that the operator's filter is for
# Policies that look at more than a table, with options that matter for random weights.
FURTHER = [
    {"policy": "local_leap", "anchor_threshold": 0.5, "relaxed_threshold": 0.1},
    {"policy": "bacd", "min_threshold": 0.1, "max_threshold": 0.6},
    {"policy": "ete", "threshold": 0.4, "explore_rank": 0.5},
    {"policy": "multi_block", "part_length": 4, "max_entropy": 2.0},
    {"policy": "multi_block", "part_length": 4, "max_entropy": 2.0, "multi_block_rule": "release"},
    {"policy": "confidence_adaptive", "threshold": 0.2, "max_unmask": 3},
    {"policy": "confidence_adaptive", "adaptive_entropy": 2.0, "max_unmask": 3},
    {"policy": "entropy_threshold", "max_entropy": 2.0},
    {"policy": "nemotron_bound", "threshold": 0.5, "bound_min": 0.1},
    {"policy": "nemotron_bound", "threshold": 0.1, "bound_form": "product"},
    {"policy": "learned_filter", "filter_threshold": 0.4, "block_length": FILTERED},
    {"policy": "hierarchical", "run_threshold": 0.1},
    {"policy": "streaming", "threshold": 0.5},
    {"policy": "wedlm", "adjusted_entropy": 2.0},
    {"policy": "prophet", "prophet_early": 2.0, "prophet_late": 1.0, "exit_scope": "answer", "commit_threshold": 0.5},
    {"policy": "sched", "sched_high": 3.0, "sched_low": 1.0, "sched_patience": 1, "sched_max_change": 0.5},
    {"policy": "klass", "kl_confidence": 0.1, "kl_threshold": 0.5, "kl_steps": 1},
    {"policy": "less", "less_confidence": 0.1, "js_threshold": 0.5, "persistence": 1},
    {"policy": "ccd"},
    {"policy": "ccd", "ccd_window": 3},
    {"policy": "ccd", "ccd_rule": "release"},
    {"policy": "stable", "stable_confidence": 0.1},
]
WHOLE = [  # of whole blocks
    {"policy": "dimple", "threshold": 0.4},
    {"policy": "dimple", "threshold": 0.6, "fallback_rank": "margin"},
]
CUTTING = [
    {"policy": "cad_llm", "cad_first_block": 4, "cad_min_block": 2, "cad_threshold": 0.5, "cad_min_threshold": 0.1},
    {"policy": "cad_llm", "cad_first_block": 4, "cad_threshold": 0.8, "cad_min_threshold": 0.2, "cad_vocabulary": True},
    {"policy": "static_threshold", "adablock": True, "adablock_threshold": 0.05, "adablock_delimiters": [5, 9, 20, 41]},
]
# Little room, so that requests wait and are preempted: (checkpoint, engine, where pages are scarce).
FAMILIES = {
    "SDAR": (make_sdar_checkpoint, {"max_num_batched_tokens": 120, "long_prefill_token_threshold": 72}),
    "Fast-dLLM v2": (make_fast_dllm_v2_checkpoint, {"max_num_batched_tokens": 65, "scheduling_policy": "priority"}),
    "LLaDA": (make_checkpoint, {"max_num_batched_tokens": 176, "scheduling_policy": "priority"}),
}


def random_request(rng, family, beginnings, profile):
    """A prompt and its sampling parameters; policies that do not depend on what others calibrate."""
    block_length = rng.choice([4, 8, 16, 24, 32])
    options, own = {"block_length": block_length}, {}
    options["policy"] = rng.choice(["static_threshold", "factor", "joint_bound", "entropy_bound", "fixed_steps"])
    if rng.random() < 0.6:
        whole = [] if family == "Fast-dLLM v2" else WHOLE
        options |= rng.choice(FURTHER + whole + (CUTTING if family == "LLaDA" else []))
        block_length = options["block_length"]
        if options["policy"] not in ("klass", "ccd") and rng.random() < 0.3:
            options["credit"] = True
    elif options["policy"] == "static_threshold":
        options["threshold"] = rng.choice([0.1, 0.4, 0.9])
        if family != "Fast-dLLM v2" and rng.random() < 0.4:
            options["steps_per_block"] = rng.randrange(1, block_length + 1)
    if options["policy"] == "factor":
        options["factor"] = rng.choice([0.5, 2.0, 50.0])
    if options["policy"] == "entropy_bound":
        options["entropy"] = rng.choice([0.3, 4.0, 30.0])
    if family == "LLaDA":
        options["cache_mode"] = rng.choice(["none", "prefix", "dual"])
        options["suffix_window"] = rng.choice([None, None, 0, 1])
    if family == "Fast-dLLM v2":
        options["sub_block_length"] = rng.choice([2, 4, 8] if block_length % 8 == 0 else [2, 4])
        options["sub_block_cache"] = rng.random() < 0.5
    if rng.random() < 0.4:
        own = {"temperature": rng.choice([0.5, 1.0]), "seed": rng.randrange(9)}
    if rng.random() < 0.4:
        own["stop_token_ids"] = [rng.randrange(3, 99) for _ in range(rng.randrange(1, 12))]
    prompt = rng.choice(beginnings)[: rng.randrange(60)] + [rng.randrange(3, 99) for _ in range(rng.randrange(1, 20))]
    max_tokens = rng.randrange(1, 60)
    own |= random_parameters(rng, max_tokens, is_sampled="temperature" in own)
    options["return_trace"] = rng.random() < 0.3
    params = sampling(max_tokens, **options, **own)
    is_drafted = rng.random() < 0.3
    if is_drafted:
        drafts = {"osdt_draft": rng.choice(beginnings), "osdt_draft_ngram": 1}
        params.extra_args |= {**drafts, "osdt_draft_threshold": 0.0}
    if rng.random() < 0.15 and "stop_token_ids" not in own:
        params.max_tokens, params.min_tokens, params.logprobs = None, 0, None
        params.extra_args["osdt_infill"] = random_template(rng, family)
        params.extra_args.pop("osdt_suffix_window", None)  # a hole sees all that follows it
        params.ignore_eos = rng.random() < 0.3
        params.logit_bias = {0: 5.0}  # its end token
    elif not is_drafted and rng.random() < 0.3:
        params.structured_outputs = StructuredOutputsParams(**rng.choice(GRAMMARS))
        params.ignore_eos, params.allowed_token_ids = False, None
    elif profile is not None and rng.random() < 0.2:
        params.extra_args = {"osdt_task": "pinned", "osdt_profile": profile, **PROFILE}
    elif not is_drafted and options["policy"] != "learned_filter":  # whose blocks have one length
        params.extra_args |= random_switch(rng, family, options, params)
    return prompt, params


# Options that go with branches and verifications alike.
KEPT = ("block_length", "cache_mode", "suffix_window", "sub_block_length", "return_trace", "infill")
KEPT += ("answer_block_length", "think_end_token", "check_prompt")


def with_branches(index, family, params):
    """A request like another one, without what has no place beside verified drafts, and with those; and without them.

    The latter has the same tokens.
    """
    rng, params = random.Random(index), params.clone()
    params.extra_args = {name: one for name, one in params.extra_args.items() if name.removeprefix("osdt_") in KEPT}
    params.presence_penalty = params.frequency_penalty = 0.0
    params.repetition_penalty, params.logprobs, params.structured_outputs = 1.0, None, None
    length = params.extra_args.setdefault("osdt_block_length", 8)
    params.extra_args["osdt_steps_per_block"] = length // rng.choice([1, 1, 2])
    base = params.clone()
    base.extra_args = {**params.extra_args, "osdt_policy": "fixed_steps"}
    drafts = {"osdt_policy": "freedave", "osdt_freedave_drafts": rng.choice([2, 4, 8])}
    if rng.random() < 0.3 and family != "Fast-dLLM v2":
        drafts |= {"osdt_freedave_base": "threshold", "osdt_threshold": rng.choice([0.1, 0.3])}
        base = None
    params.extra_args |= drafts
    return params, base


def with_verification(index, params):
    """A request like another one, without what has no place beside verifications, and with those."""
    rng, params = random.Random(index), params.clone()
    params.extra_args = {name: one for name, one in params.extra_args.items() if name.removeprefix("osdt_") in KEPT}
    params.presence_penalty = params.frequency_penalty = 0.0
    params.repetition_penalty, params.structured_outputs = 1.0, None
    options = rng.choice(
        [
            {"router": "span", "min_span": rng.randrange(1, 4)},
            {"cost": rng.choice([0.5, 1.0, 1.5]), "max_span": rng.randrange(2, 9)},
            {"router": "hysteresis", "on": 1.3, "off": 0.2, "cost_per": "confident_position"},
            {"router": "bandit", "exploration": 0.5},
        ]
    )
    params.extra_args |= {f"osdt_verify_{name}": value for name, value in options.items()}
    params.extra_args |= {"osdt_policy": "s2d2", "osdt_threshold": rng.choice([0.1, 0.3, 0.9])}
    return params


def random_parameters(rng, max_tokens, *, is_sampled):
    """Parameters that change logits or ask for them; filters matter where a request samples."""
    own = {}
    if is_sampled:
        own |= rng.choice([{}, {"top_p": 0.8}, {"top_k": 5}, {"min_p": 0.1}, {"top_k": 20, "top_p": 0.9}])
    if rng.random() < 0.4:
        some = [rng.randrange(3, 99) for _ in range(8)]
        own |= rng.choice(
            [
                {"logit_bias": {some[0]: 3.0, some[1]: -100.0}},
                {"allowed_token_ids": some},
                {"repetition_penalty": 1.4},
                {"presence_penalty": 0.8, "frequency_penalty": 0.3},
                {"min_tokens": rng.randrange(max_tokens + 1)},
            ]
        )
    if rng.random() < 0.3:
        own["logprobs"] = rng.randrange(4)
    return own


def random_switch(rng, family, options, params):
    """Another block length behind a token, with a check prompt where there is room and no log probability."""
    block_length, smallest = options["block_length"], 1
    if family == "Fast-dLLM v2":
        smallest = options["sub_block_length"]
    elif options["policy"] == "cad_llm":
        smallest = 4
    lengths = [one for one in (1, 2, 4, 8) if smallest <= one <= block_length and block_length % one == 0]
    length = rng.choice([one for one in lengths if one % smallest == 0])
    stops = params.stop_token_ids or []
    found = {"osdt_answer_block_length": length}
    found["osdt_think_end_token"] = rng.choice([one for one in range(3, 99) if one not in stops])
    if params.logprobs is None and params.max_tokens > 3:
        found["osdt_check_prompt"] = [one for one in (99, 100, 9) if one not in stops]
    params.logit_bias = {**(params.logit_bias or {}), found["osdt_think_end_token"]: 4.0}
    return found


def random_template(rng, family):
    """Text and holes, some of them open; a hole is the last part where a model does not see later blocks."""
    text = [rng.randrange(3, 99) for _ in range(rng.randrange(1, 9))]
    if family == "LLaDA":
        return [rng.randrange(1, 9), text, {"max_tokens": rng.randrange(1, 15)}, text[:2]]
    return [text, rng.choice([rng.randrange(1, 25), {"max_tokens": rng.randrange(1, 25)}])]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_request_has_the_tokens_it_has_alone(tmp_path, start_llm, family):
    make, arguments = FAMILIES[family]
    engine = {"max_num_seqs": 16, "max_model_len": 160, "num_gpu_blocks_override": 20, **arguments}
    save_file(weights_of(FILTERED, 6), tmp_path / "filter.safetensors")
    config = {"osdt": {"profile_dir": str(tmp_path / "profiles"), "block_length": FILTERED}}
    config["osdt"]["filter_file"] = str(tmp_path / "filter.safetensors")
    folder = make(tmp_path / "model", seed=1)
    save_text_tokenizer(Golden(folder, []), tmp_path / "tokenizer")
    grammars = {"backend": "xgrammar", "disable_any_whitespace": True}
    engine |= {"tokenizer": str(tmp_path / "tokenizer"), "structured_outputs_config": grammars}
    llm = start_llm(folder, additional_config=config, **engine)
    rng = random.Random(31)
    beginnings = [[rng.randrange(3, 99) for _ in range(60)] for _ in range(3)]
    calibrating = sampling(32)
    calibrating.extra_args = {"osdt_task": "pinned", **PROFILE}
    generate(llm, [beginnings[0][:10]], calibrating)
    [profile] = [one["id"] for one in vllm_osdt.profiles(llm) if one["task"] == "pinned"]
    requests = [random_request(rng, family, beginnings, profile) for _ in range(NUM_REQUESTS)]
    bases = {}
    for index in range(0, NUM_REQUESTS, 4):
        prompt, params = requests[index]
        params, bases[index] = with_branches(index, family, params)
        requests[index] = prompt, params
    for index in range(2, NUM_REQUESTS, 4):
        if family != "LLaDA" and requests[index][1].structured_outputs is None:
            requests[index] = requests[index][0], with_verification(index, requests[index][1])
    preempted, preempt = [], scheduler(llm)._preempt_request
    scheduler(llm)._preempt_request = lambda *args, **kwargs: (preempted.append(1), preempt(*args, **kwargs))[1]
    answering, begin_answer = [], scheduler(llm)._begin_answer
    scheduler(llm)._begin_answer = lambda request: (answering.append(request), begin_answer(request))[1]
    waiting, pieces, finished, aborted = list(range(NUM_REQUESTS)), {}, {}, set()
    while waiting or llm.llm_engine.has_unfinished_requests():
        if waiting and rng.random() < 0.6:
            index = waiting.pop()
            prompt, params = requests[index][0], requests[index][1].clone()
            params.output_kind = rng.choice([RequestOutputKind.FINAL_ONLY, RequestOutputKind.DELTA])
            priority = rng.randrange(3) if "scheduling_policy" in engine else 0
            llm.llm_engine.add_request(str(index), {"prompt_token_ids": prompt}, params, priority=priority)
            if rng.random() < 0.1:  # at once, or in some steps
                aborted.add(index)
        if aborted and rng.random() < 0.2:
            llm.llm_engine.abort_request([str(rng.choice(sorted(aborted)))])
        if rng.random() < 0.02:
            scheduler(llm).reset_prefix_cache(reset_running_requests=True)
        for output in llm.llm_engine.step():
            parts = pieces.setdefault(int(output.request_id), [])
            parts.append(output.outputs[0])
            if output.finished:
                finished[int(output.request_id)] = parts
    assert_idle(llm)
    policies = {request.canvas_spec.options.policy for request in answering}
    assert len(answering) >= 5 and {"freedave", *(["s2d2"] if family != "LLaDA" else [])} <= policies
    assert preempted and finished.keys() | aborted == set(range(NUM_REQUESTS))
    has_ended = [
        parts[-1].finish_reason == "stop"
        for index, parts in finished.items()
        if requests[index][1].structured_outputs is not None
    ]
    assert len(has_ended) >= 6 and any(has_ended)
    failed = [requests[index][1] for index, parts in finished.items() if parts[-1].finish_reason == "error"]
    assert all(params.stop_token_ids for params in failed)  # a token that the grammar needs first may be one of them
    for index in sorted(finished.keys() - aborted):
        prompt, params = requests[index]
        [alone] = generate(llm, [prompt], params)
        assert what_came(finished[index]) == what_came([alone]), params
        if bases.get(index) is not None:
            [alone] = generate(llm, [prompt], bases[index])
            assert what_came(finished[index])[0] == what_came([alone])[0], params


def what_came(parts):
    """Tokens, log probabilities and trace of an answer, whole or in pieces."""
    tokens = [token for part in parts for token in part.token_ids]
    logprobs = [{token: one.logprob for token, one in place.items()} for part in parts for place in part.logprobs or []]
    trace = dict(vllm_osdt.describe(parts[-1]).get("trace", {}))
    trace.pop("forward", None)  # a request that is preempted takes more of them
    return tokens, logprobs, trace
