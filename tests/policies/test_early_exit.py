"""Prophet and SchED against their definitions, step by step and in an engine."""

import math

import pytest
import torch
from vllm.exceptions import VLLMValidationError

from tests.e2e.engine import drive, generate, nfe, sampling, scheduler, submit
from tests.policies.adjusted import make_step, next_step
from tests.policies.test_policies import schedule_of
from tests.reference.decode import best_first, calibrate, decode, fixed_steps, osdt, static_threshold
from vllm_osdt.errors import InvalidOptionError
from vllm_osdt.geometry import DecodeShape
from vllm_osdt.models.traits import Traits
from vllm_osdt.options import DecodingOptions
from vllm_osdt.options.family import validate_for_family
from vllm_osdt.options.parsing import parse_options
from vllm_osdt.policies import POLICIES, PositionLogits

MIN_MARGIN = 1e-5
CANVAS = {"gen_length": 48, "block_length": 16, "cache_mode": "dual"}


class PlainExit:
    """The published rules over the ordinary schedule, or over a threshold, of one request.

    Args:
        tau: The gap that is enough, by progress.
        steps: Of a block; None with a threshold.
        passes: What passes before an exit, where that is no schedule.
        num_blocks: Of the canvas, where an exit is for all of it.
        is_last_one: Whether progress is 1 in the last step, and not behind it.
        counts_itself: Whether the step in which it is asked for counts in it.
        patience, min_progress, max_change: As of SchED.
        length: Of a block.
        shares: Positions of each step, where those are not ``fixed_steps`` of a block.
        num_positions: Of the canvas, where that is not whole blocks.
        region: First position and number of those whose gap counts; None for all that are masked.
    """

    def __init__(self, tau, steps=None, passes=None, num_blocks=None, *, is_last_one, counts_itself=False, patience=0,
                 min_progress=0.0, max_change=1.0, length=16, shares=None, num_positions=None,
                 region=None):  # fmt: skip
        self.region = region
        self.shares, self.num_positions = shares, num_positions
        self.tau, self.steps, self.passes, self.num_blocks = tau, steps, passes, num_blocks
        self.is_last_one, self.length, self.patience = is_last_one, length, patience
        self.counts_itself, self.num_alone = counts_itself, 0
        self.min_progress, self.max_change = min_progress, max_change
        self.total, self.before, self.calm, self.is_over, self.margin, self.num_exits = 0, {}, 0, False, math.inf, 0

    def begin_block(self, first=0):
        self.total, self.before, self.calm = 0, {}, 0

    def see(self, step, rows, proposal, masked, left):
        self.left = left
        self.gaps = {place: -torch.diff(logits.double().topk(2)[0]).item() for place, logits in rows.items()}
        self.best = {place: logits.argmax().item() for place, logits in rows.items()}
        return {}

    def progress(self, block, step, masked):
        if self.steps is None:
            if self.num_blocks is not None:
                return 1 - self.left / (self.num_positions or self.num_blocks * self.total)
            return max(0.0, 1 - len(masked) / self.total)  # a sub-block may have more masks than the first one
        index, number = step, self.steps
        if self.num_blocks is not None:
            index, number = block * self.steps + step, self.num_blocks * self.steps
        if not self.is_last_one:
            return (index + self.counts_itself) / number
        return index / (number - 1) if number > 1 else 1.0

    def gap(self, block, masked):
        """The mean over the positions that count."""
        watched = list(masked)
        if self.region is not None:
            start, number = self.region
            watched = [i for i in masked if start <= block * self.length + i < start + number]
            if not watched:  # all are decided, or some are in a later block
                return math.inf if start + number <= (block + 1) * self.length else -math.inf
        return sum(self.gaps[i] for i in watched) / len(watched)

    def __call__(self, block, step, masked):
        self.total = self.total or len(masked) + self.num_alone
        progress = self.progress(block, step, masked)
        gap, tau = self.gap(block, masked), self.tau(progress)
        changed = sum(self.before.get(i) != self.best[i] for i in masked) / len(masked)
        self.before = dict(self.best)
        is_calm = progress >= self.min_progress and changed <= self.max_change
        self.calm = self.calm + 1 if is_calm else 0
        if not self.is_over:
            self.margin = min(self.margin, abs(gap - tau))
        exits = is_calm and self.calm > self.patience and gap >= tau
        if exits or self.is_over:
            self.num_exits += len(masked) > 1
            self.is_over = self.num_blocks is not None
            return sorted(masked)
        if self.passes is not None:
            chosen = self.passes(block, step, masked)
            self.margin = min(self.margin, self.passes.margin)
            return chosen
        chosen, ranking = fixed_steps(self.steps, self.length)(block, step, masked), best_first(masked)
        if self.shares is not None:
            chosen = ranking[: max([1, *self.shares[step : step + 1]])]
        if len(chosen) < len(ranking):
            # Of confidences near 1, whose rounding errors are smaller than others'.
            distance = masked[ranking[len(chosen) - 1]] - masked[ranking[len(chosen)]]
            self.margin = min(self.margin, 20 * distance)
        return chosen


