"""S2D2 step by step against its definition: the router, what a verification takes and draws, refusals."""

import math
import random
from pathlib import Path

import pytest
import torch

from csrc_triton.noise import gumbel_noise
from tests.e2e.engine import nfe, sampling, tokens
from tests.policies.adjusted import NO_CONFIDENCE, chosen, make_step
from tests.policies.test_policies import schedule_of
from tests.reference.self_speculation import Outcome, Router, Settings
from vllm_osdt.errors import InvalidOptionError
from vllm_osdt.geometry import DecodeShape
from vllm_osdt.mini import gen_length_of, model_path, tasks_of
from vllm_osdt.mini.tasks import check
from vllm_osdt.mini.tasks import generate as draw_problems
from vllm_osdt.models.traits import Traits
from vllm_osdt.options import DecodingOptions
from vllm_osdt.options.family import validate_for_family
from vllm_osdt.options.parsing import parse_options
from vllm_osdt.policies import POLICIES, PositionLogits
from vllm_osdt.policies.base import MAX_CONSTANTS, MAX_READINGS, Verification
from vllm_osdt.policies.s2d2 import _sample

S2D2 = POLICIES["s2d2"]
WIDTH, VOCABULARY = 9, 11
ROUTERS = (
    {"router": "span", "min_span": 3},
    {"router": "score", "cost": 1.5},
    {"router": "score", "estimator": "margin", "margin": 0.2, "score": -0.4},
    {"router": "hysteresis", "on": 1.5, "off": 0.1, "max_span": 2},
    {"router": "score", "cost": 0.7, "cost_per": "confident_position", "threshold": 0.3, "min_span": 2},
)


def schedule(**settings):
    """Of requests with these settings."""
    own = {name if name in ("threshold", "steps") else f"verify_{name}": value for name, value in settings.items()}
    options = DecodingOptions(policy="s2d2", block_length=WIDTH, gen_length=WIDTH, **own)
    return schedule_of("s2d2", options, None)


def start(logits, masked, own, *, span=None):
    """The step of requests ``[R]`` with these logits ``[R, W, V]`` and masks, read; ``span`` of a verification."""
    rows = masked.nonzero()
    share = logits.softmax(dim=-1)
    confidence, token = (one[masked] for one in share.max(dim=-1))
    score = torch.full(masked.shape, NO_CONFIDENCE)
    score[masked] = confidence
    step = make_step(score, own, masked.shape[0], memory_size=S2D2.memory_size)
    step.token[masked] = token
    none = torch.zeros(masked.shape[0], 2, dtype=torch.int64)
    quota = 0 if own.min_unmask is None else int(own.min_unmask[0])
    minimum = torch.full((masked.shape[0],), quota, dtype=torch.int32)
    step = step._replace(verification=Verification(none if span is None else span, none.clone(), minimum))
    reading = torch.zeros(len(rows), MAX_READINGS)
    constants = torch.zeros(len(rows), MAX_CONSTANTS)
    constants[:, : len(own.constants)] = torch.tensor(own.constants)
    memory = torch.zeros(len(rows), S2D2.memory_size)
    is_verified = torch.zeros(len(rows), dtype=torch.bool)
    index = torch.zeros(len(rows), dtype=torch.int64)
    found = PositionLogits(logits[masked], None, token, confidence, constants, memory, reading, index)
    S2D2.read(found._replace(is_verified=is_verified))
    step.reading[masked] = reading
    return step


