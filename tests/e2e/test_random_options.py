"""Every policy with random options, on models of every kind, beside each other: the tokens of the plain loops.

``OSDT_TEST_SEEDS=8`` draws more of them.
"""

import itertools
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file

from tests.e2e.engine import assert_idle, drive, generate, nfe, sampling, scheduler, submit
from tests.e2e.random_options import DRAWS, Draw, Place, Watched, modified
from tests.policies.test_learned_filter import weights_of
from tests.reference.block_causal import (
    ReferenceFastDLLMv2,
    ReferenceSDAR,
    decode_block_causal,
    decode_fast_dllm_v2,
)
from tests.reference.block_causal_checkpoints import make_fast_dllm_v2_checkpoint, make_sdar_checkpoint
from tests.reference.decode import Decoded, decode
from tests.reference.dream import ReferenceDream, make_dream_checkpoint
from tests.reference.llada import ReferenceLLaDA, make_checkpoint
from tests.reference.self_speculation import FastDLLMv2View, SDARView, decode_s2d2
from vllm_osdt.declaration import declarations
from vllm_osdt.errors import InvalidOptionError
from vllm_osdt.mini import model_path
from vllm_osdt.mini.tasks import TASKS
from vllm_osdt.mini.tasks import generate as problems_of
from vllm_osdt.mini.tokenizer import build_tokenizer
from vllm_osdt.models.traits import Traits
from vllm_osdt.options import DecodingOptions
from vllm_osdt.options.family import validate_for_family
from vllm_osdt.options.parsing import parse_options
from vllm_osdt.policies import POLICIES
from vllm_osdt.policies.osdt import CalibratedOptions

NUM_SEEDS = int(os.environ.get("OSDT_TEST_SEEDS", "2"))
MIN_MARGIN = 1e-5
LENGTH = 8  # of most blocks, and those of the filter
ONE_LENGTH = "this model's blocks, which see no later ones, have one length"
REFUSED = {  # by kind of model
    "canvas": {"s2d2": "sees all others"},
    "blocks": {"cad_llm": ONE_LENGTH},
    "parts": {"cad_llm": ONE_LENGTH, "dimple": "decides the sub-blocks of a block one by one"},
}


class Family(NamedTuple):
    """A kind of model.

    Attributes:
        make: Writes a checkpoint.
        load: Reads it as a plain network.
        kind: Of ``REFUSED``.
    """

    make: Callable[..., Any]
    load: Callable[..., Any]
    kind: str


FAMILIES = {
    "LLaDA": Family(make_checkpoint, ReferenceLLaDA.load, "canvas"),
    "Dream": Family(make_dream_checkpoint, ReferenceDream.load, "canvas"),
    "SDAR": Family(make_sdar_checkpoint, ReferenceSDAR.load, "blocks"),
    "Fast-dLLM v2": Family(make_fast_dllm_v2_checkpoint, ReferenceFastDLLMv2.load, "parts"),
}


class Asked(NamedTuple):
    """A request of a policy, and what is expected of it."""

    policy: str
    prompt: list[int]
    params: Any
    decoded: Decoded

    @property
    def is_clear(self) -> bool:
        """Whether no rounding could have changed it."""
        return min(self.decoded.rule_margin, self.decoded.proposal_margin) > MIN_MARGIN


