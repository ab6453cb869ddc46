"""What happens before the first request: a warm-up of our own, and what the GPU worker builds and measures."""

from types import SimpleNamespace

import pytest
import torch

from tests.e2e.engine import assert_idle, canvas_states, generate, sampling, tokens
from tests.reference.block_causal_checkpoints import make_llada2_checkpoint, make_sdar_checkpoint
from tests.reference.llada import make_checkpoint
from vllm_osdt.geometry import FEWEST_READ_BLOCKS, MAX_BLOCK_LENGTH

pytestmark = pytest.mark.e2e

PROMPTS = [[9] * 5, [7, 8, 9] * 9, [11]]


# Experts first: vLLM makes their process groups with a process's first engine.
@pytest.fixture(scope="module", params=[make_llada2_checkpoint, make_checkpoint, make_sdar_checkpoint])
def llm(request, start_llm, tmp_path_factory):
    folder = request.param(tmp_path_factory.mktemp("checkpoint") / "model", seed=1)
    return start_llm(folder, max_num_seqs=8, max_model_len=256)


def worker(llm):
    found = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker
    return getattr(found, "worker", found)


def test_the_warm_up_runs_every_kind_of_step_and_leaves_nothing_behind(llm, monkeypatch):
    from vllm_osdt.worker.warmup import warm_up

    before = tokens(generate(llm, PROMPTS, sampling(40, policy="static_threshold")))
    one, kinds, edits = worker(llm), set(), []
    confidence, edit = one.model_runner.sampler._confidence, "vllm_osdt.worker.sampler.edit"

    def recording(logits, mask, temperature, keys, by_entropy):
        kinds.add((temperature is not None, by_entropy is not None))
        assert logits.shape[0] >= one.model_runner.model_state.canvas_states.host.block_length.max() - 1 > 0
        return confidence(logits, mask, temperature, keys, by_entropy)

    from vllm_osdt.worker import sampler

    monkeypatch.setattr(one.model_runner.sampler, "_confidence", recording)
    monkeypatch.setattr(edit, lambda *args, original=sampler.edit: edits.append(1) or original(*args))
    warm_up(one.vllm_config, one.model_runner.kv_cache_config, one.execute_model, one.sample_tokens)
    monkeypatch.undo()
    assert kinds == {(False, False), (True, False), (False, True), (True, True)}
    assert bool(edits) == one.vllm_config.model_config.hf_config.traits.can_edit
    assert not any("warm_up" in req_id for req_id in canvas_states(llm)._slot_of)
    assert tokens(generate(llm, PROMPTS, sampling(40, policy="static_threshold"))) == before
    assert_idle(llm)


@pytest.mark.parametrize(("block_length", "max_model_len", "max_num_seqs"), [(1, 64, 4), (16, 16, 1), (16, 64, 1)])
def test_small_blocks_and_contexts_are_warmed_up_as_far_as_they_go(
    start_llm, tmp_path, block_length, max_model_len, max_num_seqs
):
    folder = make_sdar_checkpoint(tmp_path / "model", seed=1, block_size=block_length)
    llm = start_llm(folder, max_model_len=max_model_len, max_num_seqs=max_num_seqs, max_num_batched_tokens=128)
    assert len(generate(llm, [[9] * 5], sampling(3))[0].token_ids) == 3


def test_vllms_own_warm_up_which_sends_grammars_is_off(llm):
    assert not worker(llm).vllm_config.kernel_config.enable_jit_warmup


def test_attention_is_told_the_longest_sequence_of_the_step(llm, monkeypatch):
    from vllm_osdt.worker import model_state

    asked, build = [], model_state.build_attn_metadata

    def recording(**arguments):
        asked.append((arguments["max_seq_len"], int(arguments["seq_lens"][: arguments["num_reqs"]].max())))
        return build(**arguments)

    monkeypatch.setattr(model_state, "build_attn_metadata", recording)
    generate(llm, PROMPTS, sampling(40, policy="static_threshold"))
    assert asked and all(told == longest < 256 for told, longest in asked)


def test_the_gpu_worker_builds_one_runner_which_is_ours(monkeypatch):
    from vllm_osdt.worker import gpu_worker

    built = []
    monkeypatch.setattr(gpu_worker.CanvasModelRunner, "__init__", lambda self, *args: built.append(args))
    one = SimpleNamespace(vllm_config="config", device="cuda:0")
    runner = gpu_worker.CanvasWorker._make_model_runner(one)
    assert type(runner) is gpu_worker.CanvasModelRunner and built == [("config", "cuda:0")]
    assert "init_device" not in vars(gpu_worker.CanvasWorker)  # vLLM's own, which calls the hook, once


@pytest.mark.parametrize(("max_num_tokens", "num_rows"), [(8192, FEWEST_READ_BLOCKS * MAX_BLOCK_LENGTH), (300, 300)])
def test_the_gpu_worker_measures_proposals_for_as_many_positions_as_a_step_reads(max_num_tokens, num_rows):
    from vllm_osdt.worker.gpu_worker import CanvasModelRunner

    seen = []
    one = SimpleNamespace(
        max_num_tokens=max_num_tokens,
        max_num_reqs=4,
        head=SimpleNamespace(measure=lambda hidden: seen.append(tuple(hidden.shape))),
    )
    CanvasModelRunner._dummy_sampler_run(one, torch.ones(4, 16))
    assert seen == [(num_rows, 16)]
