"""The checkpoints of ``tests/golden``: how a recorded case is asked for, and what an engine needs to be told."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from vllm import SamplingParams

from tests.e2e.engine import case_params, sampling


@dataclass(frozen=True)
class Family:
    """One recorded checkpoint.

    Attributes:
        params_of: Sampling parameters of a case.
        kind: The field of a case by which cases differ in kind.
        settings: Engine arguments.
    """

    params_of: Callable[[dict[str, Any]], SamplingParams]
    kind: str
    settings: dict[str, Any] = field(default_factory=dict)


def llada2_params(case: dict[str, Any]) -> SamplingParams:
    """With and without token editing."""
    edit = {} if case["editing_threshold"] is None else {"edit_threshold": case["editing_threshold"]}
    options = {"policy": "static_threshold", "threshold": case["threshold"], "block_length": case["block_length"]}
    return sampling(case["gen_length"], stop_token_ids=[2], **options, **edit)


def sdar_params(case: dict[str, Any]) -> SamplingParams:
    """A step of the authors' dynamic rule takes at least what one of their static rule does."""
    options = {"block_length": case["block_length"], "steps_per_block": case["denoising_steps"]}
    rule = {"policy": "fixed_steps"}
    if case["threshold"] is not None:
        rule = {"policy": "static_threshold", "threshold": case["threshold"]}
    return sampling(case["gen_length"], stop_token_ids=[2], **options, **rule)


def fast_dllm_v2_params(case: dict[str, Any]) -> SamplingParams:
    """With and without the cache of a sub-block."""
    names = ("threshold", "block_length", "sub_block_length", "sub_block_cache")
    options = {name: case[name] for name in names}
    return sampling(len(case["output_token_ids"]), stop_token_ids=[254], policy="static_threshold", **options)


# A model of experts comes first: vLLM makes the process groups of experts with a process's first engine.
FAMILIES = {
    "llada2_random": Family(
        llada2_params, "editing_threshold", {"hf_overrides": {"mask_token_id": 255, "eos_token_id": 2}}
    ),
    "llada_random": Family(case_params, "cache"),
    "llada_tasks": Family(case_params, "cache"),
    "dream_random": Family(case_params, "cache"),
    "sdar_random": Family(sdar_params, "remasking_strategy"),
    "fast_dllm_v2_random": Family(fast_dllm_v2_params, "sub_block_cache", {"hf_overrides": {"mask_token_id": 255}}),
}
