"""Policies that compare denoising steps, against their definitions: step by step, and in an engine."""

import math

import pytest
import torch

from csrc_triton.types import NO_CONFIDENCE
from tests.e2e.engine import canvas_states, drive, generate, nfe, sampling, scheduler, submit
from tests.policies.adjusted import chosen, make_step, next_step
from tests.policies.test_policies import schedule_of
from tests.reference.decode import best_first, decode
from tests.reference.llada import ReferenceLLaDA
from vllm_osdt import describe
from vllm_osdt.geometry import DecodeShape
from vllm_osdt.options import DecodingOptions
from vllm_osdt.policies import POLICIES, PositionLogits
from vllm_osdt.policies.fixed_steps import positions_per_step
from vllm_osdt.worker.reading import every_row

VOCABULARY, WIDTH = 13, 10
CANVAS = {"gen_length": 32, "block_length": 16, "cache_mode": "dual"}


class Plain:
    """A rule that looks at the distributions of a block's steps; ``margin`` is how near it was to another choice."""

    def __init__(self, quota=1):
        self.quota, self.margin = quota, math.inf
        self.begin_block()

    def see(self, step, rows, proposals, masked, left):
        """Keep the distribution of every masked position, by token; tokens that are ruled out have none."""
        self.proposals = dict(proposals)
        shares = torch.stack(list(rows.values())).double().softmax(dim=-1)
        self.steps.append(dict(zip(rows, shares, strict=True)))
        return self.look(masked) or {}

    def begin_block(self, first=0):
        """A block begins."""
        self.steps = []

    def look(self, masked):
        """What the step changes of proposals and confidences."""

    def note(self, difference):
        """The step would have been another one, had something been so much different."""
        self.margin = min(self.margin, abs(difference))

    def top(self, score, number):
        """The best positions of a score; how near the last one and the first that is left were."""
        ranking = best_first(score)
        if len(ranking) > number:
            self.note(score[ranking[number - 1]] - score[ranking[number]])
        return ranking[:number]

    def likeliest(self, shares):
        """The best token of a distribution, and its share."""
        (first, second), (token, _) = (one.tolist() for one in shares.topk(2))
        self.note(first - second)
        return token, first

    def best_token(self, i, back=1):
        return self.likeliest(self.steps[-back][i])[0]


def certainty(shares):
    """Negative entropy, in units that make its errors those of a probability."""
    return torch.special.xlogy(shares, shares).sum().item() / 30


class PlainKLASS(Plain):
    def __init__(self, confidence=0.9, bound=0.01, steps=2, quota=1):
        super().__init__(quota)
        self.confidence, self.bound, self.length = confidence, bound, steps

    def is_stable(self, i):
        if len(self.steps) <= self.length:
            return False
        for now, before in zip(self.steps[: -self.length - 1 : -1], self.steps[-2::-1], strict=False):
            if i not in before:
                return False
            divergence = (torch.special.xlogy(now[i], now[i]) - torch.special.xlogy(now[i], before[i])).sum().item()
            self.note(divergence - self.bound)
            if divergence >= self.bound:
                return False
        return True

    def __call__(self, block, step, masked):
        for c in masked.values():
            self.note(c - self.confidence)
        passing = [i for i, c in masked.items() if c > self.confidence and self.is_stable(i)]
        return passing or self.top(masked, self.quota)


class PlainLESS(Plain):
    def __init__(self, confidence=0.75, bound=0.04, persistence=2, quota=1):
        super().__init__(quota)
        self.confidence, self.bound, self.persistence = confidence, bound, persistence

    def coarse(self, shares):
        """The 8 likeliest tokens by themselves, and the rest as one."""
        some = dict(zip(*(one.tolist() for one in shares.topk(8)[::-1]), strict=True))
        return some | {"rest": max(0.0, 1 - sum(some.values()))}

    def is_stable(self, i):
        seen = [step for step in self.steps if i in step]
        if len(seen) <= self.persistence:
            return False
        tokens = {self.best_token(i, back) for back in range(1, self.persistence + 2)}
        now, before = (self.coarse(step[i]) for step in seen[:-3:-1])
        divergence = 0.0
        for token in now.keys() | before.keys():
            p, q = now.get(token, 0.0), before.get(token, 0.0)
            divergence += sum(0.5 * x * math.log(x / ((p + q) / 2)) for x in (p, q) if x > 0)
        self.note(divergence - self.bound)
        return len(tokens) == 1 and divergence <= self.bound

    def __call__(self, block, step, masked):
        for c in masked.values():
            self.note(c - self.confidence)
        passing = [i for i, c in masked.items() if c >= self.confidence and self.is_stable(i)]
        return passing or self.top(masked, self.quota)


