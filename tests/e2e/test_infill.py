"""Infilling: pinned positions never change and holes are filled, as a plain loop fills them."""

import random
from collections.abc import Container
from functools import partial
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

import vllm_osdt
from tests.e2e.engine import assert_idle, generate, nfe, sampling, tokens
from tests.e2e.jobs import MIN_MARGIN
from tests.policies.test_early_exit import PlainExit, prophet_tau, sched_tau
from tests.policies.test_selection import Dimple, Streaming
from tests.reference.block_causal import ReferenceSDAR, decode_block_causal
from tests.reference.decode import Decoded, Shape, ThresholdRule, decode
from tests.reference.dream import ReferenceDream

pytestmark = pytest.mark.e2e

BLOCK, THRESHOLD = 8, 0.6
HOLE = -1
OPTIONS = {"policy": "static_threshold", "threshold": THRESHOLD, "block_length": BLOCK}


@pytest.fixture(scope="module")
def sdar_llm(golden_sdar, start_llm):
    return start_llm(golden_sdar.folder, max_num_seqs=16, max_model_len=256, block_size=32)


def rule() -> ThresholdRule:
    return above(THRESHOLD)


def above(threshold: float) -> ThresholdRule:
    return ThresholdRule(lambda block, step: threshold, strict=False)


def end_of(llm: Any) -> int:
    return llm.llm_engine.model_config.hf_config.eos_token_id


def without_ends(llm: Any, may_end: Container[int] = (), bias: float = 0.0) -> Shape:
    """A hole has no end but its own, except at places of open holes; ends are as much likelier as the bias says."""
    end = end_of(llm)

    def shape(row: torch.Tensor, before: list[int], index: int) -> torch.Tensor:
        row = row.clone()
        row[end] = row[end] + bias if index in may_end else -torch.inf
        return row

    return shape


def random_template(rng: random.Random, vocabulary: int, length: int) -> list[int]:
    """Runs of pinned tokens and holes; it begins with either."""
    template: list[int] = []
    while len(template) < length:
        run = rng.randint(1, 7)
        is_hole = not template or template[-1] != HOLE
        template += [HOLE] * run if is_hole else [rng.randrange(3, vocabulary) for _ in range(run)]
    if rng.random() < 0.5:
        template = template[::-1]
    return template[:length]


def parts_of(template: list[int]) -> list[Any]:
    """The template as the field ``osdt_infill`` has it."""
    parts: list[Any] = []
    for token in template:
        is_hole = token == HOLE
        if is_hole and parts and isinstance(parts[-1], int):
            parts[-1] += 1
        elif not is_hole and parts and isinstance(parts[-1], list):
            parts[-1].append(token)
        else:
            parts.append(1 if is_hole else [token])
    return parts


def pins_of(template: list[int]) -> dict[int, int]:
    return {place: token for place, token in enumerate(template) if token != HOLE}


def asked(**values: Any) -> SamplingParams:
    """Parameters with fields for infilling, by their whole names."""
    own = {name: values.pop(name) for name in list(values) if name.startswith(("osdt_", "diffusion_"))}
    params = sampling(values.pop("max_tokens", None), **OPTIONS, **values)
    params.extra_args |= own
    return params


def jobs_of(prompts: list[list[int]], vocabulary: int, fill: Any, ways: list[dict[str, Any]]) -> list[Any]:
    rng, found = random.Random(2), []
    for index, prompt in enumerate(prompts):
        template = random_template(rng, vocabulary, rng.choice([9, 16, 27, 40]))
        values = ways[index % len(ways)]
        done: Decoded = fill(prompt, template, **values)
        if HOLE in template and min(done.proposal_margin, done.rule_margin) > MIN_MARGIN:
            found.append((prompt, template, values, done))
    assert len(found) >= 12
    return found


