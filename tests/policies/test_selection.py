"""Policies that choose by the confidences or entropies of one step, against their definitions.

Step by step on random scores, and in an engine beside each other against the plain loop.
"""

from collections.abc import Callable
from itertools import groupby
from math import prod

import pytest
import torch

from csrc_triton import Rules
from csrc_triton.types import NO_CONFIDENCE
from tests.e2e.engine import drive, generate, nfe, sampling, scheduler, submit
from tests.policies.adjusted import chosen, make_step, next_step
from tests.policies.test_policies import unmask_blocks
from tests.policies.test_stability import read
from tests.reference.decode import best_first, decode
from tests.reference.llada import ReferenceLLaDA
from vllm_osdt.errors import InvalidOptionError
from vllm_osdt.geometry import DecodeShape
from vllm_osdt.models.traits import Traits
from vllm_osdt.options import DecodingOptions
from vllm_osdt.options.family import validate_for_family
from vllm_osdt.options.parsing import parse_options
from vllm_osdt.policies import POLICIES

WIDTH = 16
CANVAS = {"gen_length": 32, "block_length": WIDTH, "cache_mode": "dual"}
END = 7  # ends the output in tests without an engine


class Plain:
    """What the published rules have in common: they look at one step, and say how clear its choice was."""

    by_entropy = False

    def __init__(self):
        self.margin, self.proposals, self.logits, self.left = float("inf"), {}, {}, 0
        self.num_alone = 0

    def see(self, step, logits, proposals, masked, left):
        self.logits, self.proposals, self.left = logits, proposals, left
        return {}

    def __call__(self, block, step, masked):
        self.as_seen = masked
        chosen, generator = self.choose(step, masked), torch.Generator().manual_seed(0)
        for _ in range(2):  # as an engine's rounding may move them; a confidence near 0 or 1 hardly moves
            moved = dict(zip(masked, torch.rand(len(masked), generator=generator).mul(2).sub(1).tolist(), strict=True))
            size = {i: 1e-4 if self.by_entropy else 1e-4 * c * (1 - c) + 1e-7 for i, c in masked.items()}
            other = self.choose(step, {i: c + moved[i] * size[i] for i, c in masked.items()})
            if set(other) != set(chosen):
                self.margin = 0.0
        return sorted(chosen)


class Adaptive(Plain):
    def __init__(self, tau, most=4, cap=None, end_after=0.0, ends=(), total=32, by_entropy=False):
        super().__init__()
        self.tau, self.most, self.cap, self.by_entropy = tau, most, cap, by_entropy
        self.end_after, self.ends, self.total = end_after, ends, total

    def choose(self, step, masked):
        if self.cap and step + 1 >= self.cap:
            return list(masked)
        early = (self.total - self.left) / self.total < self.end_after
        allowed = {i: c for i, c in masked.items() if not (early and self.proposals[i] in self.ends)}
        number = min(max(sum(c >= self.tau for c in allowed.values()), 1), self.most)
        return best_first(allowed)[:number] or best_first(masked)[:1]


class EntropyThreshold(Plain):
    by_entropy = True

    def __init__(self, tau):
        super().__init__()
        self.tau = tau

    def choose(self, step, masked):
        return {i for i, c in masked.items() if -c <= self.tau} | set(best_first(masked)[:1])


class Dimple(Plain):
    def __init__(self, tau, steps, ranked_by="probability", on_rank=False):
        super().__init__()
        self.tau, self.steps, self.ranked_by, self.on_rank, self.total = tau, steps, ranked_by, on_rank, 0

    def begin_block(self, first=0):
        self.total = 0

    def choose(self, step, masked):
        self.total = self.total or len(masked) + self.num_alone
        passing = [i for i, c in (self.ranks(masked) if self.on_rank else masked).items() if c > self.tau]
        if step + 1 >= self.steps:
            return list(masked)
        if passing:
            return passing
        times = torch.linspace(1, 1e-3, self.steps + 1, dtype=torch.float64).tolist()
        ratio = len(masked) / self.total
        for index in range(step + 1, self.steps + 1):
            number = int(len(masked) * (1 - times[index] / ratio)) if index < self.steps else len(masked)
            if number >= 1:
                return best_first(self.ranks(masked))[:number]

    def ranks(self, masked):
        if self.ranked_by == "probability":
            return masked
        found = {}
        for i, c in masked.items():
            p = self.logits[i].double().softmax(dim=-1)
            first, second = p.topk(2).values.tolist()
            value = first - second if self.ranked_by == "margin" else torch.special.xlogy(p, p).sum().item()
            found[i] = value + c - self.as_seen[i]  # moves as the confidence does
        return found