class PlainStable(Plain):
    def __init__(self, steps=1, confidence=0.8):
        super().__init__()
        self.length, self.confidence = steps, confidence

    def begin_block(self, first=0):
        super().begin_block()
        self.history = []

    def look(self, masked):
        self.history.append(self.proposals)

    def __call__(self, block, step, masked):
        for c in masked.values():
            self.note(c - self.confidence)
        recent = self.history[-self.length - 1 :]
        passing = [
            i
            for i, c in masked.items()
            if c >= self.confidence and len(recent) > self.length and len({one.get(i) for one in recent}) == 1
        ]
        return passing or self.top(masked, 1)


class PlainCCD(Plain):
    def __init__(self, window=2, positions=4, dynamic=True, quota=1):
        super().__init__(quota)
        self.window, self.positions, self.dynamic = window, positions, dynamic

    def begin_block(self, first=0):
        super().begin_block()
        self.noted = []

    def look(self, masked):
        changed, self.mean = {}, {}
        for i, shares in self.steps[-1].items():
            kept = [shares]
            for back in range(2, self.window + 1):
                if back <= len(self.steps) and i in self.noted[1 - back]:
                    kept.append(self.steps[-back][i])
            self.mean[i] = torch.stack(kept).mean(dim=0)
            if len(kept) > 1:
                changed[i] = self.likeliest(self.mean[i])
        return changed

    def __call__(self, block, step, masked):
        self.noted.append(
            self.top({i: self.steps[-1][i].max().item() for i in masked}, max(self.positions, self.quota))
        )
        now = self.noted[-1]
        agreeing = []
        if len(self.noted) >= self.window:
            for i in now:
                backs = range(2, self.window + 1)
                if all(i in self.noted[-back] and self.best_token(i, back) == self.best_token(i) for back in backs):
                    agreeing.append(i)
        if self.dynamic and len(agreeing) >= self.quota:
            return agreeing
        return self.top({i: certainty(self.mean[i]) for i in now}, self.quota)


class PlainRelease(Plain):
    """The authors' code, whose buffers are of the block here."""

    def __init__(self, dynamic=True, quota=1):
        super().__init__(quota)
        self.dynamic = dynamic

    def begin_block(self, first=0):
        super().begin_block()
        self.size, self.next, self.num_masked = 1, [], 0

    def __call__(self, block, step, masked):
        quota, rank = self.quota, {i: certainty(self.steps[-1][i]) for i in masked}
        self.num_masked = max(self.num_masked, len(rank))
        if step >= 4:
            self.size = 1 if len(rank) <= 0.1 * self.num_masked else self.size
            self.size = min(self.size + 1, 5 * quota)
        ranking = best_first(rank)
        for n in {quota, self.size}:
            self.top(rank, n)
        first = ranking[:quota]
        take = leave_out = first
        if step >= 5 and set(first) & set(self.next):
            matching = [i for i in ranking[: self.size] if i in self.next]
            matching = [i for i in matching if self.best_token(i) == self.best_token(i, 2)]
            if len(matching) >= quota:
                take, leave_out = matching if self.dynamic else matching[:quota], matching
        rest = {i: rank[i] for i in ranking if i not in leave_out}
        self.next = self.top(rest, self.size)
        return take


