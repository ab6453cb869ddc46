"""Blocks of many lengths: AdaBlock and CadLLM against their definitions, alone and in an engine."""

import itertools
import math
import random
import re
from dataclasses import replace

import pytest
import torch

from tests.e2e.engine import drive, generate, nfe, sampling, scheduler, submit
from tests.policies.adjusted import make_step, next_step
from tests.policies.test_composition import Composed
from tests.policies.test_policies import schedule_of
from tests.policies.test_selection import Streaming
from tests.reference.decode import best_first, calibrate, decode, enter, osdt, static_threshold
from tests.reference.llada import ReferenceLLaDA
from vllm_osdt.calibration.profile import CACHE_KEY, ProfileKey
from vllm_osdt.errors import InvalidOptionError
from vllm_osdt.frontend.admission import with_delimiters
from vllm_osdt.models.configs.llada import LLaDAConfig
from vllm_osdt.models.configs.sdar import SDARConfig
from vllm_osdt.options import DecodingOptions
from vllm_osdt.options.family import validate_for_family
from vllm_osdt.options.parsing import parse_options
from vllm_osdt.policies import POLICIES, PositionLogits, Schedule
from vllm_osdt.policies.adablock import ADABLOCK, MAX_DELIMITERS, MAX_NUMBERS
from vllm_osdt.policies.cad_llm import vocabulary_of

DELIMITERS = (14, 9)
MANY_DELIMITERS = (14, 9, *range(20, 42))
LENGTH = 48


class PlainAdaBlock:
    """A static threshold, or another rule, whose blocks end behind a delimiter, as published."""

    def __init__(self, tau=0.9, delimiter_tau=0.3, usual=8, delimiters=DELIMITERS, rule=None):
        self.rule, self.delimiter_tau, self.usual, self.delimiters = (
            rule or static_threshold(tau),
            delimiter_tau,
            usual,
            delimiters,
        )
        self.lengths, self.cut_margin = [], math.inf

    @property
    def margin(self):
        return min(self.rule.margin, self.cut_margin)

    def begin_block(self, first=0):
        enter(self.rule)

    def see(self, *seen):
        return self.rule.see(*seen) if hasattr(self.rule, "see") else {}

    def __call__(self, block, step, masked):
        return self.rule(block, step, masked)

    def cut(self, proposals, masked):
        found = best_first({k: masked[k] for k, token in proposals.items() if token in self.delimiters and k in masked})
        confidences = [masked[k] for k in found]
        self.cut_margin = min([self.cut_margin, *(abs(c - self.delimiter_tau) for c in confidences)])
        self.cut_margin = min([self.cut_margin, *(a - b for a, b in itertools.pairwise(confidences))])
        is_sure = bool(found) and masked[found[0]] >= self.delimiter_tau
        self.lengths.append(found[0] + 1 if is_sure else self.usual)
        return self.lengths[-1]


class PlainCadLLM:
    """CadLLM as published, of one request; ``ramp`` is the paper's or the code's threshold."""

    def __init__(
        self,
        longest,
        ramp="canvas",
        high=0.85,
        low=0.4,
        shortest=4,
        first=12,
        steps=24,
        most_steps=90,
        vocabulary=False,
    ):
        self.longest, self.ramp, self.high, self.low, self.shortest = longest, ramp, high, low, shortest
        self.first, self.steps, self.most_steps = first, steps, most_steps
        self.means, self.left, self.margin, self.lengths, self.length = [], 0, math.inf, [], LENGTH
        self.has_vocabulary, self.sizes, self.committed, self.proposals = vocabulary, [], [], {}

    def see(self, step, rows, proposals, masked, left):
        self.left, self.proposals = left, proposals
        if not self.has_vocabulary:
            return {}
        size = plain_vocabulary(1 - left / self.length, self.means, self.committed)
        if self.means:
            bounds = [abs(sum(self.means[-5:]) / len(self.means[-5:]) - bound) for bound in (0.3, 0.6, 0.8)]
            drop = abs(self.means[-1] - self.means[-3] + 0.1) if len(self.means) > 2 else 1.0
            self.margin = min([self.margin, drop, *bounds])
        self.sizes.append(size)
        return {k: (token, share_among(rows[k], token, size)) for k, token in proposals.items()}

    def cut(self, proposals, masked):
        if not self.means:
            length, self.budget = self.first, float(self.steps)
        else:
            level = sum(self.means[-2:]) / len(self.means[-2:])
            raw = (self.longest - self.shortest) * level
            self.margin = min(self.margin, abs(raw - round(raw)))
            length = min(max(self.shortest + math.floor(raw), self.shortest), self.longest)
            budget = self.steps + (self.most_steps - self.steps) * (1 - level)
            self.budget = max(budget * length / self.first, 1.0)
        self.lengths.append(length)
        return length

    def __call__(self, block, step, masked):
        share = 1 - self.left / self.length
        tau = self.high * (1 - share) + self.low * share
        if self.ramp == "block":
            tau = max(self.high - 0.45 * step / self.budget, self.low)
        self.margin = min([self.margin, *(abs(c - tau) for c in masked.values())])
        self.means.append(sum(masked.values()) / len(masked))
        chosen = [k for k, c in masked.items() if c >= tau] or best_first(masked)[:1]
        self.committed += [self.proposals[k] for k in sorted(chosen)]
        return chosen


