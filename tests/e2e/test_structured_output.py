"""Structured output: what a grammar allows is written, and nothing else; both kinds of attention, both backends."""

import json
import random
import re
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import jsonschema
import pytest
import torch
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.structured_output.request import StructuredOutputRequest

import vllm_osdt
from tests.conftest import Golden, save_text_tokenizer
from tests.e2e.engine import assert_idle, drive, generate, nfe, registry, sampling, scheduler, submit, tokens
from tests.e2e.jobs import MIN_MARGIN
from tests.e2e.schemas import make_schema
from tests.reference.block_causal import ReferenceSDAR
from tests.reference.dream import ReferenceDream
from tests.reference.grammar import Structured, decode_with_grammar
from tests.reference.llada import ReferenceLLaDA
from vllm_osdt.engine.grammar import MAX_CHOICES

pytestmark = pytest.mark.e2e

BLOCK = 8
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer"}, "ok": {"type": "boolean"}},
    "required": ["name", "age", "ok"],
    "additionalProperties": False,
}
NESTED = 'root ::= "a" root "b" | "ab"'
KINDS = {
    "choice": StructuredOutputsParams(choice=["yes", "no", "maybe not"]),
    "regex": StructuredOutputsParams(regex=r"[a-c]{2,9}-\d{3}"),
    "json": StructuredOutputsParams(json=PERSON),
    "json_object": StructuredOutputsParams(json_object=True),
    "grammar": StructuredOutputsParams(grammar=NESTED),
}
POLICIES: list[dict[str, Any]] = [
    {"policy": "static_threshold", "threshold": 0.02},
    {"policy": "static_threshold", "threshold": 0.9},
    {"policy": "fixed_steps", "steps_per_block": 2},
    {"policy": "factor", "factor": 1.5},
    {"policy": "local_leap", "anchor_threshold": 0.05, "relaxed_threshold": 0.02},
    {"policy": "entropy_bound", "entropy": 5.0},
    {"policy": "osdt", "task": "structured"},
]


@dataclass(frozen=True)
class Served:
    """An engine, the kind of its attention, and its model in plain PyTorch where that is a loop's."""

    llm: Any
    prompts: list[list[int]]
    is_causal: bool
    config: dict[str, Any]
    forward: Callable[[list[int]], torch.Tensor] | None = None


def start(golden: Any, backend: str, start_llm: Any, folder: Any) -> Any:
    save_text_tokenizer(golden, folder)
    grammars = {"backend": backend, "disable_any_whitespace": True}
    return start_llm(
        golden.folder,
        tokenizer=str(folder),
        max_num_seqs=64,
        max_model_len=256,
        block_size=32,
        structured_outputs_config=grammars,
    )


@pytest.fixture(scope="module")
def full(golden_random, start_llm, tmp_path_factory):
    llm = start(golden_random, "guidance", start_llm, tmp_path_factory.mktemp("tokenizer"))
    network = ReferenceLLaDA.load(golden_random.folder)
    prompts = [case["prompt_token_ids"] for case in golden_random.cases[:24]]
    return Served(llm, prompts, False, golden_random.config, lambda ids: network.forward(torch.tensor(ids))[0])


@pytest.fixture(scope="module")
def causal(golden_sdar, start_llm, tmp_path_factory):
    llm = start(golden_sdar, "xgrammar", start_llm, tmp_path_factory.mktemp("tokenizer"))
    network = ReferenceSDAR.load(golden_sdar.folder)
    prompts = [case["prompt_token_ids"] for case in golden_sdar.cases[:24]]
    return Served(llm, prompts, True, golden_sdar.config, lambda ids: network.forward(torch.tensor(ids), BLOCK))


@pytest.fixture(scope="module")
def dream(golden_dream, start_llm, tmp_path_factory):
    """Logits of a position are those of the row before it."""
    llm = start(golden_dream, "xgrammar", start_llm, tmp_path_factory.mktemp("tokenizer"))
    network = ReferenceDream.load(golden_dream.folder)
    prompts = [case["prompt_token_ids"][:40] for case in golden_dream.cases[:24]]

    def forward(ids: list[int]) -> torch.Tensor:
        return network.forward(torch.tensor(ids))[0].roll(1, dims=0)

    return Served(llm, prompts, False, golden_dream.config, forward)


@pytest.fixture(scope="module")
def fast_dllm_v2(golden_fast_dllm_v2, start_llm, tmp_path_factory):
    """Logits are shifted, and blocks have sub-blocks; its config names no mask token."""
    folder = tmp_path_factory.mktemp("model")
    for file in golden_fast_dllm_v2.folder.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps({**golden_fast_dllm_v2.config, "mask_token_id": 255}))
    golden = Golden(folder, golden_fast_dllm_v2.cases)
    llm = start(golden, "guidance", start_llm, tmp_path_factory.mktemp("tokenizer"))
    prompts = [case["prompt_token_ids"][:40] for case in golden.cases[:24]]
    return Served(llm, prompts, True, golden.config)