class Hierarchical(Plain):
    def __init__(self, tau, low):
        super().__init__()
        self.tau, self.low = tau, low

    def choose(self, step, masked):
        chosen = {i for i, c in masked.items() if c >= self.tau}
        for _, run in groupby(enumerate(sorted(masked)), lambda pair: pair[1] - pair[0]):
            leader = best_first({i: masked[i] for _, i in run})[0]
            if masked[leader] > self.low:
                chosen.add(leader)
        return chosen or best_first(masked)[:1]


class Streaming(Plain):
    def __init__(self, tau, relaxation, window=None):
        super().__init__()
        self.tau, self.relaxation, self.window, self.total = tau, relaxation, window, 0

    def begin_block(self, first=0):
        self.total = 0

    def choose(self, step, masked):
        self.total = max(self.total, len(masked)) if self.total else len(masked) + self.num_alone
        suffix = 0 if self.window is None else min(self.left - len(masked), self.window + 1)
        ratio = (len(masked) + suffix) / (self.total + suffix)
        tau = self.tau * (1 - self.relaxation * (1 - ratio))
        return [i for i, c in masked.items() if c >= tau] or best_first(masked)[:1]


class Nemotron(Plain):
    def __init__(self, tau, low=0.45, factor=2.0):
        super().__init__()
        self.tau, self.low, self.factor = tau, low, factor

    def choose(self, step, masked):
        return [
            i
            for rank, i in enumerate(best_first(masked))
            if rank == 0
            or masked[i] >= self.tau
            or (masked[i] >= self.low and masked[i] >= 1 - self.factor / (rank + 2))
        ]


class Product(Nemotron):
    def choose(self, step, masked):
        ranking = best_first(masked)
        return [i for n, i in enumerate(ranking) if n == 0 or prod(masked[j] for j in ranking[: n + 1]) >= self.tau]


class WeDLM(Plain):
    by_entropy = True

    def __init__(self, bound, penalty):
        super().__init__()
        self.bound, self.penalty = bound, penalty

    def choose(self, step, masked):
        adjusted = {i: -c + self.penalty * (i - min(masked)) for i, c in masked.items()}
        return [i for i, h in adjusted.items() if h < self.bound] or [min(adjusted, key=lambda i: (adjusted[i], i))]