@pytest.mark.parametrize("settings", ROUTERS, ids=lambda one: "-".join(map(str, one.values())))
@pytest.mark.parametrize("width", [WIDTH, WIDTH + 5])
def test_a_router_asks_for_what_the_definition_says(settings, width):
    """Blocks of a longer batch are as wide as the longest; padding changes nothing."""
    generator = torch.Generator().manual_seed(3)
    own, count = schedule(**settings), 40
    logits = (
        torch.randn(count, width, VOCABULARY, generator=generator) * torch.rand(count, 1, 1, generator=generator) * 6
    )
    masked = torch.rand(count, width, generator=generator) < 0.75
    masked[:, WIDTH:] = False
    masked[:, 4] = True
    step = start(logits, masked, own)
    was_on = torch.rand(count, generator=generator) < 0.5
    step.carry[:, 0] = was_on
    S2D2.adjust(step)
    asked, num_compared, num_asked = step.verification.asked.tolist(), 0, 0
    for row in range(count):
        outcome = Outcome()
        plain = Settings(is_strict=False, **settings)
        router = Router(plain, outcome)
        router.is_on = bool(was_on[row])
        places = masked[row].nonzero().ravel().tolist()
        run = [place for place in places if place - places[0] == places.index(place)]
        confident = [place for place in places if logits[row, place].softmax(-1).max() >= plain.threshold]
        wants = router.asks([logits[row, place] for place in run], len(confident), WIDTH, WIDTH - len(places))
        if outcome.router_margin < 1e-4:
            continue
        num_compared, num_asked = num_compared + 1, num_asked + wants
        assert asked[row] == ([run[0], min(len(run), plain.max_span)] if wants else [0, 0])
        if plain.router == "hysteresis":
            assert bool(step.carry[row, 0]) == router.is_on
        assert step.memory[row, places, 0].tolist() == logits[row, places].argmax(dim=-1).tolist()
    assert num_compared > 30 and 0 < num_asked < num_compared


@pytest.mark.parametrize(("exploration", "has_sub_blocks"), [(0.0, True), (0.3, False), (1.0, True), (1.0, False)])
def test_the_bandit_verifies_as_ucb_over_each_requests_own_rewards_does(exploration, has_sub_blocks):
    [bandit], rng, count = S2D2.variants, random.Random(4), 12
    generator, own = torch.Generator().manual_seed(4), schedule(router="bandit", exploration=exploration)
    if has_sub_blocks:
        shape = DecodeShape(2, 2 * WIDTH, sub_block_length=WIDTH)
        own = S2D2.schedule(DecodingOptions(verify_router="bandit", verify_exploration=exploration), shape)
    assert own.variant == 1 and schedule(router="score").variant == 0
    outcomes = [Outcome() for _ in range(count)]
    routers = [Router(Settings(router="bandit", exploration=exploration), outcome) for outcome in outcomes]
    kept, num_asked, num_compared = None, 0, 0
    for _ in range(80):
        scale = torch.rand(count, 1, 1, generator=generator) ** 3 * 6
        logits = torch.randn(count, WIDTH + 2, VOCABULARY, generator=generator) * scale
        masked = torch.rand(count, WIDTH + 2, generator=generator) < torch.rand(count, 1, generator=generator) + 0.2
        masked[:, WIDTH:], masked[:, 4] = False, True
        step = start(logits, masked, own)
        if kept is not None:
            step.carry.copy_(kept)
        at_first = torch.randint(0, 3, (count,), generator=generator) + masked.sum(dim=1)
        step.state[:, 1] = at_first
        bandit.adjust(step)
        asked, unmasked = step.verification.asked.clone(), torch.zeros_like(masked)
        num_decided = [rng.randrange(1, int(number) + 1) for number in masked.sum(dim=1)]
        for row, router in enumerate(routers):
            places = masked[row].nonzero().ravel().tolist()
            run = [place for place in places if place - places[0] == places.index(place)]
            before = WIDTH if has_sub_blocks else int(at_first[row])
            wants = router.asks([logits[row, place] for place in run], 0, WIDTH, before - len(places))
            if outcomes[row].router_margin > 1e-6:
                num_asked, num_compared = num_asked + wants, num_compared + 1
                assert asked[row].tolist() == ([run[0], len(run)] if wants else [0, 0])
            router.hears(num_decided[row])
            unmasked[row, places[: num_decided[row]]] = True
        waits = asked[:, 1] > 0
        bandit.observe(step, unmasked & ~waits[:, None])
        later = step._replace(verification=Verification(asked, torch.zeros_like(asked), step.verification.min_unmask))
        bandit.adjust(later)
        assert not later.verification.asked[waits].any()
        bandit.observe(later, unmasked & waits[:, None])
        kept = later.carry
    assert num_compared > 900 and 0.1 < num_asked / num_compared < 0.9
    assert kept[:, :16].sum(dim=1).tolist() == [80] * count