def prophet_tau(early=7.5, middle=5.0, late=2.5):
    return lambda p: early if p < 0.33 else middle if p < 0.67 else late


def sched_tau(form, high=7.5, low=2.5, rate=4.0):
    share = {
        "linear": lambda p: 1 - p,
        "cosine": lambda p: (1 + math.cos(math.pi * p)) / 2,
        "exponential": lambda p: math.exp(-rate * p),
    }[form]
    return lambda p: low + (high - low) * share(p)


def decided(step, rule):
    """The positions that each request of a step unmasks by its rule and parameter."""
    found = []
    for score, parameter in zip(step.score.tolist(), step.parameter.tolist(), strict=True):
        masked = {place: one for place, one in enumerate(score) if one != -2.0}
        if rule.name == "TOP_K":
            found.append(set(best_first(masked)[: int(parameter)]))
        else:
            found.append({place for place, one in masked.items() if one >= parameter} or set(best_first(masked)[:1]))
    return found


def run(options, make_rule, seed, rows=3, width=12, vocabulary=7, answer_start=None):
    """Decide a block of random logits by a policy and by its twin; how many steps each request took."""
    generator, policy = torch.Generator().manual_seed(seed), POLICIES[options.policy]
    schedule = schedule_of(options.policy, options)
    if answer_start is not None:
        schedule = policy.schedule(options, DecodeShape(1, width, answer_start=answer_start))
    rules = [make_rule() for _ in range(rows)]
    masked = torch.ones(rows, width, dtype=torch.bool)
    masked[0, ::4] = False
    step, num_steps = make_step(torch.empty(rows, width), schedule, rows, memory_size=policy.memory_size), [0] * rows
    step = step._replace(num_left=torch.full((rows,), width))
    logits = 4 * torch.randn(rows * width, vocabulary, generator=generator)
    for number in range(width):
        # Sharper from step to step, and not always the same token.
        logits = 1.15 * logits + torch.randn(rows * width, vocabulary, generator=generator)
        confidence, token = logits.softmax(dim=1).max(dim=1)
        score = confidence.view(rows, width).masked_fill(~masked, -2.0)
        reading, steps = torch.zeros(rows * width, 4), torch.full((rows * width,), number)
        constants = step.constants.repeat_interleave(width, dim=0)
        memory = torch.zeros(rows * width, policy.memory_size)
        policy.read(PositionLogits(logits, None, token, confidence, constants, memory, reading, steps))
        reading = reading.view(rows, width, 4) * masked[:, :, None]
        parameter = torch.full((rows,), float(schedule.parameters[0, number]))
        step = next_step(step, score, step_index=torch.full((rows,), number), reading=reading, parameter=parameter,
                         token=token.view(rows, width), num_left=masked.sum(dim=1))  # fmt: skip
        policy.adjust(step)
        for row, (rule, got) in enumerate(zip(rules, decided(step, schedule.rule), strict=True)):
            left = {i: c for i, c in enumerate(score[row].tolist()) if masked[row, i]}
            if left:
                num_steps[row] += 1
                rule.see(number, {i: logits[row * width + i] for i in left}, {}, left, len(left))
                assert got == set(rule(0, number, left)), (row, number)
                masked[row, sorted(got)] = False
    assert not masked.any()
    return num_steps, rules


BLOCK = {"block_length": 12, "gen_length": 12, "steps": 6}


@pytest.mark.parametrize("seed", range(6))
def test_prophet_fills_as_published(seed):
    numbers = {"prophet_early": 5.0, "prophet_middle": 2.5, "prophet_late": 2.0}
    options = DecodingOptions(policy="prophet", **BLOCK, **numbers)
    num_steps, _ = run(options, lambda: PlainExit(prophet_tau(5.0, 2.5, 2.0), 6, is_last_one=False, length=12), seed)
    assert 1 < min(num_steps) < 6