# Policy, its options, and its rule, for scores that are random and for the ones of a model.
CASES: dict[str, tuple[dict, Callable[[], Plain]]] = {
    "adaptive": (
        {"policy": "confidence_adaptive", "threshold": 0.7, "max_unmask": 3, "end_after": 0.0},
        lambda: Adaptive(0.7, 3),
    ),
    "adaptive capped": (
        {"policy": "confidence_adaptive", "threshold": 0.9, "max_block_steps": 4, "max_unmask": 2, "end_after": 0.0},
        lambda: Adaptive(0.9, 2, cap=4),
    ),
    "adaptive entropy": (
        {"policy": "confidence_adaptive", "adaptive_entropy": 0.81, "max_unmask": 12, "end_after": 0.0},
        lambda: Adaptive(-0.81, 12, by_entropy=True),
    ),
    "entropy": ({"policy": "entropy_threshold", "max_entropy": 0.81}, lambda: EntropyThreshold(0.81)),
    "dimple": (
        {"policy": "dimple", "threshold": 0.97, "steps_per_block": 6},
        lambda: Dimple(0.97, 6),
    ),
    "dimple slow": ({"policy": "dimple", "threshold": 0.97}, lambda: Dimple(0.97, WIDTH)),
    "hierarchical": (
        {"policy": "hierarchical", "threshold": 0.85, "run_threshold": 0.5},
        lambda: Hierarchical(0.85, 0.5),
    ),
    "streaming": ({"policy": "streaming", "threshold": 0.95, "relaxation": 0.7}, lambda: Streaming(0.95, 0.7)),
    "streaming window": (
        {"policy": "streaming", "threshold": 0.9, "relaxation": 0.7, "ratio_window": 4},
        lambda: Streaming(0.9, 0.7, window=4),
    ),
    "nemotron": ({"policy": "nemotron_bound", "threshold": 0.95, "bound_min": 0.3}, lambda: Nemotron(0.95, 0.3)),
    "nemotron factor": ({"policy": "nemotron_bound", "bound_factor": 1.3}, lambda: Nemotron(0.9, factor=1.3)),
    "product": ({"policy": "nemotron_bound", "bound_form": "product", "threshold": 0.4}, lambda: Product(0.4)),
    "wedlm": ({"policy": "wedlm", "adjusted_entropy": 0.81, "distance_penalty": 0.11}, lambda: WeDLM(0.81, 0.11)),
}
AGAIN = ("adaptive capped", "dimple slow", "nemotron factor")  # whose policies have another case
# Those that read logits: in an engine alone.
READING = {
    "dimple margin": (
        {"policy": "dimple", "threshold": 0.97, "steps_per_block": 5, "fallback_rank": "margin"},
        lambda: Dimple(0.97, 5, "margin"),
    ),
    "dimple entropy": (
        {"policy": "dimple", "threshold": 0.97, "steps_per_block": 5, "fallback_rank": "entropy"},
        lambda: Dimple(0.97, 5, "entropy"),
    ),
    "dimple on margin": (
        {"policy": "dimple", "threshold": 0.8, "fallback_rank": "margin", "threshold_on_rank": True},
        lambda: Dimple(0.8, WIDTH, "margin", on_rank=True),
    ),
}


def run_block(name, rounds, *, by_entropy):
    """What each step of a block unmasks in each row, with ``rounds[step]`` its scores float32 ``[R, W]``."""
    rows, width = rounds[0].shape
    options = DecodingOptions(block_length=width, gen_length=width, **CASES[name][0])
    policy = POLICIES[options.policy]
    steps = options.steps or options.steps_per_block or width
    schedule = policy.schedule(
        DecodingOptions(**{**options.as_dict(), "steps": steps, "steps_per_block": None}), DecodeShape(1, width)
    )
    assert policy.looks_at_entropy(options) == by_entropy
    canvas, masked = torch.zeros(rows, width, dtype=torch.int32), torch.ones(rows, width, dtype=torch.bool)
    step, found = make_step(torch.zeros(rows, width), schedule, rows), []
    while masked.any():
        number = len(found)
        score = rounds[number % len(rounds)].masked_fill(~masked, NO_CONFIDENCE)
        parameter = torch.from_numpy(schedule.parameters[:1, number]).repeat(rows)
        step = next_step(step, score, step_index=torch.full((rows,), number), parameter=parameter)
        if policy.adjusts:
            policy.adjust(step)
        least = 0 if schedule.min_unmask is None else int(schedule.min_unmask[number])
        rules = Rules(
            torch.full((rows,), int(schedule.rule), dtype=torch.int8),
            step.parameter,
            torch.full((rows,), least, dtype=torch.int32),
        )
        before = masked.clone()
        unmask_blocks(canvas, masked, torch.ones(rows, width, dtype=torch.int64), step.score, rules)
        if policy.adjusts:
            policy.observe(step, before & ~masked)
        found.append([{i for i in range(width) if before[row, i] and not masked[row, i]} for row in range(rows)])
    return found


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", range(5))
def test_each_step_unmasks_what_the_definition_says(name, seed):
    generator = torch.Generator().manual_seed(seed)
    rules = [CASES[name][1]() for _ in range(3)]
    if rules[0].by_entropy:  # a grid that a confidence holds exactly
        entropy = (
            torch.randint(0, 256, (WIDTH, 3, WIDTH), generator=generator) / 64 * torch.tensor([1.0, 0.25, 0.5])[:, None]
        )
        rounds = list(1 - entropy / 32)
    else:
        rounds = list(torch.rand(WIDTH, 3, WIDTH, generator=generator) ** torch.tensor([1.0, 0.3, 3.0])[:, None])
        rounds[0][0, 3], rounds[0][0, 9] = rounds[0][0].max(), rounds[0][0].max()  # equal ones: the first goes first
    found = run_block(name, rounds, by_entropy=rules[0].by_entropy)
    for row, rule in enumerate(rules):
        left = set(range(WIDTH))
        for step, unmasked in enumerate(found):
            values = rounds[step % WIDTH][row].double()
            masked = {i: (32 * (values[i] - 1) if rule.by_entropy else values[i]).item() for i in sorted(left)}
            if masked:
                rule.proposals, rule.left = dict.fromkeys(masked, 1), len(masked)
                assert unmasked[row] == set(rule(0, step, masked)), step
                assert unmasked[row]
                left -= unmasked[row]
        assert not left
    alone = run_block(name, [one[1:2] for one in rounds], by_entropy=rules[0].by_entropy)
    assert [one[0] for one in alone] == [one[1] for one in found[: len(alone)]]