def test_a_verification_takes_what_agrees_and_the_first_that_does_not_and_the_threshold_adds_what_is_missing():
    rng, seen = random.Random(5), set()
    for _ in range(200):
        quota = rng.choice([0, 1, 3])
        own = schedule(router="span", threshold=0.5, **({"steps": math.ceil(WIDTH / quota)} if quota else {}))
        masked = [rng.random() < 0.8 for _ in range(WIDTH)]
        first = rng.randrange(WIDTH)
        length = rng.randrange(1, WIDTH - first + 1)
        masked[first : first + length] = [True] * length
        drafted = [rng.random() for _ in range(WIDTH)]
        agrees = [rng.random() < 0.7 for _ in range(WIDTH)]
        score = torch.tensor([[0.3 if one else NO_CONFIDENCE for one in masked]])
        step = make_step(score, own, 1, memory_size=2)
        minimum = torch.tensor([0 if own.min_unmask is None else own.min_unmask[0]], dtype=torch.int32)
        span = torch.tensor([[first, length]])
        step = step._replace(verification=Verification(span, torch.zeros_like(span), minimum))
        step.token.copy_(torch.arange(WIDTH) + 100)  # of the verification
        step.memory[0, :, 0], step.memory[0, :, 1] = torch.arange(WIDTH) + 200, torch.tensor(drafted)
        step.reading[0, :, 1] = torch.tensor(agrees).float()
        step.carry[0, 0] = 1
        S2D2.adjust(step)
        taken = []
        for place in range(first, first + length):
            taken.append(place)
            if not agrees[place]:
                break
        expected, missing = set(taken), int(minimum) - len(taken)
        left = [place for place in range(WIDTH) if masked[place] and place not in taken]
        if missing > 0:
            above = [place for place in left if drafted[place] >= 0.5]
            best = sorted(left, key=lambda place: -drafted[place])[:missing]
            expected |= set(above if len(above) >= missing else best)
        from_threshold = {place for place, one in enumerate(step.score[0].tolist()) if one >= step.parameter}
        ranking = sorted(range(WIDTH), key=lambda place: -step.score[0, place].item())
        least = {place for place in ranking[: int(minimum)] if step.score[0, place] > NO_CONFIDENCE}
        assert from_threshold | least == expected
        assert [step.token[0, place].item() for place in sorted(expected)] == [
            place + (100 if place in taken else 200) for place in sorted(expected)
        ]
        assert step.verification.asked.tolist() == [[0, 0]] and step.carry[0, 0] == 1
        seen.add((len(expected) > len(taken), len(taken) == length))
    assert len(seen) == 4


def test_drafts_that_are_not_verified_are_decided_by_the_threshold():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(30, WIDTH, VOCABULARY, generator=generator) * 4
    masked = torch.rand(30, WIDTH, generator=generator) < 0.7
    masked[:, 0] = True
    step = start(logits, masked, schedule(score=99.0, threshold=0.6))
    S2D2.adjust(step)
    confidence = logits.softmax(dim=-1).amax(dim=-1)
    for row, found in enumerate(chosen(step)):
        places = masked[row].nonzero().ravel().tolist()
        above = {place for place in places if confidence[row, place] >= 0.6}
        assert found == (above or {max(places, key=lambda place: confidence[row, place])})


@pytest.mark.parametrize("seed", range(3))
def test_draft_and_verification_together_draw_from_the_verifying_distribution(seed):
    """Chi-squared with 7 degrees of freedom: a true sampler exceeds 24.3 once in 1000 seeds."""
    generator, number = torch.Generator().manual_seed(seed), 40_000
    logits = torch.randn(2, 8, generator=generator) * 1.5
    p, q = logits.softmax(dim=-1)
    key = torch.randint(-(2**62), 2**62, (number,), generator=generator)
    drafted = (q.log() + gumbel_noise(key, torch.arange(8))).argmax(dim=-1)
    drawn = _sample(p.expand(number, -1), q.expand(number, -1), drafted, key)

    def chi_squared(tokens, expected):
        count = torch.bincount(tokens, minlength=8)
        return ((count - number * expected) ** 2 / (number * expected)).sum().item()

    assert chi_squared(drafted, q) < 24.3 and chi_squared(drawn, p) < 24.3
    assert chi_squared(drafted, p) > 200
    share = (drawn == drafted).double().mean().item()
    assert share == pytest.approx(torch.minimum(p, q).sum().item(), abs=0.015)