def assert_filled(llm: Any, jobs: list[Any]) -> None:
    params = [asked(osdt_infill=parts_of(template), **values) for _, template, values, _ in jobs]
    got = generate(llm, [prompt for prompt, *_ in jobs], params)
    assert tokens(got) == [done.tokens for *_, done in jobs]
    for one, (_, template, _, _) in zip(got, jobs, strict=True):
        assert len(one.token_ids) == len(template) and one.finish_reason == "length"
        assert all(one.token_ids[place] == token for place, token in pins_of(template).items())
    for (prompt, _, _, done), one in list(zip(jobs, params, strict=True))[::4]:
        [alone] = generate(llm, [prompt], [one])
        assert (list(alone.token_ids), nfe(alone)) == (done.tokens, done.nfe)
    assert_idle(llm)


def test_templates_are_filled_as_by_the_plain_loop_where_positions_see_the_whole_canvas(
    golden_tasks, tasks_twin, tasks_llm
):
    def fill(prompt: list[int], template: list[int], cache_mode: str) -> Decoded:
        canvas = {"gen_length": len(template), "block_length": BLOCK, "cache_mode": cache_mode}
        return decode(tasks_twin, prompt, rule(), pinned=pins_of(template), shape=without_ends(tasks_llm), **canvas)

    prompts = [case["prompt_token_ids"] for case in golden_tasks.cases[:24]]
    ways = [{"cache_mode": mode} for mode in ("none", "prefix", "dual")]
    assert_filled(tasks_llm, jobs_of(prompts, golden_tasks.config["vocab_size"], fill, ways))


def test_templates_are_filled_as_by_the_plain_loop_where_logits_are_shifted(golden_dream, start_llm):
    """A block's first step decides its first position alone, or nothing where that is pinned."""
    network = ReferenceDream.load(golden_dream.folder)
    llm = start_llm(golden_dream.folder, max_num_seqs=32, max_model_len=512)

    def fill(prompt: list[int], template: list[int], cache_mode: str) -> Decoded:
        canvas = {"gen_length": len(template), "block_length": BLOCK, "cache_mode": cache_mode}
        return decode(network, prompt, rule(), pinned=pins_of(template), shape=without_ends(llm), **canvas)

    prompts = [case["prompt_token_ids"][:40] for case in golden_dream.cases[:24]]
    ways = [{"cache_mode": mode} for mode in ("none", "prefix", "dual")]
    assert_filled(llm, jobs_of(prompts, golden_dream.config["vocab_size"] - 2, fill, ways))


@pytest.mark.parametrize(
    ("options", "make_rule"),
    [
        ({"policy": "streaming", "threshold": 0.7, "relaxation": 0.9}, lambda: Streaming(0.7, 0.9)),
        ({"policy": "dimple", "threshold": 0.9, "steps_per_block": 4}, lambda: Dimple(0.9, 4)),
        (
            {"policy": "prophet", "commit_threshold": 0.9, "prophet_late": 1.0},
            lambda: PlainExit(prophet_tau(late=1.0), passes=above(0.9), is_last_one=False, length=BLOCK),
        ),
        (
            {"policy": "sched", "commit_threshold": 0.9, "sched_high": 3.0, "sched_low": 0.5},
            lambda: PlainExit(sched_tau("cosine", 3.0, 0.5), passes=above(0.9), is_last_one=True, length=BLOCK),
        ),
    ],
    ids=["streaming", "dimple", "prophet", "sched"],
)
def test_a_given_first_position_is_not_counted_as_decided(golden_dream, start_llm, options, make_rule):
    """Rules that read how much of a block is decided; its first step decides nothing here."""
    network = ReferenceDream.load(golden_dream.folder)
    llm = start_llm(golden_dream.folder, max_num_seqs=32, max_model_len=512)
    rng, asks, expected = random.Random(3), [], []
    for case in golden_dream.cases[:16]:
        template = [HOLE] * 3 * BLOCK
        for place in (0, BLOCK, 2 * BLOCK, rng.randrange(len(template))):
            template[place] = rng.randrange(3, golden_dream.config["vocab_size"] - 2)
        prompt, canvas = case["prompt_token_ids"][:40], {"gen_length": len(template), "block_length": BLOCK}
        shape, pinned = without_ends(llm), pins_of(template)
        done = decode(network, prompt, make_rule(), pinned=pinned, shape=shape, cache_mode="dual", **canvas)
        if min(done.proposal_margin, done.rule_margin) > MIN_MARGIN:
            params = sampling(None, **options, block_length=BLOCK, cache_mode="dual")
            params.extra_args["osdt_infill"] = parts_of(template)
            asks.append((prompt, params))
            expected.append((done.tokens, done.nfe))
    assert len(asks) >= 8
    got = generate(llm, [prompt for prompt, _ in asks], [params for _, params in asks])
    assert [(list(one.token_ids), nfe(one)) for one in got] == expected
    assert_idle(llm)


