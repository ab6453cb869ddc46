"""Sampling parameters that change logits, and log probabilities, as a plain loop has them; both kinds of attention."""

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from vllm.exceptions import VLLMValidationError

import vllm_osdt
from tests.e2e.engine import assert_idle, drive, generate, nfe, sampling, submit, tokens
from tests.e2e.jobs import MIN_MARGIN
from tests.reference.block_causal import ReferenceSDAR, decode_block_causal
from tests.reference.decode import Decoded, Shape, ThresholdRule, decode

pytestmark = pytest.mark.e2e

BLOCK, LENGTH = 8, 24
THRESHOLD = 0.6


@dataclass(frozen=True)
class Served:
    """An engine and the same model in plain PyTorch."""

    llm: Any
    prompts: list[list[int]]
    vocabulary: int
    decode: Callable[..., Decoded]
    logits: Callable[[list[int]], torch.Tensor]  # of the first position behind a prompt, block length 1


@pytest.fixture(scope="module")
def sdar_llm(golden_sdar, start_llm):
    return start_llm(golden_sdar.folder, max_num_seqs=64, max_model_len=256, block_size=32)


@pytest.fixture(scope="module")
def full(golden_tasks, tasks_twin, tasks_llm):
    prompts = [case["prompt_token_ids"] for case in golden_tasks.cases[:30]]
    canvas = {"gen_length": LENGTH, "block_length": BLOCK, "cache_mode": "none"}
    mask = tasks_twin.mask_token_id

    def logits(prompt: list[int]) -> torch.Tensor:
        return tasks_twin.forward(torch.tensor([*prompt, mask]))[0][-1]

    return Served(tasks_llm, prompts, golden_tasks.config["vocab_size"], partial(decode, tasks_twin, **canvas), logits)


@pytest.fixture(scope="module")
def causal(golden_sdar, sdar_llm):
    network = ReferenceSDAR.load(golden_sdar.folder)
    prompts = [case["prompt_token_ids"] for case in golden_sdar.cases[:30]]
    loop = partial(decode_block_causal, network, block_length=BLOCK, max_tokens=LENGTH)

    def logits(prompt: list[int]) -> torch.Tensor:
        return network.forward(torch.tensor([*prompt, network.mask_token_id]), 1)[-1]

    return Served(sdar_llm, prompts, golden_sdar.config["vocab_size"], loop, logits)


@pytest.fixture(params=["full", "causal"])
def served(request):
    return request.getfixturevalue(request.param)


def static() -> ThresholdRule:
    return ThresholdRule(lambda block, step: THRESHOLD, strict=False)


def asked(llm: Any, max_tokens: int = LENGTH, **values: Any) -> Any:
    """Parameters of a request in one canvas of LENGTH, or of a block-causal one of as many blocks."""
    own = {"policy": "static_threshold", "threshold": THRESHOLD, "block_length": BLOCK}
    if not llm.llm_engine.model_config.hf_config.traits.is_block_causal:
        own |= {"cache_mode": "none", "gen_length": LENGTH}
    return sampling(max_tokens, **{**own, **values})


def biased(biases: dict[int, float]) -> Shape:
    def shape(row: torch.Tensor, before: list[int], index: int) -> torch.Tensor:
        row = row.clone()
        for token, bias in biases.items():
            row[token] += bias
        return row

    return shape


def only(allowed: list[int]) -> Shape:
    def shape(row: torch.Tensor, before: list[int], index: int) -> torch.Tensor:
        kept = torch.full_like(row, -torch.inf)
        kept[allowed] = row[allowed]
        return kept

    return shape


def not_before(min_tokens: int, stops: list[int]) -> Shape:
    def shape(row: torch.Tensor, before: list[int], index: int) -> torch.Tensor:
        return row.index_fill(0, torch.tensor(stops), -torch.inf) if index < min_tokens else row

    return shape


def penalized(prompt: list[int], presence: float = 0.0, frequency: float = 0.0, repetition: float = 1.0) -> Shape:
    """As OpenAI and the CTRL paper (arXiv 1909.05858) define them; repetition counts the prompt too."""

    def shape(row: torch.Tensor, before: list[int], index: int) -> torch.Tensor:
        row = row.clone()
        for token in set(before):
            row[token] = row[token] / repetition if row[token] > 0 else row[token] * repetition
        for token, number in Counter(before[len(prompt) :]).items():
            row[token] -= presence + frequency * number
        return row

    return shape