def random_variant(draw: Draw, kind: str, policy: str, *, length: int | None = None) -> dict[str, Any]:
    """How blocks lie, and what is cached."""
    rng = draw.random
    length = length or (LENGTH if policy == "learned_filter" else rng.choice([4, LENGTH, LENGTH, 12]))
    if kind == "blocks":
        return {"block_length": length}
    if kind == "parts":
        caches = policy not in ("freedave", "s2d2") and draw.flag()
        return {
            "block_length": length,
            "sub_block_length": rng.choice([length // 2, length]),
            "sub_block_cache": caches,
        }
    cache = rng.choice(["none", "prefix", "dual"])
    variant = {"block_length": length, "cache_mode": cache, "suffix_window": rng.choice([None, None, 0, 1])}
    if cache != "none" and policy != "cad_llm" and draw.flag(0.3):
        variant["refresh_interval"] = 2
    return variant


def decode_plainly(network: Any, kind: str, prompt: list[int], rule: Any, variant: dict[str, Any], **asked: Any) -> Any:
    """The loop of a kind of model."""
    if kind == "canvas":
        whole = -(-asked["max_tokens"] // variant["block_length"]) * variant["block_length"]
        return decode(network, prompt, rule, gen_length=whole, **variant, **asked)
    return {"blocks": decode_block_causal, "parts": decode_fast_dllm_v2}[kind](
        network, prompt, rule, **variant, **asked
    )


def decode_verified(network: Any, kind: str, prompt: list[int], settings: Any, variant: Any, **asked: Any) -> Any:
    """The same with ``s2d2``."""
    view = {"blocks": SDARView, "parts": FastDLLMv2View}[kind](network, variant["block_length"])
    return decode_s2d2(view, prompt, settings, sub_block_length=variant.get("sub_block_length"), **asked)


def ask(network: Any, kind: str, policy: str, seed: Any, weights: Any, *, prompt: Any = None, **usual: Any) -> Asked:
    """A random request of a policy.

    Args:
        network: The plain one.
        kind, policy: Of what model and rule.
        seed: Of everything.
        weights: Of the engine's filter.
        prompt: Where it is not random.
        usual: Fixed ``block_length`` and ``max_tokens``, where they are not random.
    """
    draw = Draw(seed)
    prompt = prompt or [draw.random.randrange(3, 99) for _ in range(draw.random.randrange(1, 24))]
    variant = random_variant(draw, kind, policy, length=usual.get("block_length"))
    length, max_tokens = variant["block_length"], usual.get("max_tokens") or draw.random.randrange(8, 26)
    ends = tuple(draw.random.sample(range(3, 99), 8)) if draw.flag(0.3) else ()
    start = len(prompt) // length * length if kind != "canvas" else len(prompt)
    num_blocks = -(-(len(prompt) + max_tokens - start) // length)
    sub_length = variant.get("sub_block_length", length)
    is_shifted = network.logits_shift > 0 and variant.get("cache_mode") != "none"
    num_positions = start + num_blocks * length - len(prompt)
    is_block_causal, num_asked = kind != "canvas", -(-max_tokens // length)
    place = Place(
        length, sub_length, is_shifted, is_block_causal, is_block_causal, kind == "parts", num_positions, num_blocks,
        num_asked, ends, weights,
    )  # fmt: skip
    options, rule = modified(draw, place, POLICIES[policy], DRAWS[policy](draw, place))
    if options.get("adablock"):
        variant.pop("refresh_interval", None)
    asked = {"max_tokens": max_tokens, "end_token_ids": ends}
    if policy == "s2d2":
        variant.pop("sub_block_cache", None)
        decoded = decode_verified(network, kind, prompt, rule, variant, **asked)
    else:
        decoded = decode_plainly(network, kind, prompt, Watched(rule), variant, **asked)
    whole = {"gen_length": num_blocks * length} if kind == "canvas" else {}
    params = sampling(max_tokens, policy=policy, stop_token_ids=list(ends), **options, **(variant | whole))
    return Asked(policy, prompt, params, decoded)


def random_requests(network: Any, kind: str, weights: Any, num_seeds: int) -> list[Asked]:
    """So many of each policy that the kind of model has."""
    names = [name for name in DRAWS if name not in REFUSED[kind]]
    return [ask(network, kind, name, f"{name} {seed}", weights) for seed in range(num_seeds) for name in names]


def assert_as_decoded(requests: list[Asked], completions: list[Any], mask_token_id: int) -> None:
    """Tokens and forwards, but for some requests that hang on rounding; no mask token, and progress, of all."""
    others = []
    for one, got in zip(requests, completions, strict=True):
        assert mask_token_id not in got.token_ids and len(got.token_ids) > 0, one.params
        has_forwards = nfe(got) == one.decoded.nfe or (one.policy == "freedave" and nfe(got) < one.decoded.nfe)
        if list(got.token_ids) != one.decoded.tokens or not has_forwards:
            others.append((one, nfe(got)))
    wrong = [(one.params.extra_args, number, one.decoded.nfe) for one, number in others if one.is_clear]
    assert not wrong, wrong
    assert len(others) <= 0.1 * len(requests), [one.policy for one, _ in others]


def engine_with_filter(start_llm: Any, folder: Any, model: Any, length: int) -> tuple[Any, dict[str, torch.Tensor]]:
    """An engine whose operator has a filter, and its weights."""
    weights = weights_of(length, 6, seed=3)
    path = folder / f"filter-{length}.safetensors"
    save_file(weights, path)
    config = {"osdt": {"profile_dir": "", "block_length": length, "filter_file": str(path)}}
    return start_llm(model, additional_config=config, max_num_seqs=64, max_model_len=256), weights


@pytest.mark.e2e
@pytest.mark.parametrize("family", FAMILIES)
def test_every_policy_decodes_as_its_plain_loop(tmp_path, start_llm, family):
    make, load, kind = FAMILIES[family]
    folder = make(tmp_path / "model", seed=1)
    network = load(folder)
    llm, weights = engine_with_filter(start_llm, tmp_path, folder, LENGTH)
    requests = random_requests(network, kind, weights, NUM_SEEDS)
    completions = generate(llm, [one.prompt for one in requests], [one.params for one in requests])
    assert_as_decoded(requests, completions, network.mask_token_id)
    assert_idle(llm)

    # In another order, and some end or begin again in the middle of a block.
    rng = random.Random(5)
    order = rng.sample(range(len(requests)), len(requests))
    aborted = {submit(llm, requests[index].prompt, requests[index].params) for index in order[::4]}
    ids = {submit(llm, requests[index].prompt, requests[index].params): index for index in order}

    def disturb(step: int) -> None:
        if step in (2, 5, 9):
            assert scheduler(llm).reset_prefix_cache(reset_running_requests=True)
        if step > 2 and aborted:
            llm.llm_engine.abort_request([aborted.pop()])

    finished = drive(llm, disturb)
    again = {index: finished[req_id].token_ids for req_id, index in ids.items()}
    changed = [one for index, one in enumerate(requests) if list(again[index]) != list(completions[index].token_ids)]
    # With other refreshes after a preemption, a request may have other tokens.
    changed = [one for one in changed if one.is_clear and "osdt_refresh_interval" not in one.params.extra_args]
    assert not changed, [one.params.extra_args for one in changed]
    assert_idle(llm)


@pytest.mark.parametrize(
    ("kind", "traits"),
    [
        ("canvas", Traits(LENGTH, 1)),
        ("blocks", Traits(LENGTH, 1, is_block_causal=True)),
        ("parts", Traits(LENGTH, 1, sub_block_length=4, is_block_causal=True, logits_shift=1)),
    ],
)
def test_what_a_kind_of_model_has_not_is_refused_and_all_else_taken(kind, traits):
    base = DecodingOptions(cache_mode="dual" if kind == "canvas" else "block", block_length=LENGTH)
    for name in DRAWS:
        asked = parse_options({"osdt_policy": name}, base=base, prefix="osdt_")
        if name in REFUSED[kind]:
            with pytest.raises(InvalidOptionError, match=REFUSED[kind][name]):
                validate_for_family(asked, traits)
        else:
            validate_for_family(asked, traits)


def test_every_option_of_every_policy_is_drawn():
    place = Place(LENGTH, LENGTH, False, False, False, False, 24, 3, 3, (5,), weights_of(LENGTH, 4))
    of_profiles = declarations(CalibratedOptions).keys()
    assert DRAWS.keys() == POLICIES.keys() - {"osdt"}
    for name in DRAWS:
        drawn = {option for seed in range(40) for option in DRAWS[name](Draw(seed), place)[0]}
        own = declarations(POLICIES[name].Options).keys() - of_profiles - {"relaxed_ratio", "prophet_region"}
        assert own == drawn, name


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("model", "load", "kind", "length"),
    [("llada-mini", ReferenceLLaDA.load, "canvas", 16), ("sdar-mini", ReferenceSDAR.load, "blocks", 8)],
    ids=["llada-mini", "sdar-mini"],
)
def test_every_policy_decodes_as_its_plain_loop_on_a_bundled_model(tmp_path, start_llm, model, load, kind, length):
    folder = Path(model_path(model))
    network, tokenizer = load(folder), build_tokenizer()
    llm, weights = engine_with_filter(start_llm, tmp_path, folder, length)
    prompts = [tokenizer.encode(problems_of(task, "held_out", 1, 7)[0].prompt).ids for task in TASKS]
    names = [name for name in DRAWS if name not in REFUSED[kind]]
    requests = [
        ask(network, kind, name, f"{name} {model}", weights, prompt=prompt, block_length=length, max_tokens=32)
        for name, prompt in zip(names, itertools.cycle(prompts), strict=False)
    ]
    completions = generate(llm, [one.prompt for one in requests], [one.params for one in requests])
    assert_as_decoded(requests, completions, network.mask_token_id)
    assert_idle(llm)