def test_prophet_counts_the_step_itself_as_the_release_does():
    numbers = {"prophet_early": 8.0, "prophet_middle": 2.5, "prophet_late": 2.0}
    found = {}
    for progress, counts_itself in (("done", False), ("release", True)):
        options = DecodingOptions(policy="prophet", prophet_progress=progress, **BLOCK, **numbers)
        tau = prophet_tau(8.0, 2.5, 2.0)
        rule = lambda tau=tau, own=counts_itself: PlainExit(tau, 6, is_last_one=False, counts_itself=own, length=12)  # noqa: E731
        found[progress] = [one for seed in range(4) for one in run(options, rule, seed)[0]]
    assert all(map(int.__le__, found["release"], found["done"])) and found["release"] != found["done"]


@pytest.mark.parametrize("start", [0, 5, 10])
def test_a_gap_of_the_answer_alone_is_that_of_the_positions_behind_the_text(start):
    numbers = {"prophet_early": 5.0, "prophet_middle": 2.5, "prophet_late": 2.0}
    options = DecodingOptions(policy="prophet", prophet_region=4, **BLOCK, **numbers)
    everywhere = DecodingOptions(policy="prophet", **BLOCK, **numbers)
    tau, found = prophet_tau(5.0, 2.5, 2.0), []
    for seed in range(6):
        rule = lambda: PlainExit(tau, 6, is_last_one=False, length=12, region=(start, 4))  # noqa: E731
        found.append(run(options, rule, seed, answer_start=start)[0])
    plain = lambda: PlainExit(tau, 6, is_last_one=False, length=12)  # noqa: E731
    assert found != [run(everywhere, plain, seed)[0] for seed in range(6)]


@pytest.mark.parametrize("form", ["linear", "cosine", "exponential"])
@pytest.mark.parametrize(("patience", "min_progress", "max_change"), [(0, 0.0, 1.0), (1, 0.0, 0.5), (0, 0.5, 0.3)])
def test_sched_fills_as_published(form, patience, min_progress, max_change):
    gates = {"patience": patience, "min_progress": min_progress, "max_change": max_change}
    numbers = {"high": 10.0, "low": 4.0} | ({"rate": 2.0} if form == "exponential" else {})
    options = {f"sched_{name}": value for name, value in (gates | numbers | {"form": form}).items()}
    found = set()
    for seed in range(4):
        rule = lambda: PlainExit(sched_tau(form, **numbers), 6, is_last_one=True, length=12, **gates)  # noqa: E731
        found |= set(run(DecodingOptions(policy="sched", **BLOCK, **options), rule, seed)[0])
    assert min(found) < 6 and min(found) > 1


@pytest.mark.parametrize("scope", ["block", "answer"])
@pytest.mark.parametrize("policy", ["prophet", "sched"])
def test_beside_a_threshold_progress_is_the_committed_share(policy, scope):
    tau = {"prophet": prophet_tau(), "sched": sched_tau("cosine")}[policy]
    options = DecodingOptions(policy=policy, block_length=12, gen_length=12, commit_threshold=0.999, exit_scope=scope)
    for seed in range(4):
        run(options, lambda: PlainExit(tau, passes=static_threshold(0.999), is_last_one=True), seed, rows=1 + seed)