@pytest.mark.parametrize("name", CASES)
def test_positions_without_a_confidence_do_not_stop_a_block(name):
    score = torch.full((1, WIDTH), torch.nan)
    found = run_block(name, [score], by_entropy=CASES[name][1]().by_entropy)
    assert all(step[0] for step in found) and len(found) <= WIDTH


@pytest.mark.parametrize(("num_alone", "tau"), [(0, 0.8), (1, 0.8 * (1 - 0.5 * (1 - 3 / 4)))])
def test_a_first_position_counts_as_decided_where_it_had_a_step_alone(num_alone, tau):
    """Not where the request gives it: its step then decides nothing."""
    options = DecodingOptions(policy="streaming", threshold=0.8, relaxation=0.5, block_length=4, gen_length=4)
    schedule = POLICIES["streaming"].schedule(options, DecodeShape(1, 4, decides_first_alone=True))
    step = make_step(torch.tensor([[NO_CONFIDENCE, 0.5, 0.5, 0.5]]), schedule, 1)
    step = step._replace(step_index=torch.tensor([1]), num_alone=torch.tensor([num_alone]))
    POLICIES["streaming"].adjust(step)
    assert step.parameter.item() == pytest.approx(tau, abs=1e-6)


def early_ends(tokens, score, *, left, end_after=0.5):
    """What ``confidence_adaptive`` unmasks of proposed tokens, of a canvas of 32 with so many left."""
    options = DecodingOptions(policy="confidence_adaptive", threshold=0.5, max_unmask=2, end_after=end_after)
    policy = POLICIES["confidence_adaptive"]
    schedule = policy.schedule(options, DecodeShape(1, len(tokens)))
    step = make_step(torch.tensor([score]), schedule, 1)
    step = step._replace(
        token=torch.tensor([tokens]),
        end_token_ids=torch.tensor([[END, -1]]),
        num_left=torch.tensor([left]),
        num_positions=torch.tensor([32]),
    )
    policy.adjust(step)
    [found] = chosen(step)
    return found


def test_a_token_that_ends_the_output_waits_until_half_of_the_canvas_is_decided():
    tokens, score = [1, END, END, 2], [0.6, 0.9, 0.95, 0.55]
    assert early_ends(tokens, score, left=17) == {0, 3}
    assert early_ends(tokens, score, left=16) == {1, 2}
    assert early_ends(tokens, score, left=32, end_after=0.0) == {1, 2}
    assert early_ends(tokens, [0.2, 0.9, 0.95, 0.1], left=17) == {0}  # the others do not count either
    assert early_ends([END] * 4, score, left=32) == {2}  # where there is nothing else