def plain_vocabulary(progress, means, committed):
    """V of the authors' code."""
    size = 800.0 if progress < 0.2 else 70.0 if progress < 0.7 else 90.0
    if means:
        recent = sum(means[-5:]) / len(means[-5:])
        size *= 1.5 if recent < 0.3 else 1.2 if recent < 0.6 else 0.8 if recent > 0.8 else 1.0
        if len(means) > 2 and means[-1] - means[-3] < -0.1:
            size *= 1.3
    if len(committed) >= 8 and len(set(committed[-4:])) == 1:
        size *= 3
    return int(min(max(size, 35), 1000))


def share_among(row, token, size):
    """The share of a token among the likeliest ones of a row of logits."""
    order = sorted(row.tolist(), reverse=True)[:size]
    if row[token].item() < order[-1]:
        return 0.0
    return math.exp(row[token].item() - order[0]) / sum(math.exp(one - order[0]) for one in order)


@pytest.mark.parametrize("seed", range(12))
def test_a_confidence_is_a_share_of_the_likeliest_tokens(seed):
    generator = torch.Generator().manual_seed(seed)
    schedule = schedule_of("cad_llm", DecodingOptions(block_length=12, gen_length=12, cad_vocabulary=True))
    policy = POLICIES["cad_llm"].variants[schedule.variant - 1]
    twins = [PlainCadLLM(12, vocabulary=True) for _ in range(2)]
    for twin in twins:
        twin.length, twin.first = 12, 12
    masked = torch.ones(2, 12, dtype=torch.bool)
    step = make_step(torch.rand(2, 12, generator=generator), schedule, rows=2)
    num_tokens = (5, 1200)[seed % 2]  # of few tokens the same are decided in a row
    for number in range(12):
        logits = torch.randn(2, 12, num_tokens, generator=generator) * (1.0 + 3 * (seed % 3))
        logits[..., -1] = -torch.inf
        token = logits.argmax(dim=-1) if number % 3 else torch.randint(num_tokens - 1, (2, 12), generator=generator)
        row, place = masked.nonzero(as_tuple=True)
        rows = PositionLogits(
            logits[row, place], None, token[row, place], torch.zeros(row.numel()), step.constants[row],
            torch.zeros(row.numel(), 0), torch.zeros(row.numel(), 4), step.step_index[row], (), step.carry[row],
        )  # fmt: skip
        policy.read(rows)
        score = torch.full((2, 12), -2.0)
        score[row, place] = rows.confidence
        step = next_step(step, score, step_index=torch.full((2,), number))._replace(token=token)
        step = step._replace(num_left=masked.sum(dim=1))
        policy.adjust(step)
        unmasked = torch.zeros(2, 12, dtype=torch.bool)
        for index, twin in enumerate(twins):
            own = {k: token[index, k].item() for k in range(12) if masked[index, k]}
            if not own:
                continue
            seen = twin.see(number, {k: logits[index, k] for k in own}, own, None, len(own))
            confidence = {k: c for k, (_, c) in seen.items()}
            for k, c in confidence.items():
                assert score[index, k].item() == pytest.approx(c, abs=1e-6)
            chosen = best_first(confidence)[: 1 + number % 2]
            twin.means.append(sum(confidence.values()) / len(confidence))
            twin.committed += [own[k] for k in sorted(chosen)]
            unmasked[index, chosen] = True
        policy.observe(step, unmasked)
        masked &= ~unmasked
    assert not masked.any()