def test_positions_of_one_token_say_nothing_of_the_others():
    options = DecodingOptions(policy="prophet", block_length=3, gen_length=3, steps=3)
    policy, schedule = POLICIES["prophet"], schedule_of("prophet", options)
    step = make_step(torch.rand(2, 3), schedule, 2)
    logits = torch.tensor([[0.0, 1.0, -1.0]]).repeat(6, 1)
    logits[[0, 3, 4, 5], 1:] = -torch.inf  # all of the second request's have one token left
    fields = torch.zeros(6, dtype=torch.int64), torch.rand(6), torch.zeros(6, 8), torch.zeros(6, 0)
    reading = torch.zeros(6, 4)
    policy.read(PositionLogits(logits, None, *fields, reading, torch.zeros(6, dtype=torch.int64)))
    assert reading[:, :2].tolist() == [[0, 0], [1, 1], [1, 1], [0, 0], [0, 0], [0, 0]]
    step = step._replace(reading=reading.view(2, 3, 4))
    policy.adjust(step)
    assert step.parameter.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"policy": "sched", "prophet_region": 5}, "which policy 'sched' does not use"),
        ({"policy": "sched", "sched_low": 8.0}, "sched_low is 8, above sched_high 7.5; lower it"),
        ({"policy": "sched", "sched_rate": 2.0}, "which says nothing without osdt_sched_form = 'exponential'"),
        ({"policy": "sched", "commit_threshold": 0.9, "calibrated": True, "task": "a"}, "send one of them"),
        ({"policy": "prophet", "calibrated": True}, "names no task"),
        ({"policy": "prophet", "sched_high": 9.0}, "which policy 'prophet' does not use"),
        (
            {"policy": "prophet", "prophet_progress": "release", "commit_threshold": 0.9},
            "which means nothing beside the other options of policy 'prophet'",
        ),
    ],
)
def test_what_says_nothing_is_refused(values, words):
    asked = {"osdt_" + name: value for name, value in values.items()}
    with pytest.raises(InvalidOptionError, match=words):
        parse_options(asked, base=DecodingOptions(), prefix="osdt_")


def test_steps_beside_a_threshold_are_refused_where_sub_blocks_take_as_many_as_they_need():
    traits = Traits(block_length=32, mask_token_id=1, is_block_causal=True, sub_block_length=8)
    base = {"policy": "sched", "steps": 32, "cache_mode": "block"}
    assert validate_for_family(DecodingOptions(**base), traits).steps == 32
    with pytest.raises(InvalidOptionError, match="with policy 'sched' this model's sub-blocks"):
        validate_for_family(DecodingOptions(**base, commit_threshold=0.9), traits)


def cases():
    """Options of the engine, and the twin of a request with them."""
    prophet = {"prophet_early": 5.0, "prophet_middle": 4.0, "prophet_late": 3.0}
    tau = prophet_tau(5.0, 4.0, 3.0)
    yield {"policy": "prophet", "steps_per_block": 8, **prophet}, lambda: PlainExit(tau, 8, is_last_one=False)
    yield (
        {"policy": "prophet", "steps_per_block": 8, "exit_scope": "answer", "prophet_progress": "release", **prophet},
        lambda: PlainExit(tau, 8, num_blocks=3, is_last_one=False, counts_itself=True),
    )
    gates = {"patience": 1, "min_progress": 0.05, "max_change": 0.4}
    options = {f"sched_{name}": value for name, value in ({"high": 4.0, "low": 1.0} | gates).items()}
    yield (
        {"policy": "sched", "commit_threshold": 0.98, **options},
        lambda: PlainExit(sched_tau("cosine", 4.0, 1.0), passes=static_threshold(0.98), is_last_one=True, **gates),
    )
    yield (
        {"policy": "sched", "commit_threshold": 0.95, "exit_scope": "answer", "sched_form": "linear"},
        lambda: PlainExit(sched_tau("linear"), passes=static_threshold(0.95), num_blocks=3, is_last_one=True),
    )