def test_every_hole_of_a_model_with_sub_blocks_is_filled_by_the_model(golden_fast_dllm_v2, start_llm):
    settings = {"hf_overrides": {"mask_token_id": 255}, "max_num_seqs": 16, "max_model_len": 256, "block_size": 32}
    llm = start_llm(golden_fast_dllm_v2.folder, **settings)
    prompt, parts = golden_fast_dllm_v2.cases[0]["prompt_token_ids"][:32], [[5, 6], 4, [7], 13]
    for values in ({}, {"sub_block_cache": True}, {"sub_block_length": 2}):
        params = sampling(None, policy="static_threshold", threshold=THRESHOLD, return_trace=True, **values)
        params.extra_args["osdt_infill"] = parts
        [one] = generate(llm, [prompt], [params])
        assert list(one.token_ids[:2]) == [5, 6] and one.token_ids[6] == 7 and len(one.token_ids) == 20
        confidence = vllm_osdt.describe(one)["trace"]["confidence"]
        assert [place for place, value in enumerate(confidence) if value is None] == [0, 1, 6]
    assert_idle(llm)


def test_a_pinned_end_token_ends_nothing(golden_tasks, tasks_llm):
    prompt, end = golden_tasks.cases[0]["prompt_token_ids"], tasks_llm.llm_engine.model_config.hf_config.eos_token_id
    [one] = generate(tasks_llm, [prompt], [asked(osdt_infill=[[5, 6], 3, [end], 4, [7, end]], ignore_eos=False)])
    assert len(one.token_ids) == 12 and one.finish_reason == "length"
    assert [place for place, token in enumerate(one.token_ids) if token == end] == [5, 11]


def test_templates_are_filled_as_by_the_plain_loop_within_blocks(golden_sdar, sdar_llm):
    network = ReferenceSDAR.load(golden_sdar.folder)
    loop = partial(decode_block_causal, network, block_length=BLOCK, shape=without_ends(sdar_llm))

    def keep_within_blocks(prompt: list[int], template: list[int]) -> list[int]:
        """Fill with text what follows a hole in a later block."""
        kept = list(template)
        for place, token in enumerate(template):
            position = len(prompt) + place
            is_cut = position % BLOCK == BLOCK - 1 and token == HOLE
            if is_cut:
                kept[place] = 5
        return kept

    prompts = [case["prompt_token_ids"] for case in golden_sdar.cases[:24]]
    rng, jobs = random.Random(4), []
    for prompt in prompts:
        template = keep_within_blocks(prompt, random_template(rng, golden_sdar.config["vocab_size"] - 2, 26))
        done = loop(prompt, rule(), max_tokens=len(template), pinned=pins_of(template))
        if min(done.proposal_margin, done.rule_margin) > MIN_MARGIN:
            jobs.append((prompt, template, {}, done))
    assert len(jobs) >= 12
    params = [asked(osdt_infill=parts_of(template)) for _, template, _, _ in jobs]
    got = tokens(generate(sdar_llm, [prompt for prompt, *_ in jobs], params))
    assert got == [done.tokens for *_, done in jobs]
    assert_idle(sdar_llm)