@pytest.mark.parametrize("ranked_by", ["margin", "entropy"])
def test_what_ranks_passes_the_threshold_where_dimple_is_asked_for_that(ranked_by):
    generator = torch.Generator().manual_seed(0)
    asked = {"fallback_rank": ranked_by, "threshold_on_rank": True, "steps": 9, "block_length": 12, "gen_length": 12}
    options, policy = DecodingOptions(policy="dimple", threshold=0.6, **asked), POLICIES["dimple"]
    schedule = policy.schedule(options, DecodeShape(1, 12))
    rules, masked = [Dimple(0.6, 9, ranked_by, on_rank=True) for _ in range(4)], torch.ones(4, 12, dtype=torch.bool)
    step, passed = make_step(torch.zeros(4, 12), schedule, 4), 0
    for number in range(9):
        logits = 3 * torch.randn(4, 12, 6, generator=generator)
        score = logits.softmax(dim=-1).amax(dim=-1).masked_fill(~masked, NO_CONFIDENCE)
        step = next_step(step, score, step_index=torch.full((4,), number), parameter=torch.full((4,), 0.6))
        policy.adjust(read(policy, step, logits, *torch.zeros(2, 4, 12, 6)))
        for row, (rule, got) in enumerate(zip(rules, chosen(step), strict=True)):
            left = {i: score[row, i].item() for i in range(12) if masked[row, i]}
            if left:
                rule.see(number, {i: logits[row, i] for i in left}, {}, left, len(left))
                assert got == set(rule(0, number, left)), (number, row)
                passed += any(one > 0.6 for one in rule.ranks(left).values())
                masked[row, list(got)] = False
    assert not masked.any() and (passed > 4) == (ranked_by == "margin")


def test_masks_behind_the_block_count_in_how_full_it_is():
    options = DecodingOptions(policy="streaming", threshold=0.8, relaxation=0.5, ratio_window=4)
    schedule = POLICIES["streaming"].schedule(options, DecodeShape(3, 8))
    step = make_step(torch.rand(4, 8), schedule, 4)._replace(num_left=torch.tensor([24, 12, 9, 8]))
    POLICIES["streaming"].adjust(step)
    assert step.parameter.tolist() == pytest.approx([0.8] * 4)  # a block of masks is empty, whatever is behind it
    half = torch.cat([torch.rand(4, 4), torch.full((4, 4), NO_CONFIDENCE)], dim=1)
    step = next_step(step, half, parameter=torch.full((4,), 0.8))
    POLICIES["streaming"].adjust(step)
    # 16, 4, 1 and no masks behind the block, of which 5 at most count
    assert step.parameter.tolist() == pytest.approx([0.8 * (1 - 0.5 * 4 / (8 + behind)) for behind in (5, 4, 1, 0)])


def test_options_that_contradict_each_other_are_refused():
    def parse(**values):
        return parse_options({f"osdt_{name}": value for name, value in values.items()}, base=base, prefix="osdt_")

    base = DecodingOptions()
    with pytest.raises(InvalidOptionError, match=r"bound_factor is 3, but bound_form 'product' has no bound of a rank"):
        parse(policy="nemotron_bound", bound_form="product", bound_factor=3.0)
    with pytest.raises(InvalidOptionError, match="send one of them"):
        parse(policy="confidence_adaptive", adaptive_entropy=0.3, threshold=0.5)
    with pytest.raises(InvalidOptionError, match="threshold_on_rank is True, which means nothing beside the other"):
        parse(policy="dimple", threshold_on_rank=True)
    with pytest.raises(InvalidOptionError, match="calibrated and threshold_on_rank are true"):
        parse(policy="dimple", threshold_on_rank=True, fallback_rank="margin", calibrated=True, task="a")
    with pytest.raises(InvalidOptionError, match=r"policy is 'dimple', whose schedule is one of whole blocks"):
        validate_for_family(parse(policy="dimple"), Traits(32, 1, sub_block_length=8))
    with pytest.raises(InvalidOptionError, match="adablock cuts blocks"):
        validate_for_family(parse(policy="dimple", adablock=True), Traits(32, 1))
    with pytest.raises(InvalidOptionError, match="ratio_window is 32, but no block of this model sees a later one"):
        validate_for_family(DecodingOptions(policy="streaming", ratio_window=32, cache_mode="block"), Traits(32, 1))
    base = DecodingOptions(policy="confidence_adaptive", adaptive_entropy=0.3)
    assert parse(threshold=0.5).adaptive_entropy is None  # the request's own form
    assert parse(max_unmask=3).adaptive_entropy == 0.3
    base = DecodingOptions(policy="confidence_adaptive", edit_threshold=0.5)
    assert parse(adaptive_entropy=0.3).edit_threshold is None and parse(max_unmask=3).edit_threshold == 0.5