def options(**values):
    """A request's options, parsed."""
    values = {"osdt_" + name: value for name, value in {"policy": "s2d2", **values}.items()}
    cache = values.pop("osdt_base", "block")
    return parse_options(values, base=DecodingOptions(block_length=8, cache_mode=cache), prefix="osdt_")


@pytest.mark.parametrize(
    ("values", "traits", "words"),
    [
        ({"base": "dual"}, Traits(8, 99), "policy is 's2d2'.*sees all others.*choose another"),
        ({"edit_threshold": 0.9}, Traits(8, 99, is_block_causal=True, can_edit=True), "edit_threshold is 0.9.*leave"),
        ({"draft_ngram": 2}, Traits(8, 99, is_block_causal=True), "draft_ngram is 2.*drafts for itself"),
        (
            {"base": "causal", "cache_mode": "causal_fused"},
            Traits(8, 99, is_block_causal=True, commits_causally=True),
            "cache_mode is 'causal_fused'.*no pass of its own",
        ),
        (
            {"sub_block_cache": True},
            Traits(8, 99, sub_block_length=4, is_block_causal=True, logits_shift=1),
            "sub_block_cache is True.*overwrites",
        ),
    ],
)
def test_what_a_verification_cannot_stand_beside_is_refused(values, traits, words):
    with pytest.raises(InvalidOptionError, match=words):
        validate_for_family(options(**values), traits)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"verify_router": "hysteresis", "verify_on": -6.0}, "verify_off is -5; it must be less than verify_on -6"),
        ({"verify_min_span": 5, "verify_max_span": 4}, "verify_max_span is 4; it must be at least verify_min_span 5"),
        ({"verify_on": 2.0}, "says nothing without osdt_verify_router = 'hysteresis'"),
        ({"verify_router": "span", "verify_cost": 2.0}, "verify_cost is 2.0, which means nothing beside"),
        ({"verify_router": "bandit", "verify_min_span": 2}, "verify_min_span is 2, which means nothing beside"),
        ({"verify_exploration": 0.5}, "says nothing without osdt_verify_router = 'bandit'"),
        ({"credit": True}, "credit is true, but policy 's2d2' compares"),
        ({"policy": "static_threshold", "verify_cost": 2.0}, "does not use"),
    ],
)
def test_options_that_mean_nothing_are_refused(values, words):
    with pytest.raises(InvalidOptionError, match=words):
        options(**values)


def test_a_trained_model_answers_as_from_left_to_right_in_fewer_forwards(start_llm):
    """A small version of ``benchmarks/bench_verification.py``; a verification of one position is one token more."""
    model = model_path("sdar-mini")
    llm = start_llm(Path(model), max_num_seqs=24, tokenizer=model)
    problems = [one for task in tasks_of("sdar-mini") for one in draw_problems(task, "held_out", 4, 5)]

    def answers(**own):
        params = sampling(gen_length_of("sdar-mini"), policy="s2d2", ignore_eos=False, **own)
        outputs = llm.generate([problem.prompt for problem in problems], params, use_tqdm=False)
        return [output.outputs[0] for output in outputs]

    one_by_one = answers(verify_router="span", verify_max_span=1)
    at_once = answers(verify_router="span")
    right = [
        [check(problem, one.text) for problem, one in zip(problems, some, strict=True)]
        for some in (one_by_one, at_once)
    ]
    assert tokens(at_once) == tokens(one_by_one) and right[0] == right[1] and sum(right[0]) >= 10
    assert sum(map(nfe, at_once)) * 4 < sum(map(nfe, one_by_one))