def test_text_behind_a_hole_in_a_later_block_is_refused_by_a_block_causal_model(golden_sdar, sdar_llm):
    prompt = golden_sdar.cases[0]["prompt_token_ids"]
    with pytest.raises(VLLMValidationError, match="later block of 8"):
        generate(sdar_llm, [prompt], [asked(osdt_infill=[2 * BLOCK, [5, 6]])])
    with pytest.raises(VLLMValidationError, match="later block of 8"):
        generate(sdar_llm, [prompt], [asked(osdt_suffix=[5, 6], max_tokens=2 * BLOCK)])
    inside = BLOCK - len(prompt) % BLOCK - 1
    if inside:
        [one] = generate(sdar_llm, [prompt], [asked(osdt_suffix=[5, 6], max_tokens=inside)])
        assert len(one.token_ids) == inside


def test_a_suffix_is_seen_and_not_output(golden_tasks, tasks_twin, tasks_llm):
    for case in golden_tasks.cases[:6]:
        prompt, suffix = case["prompt_token_ids"], [7, 8, 9, 10, 11]
        canvas = {"gen_length": 25, "block_length": BLOCK, "cache_mode": "none"}
        pinned = {20 + place: token for place, token in enumerate(suffix)}
        canvas["max_tokens"] = 20
        done = decode(tasks_twin, prompt, rule(), pinned=pinned, **canvas)
        [one] = generate(tasks_llm, [prompt], [asked(osdt_suffix=suffix, max_tokens=20, cache_mode="none")])
        assert list(one.token_ids) == done.tokens and len(one.token_ids) == 20


def test_a_seed_canvas_has_the_names_that_vllm_gives_it(golden_tasks, tasks_llm):
    """They are for canvases of the served length alone."""
    prompt, mask = golden_tasks.cases[0]["prompt_token_ids"], golden_tasks.config["mask_token_id"]
    template = [7, 8, HOLE, HOLE, HOLE, 9, HOLE, HOLE, 10, *[HOLE] * 22, 11]
    seed = [mask if token == HOLE else token for token in template]
    by_seed = asked(diffusion_seed_canvas=seed, diffusion_pinned=sorted(pins_of(template)))
    by_parts = asked(osdt_infill=parts_of(template))
    one, other = tokens(generate(tasks_llm, [prompt] * 2, [by_seed, by_parts]))
    assert one == other and [one[place] for place in pins_of(template)] == list(pins_of(template).values())


def test_text_is_pinned_as_it_stands_there_a_mask_token_included(tasks_llm, golden_tasks):
    tokenizer = tasks_llm.get_tokenizer()
    words = tokenizer.convert_ids_to_tokens([7, golden_tasks.config["mask_token_id"], 9])
    params = asked(osdt_infill=[" ".join(words), 3, words[0]])
    [one] = generate(tasks_llm, golden_tasks.cases[:1] and [golden_tasks.cases[0]["prompt_token_ids"]], [params])
    assert list(one.token_ids[:3]) == tokenizer.convert_tokens_to_ids(words)
    assert one.token_ids[6] == 7 and golden_tasks.config["mask_token_id"] not in one.token_ids[3:6]