CASES = {
    "klass": ("klass", {}, PlainKLASS, {}),
    "klass-bold": (
        "klass",
        {"kl_confidence": 0.2, "kl_threshold": 0.2, "kl_steps": 1, "steps": 4},
        PlainKLASS,
        {"confidence": 0.2, "bound": 0.2, "steps": 1},
    ),
    "less": ("less", {}, PlainLESS, {}),
    "less-bold": (
        "less",
        {"less_confidence": 0.2, "js_threshold": 0.1, "persistence": 1, "steps": 3},
        PlainLESS,
        {"confidence": 0.2, "bound": 0.1, "persistence": 1},
    ),
    "stable": ("stable", {}, PlainStable, {}),
    "stable-bold": (
        "stable",
        {"stable_steps": 1, "stable_confidence": 0.0},
        PlainStable,
        {"steps": 1, "confidence": 0},
    ),
    "ccd": ("ccd", {}, PlainCCD, {}),
    "ccd-dream": ("ccd", {"ccd_window": 3, "ccd_positions": 6}, PlainCCD, {"window": 3, "positions": 6}),
    "ccd-uniform": ("ccd", {"ccd_dynamic": False, "steps": 5}, PlainCCD, {"dynamic": False}),
    "ccd-release": ("ccd", {"ccd_rule": "release"}, PlainRelease, {}),
    "ccd-release-uniform": ("ccd", {"ccd_rule": "release", "ccd_dynamic": False}, PlainRelease, {"dynamic": False}),
}


def read(policy, step, logits, before, earlier):
    """Have a policy read the logits of all open positions; returns the step with what it has made of them.

    Args:
        step: Its tokens and confidences are those of the logits already.
        logits, before, earlier: float32 ``[R, W, V]``, of this step and of the two before it.
    """
    at = step.is_open.nonzero(as_tuple=True)
    token, confidence, memory, reading = (
        one.clone() for one in (step.token[at], step.confidence[at], step.memory[at], step.reading[at])
    )
    number = policy.num_steps_before if policy.reads_step_before else 0
    kept = [every_row(one[at]) for one in (before, earlier)[:number]]
    rows = PositionLogits(
        logits[at].clone(), kept[0] if kept else None, token, confidence, step.constants[at[0]], memory, reading,
        step.step_index[at[0]], tuple(kept[1:]),
    )  # fmt: skip
    policy.read(rows)
    for grid, found in ((step.token, token), (step.confidence, confidence), (step.memory, memory)):
        grid[at] = found
    step.reading[at] = reading
    step.score.copy_(step.confidence)
    return step


def walk(generator, shape):
    """Logits that move little from step to step, and some of them not at all."""
    logits = 4.0 * torch.randn(shape, generator=generator)
    pace = torch.rand(shape[:2], generator=generator).unsqueeze(-1).sub(0.4).clamp(min=0.0)
    while True:
        yield logits
        logits = logits + pace * torch.randn(shape, generator=generator)


@pytest.mark.parametrize("case", CASES)
def test_a_block_is_decoded_by_the_published_rule(case):
    name, options, twin, plain = CASES[case]
    num_early = 0
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        opts = DecodingOptions(**{"policy": name, "block_length": WIDTH, "gen_length": WIDTH, **options})
        schedule = schedule_of(name, opts)
        policy = (POLICIES[name], *POLICIES[name].variants)[schedule.variant]
        masked = torch.rand(3, WIDTH, generator=generator) < torch.tensor([1.0, 0.9, 0.5]).unsqueeze(1)
        masked[:, 0] = True
        source, before = (
            walk(generator, (3, WIDTH, VOCABULARY)),
            torch.randn(2, 3, WIDTH, VOCABULARY, generator=generator),
        )
        rules = [twin(**plain) for _ in range(3)]
        step = make_step(torch.empty(3, WIDTH), schedule, 3, memory_size=policy.memory_size)
        for number in range(WIDTH):
            logits = next(source).clone()
            logits[..., 0] = -torch.inf  # the mask token
            share, token = logits.softmax(dim=-1).max(dim=-1)
            score = share.masked_fill(~masked, NO_CONFIDENCE)
            quota = max(1, int(positions_per_step(opts.steps, DecodeShape(1, WIDTH))[number])) if opts.steps else 1
            parameter = torch.full((3,), float(schedule.parameters[0, number]))
            step = next_step(
                step, score, step_index=torch.full((3,), number), token=token.masked_fill(~masked, 0),
                parameter=parameter, reading=torch.zeros_like(step.reading),
            )  # fmt: skip
            if policy.reads_logits:
                step = read(policy, step, logits, *before)
            policy.adjust(step)
            unmasked = torch.zeros_like(masked)
            for row, (rule, got) in enumerate(zip(rules, chosen(step), strict=True)):
                left = {i: score[row, i].item() for i in range(WIDTH) if masked[row, i]}
                if not left:
                    assert not got
                    continue
                rule.quota = quota
                proposals = {i: int(token[row, i]) for i in left}
                seen = rule.see(number, {i: logits[row, i] for i in left}, proposals, left, len(left))
                for i, (other, confidence) in seen.items():
                    assert step.token[row, i] == other
                    assert step.confidence[row, i].item() == pytest.approx(confidence, abs=1e-5)
                    left[i] = confidence
                assert got == set(rule(0, number, left)), (seed, number, row)
                unmasked[row, list(got)] = True
                num_early += len(got) - 1
            policy.observe(step, unmasked)
            masked &= ~unmasked
            before = torch.stack([logits, before[0]])
        assert not masked.any()
    assert num_early > 0 or "uniform" in case  # the rule itself had something to say