def test_what_the_size_of_the_vocabulary_depends_on():
    rng = random.Random(3)
    carries, expected = [], []
    for _ in range(400):
        means = [rng.choice([0.1, 0.45, 0.7, 0.9]) + rng.random() * 0.05 for _ in range(rng.randrange(9))]
        run, number, progress = rng.randrange(7), rng.choice([4, 7, 8, 20]), rng.choice([0.1, 0.5, 0.8])
        committed = [*range(100, 100 + max(number - run, 0)), *[5] * run]
        last = [*reversed(means[-5:]), *[0.0] * (5 - len(means[-5:]))]
        carries.append([*last, len(means), progress, 5, run, len(committed)])
        expected.append(plain_vocabulary(progress, means, committed))
    assert vocabulary_of(torch.tensor(carries)).tolist() == expected
    assert {35, 168, 1000} & set(expected) == {168, 1000} and len(set(expected)) > 12


@pytest.mark.parametrize(("delimiters", "vocabulary"), [((3, 5), 8), (tuple(range(4, 4 + MAX_DELIMITERS)), 90)])
@pytest.mark.parametrize("seed", range(20))
def test_a_block_ends_behind_its_surest_delimiter(seed, delimiters, vocabulary):
    generator = torch.Generator().manual_seed(seed)
    score = torch.rand(4, 21, generator=generator).masked_fill(torch.rand(4, 21, generator=generator) < 0.2, -2.0)
    score[3] *= 0.1
    token = torch.randint(0, vocabulary, (4, 21), generator=generator)
    own = {"adablock_delimiters": list(delimiters), "adablock_length": 9, "adablock_threshold": 0.5}
    constants = torch.zeros(4, MAX_NUMBERS)
    given = ADABLOCK.constants(DecodingOptions(adablock=True, **own))
    constants[:, : len(given)] = torch.tensor(given)
    step = make_step(score, Schedule(0, torch.zeros(1, 21).numpy()), 4)
    got = ADABLOCK.cut(step._replace(token=token, constants=constants)).tolist()
    for row in range(4):
        confidence = {k: c for k, c in enumerate(score[row].tolist()) if c >= 0}
        proposals = dict(enumerate(token[row].tolist()))
        assert got[row] == PlainAdaBlock(0.9, 0.5, 9, delimiters).cut(proposals, confidence)


def plain(network, prompts, make_rule, **canvas):
    rules = [make_rule() for _ in prompts]
    found = [decode(network, prompt, rule, **canvas) for prompt, rule in zip(prompts, rules, strict=True)]
    clear = [i for i, one in enumerate(found) if min(one.rule_margin, one.proposal_margin) > 1e-5]
    assert len({length for rule in rules for length in rule.lengths}) > 3
    assert len(clear) >= 0.6 * len(prompts)
    return found, clear


CASES = {
    "adablock-dual": ("dual", PlainAdaBlock, {"policy": "static_threshold", "adablock": True}),
    "adablock-prefix": (
        "prefix",
        lambda: PlainAdaBlock(delimiters=MANY_DELIMITERS),
        {"policy": "static_threshold", "adablock": True, "adablock_delimiters": list(MANY_DELIMITERS)},
    ),
    "cad_llm-dual": ("dual", lambda: PlainCadLLM(16), {"policy": "cad_llm", "cad_first_block": 12}),
    "cad_llm-none": (
        "none",
        lambda: PlainCadLLM(16, "block"),
        {"policy": "cad_llm", "cad_first_block": 12, "cad_ramp": "block"},
    ),
    "cad_llm-vocabulary": (
        "dual",
        lambda: PlainCadLLM(16, vocabulary=True),
        {"policy": "cad_llm", "cad_first_block": 12, "cad_vocabulary": True},
    ),
}