def open_template(rng: random.Random, vocabulary: int) -> tuple[list[Any], list[int], list[set[int]]]:
    """Parts with open holes, the template, and the places of each open hole."""
    parts: list[Any] = []
    template: list[int] = []
    holes: list[set[int]] = []
    for index in range(rng.randrange(3, 7)):
        size = rng.randrange(1, 12)
        if index % 2:
            parts.append([rng.randrange(3, vocabulary) for _ in range(1 + size // 3)])
            template += parts[-1]
            continue
        is_open = rng.random() < 0.7
        parts.append({"max_tokens": size} if is_open else size)
        if is_open:
            holes.append(set(range(len(template), len(template) + size)))
        template += [HOLE] * size
    return parts, template, holes


def without_tails(tokens: list[int], holes: list[set[int]], end: int) -> list[int]:
    """A filled template without what open holes have from their ends on."""
    left_out: set[int] = set()
    for hole in holes:
        ends = [place for place in hole if tokens[place] == end]
        left_out |= {place for place in hole if ends and place >= min(ends)}
    return [token for place, token in enumerate(tokens) if place not in left_out]


def test_an_open_hole_ends_at_its_first_end_token(golden_tasks, tasks_twin, tasks_llm):
    rng, end = random.Random(7), end_of(tasks_llm)
    prompts, params, expected, whole = [], [], [], []
    for case in golden_tasks.cases[:24]:
        parts, template, holes = open_template(rng, golden_tasks.config["vocab_size"])
        bias, mode = rng.choice([0.0, 4.0]), rng.choice(["none", "prefix", "dual"])
        shape = without_ends(tasks_llm, set().union(*holes), bias)
        canvas = {"gen_length": len(template), "block_length": BLOCK, "cache_mode": mode, "shape": shape}
        done = decode(tasks_twin, case["prompt_token_ids"], rule(), pinned=pins_of(template), **canvas)
        if min(done.proposal_margin, done.rule_margin) > MIN_MARGIN:
            own = {"logit_bias": {end: bias}, "cache_mode": mode, "ignore_eos": False, "return_trace": True}
            params.append(asked(osdt_infill=parts, **own))
            prompts.append(case["prompt_token_ids"])
            expected.append(without_tails(done.tokens, holes, end))
            whole.append(done.tokens)
    got = generate(tasks_llm, prompts, params)
    assert tokens(got) == expected
    assert sum(len(one) < len(all_of_it) for one, all_of_it in zip(expected, whole, strict=True)) >= 8
    tokenizer = tasks_llm.get_tokenizer()
    for one in got:
        trace = vllm_osdt.describe(one)["trace"]
        assert one.finish_reason == "length" and one.text.split() == tokenizer.decode(one.token_ids).split()
        assert {len(trace[name]) for name in ("step", "forward", "confidence")} == {len(one.token_ids)}
        assert sum(block["num_tokens"] for block in trace["blocks"]) == len(one.token_ids)
    exact = [params.clone() for params in params]
    for one in exact:
        one.ignore_eos = True  # no end token ends anything
    for one, all_of_it in zip(generate(tasks_llm, prompts, exact), whole, strict=True):
        assert len(one.token_ids) == len(all_of_it) and end not in one.token_ids
    assert_idle(tasks_llm)


def test_an_open_hole_of_a_block_causal_model_ends_and_the_last_one_ends_the_answer(golden_sdar, sdar_llm):
    network, end = ReferenceSDAR.load(golden_sdar.folder), end_of(sdar_llm)
    prompts, params, expected, nfes = [], [], [], []
    for case in golden_sdar.cases[:16]:
        prompt = (case["prompt_token_ids"] * BLOCK)[: 2 * BLOCK]
        template = [5, HOLE, HOLE, HOLE, 6, HOLE, HOLE, 7, *[HOLE] * 40]
        holes = [{1, 2, 3}, set(range(8, 48))]
        shape = without_ends(sdar_llm, set().union(*holes), 6.0)
        done = decode_block_causal(
            network, prompt, rule(), block_length=BLOCK, max_tokens=48, pinned=pins_of(template), shape=shape
        )
        if min(done.proposal_margin, done.rule_margin) > MIN_MARGIN:
            parts = [[5], {"max_tokens": 3}, [6], 2, [7], {"max_tokens": 40}]
            prompts.append(prompt)
            params.append(asked(osdt_infill=parts, logit_bias={end: 6.0}, ignore_eos=False))
            expected.append(without_tails(done.tokens, holes, end))
            nfes.append(done.nfe)
    got = generate(sdar_llm, prompts, params)
    assert tokens(got) == expected and {one.finish_reason for one in got} == {"length"}
    assert sum(nfe(one) < nfe_of_all for one, nfe_of_all in zip(got, nfes, strict=True)) >= 4
    assert_idle(sdar_llm)


def test_a_suffix_lets_an_answer_end_early(golden_tasks, tasks_llm):
    end, suffix = end_of(tasks_llm), [7, 8, 9]
    prompts = [case["prompt_token_ids"] for case in golden_tasks.cases[:8]]
    params = asked(osdt_suffix=suffix, max_tokens=32, ignore_eos=False, logit_bias={end: 4.0})
    got = generate(tasks_llm, prompts, params)
    ended = [one for one in got if one.finish_reason == "stop"]
    assert len(ended) >= 4 and all(one.token_ids[-1] == end and end not in one.token_ids[:-1] for one in ended)
    assert all(len(one.token_ids) == 32 for one in got if one not in ended)
    [first] = generate(tasks_llm, prompts[:1], asked(osdt_suffix=suffix, max_tokens=32))
    stop = first.token_ids[5]
    [one] = generate(tasks_llm, prompts[:1], asked(osdt_suffix=suffix, max_tokens=32, stop_token_ids=[stop]))
    assert one.finish_reason == "stop" and list(one.token_ids) == list(first.token_ids[: len(one.token_ids)])
    assert_idle(tasks_llm)


def test_a_template_is_traced_and_calibrates_nothing(tasks_llm, golden_tasks):
    prompt = golden_tasks.cases[0]["prompt_token_ids"]
    params = asked(osdt_infill=[[7, 8], 14], return_trace=True)
    params.extra_args |= {"osdt_policy": "osdt", "osdt_task": "infilled"}
    del params.extra_args["osdt_threshold"]
    [one] = generate(tasks_llm, [prompt], [params])
    about = vllm_osdt.describe(one)
    assert not about["calibrating"] and about["trace"]["confidence"][:2] == [None, None]
    assert all(0 <= value <= 1 for value in about["trace"]["confidence"][2:])


REFUSED = [
    ({"osdt_infill": []}, "osdt_infill has"),
    ({"osdt_infill": [0, [5]]}, "osdt_infill has 0"),
    ({"osdt_infill": [[5, 6]]}, "has no hole"),
    ({"osdt_infill": [3, [500]]}, r"osdt_infill has \[500\]"),
    ({"osdt_infill": [3, {"max": 4}]}, "expected text or a list of token ids"),
    ({"osdt_infill": [{"max_tokens": 0}]}, "osdt_infill has {'max_tokens': 0}"),
    ({"osdt_infill": [{"max_tokens": 3, "x": 1}]}, "of an open one"),
    ({"osdt_infill": [{"max_tokens": 400}]}, "has 400 tokens or more, but max_model_len is 256"),
    ({"osdt_infill": [{"max_tokens": 4}], "min_tokens": 2, "ignore_eos": False}, "min_tokens cannot be sent"),
    ({"osdt_infill": [3, [5]], "osdt_suffix": [5]}, "send one of"),
    ({"diffusion_pinned": [0]}, "diffusion_seed_canvas"),
    ({"diffusion_seed_canvas": [5] * 32, "diffusion_pinned": [0]}, "not pinned"),
    ({"diffusion_max_steps": 3}, "diffusion_max_steps"),
    ({"osdt_infill": [3, [5]], "max_tokens": 2}, "max_tokens is 2"),
    ({"osdt_infill": [3, [5]], "gen_length": 8}, "gen_length cannot be sent with osdt_infill"),
    ({"osdt_infill": [3, [5]], "suffix_window": 1}, "suffix_window cannot be sent with osdt_infill"),
    ({"osdt_infill": [3, [5]], "logprobs": 1}, "logprobs cannot be sent"),
    ({"osdt_infill": [3, [5]], "stop_token_ids": [4]}, "stop_token_ids cannot be sent"),
    ({"osdt_infill": [400, [5]]}, "has 400 tokens or more, but max_model_len is 256"),
    ({"osdt_infill": [10**15]}, "max_model_len is 256"),
    ({"osdt_suffix": [5], "max_tokens": 10**15}, "max_model_len is 256"),
    ({"osdt_infill": [250, [5]]}, "has 251 tokens, but the prompt of"),
    ({"osdt_infill": [3, [5]], "allowed_token_ids": [0]}, "all of allowed_token_ids are stop tokens"),
]


@pytest.mark.parametrize(("values", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_a_template_that_makes_no_sense_is_refused(tasks_llm, golden_tasks, values, words):
    with pytest.raises(VLLMValidationError, match=words):
        generate(tasks_llm, [golden_tasks.cases[0]["prompt_token_ids"]], [asked(**values)])
    assert_idle(tasks_llm)