def test_a_position_without_a_step_before_is_not_stable():
    """Shifted logits: a block's first step has logits of its first position alone."""
    for name, options in (("klass", {"kl_confidence": 0.0, "kl_threshold": 9.0, "kl_steps": 1}), ("ccd", {})):
        policy = POLICIES[name]
        opts = DecodingOptions(policy=name, block_length=3, gen_length=3, **options)
        step = make_step(torch.tensor([[0.5, NO_CONFIDENCE, NO_CONFIDENCE]]), schedule_of(name, opts), 1, memory_size=4)
        logits = torch.zeros(1, 3, 4)
        step = read(policy, step, logits, logits, logits)
        policy.adjust(step)
        own = torch.from_numpy(schedule_of(name, opts).parameters[0, 1:2])
        fresh = {"reading": torch.zeros_like(step.reading), "parameter": own}
        later = next_step(step, torch.tensor([[NO_CONFIDENCE, 0.5, 0.4]]), **fresh)
        later = read(policy, later, logits, logits, logits)
        policy.adjust(later)
        assert chosen(later) == [{1}]  # the most confident one alone


E2E = {
    "klass": ({"kl_confidence": 0.3, "kl_threshold": 0.3, "kl_steps": 1}, PlainKLASS(0.3, 0.3, 1)),
    "less": ({"less_confidence": 0.3, "js_threshold": 0.1, "persistence": 1}, PlainLESS(0.3, 0.1, 1)),
    "stable": ({"stable_steps": 1, "stable_confidence": 0.2}, PlainStable(1, 0.2)),
    "ccd": ({}, PlainCCD()),
    "dream": ({"policy": "ccd", "ccd_window": 3}, PlainCCD(3)),
    "release": ({"policy": "ccd", "ccd_rule": "release"}, PlainRelease()),
}


@pytest.fixture(scope="module")
def decoded(golden_tasks):
    """Of each rule what the plain loop makes of the prompts, and how far from a near tie it was."""
    network = ReferenceLLaDA.load(golden_tasks.folder)
    prompts = [case["prompt_token_ids"] for case in golden_tasks.cases[:10]]
    found = {}
    for name, (_, rule) in E2E.items():
        found[name] = []
        for prompt in prompts:
            rule.margin = math.inf
            outcome = decode(network, prompt, rule, **CANVAS)
            found[name].append((outcome.tokens, outcome.nfe, min(outcome.rule_margin, outcome.proposal_margin)))
    return prompts, found


def params_of(name):
    return sampling(32, **{"policy": name, **E2E[name][0], **CANVAS})


def assert_equal_but_for_near_ties(got, expected, least):
    """The model is so sure that many positions tie: in float32, another one of them may be the first."""
    others = [
        margin for one, (tokens, forwards, margin) in zip(got, expected, strict=True) if one != (tokens, forwards)
    ]
    assert all(margin < 1e-6 for margin in others) and len(got) - len(others) >= least