@pytest.mark.e2e
def test_an_engine_decodes_as_the_plain_loop(tasks_llm, tasks_twin, golden_tasks):
    prompts = [case["prompt_token_ids"] for case in golden_tasks.cases[:8]]
    asked, expected = [], []
    for options, make_rule in cases():
        rules = [make_rule() for _ in prompts]
        expected += [decode(tasks_twin, prompt, rule, **CANVAS) for prompt, rule in zip(prompts, rules, strict=True)]
        asked += [sampling(48, **options, **CANVAS)] * len(prompts)
        assert sum(rule.num_exits for rule in rules) > 0
    told = [i for i, one in enumerate(expected) if min(one.rule_margin, one.proposal_margin) > MIN_MARGIN]
    assert all(len([i for i in told if i // len(prompts) == case]) >= 5 for case in range(4))
    got = generate(tasks_llm, prompts * 4, asked)
    assert [list(got[i].token_ids) for i in told] == [expected[i].tokens for i in told]
    assert [nfe(got[i]) for i in told] == [expected[i].nfe for i in told]

    ids = {
        submit(tasks_llm, prompts[i % len(prompts)], asked[i]): i for i in told if asked[i] is asked[2 * len(prompts)]
    }

    def preempt(step):
        if step == 3:  # in the middle of a block, which begins again: what it has seen is forgotten
            assert scheduler(tasks_llm).reset_prefix_cache(reset_running_requests=True)

    finished = drive(tasks_llm, preempt)
    assert {i: list(finished[req_id].token_ids) for req_id, i in ids.items()} == {
        i: expected[i].tokens for i in ids.values()
    }


@pytest.mark.e2e
def test_an_engine_watches_the_answer_behind_given_text(tasks_llm, tasks_twin, golden_tasks):
    """The text ends in the middle of a block, at the end of one, and shortly before that."""
    end, tau = tasks_llm.llm_engine.model_config.hf_config.eos_token_id, prophet_tau(6.0, 4.0, 2.0)
    own = {"policy": "prophet", "prophet_region": 5, "prophet_early": 6.0, "prophet_middle": 4.0, "prophet_late": 2.0}
    text, asked, expected, exits = [7, 8], [], [], [0, 0, 0]

    def shape(row, before, index):
        row[end] = -torch.inf
        return row

    for number, case in enumerate(golden_tasks.cases[:30]):
        kind, start, prompt = number % 3, (22, 32, 30)[number // 3 % 3], case["prompt_token_ids"]
        length, scope = ((48, "block"), (16, "block"), (16, "answer"))[kind]
        canvas = {"block_length": length, "cache_mode": "none"}
        num_blocks = 48 // length if scope == "answer" else None
        rule = PlainExit(tau, length // 2, num_blocks=num_blocks, is_last_one=False, length=length, region=(start, 5))
        pinned = {start - 2 + place: token for place, token in enumerate(text)}
        done = decode(tasks_twin, prompt, rule, gen_length=48, pinned=pinned, shape=shape, **canvas)
        exits[kind] += rule.num_exits
        if min(done.rule_margin, done.proposal_margin) > MIN_MARGIN:
            params = sampling(None, **own, steps_per_block=length // 2, exit_scope=scope, **canvas)
            params.extra_args["osdt_infill"] = [start - 2, text, 48 - start]
            asked.append((prompt, params))
            expected.append((done.tokens, done.nfe))
    assert len(asked) >= 12 and all(exits)
    got = generate(tasks_llm, [prompt for prompt, _ in asked], [params for _, params in asked])
    assert [(list(one.token_ids), nfe(one)) for one in got] == expected


@pytest.mark.e2e
def test_an_answer_without_text_before_it_is_not_watched(tasks_llm, golden_tasks):
    prompt = golden_tasks.cases[0]["prompt_token_ids"]
    for template in ({}, {"osdt_infill": [8, [7, 8]]}):
        params = sampling(None, policy="prophet", prophet_region=5, block_length=16)
        params.extra_args |= template
        with pytest.raises(VLLMValidationError, match="gives no text that a hole follows"):
            generate(tasks_llm, [prompt], [params])


@pytest.mark.e2e
def test_an_exit_beside_thresholds_of_a_profile(tasks_llm, tasks_twin, golden_tasks):
    prompts = [case["prompt_token_ids"] for case in golden_tasks.cases[:12]]
    first = decode(tasks_twin, prompts[0], static_threshold(0.9), **CANVAS)
    table = calibrate(first.record, "block", "q1", False)
    rules = [PlainExit(prophet_tau(), passes=osdt(table, 1.0, 0.1), is_last_one=True) for _ in prompts]
    expected = [decode(tasks_twin, prompt, rule, **CANVAS) for prompt, rule in zip(prompts, rules, strict=True)]
    told = [i for i, one in enumerate(expected) if min(one.rule_margin, one.proposal_margin) > MIN_MARGIN]
    assert len(told) >= 7 and sum(rule.num_exits for rule in rules) > 0
    one_shot = {"num_calibration_requests": 1, "statistic": "q1", "slack": 0.1, "threshold_cap": 1.0}
    params = sampling(48, policy="prophet", calibrated=True, task="exits", **one_shot, **CANVAS)
    [calibrating] = generate(tasks_llm, prompts[:1], params)
    assert list(calibrating.token_ids) == first.tokens and nfe(calibrating) == first.nfe  # the static threshold alone
    got = generate(tasks_llm, prompts, params)
    assert [list(got[i].token_ids) for i in told] == [expected[i].tokens for i in told]
    assert [nfe(got[i]) for i in told] == [expected[i].nfe for i in told]