def frequent(served: Served) -> list[int]:
    """The tokens that these prompts' answers have most often."""
    found = Counter(token for prompt in served.prompts[:8] for token in served.decode(prompt, static()).tokens)
    return [token for token, _ in found.most_common(4)]


def kinds(served: Served, prompt: list[int]) -> list[tuple[dict[str, Any], Shape]]:
    """Parameters of a request, and what they do to logits."""
    first, second, *_ = often = frequent(served)
    some = sorted({*often, *random.Random(5).sample(range(3, served.vocabulary - 3), 20)})
    some = [token for token in some if token != served.decode.args[0].mask_token_id]
    return [
        ({"logit_bias": {first: -3.0, second: 2.5}}, biased({first: -3.0, second: 2.5})),
        ({"logit_bias": {first: -100.0}}, biased({first: -100.0})),
        ({"allowed_token_ids": some}, only(some)),
        ({"stop_token_ids": [first], "min_tokens": 13}, not_before(13, [first])),
        ({"presence_penalty": 1.5}, penalized(prompt, presence=1.5)),
        ({"frequency_penalty": 0.7, "presence_penalty": -0.5}, penalized(prompt, presence=-0.5, frequency=0.7)),
        ({"repetition_penalty": 1.6}, penalized(prompt, repetition=1.6)),
        ({"repetition_penalty": 1.3, "frequency_penalty": 0.4}, penalized(prompt, 0.0, 0.4, 1.3)),
    ]


def test_greedy_requests_are_decoded_as_by_the_plain_loop(served):
    jobs = []
    for index, prompt in enumerate(served.prompts):
        variants = kinds(served, prompt)
        values, shape = variants[index % len(variants)]
        done = served.decode(prompt, static(), end_token_ids=tuple(values.get("stop_token_ids", ())), shape=shape)
        if min(done.proposal_margin, done.rule_margin) > MIN_MARGIN:
            jobs.append((prompt, asked(served.llm, **values), done))
    assert len(jobs) >= 20
    plain = [served.decode(prompt, static()).tokens for prompt, _, _ in jobs]
    assert sum(done.tokens != tokens for (_, _, done), tokens in zip(jobs, plain, strict=True)) >= 12  # they matter
    got = generate(served.llm, [prompt for prompt, _, _ in jobs], [params for _, params, _ in jobs])
    assert tokens(got) == [done.tokens for _, _, done in jobs]
    assert [nfe(one) for one in got] == [done.nfe for _, _, done in jobs]
    for prompt, params, done in jobs[::3]:
        [alone] = generate(served.llm, [prompt], [params])
        assert list(alone.token_ids) == done.tokens
    assert_idle(served.llm)


def test_log_probabilities_are_those_of_the_step_that_unmasked_a_token(served):
    jobs = []
    for prompt in served.prompts[:12]:
        done = served.decode(prompt, static())
        if min(done.proposal_margin, done.rule_margin) > MIN_MARGIN:
            jobs.append((prompt, done))
    assert len(jobs) >= 6
    asks = [index % 4 for index in range(len(jobs))]
    got = generate(served.llm, [prompt for prompt, _ in jobs], [asked(served.llm, logprobs=k) for k in asks])
    plain = generate(served.llm, [prompt for prompt, _ in jobs], [asked(served.llm)] * len(jobs))
    assert tokens(got) == tokens(plain) == [done.tokens for _, done in jobs]
    assert [nfe(one) for one in got] == [nfe(one) for one in plain]  # no forward of their own
    for one, (_, done), number in zip(got, jobs, asks, strict=True):
        assert len(one.logprobs) == len(done.tokens)
        for found, token, logits in zip(one.logprobs, done.tokens, done.chosen_from, strict=True):
            expected = logits.double().log_softmax(dim=-1)
            best = expected.topk(max(number, 1))
            assert set(found) == {token, *best.indices[:number].tolist()}
            for other, value in found.items():
                assert value.logprob == pytest.approx(expected[other].item(), abs=2e-4)
            assert found[token].rank == int((expected >= expected[token]).sum())
    assert plain[0].logprobs is None