@pytest.mark.e2e
def test_an_engine_decodes_as_the_plain_loop_in_one_batch_of_all_and_alone(tasks_llm, decoded):
    prompts, found = decoded
    asked = [(name, i) for i in range(len(prompts)) for name in E2E]
    got = generate(tasks_llm, [prompts[i] for _, i in asked], [params_of(name) for name, _ in asked])
    outcomes = {key: (list(one.token_ids), nfe(one)) for key, one in zip(asked, got, strict=True)}
    for name, expected in found.items():
        own = [outcomes[name, i] for i in range(len(prompts))]
        assert_equal_but_for_near_ties(own, expected, least=7)
        assert sum(forwards for _, forwards in own) < 30 * len(own), name  # more than one position a step
        [alone] = generate(tasks_llm, prompts[:1], params_of(name))
        assert (list(alone.token_ids), nfe(alone)) == own[0]


@pytest.mark.e2e
@pytest.mark.parametrize("longest", [0, 15])
def test_where_logits_have_no_room_hidden_states_are_kept(tasks_llm, decoded, monkeypatch, longest):
    """Of requests with long blocks; beside them are others with short ones, whose logits are kept."""
    prompts, found = decoded
    states, vocabulary = canvas_states(tasks_llm), tasks_llm.llm_engine.model_config.get_vocab_size()
    monkeypatch.setattr(states, "kept_logits_bytes", longest * states.policy_state.shape[0] * vocabulary * 4 * 2)
    short = [sampling(32, policy=name, **{**CANVAS, "block_length": 8}) for name in ("klass", "ccd")]
    expected = [generate(tasks_llm, prompts[:1], params)[0].token_ids for params in short]
    names = ("klass", "ccd", "dream")
    asked = [(name, i) for i in range(5) for name in names]
    params = [*map(params_of, (name for name, _ in asked)), *short]
    got = generate(tasks_llm, [*(prompts[i] for _, i in asked), *prompts[:1] * 2], params)
    for name in names:
        own = [(list(one.token_ids), nfe(one)) for one, (other, _) in zip(got, asked, strict=False) if other == name]
        assert_equal_but_for_near_ties(own, found[name][:5], least=4)
    assert [one.token_ids for one in got[len(asked) :]] == expected


@pytest.mark.e2e
def test_a_block_begins_anew_after_preemption(tasks_llm, decoded):
    prompts, found = decoded
    ids = {submit(tasks_llm, prompts[i], params_of(name)): (name, i) for name in E2E for i in range(5)}

    def preempt(step):
        if step == 5:  # in the middle of a block
            assert scheduler(tasks_llm).reset_prefix_cache(reset_running_requests=True)

    finished = drive(tasks_llm, preempt)
    for name in E2E:
        expected = [(tokens, 0, margin) for tokens, _, margin in found[name][:5]]
        own = {i: (list(finished[req_id].token_ids), 0) for req_id, (other, i) in ids.items() if other == name}
        assert_equal_but_for_near_ties([own[i] for i in range(5)], expected, least=4)


@pytest.mark.e2e
def test_an_average_is_over_the_steps_before(tasks_llm, golden_tasks):
    """Every position is noted, and one committed a step: its share is the mean of three steps'."""
    network = ReferenceLLaDA.load(golden_tasks.folder)
    options = {"policy": "ccd", "ccd_window": 3, "ccd_positions": 16, "ccd_dynamic": False, **CANVAS}
    prompts = [case["prompt_token_ids"] for case in golden_tasks.cases[:6]]
    got = generate(tasks_llm, prompts, sampling(32, return_trace=True, **options))
    differences = []
    for prompt, completion in zip(prompts, got, strict=True):
        expected = decode(network, prompt, PlainCCD(window=3, positions=16, dynamic=False), **CANVAS)
        trace = describe(completion)["trace"]
        for step, confidence, (place, _, share) in zip(trace["step"], trace["confidence"], expected.steps, strict=True):
            if step == place:  # near ties may be decided in another order
                differences.append(abs(confidence - share))
    assert len(differences) > 0.8 * 32 * len(prompts) and max(differences) < 1e-4