@pytest.mark.e2e
def test_an_engine_decodes_as_the_plain_loop_also_after_preemption(tasks_llm, golden_tasks):
    network = ReferenceLLaDA.load(golden_tasks.folder)
    cases = [(name, *case) for name, case in {**CASES, **READING}.items() if name not in AGAIN]
    prompts = [case["prompt_token_ids"] for case in golden_tasks.cases[1:5]]
    expected = {
        (name, i): decode(network, prompt, make(), **CANVAS)
        for name, _, make in cases
        for i, prompt in enumerate(prompts)
    }
    clear = [key for key, one in expected.items() if min(one.rule_margin, one.proposal_margin) > 1e-5]
    params = {name: sampling(32, **options, **CANVAS) for name, options, _ in cases}
    completions = generate(tasks_llm, [prompts[i] for _, i in clear], [params[name] for name, _ in clear])
    got = dict(zip(clear, completions, strict=True))
    for name, _, _ in cases:
        own = [key for key in clear if key[0] == name]
        assert len(own) >= 2, name
        assert [list(got[key].token_ids) for key in own] == [expected[key].tokens for key in own], name
        assert [nfe(got[key]) for key in own] == [expected[key].nfe for key in own], name
        assert 2 * len(own) < sum(nfe(got[key]) for key in own) < 32 * len(own), name

    ids = {submit(tasks_llm, prompts[i], params[name]): (name, i) for name, i in clear if i == clear[0][1]}

    def preempt(step):
        if step == 2:  # in the middle of a block
            assert scheduler(tasks_llm).reset_prefix_cache(reset_running_requests=True)

    finished = drive(tasks_llm, preempt)
    assert {key: list(finished[req_id].token_ids) for req_id, key in ids.items()} == {
        key: expected[key].tokens for key in ids.values()
    }


@pytest.mark.e2e
def test_an_engine_unmasks_no_early_end(tasks_llm, golden_tasks):
    network, prompts = (
        ReferenceLLaDA.load(golden_tasks.folder),
        [one["prompt_token_ids"] for one in golden_tasks.cases[:8]],
    )
    eos = golden_tasks.config["eos_token_id"]
    rules = [Adaptive(0.6, 4, end_after=0.5, ends=(eos,)) for _ in prompts]
    expected = [
        decode(network, prompt, rule, end_token_ids=(eos,), **CANVAS)
        for prompt, rule in zip(prompts, rules, strict=True)
    ]
    clear = [i for i, one in enumerate(expected) if min(one.rule_margin, one.proposal_margin) > 1e-5]
    options = {"policy": "confidence_adaptive", "threshold": 0.6, **CANVAS}
    params = [sampling(32, **options, end_after=share, stop_token_ids=[eos]) for _ in clear for share in (0.5, 0.0)]
    got = generate(tasks_llm, [prompts[i] for i in clear for _ in range(2)], params)
    assert [list(one.token_ids) for one in got[::2]] == [expected[i].tokens for i in clear]
    assert [nfe(one) for one in got[::2]] == [expected[i].nfe for i in clear]
    assert len(clear) >= 4 and list(map(nfe, got[::2])) != list(map(nfe, got[1::2]))
