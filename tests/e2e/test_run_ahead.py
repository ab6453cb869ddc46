"""Steps that a CPU's worker takes one behind another change nothing but the number of the engine's steps."""

from collections import Counter

import pytest
from vllm.lora.request import LoRARequest

from tests.e2e.engine import drive, generate, nfe, sampling, scheduler, submit, tokens
from tests.e2e.test_lora import RANK, add_adapter
from tests.reference.block_causal import ReferenceSDAR
from tests.reference.block_causal_checkpoints import make_llada2_checkpoint, make_sdar_checkpoint
from tests.reference.nemotron_labs_diffusion import make_nemotron_checkpoint

pytestmark = pytest.mark.e2e

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [20, 21], [30, 31, 32, 33, 34, 35]]
SLOW = {"policy": "fixed_steps", "steps_per_block": 8, "block_length": 8}
REQUESTS = {
    "greedy": [sampling(24, **SLOW)] * 4,
    "caches": [sampling(24, **SLOW, cache_mode=mode) for mode in ("none", "prefix", "dual", "dual")],
    # Of eight positions two, two, two, one and one: what a rule says of a step differs from the step before.
    "uneven": [sampling(24, policy="fixed_steps", steps_per_block=5, block_length=8, cache_mode="dual")] * 4,
    "rules": [
        sampling(24, policy="static_threshold", threshold=0.9, block_length=8),
        sampling(24, policy="prophet", block_length=16),
        sampling(24, policy="local_leap", block_length=32),
        sampling(24, policy="klass", block_length=8),
    ],
    "cuts": [
        sampling(24, policy="cad_llm", block_length=16),
        sampling(24, **SLOW, adablock=True, adablock_delimiters=[7, 11, 13], cache_mode="dual"),
        sampling(
            24,
            block_length=16,
            adablock=True,
            adablock_delimiters=[7, 11, 13],
            cache_mode="prefix",
        ),
        sampling(24, **SLOW),
    ],
    "shaped": [
        sampling(24, **SLOW, presence_penalty=1.5, min_tokens=20, ignore_eos=False),
        sampling(24, **SLOW, repetition_penalty=1.4, logit_bias={40: 3.0}),
        sampling(24, **SLOW, credit=True, cache_mode="prefix"),
        sampling(24, **SLOW, draft=[40, 41, 42, 43], draft_threshold=0.01),
    ],
    "canvases": [
        sampling(24, **SLOW, cache_mode="dual", suffix_window=1),
        sampling(24, **SLOW, cache_mode="dual", refresh_interval=2),
        sampling(None, **SLOW, infill=[6, [50, 51, 52], 12, [53]]),
        sampling(24, **SLOW, gen_length=48),
    ],
    "sampled": [sampling(24, **SLOW, temperature=0.8, seed=seed, top_k=20, logprobs=2) for seed in range(4)],
}