@pytest.fixture(params=["full", "causal"])
def served(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(params=["full", "causal", "dream"])
def served_like_a_loop(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(params=["full", "causal", "dream", "fast_dllm_v2"])
def served_by_any(request):
    return request.getfixturevalue(request.param)


def asked(served: Served, kind: StructuredOutputsParams | None, max_tokens: int = 48, **values: Any) -> Any:
    """Parameters of a request, which vLLM may write to."""
    own = {"block_length": BLOCK, "ignore_eos": False, **({} if served.is_causal else {"gen_length": 48})}
    return sampling(max_tokens, structured_outputs=deepcopy(kind), **{**own, **values})


def grammar_of(served: Served, params: Any) -> Callable[[], Any]:
    """Makes grammars of a request that have read nothing."""
    backend = scheduler(served.llm).structured_output_manager.backend
    key, spec = StructuredOutputRequest.from_sampling_params(params).structured_output_key
    return lambda: backend.compile_grammar(key, spec, stop_token_ids={served.config["eos_token_id"]})


def is_written(kind: str, text: str) -> bool:
    """Whether a text is a document of its kind."""
    if kind == "choice":
        return text in ("yes", "no", "maybe not")
    if kind == "regex":
        return re.fullmatch(r"[a-c]{2,9}-\d{3}", text) is not None
    if kind == "grammar":
        return re.fullmatch("(a+)(b+)", text) is not None and text.count("a") == text.count("b")
    document = json.loads(text)
    if kind == "json":
        jsonschema.validate(document, PERSON)
    return isinstance(document, dict)


def assert_valid(served: Served, completion: Any, params: Any, kind: str) -> None:
    """A whole document, or the beginning of one that ``max_tokens`` has cut."""
    assert completion.finish_reason in ("stop", "length"), completion
    ids = list(completion.token_ids)
    assert served.config["mask_token_id"] not in ids
    assert grammar_of(served, params)().accept_tokens("test", ids)
    if completion.finish_reason == "stop":
        assert is_written(kind, completion.text), completion.text
    else:
        assert len(ids) == params.max_tokens


def many(served: Served) -> list[tuple[str, list[int], Any]]:
    """Requests of every kind, by every policy, greedy and not."""
    jobs = []
    for index, (kind, policy) in enumerate((kind, policy) for kind in KINDS for policy in POLICIES):
        heat = {"temperature": 1.0, "seed": index, "top_p": 0.9} if index % 3 == 1 else {}
        params = asked(served, KINDS[kind], **policy, **heat, filtered_confidence=index % 2 == 1)
        jobs.append((kind, served.prompts[index % len(served.prompts)], params))
    return jobs


def test_every_policy_writes_what_the_grammar_allows(served_by_any):
    served = served_by_any
    jobs = many(served)
    got = generate(served.llm, [prompt for _, prompt, _ in jobs], [params for *_, params in jobs])
    for (kind, _, params), one in zip(jobs, got, strict=True):
        assert_valid(served, one, params, kind)
    assert sum(one.finish_reason == "stop" for one in got) >= len(jobs) // 2
    assert sum(nfe(one) < len(one.token_ids) for one in got) >= len(jobs) // 4  # chains, not one token a step
    assert_idle(served.llm)


def test_requests_are_decoded_as_by_a_loop_that_asks_the_grammar_for_every_position(served_like_a_loop):
    served = served_like_a_loop
    jobs: list[tuple[Any, list[int], Structured]] = []
    got = []
    for index, prompt in enumerate(served.prompts):
        kind = [*KINDS][index % len(KINDS)]
        threshold = (0.006, 0.02, 0.1)[index % 3]
        params = asked(
            served,
            KINDS[kind],
            24,
            policy="static_threshold",
            threshold=threshold,
            **({} if served.is_causal else {"cache_mode": "none", "gen_length": 24}),
        )
        [one] = generate(served.llm, [prompt], [params])  # vLLM completes the parameters, and makes its backend
        backend = scheduler(served.llm).structured_output_manager.backend
        done = decode_with_grammar(
            served.forward,
            prompt,
            grammar_of(served, params),
            backend.allocate_token_bitmask(1),
            threshold=threshold,
            block_length=BLOCK,
            is_causal=served.is_causal,
            max_tokens=24,
            mask=served.config["mask_token_id"],
            end=served.config["eos_token_id"],
            max_choices=MAX_CHOICES,
        )
        if done.margin > MIN_MARGIN:
            jobs.append((params, prompt, done))
            got.append(one)
    assert len(jobs) >= len(served.prompts) // 2
    assert sum(done.num_drafted for *_, done in jobs) >= 20
    assert tokens(got) == [done.tokens for *_, done in jobs]
    assert [nfe(one) for one in got] == [done.nfe for *_, done in jobs]


def test_a_request_alone_in_a_batch_and_preempted_writes_the_same(served_by_any):
    served = served_by_any
    jobs = many(served)[::2]
    together = tokens(generate(served.llm, [prompt for _, prompt, _ in jobs], [params for *_, params in jobs]))
    for (_, prompt, params), beside in list(zip(jobs, together, strict=True))[::4]:
        assert tokens(generate(served.llm, [prompt], [params])) == [beside]
    req_ids = [submit(served.llm, prompt, params) for _, prompt, params in jobs]
    free = submit(served.llm, served.prompts[0], asked(served, None))

    def preempt(step: int) -> None:
        if step in (1, 2, 5, 9):
            scheduler(served.llm).reset_prefix_cache(reset_running_requests=True)
        if step == 3:
            served.llm.llm_engine.abort_request([free], internal=True)

    finished = drive(served.llm, preempt)
    changed = [
        jobs[place][0] for place, req_id in enumerate(req_ids) if list(finished[req_id].token_ids) != together[place]
    ]
    assert changed == []
    assert_idle(served.llm)


def test_documents_of_a_hundred_schemas_are_valid(served):
    rng = random.Random(3)
    schemas = [make_schema(rng) for _ in range(100)]
    params = [
        asked(
            served,
            StructuredOutputsParams(json=schema),
            96,
            **({} if served.is_causal else {"gen_length": 96}),
            temperature=(0.0, 0.8)[index % 2],
            seed=index,
            **POLICIES[index % len(POLICIES)],
        )
        for index, schema in enumerate(schemas)
    ]
    got = generate(served.llm, [served.prompts[index % 24] for index in range(100)], params)
    assert {one.finish_reason for one in got} <= {"stop", "length"}
    written = [(one, schema) for one, schema in zip(got, schemas, strict=True) if one.finish_reason == "stop"]
    assert len(written) >= 80
    for one, schema in written:
        jsonschema.validate(json.loads(one.text), schema)


def test_a_grammar_beside_parameters_that_allow_none_of_its_tokens_ends_with_an_error(served):
    [yes, *_] = served.llm.get_tokenizer().encode("b")
    params = asked(served, KINDS["choice"], policy="static_threshold", allowed_token_ids=[yes])
    [one] = generate(served.llm, served.prompts[:1], [params])
    assert one.finish_reason == "error" and not one.token_ids
    assert vllm_osdt.describe(one)["error"].startswith("No token")
    banned = asked(served, KINDS["choice"], policy="static_threshold", min_tokens=12)  # vLLM lets the grammar end
    [one] = generate(served.llm, served.prompts[:1], [banned])
    assert_valid(served, one, banned, "choice")
    assert_idle(served.llm)


def test_a_grammar_that_does_not_compile_is_refused_or_ends_its_request_alone(served, monkeypatch):
    with pytest.raises(VLLMValidationError, match=r"regex|grammar"):
        generate(served.llm, served.prompts[:1], [asked(served, StructuredOutputsParams(regex="(a"))])
    generate(served.llm, served.prompts[:1], [asked(served, KINDS["choice"])])
    backend = scheduler(served.llm).structured_output_manager.backend

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no such grammar")

    with monkeypatch.context() as patch:
        patch.setattr(backend, "compile_grammar", fail)
        got = generate(served.llm, served.prompts[:2], [asked(served, KINDS["regex"]), asked(served, None, 8)])
    assert [one.finish_reason for one in got] == ["error", "length"]
    assert_idle(served.llm)


def test_a_structured_request_uses_its_tasks_profile_and_does_not_make_one(served):
    options = {"policy": "osdt", "task": "profiled", "threshold": 0.02, "num_calibration_requests": 1}
    options |= {"statistic": "q1"}
    calibrated = len(registry(served.llm).profiles)
    generate(served.llm, served.prompts[:3], [asked(served, KINDS["json"], **options)] * 3)
    assert len(registry(served.llm).profiles) == calibrated
    generate(served.llm, served.prompts[:1], [asked(served, None, ignore_eos=True, **options)])
    assert len(registry(served.llm).profiles) == calibrated + 1
    params = asked(served, KINDS["json"], **options)
    [one] = generate(served.llm, served.prompts[:1], [params])
    assert one.spec_decode_metrics.osdt["profile"] is not None and not one.spec_decode_metrics.osdt["calibrating"]
    assert_valid(served, one, params, "json")


def test_ignore_eos_beside_a_grammar_is_refused(served):
    params = asked(served, KINDS["choice"], ignore_eos=True)
    with pytest.raises(VLLMValidationError, match="ignore_eos"):
        generate(served.llm, served.prompts[:1], [params])