def test_log_probabilities_do_not_depend_on_the_batch_or_on_streaming(served):
    prompts = served.prompts[:6]
    params = [asked(served.llm, logprobs=2, temperature=0.9, seed=index) for index in range(len(prompts))]
    together = generate(served.llm, prompts, params)
    for prompt, one, beside in zip(prompts, params, together, strict=True):
        [alone] = generate(served.llm, [prompt], [one])
        assert list(alone.token_ids) == list(beside.token_ids)
        values = [[(token, found.logprob) for token, found in place.items()] for place in alone.logprobs]
        assert values == [[(token, found.logprob) for token, found in place.items()] for place in beside.logprobs]


def test_a_trace_says_when_each_token_was_unmasked(served):
    jobs = []
    for prompt in served.prompts[:10]:
        done = served.decode(prompt, static())
        if min(done.proposal_margin, done.rule_margin) > MIN_MARGIN:
            jobs.append((prompt, done))
    asks = [asked(served.llm, return_trace=True, logprobs=0) for _ in jobs]
    got = generate(served.llm, [prompt for prompt, _ in jobs], asks)
    for one, (prompt, done) in zip(got, jobs, strict=True):
        assert list(one.token_ids) == done.tokens
        trace = vllm_osdt.describe(one)["trace"]
        assert trace["step"] == [step for step, _, _ in done.steps]
        if served.decode.func is decode:  # fused commits have a count of their own
            assert trace["forward"] == [forward for _, forward, _ in done.steps]
        assert max(trace["forward"]) == nfe(one) and trace["forward"][0] >= 1
        assert trace["confidence"] == pytest.approx([confidence for _, _, confidence in done.steps], abs=1e-4)
        assert sum(block["num_tokens"] for block in trace["blocks"]) == len(done.tokens)
        assert {block["rule"] for block in trace["blocks"]} == {"threshold"}
        first = (BLOCK - len(prompt) % BLOCK) if served.decode.func is decode_block_causal else BLOCK
        assert trace["blocks"][0]["num_tokens"] == first
        assert trace["blocks"][0]["thresholds"] == pytest.approx([THRESHOLD] * (1 + max(trace["step"][:first])))
    [alone] = generate(served.llm, [jobs[0][0]], [asked(served.llm)])
    assert "trace" not in vllm_osdt.describe(alone)
    assert_idle(served.llm)


FILTERS: list[dict[str, Any]] = [
    {"top_k": 3},
    {"top_p": 0.7},
    {"min_p": 0.2},
    {"top_k": 5, "top_p": 0.9, "min_p": 0.05, "temperature": 1.5},
    {"temperature": 0.7},
]


def left(logits: torch.Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, temperature: float = 1.0) -> Any:
    """The distribution that a proposal is drawn from, float64 ``[vocabulary]``."""
    probability = (logits.double() / temperature).softmax(dim=-1)
    probability[probability < min_p * probability.max()] = 0
    order = probability.argsort(descending=True)
    if top_k:
        probability[order[top_k:]] = 0
    probability /= probability.sum()
    mass_before = probability[order].cumsum(0) - probability[order]
    probability[order[mass_before >= top_p]] = 0
    return probability / probability.sum()


@pytest.mark.parametrize("values", FILTERS, ids=str)
def test_filtered_proposals_have_the_distribution_of_what_is_left(served, values):
    prompt, number = served.prompts[1], 250
    logits = served.logits(prompt) * 1.0
    logits[served.decode.args[0].mask_token_id] = -torch.inf
    expected = left(logits, **values)
    values = {"temperature": 1.0, **values}
    own = (
        {"block_length": 1, "gen_length": 1} if served.prompts and served.decode.func is decode else {"block_length": 1}
    )
    params = [asked(served.llm, 1, seed=seed, **values, **own) for seed in range(number)]
    found = Counter(ids[0] for ids in tokens(generate(served.llm, [prompt] * number, params)))
    assert set(found) <= set(expected.nonzero().flatten().tolist())
    # Chi-squared over the tokens that are expected five times, and all others as one; its mean is the number of cells
    # less one, and 5 standard deviations above it are never seen by chance.
    often = [token for token in expected.nonzero().flatten().tolist() if expected[token] * number >= 5]
    cells = [(found[token], expected[token].item() * number) for token in often]
    rest = number - sum(want for _, want in cells)
    if rest > 1:
        cells.append((number - sum(got for got, _ in cells), rest))
    freedom = max(len(cells) - 1, 1)
    chi_squared = sum((got - want) ** 2 / want for got, want in cells)
    assert chi_squared < freedom + 5 * (2 * freedom) ** 0.5


