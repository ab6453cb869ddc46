"""Requests of every kind come, go and lose their pages at random steps; each has the tokens it has alone."""

import random

import pytest
from vllm.sampling_params import RequestOutputKind

from tests.e2e.engine import assert_idle, generate, sampling, scheduler
from tests.reference.block_causal_checkpoints import make_fast_dllm_v2_checkpoint, make_sdar_checkpoint
from tests.reference.llada import make_checkpoint

pytestmark = pytest.mark.e2e

NUM_REQUESTS = 100
# Little room, so that requests wait and are preempted: (checkpoint, engine, where pages are scarce).
FAMILIES = {
    "SDAR": (make_sdar_checkpoint, {"max_num_batched_tokens": 120, "long_prefill_token_threshold": 72}),
    "Fast-dLLM v2": (make_fast_dllm_v2_checkpoint, {"max_num_batched_tokens": 65, "scheduling_policy": "priority"}),
    "LLaDA": (make_checkpoint, {"max_num_batched_tokens": 176, "scheduling_policy": "priority"}),
}


def random_request(rng, family, beginnings):
    """A prompt and its sampling parameters; policies that do not depend on what others calibrate."""
    block_length = rng.choice([4, 8, 16, 24, 32])
    options, own = {"block_length": block_length}, {}
    options["policy"] = rng.choice(["static_threshold", "factor", "joint_bound", "entropy_bound", "fixed_steps"])
    if options["policy"] == "static_threshold":
        options["threshold"] = rng.choice([0.1, 0.4, 0.9])
        if family != "Fast-dLLM v2" and rng.random() < 0.4:
            options["steps_per_block"] = rng.randrange(1, block_length + 1)
    if options["policy"] == "factor":
        options["factor"] = rng.choice([0.5, 2.0, 50.0])
    if options["policy"] == "entropy_bound":
        options["entropy"] = rng.choice([0.3, 4.0, 30.0])
    if family == "LLaDA":
        options["cache_mode"] = rng.choice(["none", "prefix", "dual"])
    if family == "Fast-dLLM v2":
        options["sub_block_length"] = rng.choice([2, 4, 8] if block_length % 8 == 0 else [2, 4])
        options["sub_block_cache"] = rng.random() < 0.5
    if rng.random() < 0.4:
        own = {"temperature": rng.choice([0.5, 1.0]), "seed": rng.randrange(9)}
    if rng.random() < 0.4:
        own["stop_token_ids"] = [rng.randrange(3, 99) for _ in range(rng.randrange(1, 12))]
    prompt = rng.choice(beginnings)[: rng.randrange(60)] + [rng.randrange(3, 99) for _ in range(rng.randrange(1, 20))]
    return prompt, sampling(rng.randrange(1, 60), **options, **own)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_request_has_the_tokens_it_has_alone(tmp_path, start_llm, family):
    make, arguments = FAMILIES[family]
    engine = {"max_num_seqs": 16, "max_model_len": 160, "num_gpu_blocks_override": 20, **arguments}
    llm, rng = start_llm(make(tmp_path / "model", seed=1), **engine), random.Random(31)
    beginnings = [[rng.randrange(3, 99) for _ in range(60)] for _ in range(3)]
    requests = [random_request(rng, family, beginnings) for _ in range(NUM_REQUESTS)]
    preempted, preempt = [], scheduler(llm)._preempt_request
    scheduler(llm)._preempt_request = lambda *args, **kwargs: (preempted.append(1), preempt(*args, **kwargs))[1]
    waiting, finished, aborted = list(range(NUM_REQUESTS)), {}, set()
    while waiting or llm.llm_engine.has_unfinished_requests():
        if waiting and rng.random() < 0.6:
            index = waiting.pop()
            prompt, params = requests[index][0], requests[index][1].clone()
            params.output_kind = RequestOutputKind.FINAL_ONLY
            priority = rng.randrange(3) if "scheduling_policy" in engine else 0
            llm.llm_engine.add_request(str(index), {"prompt_token_ids": prompt}, params, priority=priority)
            if rng.random() < 0.1:  # at once, or in some steps
                aborted.add(index)
        if aborted and rng.random() < 0.2:
            llm.llm_engine.abort_request([str(rng.choice(sorted(aborted)))])
        if rng.random() < 0.02:
            scheduler(llm).reset_prefix_cache(reset_running_requests=True)
        for output in llm.llm_engine.step():
            if output.finished:
                finished[int(output.request_id)] = list(output.outputs[0].token_ids)
    assert_idle(llm)
    assert preempted and finished.keys() | aborted == set(range(NUM_REQUESTS))
    for index in sorted(finished.keys() - aborted):
        prompt, params = requests[index]
        [alone] = generate(llm, [prompt], params)
        assert finished[index] == list(alone.token_ids), params