@pytest.mark.e2e
def test_an_engine_decodes_as_the_plain_loops_in_one_batch_and_after_preemption(tasks_llm, golden_tasks):
    network = ReferenceLLaDA.load(golden_tasks.folder)
    prompts = [case["prompt_token_ids"] for case in golden_tasks.cases[:12]]
    requests, expected = [], []
    for cache_mode, make_rule, options in CASES.values():
        if "adablock" in options:
            options = {"adablock_delimiters": list(DELIMITERS), "adablock_length": 8, **options}
        canvas = {"gen_length": LENGTH, "block_length": 16, "cache_mode": cache_mode}
        found, clear = plain(network, prompts, make_rule, **canvas)
        requests += [(prompts[i], sampling(LENGTH, **options, **canvas)) for i in clear]
        expected += [found[i] for i in clear]
    got = generate(tasks_llm, [prompt for prompt, _ in requests], [params for _, params in requests])
    assert [list(one.token_ids) for one in got] == [one.tokens for one in expected]
    assert [nfe(one) for one in got] == [one.nfe for one in expected]

    ids = {submit(tasks_llm, *request): i for i, request in enumerate(requests[::3])}

    def preempt(step):
        if step in (5, 9, 14, 20):  # also in later blocks: what is kept of a request survives
            assert scheduler(tasks_llm).reset_prefix_cache(reset_running_requests=True)

    finished = drive(tasks_llm, preempt)
    assert {i: list(finished[req_id].token_ids) for req_id, i in ids.items()} == {
        i: one.tokens for i, one in enumerate(expected[::3])
    }


def by_place(decoded, lengths, block_length):
    """What a decoding recorded, by the place of ``block_length`` positions in which a block begins, and step."""
    places, start = [], 0
    for steps, length in zip(decoded.record, lengths, strict=True):
        places += [[] for _ in range(start // block_length + 1 - len(places))]
        own = places[start // block_length]
        own += [[] for _ in range(len(steps) - len(own))]
        for step, samples in enumerate(steps):
            own[step] += samples
        start += length
    return places


@pytest.mark.e2e
@pytest.mark.parametrize("policy", ["osdt", "streaming"])
def test_a_tasks_thresholds_go_with_blocks_of_many_lengths(tasks_llm, tasks_twin, golden_tasks, policy):
    prompts = [case["prompt_token_ids"] for case in golden_tasks.cases[:14]]
    canvas = {"gen_length": LENGTH, "block_length": 16, "cache_mode": "dual"}
    calibrating = PlainAdaBlock()
    first = decode(tasks_twin, prompts[0], calibrating, **canvas)
    assert len(first.record) > len(by_place(first, calibrating.lengths, 16)) == 3
    table = calibrate(by_place(first, calibrating.lengths, 16), "step_block", "q2", False)
    found = []
    for prompt in prompts:
        rule = osdt(table, 0.95, 0.1)
        if policy == "streaming":
            rule = Composed(Streaming(0.9, 0.6), rule.cutoff)
        found.append(decode(tasks_twin, prompt, PlainAdaBlock(rule=rule), **canvas))
    clear = [i for i, one in enumerate(found) if min(one.rule_margin, one.proposal_margin) > 1e-5]
    assert len(clear) >= 8
    one_shot = {"num_calibration_requests": 1, "statistic": "q2", "granularity": "step_block"}
    own = {"adablock": True, "adablock_length": 8, "adablock_delimiters": list(DELIMITERS), "policy": policy}
    own |= {"threshold_cap": 0.95, "slack": 0.1} | ({} if policy == "osdt" else {"calibrated": True})
    params = sampling(LENGTH, task=f"cut-{policy}", **one_shot, **own, **canvas)
    [recorded] = generate(tasks_llm, prompts[:1], params)
    assert (list(recorded.token_ids), nfe(recorded)) == (first.tokens, first.nfe)  # the static threshold alone
    got = generate(tasks_llm, [prompts[i] for i in clear], params)
    assert [(list(one.token_ids), nfe(one)) for one in got] == [(found[i].tokens, found[i].nfe) for i in clear]
    assert any(found[i].nfe != decode(tasks_twin, prompts[i], PlainAdaBlock(), **canvas).nfe for i in clear[:4])


def test_profiles_tell_how_blocks_are_cut():
    usual = DecodingOptions(block_length=16, adablock_delimiters=[14], task="a")
    ways = [{}, {"adablock_length": 8}, {"adablock_threshold": 0.5}, {"adablock_delimiters": [14, 126081]}]
    keys = [replace(usual, adablock=True, **own).cache_key for own in ways]
    assert len({usual.cache_key, *keys}) == 5 and all(re.fullmatch(CACHE_KEY, key) for key in keys)
    assert replace(usual, adablock=True, adablock_length=64).cache_key == keys[0] == "dual:adablock0.3,16,14"
    widths = [ProfileKey("a", 16, one, 0.9).num_positions for one in (usual.cache_key, f"{keys[0]}:credit0.7,0.2,0.8")]
    assert widths == [16, 32]
    assert validate_for_family(replace(usual, adablock=True), LLaDAConfig().traits).calibrates


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"osdt_adablock_threshold": 0.5}, "osdt_adablock_threshold is 0.5, but osdt_adablock is false"),
        ({"osdt_adablock": True, "osdt_policy": "cad_llm"}, "policy 'cad_llm' says itself how long blocks are"),
        ({"osdt_policy": "cad_llm", "osdt_cad_steps": 30}, "says nothing without osdt_cad_ramp = 'block'"),
        ({"osdt_adablock": True, "osdt_refresh_interval": 2}, "adablock is true and refresh_interval 2"),
        (
            {"osdt_policy": "cad_llm", "osdt_cad_threshold": 0.3},
            "cad_min_threshold is 0.4, above cad_threshold 0.3; lower it",
        ),
        (
            {"osdt_adablock": True, "osdt_adablock_delimiters": []},
            "adablock_delimiters is \\[\\]; expected 1 to 29 token",
        ),
    ],
)
def test_what_contradicts_blocks_of_many_lengths_is_refused(values, message):
    traits = LLaDAConfig().traits
    with pytest.raises(InvalidOptionError, match=message):
        validate_for_family(parse_options(values, base=DecodingOptions(), prefix="osdt_"), traits)


