"""Random requests and what a plain loop makes of them, for every model family."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import vllm_osdt
from tests.e2e.engine import assert_idle, drive, generate, nfe, sampling, scheduler, submit, tokens, watch_logits
from tests.reference.decode import (
    Decoded,
    Draft,
    EntropyBound,
    Rule,
    ThresholdRule,
    best_first,
    calibrate,
    decode,
    factor,
    joint_bound,
    osdt,
)

MIN_MARGIN = 1e-5
DRAFT_THRESHOLD = 0.02  # confidences of random weights are low
LOGIT_TOLERANCE = 2e-4  # see tests/models/test_llada.py


@dataclass(frozen=True)
class Job:
    """A request, and what is expected of it."""

    prompt: list[int]
    params: Any
    decoded: Decoded


def above(tau: float) -> ThresholdRule:
    """The static threshold of the block-causal families: equality does not pass."""
    return ThresholdRule(lambda block, step: tau, strict=True)


RULES: list[tuple[dict[str, Any], Callable[[], Rule]]] = [
    ({"policy": "static_threshold", "threshold": 0.2}, lambda: above(0.2)),
    ({"policy": "static_threshold", "threshold": 0.5}, lambda: above(0.5)),
    ({"policy": "static_threshold", "threshold": 0.9}, lambda: above(0.9)),
    ({"policy": "factor", "factor": 1.5}, lambda: factor(1.5)),
    ({"policy": "joint_bound", "delta": 0.1}, lambda: joint_bound(0.1)),
    ({"policy": "fixed_steps"}, lambda: lambda block, step, masked: best_first(masked)[:1]),
    ({"policy": "entropy_bound", "entropy": 4.0}, lambda: EntropyBound(4.0)),
]  # as many as share no divisor with the number of a family's variants
MIN_ENDED = 8  # jobs of a family that end at a stop token
MIN_SHORTENED = 2  # that take fewer forwards by a draft
CANVAS_VARIANTS = [{"cache_mode": cache, "block_length": b} for b in (4, 8, 16) for cache in ("none", "prefix", "dual")]


def make_jobs(
    decode: Callable[..., Decoded], variants: Sequence[dict[str, Any]], number: int = 60, rules: Any = RULES
) -> list[Job]:
    """Random requests, each of the rules with each of the variants; those whose outcome hangs on rounding are left out.

    Some have a draft: their own output with some other tokens, perhaps a part of it, perhaps with more behind it.

    Args:
        decode: Takes prompt, rule, ``max_tokens``, ``end_token_ids`` and a variant's options.
        variants: Options of requests, such as ``block_length``.
        number: How many to draw.
        rules: Options and the plain rule.
    """
    rng, jobs, num_shortened = random.Random(0), [], 0
    for index in range(number):
        (options, rule), variant = rules[index % len(rules)], variants[index % len(variants)]
        prompt = [rng.randrange(8, 100) for _ in range(rng.randrange(1, 60))]
        max_tokens, ends = rng.randrange(1, 48), ()
        decoded = decode(prompt, rule(), max_tokens=max_tokens, end_token_ids=ends, **variant)
        if rng.randrange(3) == 0:  # it ends where the undisturbed output comes by
            ends = (rng.randrange(3, 8), decoded.tokens[len(decoded.tokens) // 2])
            decoded = decode(prompt, rule(), max_tokens=max_tokens, end_token_ids=ends, **variant)
        if index % 5 == 4:
            drafted = random_draft(random.Random(index), decoded.tokens)
            options = {**options, "draft": drafted, "draft_threshold": DRAFT_THRESHOLD}
            draft = Draft(dict(enumerate(drafted[:max_tokens])), DRAFT_THRESHOLD)
            without, decoded = (
                decoded,
                decode(prompt, rule(), max_tokens=max_tokens, end_token_ids=ends, draft=draft, **variant),
            )
            num_shortened += decoded.nfe < without.nfe
        if min(decoded.proposal_margin, decoded.rule_margin, decoded.edit_margin) > MIN_MARGIN:
            params = sampling(max_tokens, stop_token_ids=list(ends), **options, **variant)
            jobs.append(Job(prompt, params, decoded))
    assert sum(len(job.decoded.tokens) < job.params.max_tokens for job in jobs) >= MIN_ENDED
    assert num_shortened >= MIN_SHORTENED
    return jobs


def random_draft(rng: random.Random, answer: list[int], share: float = 0.3) -> list[int]:
    """An answer with a share of other tokens, perhaps a part of it, perhaps with more behind it."""
    tokens = [rng.randrange(8, 100) if rng.random() < share else token for token in answer]
    return [*tokens[: rng.randrange(1, len(tokens) + 20)], *[8] * rng.choice([0, 20])]


def make_canvas_jobs(network: Any) -> list[Job]:
    """Random requests to a model whose positions see the whole canvas, in all cache modes."""

    def decode_one(prompt: list[int], rule: Rule, *, max_tokens: int, **canvas: Any) -> Decoded:
        whole = -(-max_tokens // canvas["block_length"]) * canvas["block_length"]
        return decode(network, prompt, rule, gen_length=whole, max_tokens=max_tokens, **canvas)

    jobs = make_jobs(decode_one, CANVAS_VARIANTS, 70)
    assert len(jobs) >= 50
    return jobs


def run(llm: Any, jobs: Sequence[Job]) -> list[Any]:
    """The completions of all jobs in one batch."""
    return generate(llm, [job.prompt for job in jobs], [job.params for job in jobs])


def wrong(jobs: Sequence[Job], completions: Sequence[Any]) -> list[int]:
    """Which completions have other tokens than expected."""
    pairs = enumerate(zip(jobs, completions, strict=True))
    return [index for index, (job, c) in pairs if list(c.token_ids) != job.decoded.tokens]


def assert_one_batch_is_right(llm: Any, jobs: Sequence[Job]) -> None:
    """All at once: tokens and forwards."""
    completions = run(llm, jobs)
    assert wrong(jobs, completions) == []
    assert [nfe(c) for c in completions] == [job.decoded.nfe for job in jobs]
    assert_idle(llm)


def assert_company_changes_nothing(llm: Any, jobs: Sequence[Job], num_alone: int = 20) -> None:
    """In another order, and one by one."""
    shuffled = random.Random(3).sample(jobs, len(jobs))
    assert wrong(shuffled, run(llm, shuffled)) == []
    assert wrong(jobs[:num_alone], [run(llm, [job])[0] for job in jobs[:num_alone]]) == []


def assert_preemption_changes_nothing(llm: Any, jobs: Sequence[Job]) -> None:
    """All requests lose their pages in the middle of blocks, several times."""
    req_ids = [submit(llm, job.prompt, job.params) for job in jobs]

    def preempt(step: int) -> None:
        if step in (1, 2, 5, 9):
            scheduler(llm).reset_prefix_cache(reset_running_requests=True)

    finished = drive(llm, preempt)
    assert wrong(jobs, [finished[req_id] for req_id in req_ids]) == []
    assert_idle(llm)


def assert_an_answer_is_a_request_of_its_own(
    llm: Any, block_length: int, answer_block_length: int, *, whole: int | None = None, **options: Any
) -> None:
    """Behind the end of thinking, a request goes on as one whose prompt ends there, in other blocks.

    Args:
        llm: The engine.
        block_length, answer_block_length: Of the two parts.
        whole: Length of the canvas; None for a block-causal model.
        options: Of all requests.
    """
    rng, check, number = random.Random(7), [9, 10, 11], 32
    prompts = [[rng.randrange(8, 100) for _ in range(length)] for length in (1, 17, 30, 44)]

    def asked(length: int, num_written: int = 0, **values: Any) -> Any:
        canvas = {} if whole is None else {"gen_length": whole - num_written}
        return sampling(number - num_written, block_length=length, **canvas, **options, **values)

    plain = tokens(generate(llm, prompts, asked(block_length)))
    ends = [one[rng.randrange(6, 20)] for one in plain]
    first = generate(llm, prompts, [asked(block_length, stop_token_ids=[end]) for end in ends])
    written = [one[:-1] + check for one in tokens(first)]
    asks = [asked(answer_block_length, len(one)) for one in written]
    second = generate(llm, [prompt + one for prompt, one in zip(prompts, written, strict=True)], asks)
    own = {"answer_block_length": answer_block_length, "check_prompt": check}
    got = generate(llm, prompts, [asked(block_length, think_end_token=end, **own) for end in ends])
    assert tokens(got) == [one + rest for one, rest in zip(written, tokens(second), strict=True)]
    assert [nfe(one) for one in got] == [nfe(one) + nfe(rest) for one, rest in zip(first, second, strict=True)]
    assert_idle(llm)


def assert_takes_recorded_decisions(llm: Any, cases: Sequence[dict[str, Any]], params_of: Callable[..., Any]) -> None:
    """All thirty recorded cases of a block-causal family at once.

    Args:
        llm: The engine.
        cases: What the authors' decoder did.
        params_of: Sampling parameters of a case.
    """
    assert len(cases) == 30
    completions = generate(llm, [case["prompt_token_ids"] for case in cases], [params_of(case) for case in cases])
    assert tokens(completions) == [case["output_token_ids"] for case in cases]


def assert_takes_recorded_decisions_in_any_order(
    llm: Any, cases: Sequence[dict[str, Any]], params_of: Callable[..., Any]
) -> None:
    """Shuffled, and one by one."""
    assert_takes_recorded_decisions(llm, random.Random(1).sample(cases, len(cases)), params_of)
    alone = [generate(llm, [case["prompt_token_ids"]], params_of(case))[0] for case in cases]
    assert tokens(alone) == [case["output_token_ids"] for case in cases]


def assert_osdt_equals_a_plain_implementation(
    llm: Any, decode_one: Callable[..., Decoded], task: str, options: dict[str, Any]
) -> None:
    """One request calibrates, eight use the thresholds by block and step.

    Args:
        llm: The engine.
        decode_one: Takes prompt and rule.
        task: The task's name.
        options: Of the requests, with ``max_tokens``.
    """
    rng = random.Random(5)
    first, *later = [[rng.randrange(3, 100) for _ in range(rng.randrange(1, 40))] for _ in range(9)]
    phase_1 = decode_one(first, above(0.3))
    rule = osdt(calibrate(phase_1.record, "step_block", "q2", False), 1.0, 0.1)
    params = sampling(
        task=task,
        threshold=0.3,
        granularity="step_block",
        statistic="q2",
        num_calibration_requests=1,
        slack=0.1,
        threshold_cap=1.0,
        **options,
    )
    [got] = generate(llm, [first], params)
    assert (list(got.token_ids), nfe(got)) == (phase_1.tokens, phase_1.nfe)
    expected = [decode_one(prompt, rule) for prompt in later]
    clear = [index for index, e in enumerate(expected) if e.proposal_margin > MIN_MARGIN]
    assert len(clear) >= 6 and rule.margin > MIN_MARGIN
    completions = generate(llm, later, params)
    assert [list(completions[i].token_ids) for i in clear] == [expected[i].tokens for i in clear]
    assert vllm_osdt.describe(completions[0])["profile"] is not None


def assert_first_logits_equal(llm: Any, network: Any, monkeypatch: Any, block_length: int, **options: Any) -> None:
    """Logits of the first denoising step of prompts of odd lengths, against those of the plain network."""

    def expected(prompt: list[int], number: int) -> torch.Tensor:
        end = -(-(len(prompt) + 1) // block_length) * block_length
        canvas = torch.tensor(prompt + [network.mask_token_id] * (end - len(prompt)))
        return network.forward(canvas, block_length)[len(prompt) - network.logits_shift :][:number]

    _assert_first_logits_are(llm, monkeypatch, expected, max_tokens=8, block_length=block_length, **options)


def assert_first_causal_logits_equal(llm: Any, network: Any, monkeypatch: Any, cache_mode: str) -> None:
    """The same of a model that commits causally: of the last prompt token, or of the first block (``causal_fused``)."""

    def expected(prompt: list[int], number: int) -> torch.Tensor:
        logits = network.forward(torch.tensor(prompt + [network.mask_token_id] * 16), len(prompt))
        return logits[len(prompt) - (cache_mode == "causal") :][:number]

    _assert_first_logits_are(llm, monkeypatch, expected, max_tokens=16, block_length=16, cache_mode=cache_mode)


def assert_first_canvas_logits_equal(llm: Any, network: Any, monkeypatch: Any) -> None:
    """The same where positions see the whole canvas: logits of its first block."""

    def expected(prompt: list[int], number: int) -> torch.Tensor:
        logits, _ = network.forward(torch.tensor(prompt + [network.mask_token_id] * 32))
        return logits[len(prompt) - network.logits_shift :][:number]

    _assert_first_logits_are(llm, monkeypatch, expected, max_tokens=32, block_length=16, cache_mode="none")


def _assert_first_logits_are(
    llm: Any, monkeypatch: Any, expected: Callable[[list[int], int], torch.Tensor], max_tokens: int, **options: Any
) -> None:
    """``expected`` takes a prompt and the number of rows."""
    seen = {}

    def record(logits: Any, input_batch: Any) -> None:
        for row, req_id in enumerate(input_batch.req_ids):
            first, last = input_batch.cu_num_logits_np[row : row + 2]
            if last > first:
                seen.setdefault(req_id, logits[first:last])

    watch_logits(monkeypatch, record)
    rng = random.Random(4)
    prompts = [[rng.randrange(8, 100) for _ in range(length)] for length in (1, 5, 37, 53)]
    generate(llm, prompts, sampling(max_tokens, policy="static_threshold", **options))
    assert len(seen) == len(prompts)
    for prompt, logits in zip(prompts, (seen[req_id] for req_id in sorted(seen, key=_number)), strict=True):
        plain = expected(prompt, len(logits))
        assert plain.std() > 0.5
        torch.testing.assert_close(logits, plain, rtol=1e-5, atol=LOGIT_TOLERANCE)


def _number(req_id: str) -> int:
    """When a request of ``LLM.generate`` was made."""
    return int(req_id.split("-")[0])