def runner_of(llm):
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def drives(llm, monkeypatch, run, *, ahead):
    """What ``run`` returns, the engine's steps, and those behind others."""
    counts, schedule, again = Counter(), scheduler(llm).schedule, runner_of(llm)._step_again

    def count(name, function):
        def counted(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        return counted

    with monkeypatch.context() as patch:
        patch.setattr(scheduler(llm), "schedule", count("steps", schedule))
        patch.setattr(runner_of(llm), "_step_again", count("behind", again))
        patch.setattr(runner_of(llm), "_runs_ahead", ahead)
        return run(), counts["steps"], counts["behind"]


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """However long a step takes here, another one may follow it."""
    monkeypatch.setattr("vllm_osdt.worker.cpu_worker.MAX_SECONDS_AHEAD", 60.0)


@pytest.mark.parametrize("number", [1, 4])
@pytest.mark.parametrize("requests", REQUESTS)
def test_tokens_and_forwards_are_those_of_single_steps(random_llm, monkeypatch, requests, number):
    params = REQUESTS[requests][:number]

    def run():
        return generate(random_llm, PROMPTS[:number], params)

    expected, num_steps, none = drives(random_llm, monkeypatch, run, ahead=False)
    found, num_fewer, num_behind = drives(random_llm, monkeypatch, run, ahead=True)
    assert tokens(found) == tokens(expected)
    assert list(map(nfe, found)) == list(map(nfe, expected))
    assert [one.logprobs for one in found] == [one.logprobs for one in expected]
    drafted = [[one.spec_decode_metrics.num_draft_tokens for one in of] for of in (found, expected)]
    assert drafted[0] == drafted[1]
    assert none == 0 < num_behind and num_fewer + num_behind == num_steps


def make_llada2(folder):
    return make_llada2_checkpoint(folder), {}, {"edit_threshold": 0.0}


def make_sdar(folder):
    return make_sdar_checkpoint(folder), {}, {}


def make_nemotron(folder):
    return make_nemotron_checkpoint(folder), {}, {}


def make_sdar_with_adapters(folder):
    path = make_sdar_checkpoint(folder / "model")
    network = ReferenceSDAR.load(path)
    for number in (1, 2):
        add_adapter(folder / f"adapter{number}", network, ("embed_tokens", "lm_head", "q_proj"), seed=number)
    return path, {"enable_lora": True, "max_loras": 2, "max_lora_rank": RANK}, {}


@pytest.mark.parametrize("make", [make_llada2, make_sdar, make_nemotron, make_sdar_with_adapters])
def test_other_kinds_of_models_decode_what_they_do_in_single_steps(tmp_path, start_llm, monkeypatch, make):
    """Block-causal models with experts and edits, with adapters, and one that commits causally."""
    path, settings, options = make(tmp_path)
    llm = start_llm(path, max_num_seqs=4, max_model_len=128, **settings)
    adapters = [LoRARequest(f"a{number}", number, str(tmp_path / f"adapter{number}")) for number in (1, 2)]
    loras = [None, *adapters, adapters[0]] if settings else None
    params = [sampling(24, **{**SLOW, **options, "temperature": temperature}, seed=3) for temperature in (0, 0, 0, 0.8)]

    def run():
        requests = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
        llm.reset_prefix_cache()
        return [one.outputs[0] for one in llm.generate(requests, params, lora_request=loras, use_tqdm=False)]

    expected, num_steps, _ = drives(llm, monkeypatch, run, ahead=False)
    found, num_fewer, num_behind = drives(llm, monkeypatch, run, ahead=True)
    assert tokens(found) == tokens(expected)
    assert list(map(nfe, found)) == list(map(nfe, expected))
    assert 0 < num_behind == num_steps - num_fewer


def test_the_first_step_of_a_block_is_the_engine_s_and_few_follow_one(random_llm, monkeypatch):
    def run():
        return generate(random_llm, PROMPTS[:1], sampling(16, **SLOW))

    # Of a block's eight steps none follows the first, which has other rows; four follow the second, one the seventh.
    _, num_steps, num_behind = drives(random_llm, monkeypatch, run, ahead=True)
    assert num_behind == 2 * 5 and num_steps in (2 * 3, 2 * 3 + 1)  # with one that finds nothing to do
    counts = scheduler(random_llm).calibrator.statistics.counts
    assert counts["run_ahead", "wasted"] == 0


def test_nothing_follows_a_step_that_others_wait_for(narrow_llm, monkeypatch):
    """Of requests whose rows do not all fit a step, those that have waited come first in the next one."""
    params = sampling(32, policy="fixed_steps", steps_per_block=8, block_length=8, cache_mode="none")
    prompts = [PROMPTS[1] * 16] * 3  # 112 rows each, of 200

    def run():
        req_ids = [submit(narrow_llm, prompt, params) for prompt in prompts]
        finished = drive(narrow_llm)
        return [finished[req_id] for req_id in req_ids]

    asked, keeps_rows = [], runner_of(narrow_llm)._keeps_rows

    def asking(batch):
        asked.append((runner_of(narrow_llm)._is_awaited, keeps_rows(batch)))
        return asked[-1][1]

    monkeypatch.setattr(runner_of(narrow_llm), "_keeps_rows", asking)
    expected, num_steps, _ = drives(narrow_llm, monkeypatch, run, ahead=False)
    asked.clear()
    found, num_fewer, num_behind = drives(narrow_llm, monkeypatch, run, ahead=True)
    assert tokens(found) == tokens(expected)
    assert num_fewer + num_behind == num_steps
    assert (True, False) in asked and (True, True) not in asked and (False, True) in asked


def test_recorded_requests_are_looked_at_step_by_step(random_llm, monkeypatch):
    params = sampling(16, **SLOW, return_trace=True)

    def run():
        return generate(random_llm, PROMPTS[:1], params)

    _, _, num_behind = drives(random_llm, monkeypatch, run, ahead=True)
    assert num_behind == 0
    _, _, num_behind = drives(
        random_llm, monkeypatch, lambda: generate(random_llm, PROMPTS[:2], [params, sampling(16, **SLOW)]), ahead=True
    )
    assert num_behind == 0


def test_vllm_s_own_metrics_count_every_step(tasks_llm, monkeypatch):
    def count():
        found = [one.value for one in tasks_llm.get_metrics() if one.name == "vllm:diffusion_num_denoising_steps"]
        return sum(found)

    def run():
        before = count()
        [completion] = generate(tasks_llm, PROMPTS[:1], sampling(16, **SLOW))
        return count() - before, nfe(completion)

    (num_counted, num_forwards), _, num_behind = drives(tasks_llm, monkeypatch, run, ahead=True)
    assert num_counted == num_forwards == 16 and num_behind == 2 * 5