def test_parameters_of_one_request_change_no_other(served):
    prompts = served.prompts[:16]
    plain = [asked(served.llm) for _ in prompts]
    expected = tokens(generate(served.llm, prompts, plain))
    rng = random.Random(1)
    mixed, expects = [], []
    for prompt, params, want in zip(prompts, plain, expected, strict=True):
        if rng.random() < 0.5:
            values, _ = rng.choice(kinds(served, prompt))
            params, want = asked(served.llm, logprobs=rng.choice([None, 2]), **values), None
        mixed.append(params)
        expects.append(want)
    got = tokens(generate(served.llm, prompts, mixed))
    assert 3 <= sum(want is None for want in expects) <= 13
    assert all(want is None or ids == want for ids, want in zip(got, expects, strict=True))
    for prompt, params, ids in zip(prompts, mixed, got, strict=True):
        assert tokens(generate(served.llm, [prompt], [params])) == [ids]


def test_preempted_and_aborted_requests_leave_their_parameters_behind(served):
    prompt = served.prompts[0]
    [plain] = tokens(generate(served.llm, [prompt], [asked(served.llm)]))
    allowed = sorted(set(plain))[:2]
    aborted = submit(served.llm, prompt, asked(served.llm, allowed_token_ids=allowed, logprobs=1))
    served.llm.llm_engine.step()
    served.llm.llm_engine.abort_request([aborted], internal=True)
    drive(served.llm)
    assert tokens(generate(served.llm, [prompt], [asked(served.llm)])) == [plain]


def test_filtered_confidence_is_the_share_of_what_is_left(served):
    prompt = served.prompts[2]
    done = served.decode(prompt, static())
    allowed = sorted(set(done.tokens))[:3]
    values = {"allowed_token_ids": allowed, "threshold": 0.95}
    [model] = generate(served.llm, [prompt], [asked(served.llm, **values)])
    [share] = generate(served.llm, [prompt], [asked(served.llm, filtered_confidence=True, **values)])
    assert set(share.token_ids) <= set(allowed) and set(model.token_ids) <= set(allowed)
    assert nfe(share) <= nfe(model)
    one = asked(served.llm, allowed_token_ids=allowed[:1], filtered_confidence=True)
    [certain] = generate(served.llm, [prompt], [one])
    blocks = (
        -(-(len(prompt) % BLOCK + LENGTH) // BLOCK) if served.decode.func is decode_block_causal else LENGTH // BLOCK
    )
    assert set(certain.token_ids) == {allowed[0]}
    assert nfe(certain) == blocks  # what is certain is unmasked at once


def test_words_of_several_tokens_cannot_be_banned(full):
    words = full.llm.get_tokenizer().convert_ids_to_tokens(frequent(full)[:2])
    params = asked(full.llm, bad_words=[words[0]])
    [one] = generate(full.llm, full.prompts[:1], [params])
    assert frequent(full)[0] not in one.token_ids
    with pytest.raises(VLLMValidationError, match=r"bad_words.*one token"):
        generate(full.llm, full.prompts[:1], [asked(full.llm, bad_words=[" ".join(words)])])


def test_processed_log_probabilities_are_those_of_what_was_chosen_from(golden_tasks, start_llm):
    """A greedy proposal is the best of what penalties leave, though its step has written it since."""
    llm = start_llm(golden_tasks.folder, max_num_seqs=8, max_model_len=256, logprobs_mode="processed_logprobs")
    prompts = [case["prompt_token_ids"] for case in golden_tasks.cases[:6]]
    for values in ({"presence_penalty": 2.0}, {"repetition_penalty": 5.0}, {"temperature": 1.0, "top_k": 3}):
        for one in generate(llm, prompts, [asked(llm, logprobs=1, seed=1, **values)] * len(prompts)):
            ranks = [place[token].rank for place, token in zip(one.logprobs, one.token_ids, strict=True)]
            assert max(ranks) <= values.get("top_k", 1)
            assert all(place[token].logprob > -40 for place, token in zip(one.logprobs, one.token_ids, strict=True))