def test_a_usual_length_is_no_longer_than_a_block_and_an_entropy_counts_as_a_confidence():
    options = DecodingOptions(adablock=True, adablock_delimiters=[3], adablock_threshold=0.5, block_length=16)
    assert list(ADABLOCK.constants(options)) == [0.5, 16, 1, 3]
    score = torch.full((2, 8), 1 - 0.6 / 32)  # entropies of 0.6 and 0.8 nats; ln 2 is 0.69
    score[1] = 1 - 0.8 / 32
    schedule = Schedule(0, torch.zeros(1, 8).numpy(), constants=ADABLOCK.constants(options, by_entropy=True))
    token = torch.zeros(2, 8, dtype=torch.int64)
    token[:, 2] = 3
    assert ADABLOCK.cut(make_step(score, schedule, 2)._replace(token=token)).tolist() == [3, 16]


@pytest.mark.parametrize("values", [{"osdt_adablock": True}, {"osdt_policy": "cad_llm"}])
def test_block_causal_models_refuse_them(values):
    base = DecodingOptions(cache_mode="block")
    with pytest.raises(InvalidOptionError, match="this model's blocks, which see no later ones, have one length"):
        validate_for_family(parse_options(values, base=base, prefix="osdt_"), SDARConfig().traits)


def test_the_tokenizers_line_end_is_the_delimiter():
    options = DecodingOptions(adablock=True)
    assert list(with_delimiters(options, lambda text: [7], 10).adablock_delimiters) == [7]
    with pytest.raises(InvalidOptionError, match="line end is 2 tokens instead of one; send adablock_delimiters"):
        with_delimiters(options, lambda text: [7, 8], 10)
    with pytest.raises(InvalidOptionError, match="adablock_delimiters has 12; this model's token ids are below 10"):
        with_delimiters(DecodingOptions(adablock=True, adablock_delimiters=[12]), None, 10)


@pytest.mark.e2e
def test_an_operator_may_have_all_blocks_cut(golden_tasks, start_llm):
    """The first steps of an engine come before a request has told, or a tokenizer, what delimits."""
    config = {"osdt": {"profile_dir": "", "adablock": True, "policy": "static_threshold"}}
    llm = start_llm(golden_tasks.folder, max_num_seqs=2, max_model_len=128, additional_config=config)
    network, prompt = ReferenceLLaDA.load(golden_tasks.folder), golden_tasks.cases[0]["prompt_token_ids"]
    canvas = {"gen_length": LENGTH, "block_length": 16, "cache_mode": "dual"}
    expected = decode(network, prompt, PlainAdaBlock(), **canvas)
    params = sampling(LENGTH, adablock_delimiters=list(DELIMITERS), adablock_length=8, **canvas)
    assert [list(one.token_ids) for one in generate(llm, [prompt], params)] == [expected.tokens]
