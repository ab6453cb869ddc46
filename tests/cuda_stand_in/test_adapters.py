"""Adapters (LoRA): their kernels are in the graphs, which give what an engine without graphs gives."""

from functools import partial

import numpy as np
import pytest
from vllm.lora.ops.triton_ops import lora_shrink_op
from vllm.lora.request import LoRARequest

from tests.cuda_stand_in.cuda import LEDGER
from tests.cuda_stand_in.test_graphs import count_replays, runner_of
from tests.e2e.engine import sampling, tokens
from tests.e2e.test_lora import RANK, add_adapter
from tests.reference.block_causal import ReferenceSDAR
from tests.reference.block_causal_checkpoints import make_sdar_checkpoint
from tests.reference.llada import ReferenceLLaDA, make_checkpoint
from vllm_osdt.worker.graphs import Ends

SERVED = {"osdt": {"profile_dir": "", "block_length": 8}}
FAMILIES = {
    "SDAR": (
        partial(make_sdar_checkpoint, num_hidden_layers=1),
        ReferenceSDAR,
        ("embed_tokens", "lm_head", "q_proj", "v_proj", "down_proj"),
        {},
        {"fused_commit": False},
    ),
    "LLaDA": (partial(make_checkpoint, n_layers=1), ReferenceLLaDA, ("v_proj", "ff_proj"), {"cache_mode": "dual"}, {}),
}


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """The kernels in few programs: each takes the interpreter long, and as a rule the first one has 64 a block."""
    configs = lora_shrink_op.get_lora_op_configs
    monkeypatch.setattr(
        lora_shrink_op, "get_lora_op_configs", lambda *args, **kw: configs(*args, **kw) | {"split_k": 1}
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_graphs_with_adapters_decode_the_same(tmp_path, start_llm, monkeypatch, family):
    make, network, modules, mode, operator = FAMILIES[family]
    folder = make(tmp_path / "model", seed=1)
    network = network.load(folder)
    for number in (1, 2):
        add_adapter(tmp_path / f"adapter{number}", network, modules, seed=number)
    adapters = [None, *(LoRARequest(f"a{n}", n, str(tmp_path / f"adapter{n}")) for n in (1, 2))]
    settings = {"dtype": "bfloat16", "max_num_seqs": 3, "max_model_len": 32, "max_num_batched_tokens": 64}
    settings |= {"enable_lora": True, "max_loras": 2, "max_lora_rank": RANK}
    settings["additional_config"] = {"osdt": {**SERVED["osdt"], **operator}}
    with_graphs = start_llm(folder, compilation_config={"cudagraph_capture_sizes": [32]}, **settings)
    without = start_llm(folder, compilation_config=None, enforce_eager=True, **settings)
    random = np.random.default_rng(3)
    prompts = [random.integers(3, 99, size=3 + place).tolist() for place in range(3)]
    replayed = count_replays(with_graphs)

    def run(llm, chosen, params):
        requests = [{"prompt_token_ids": prompt} for prompt in prompts[: len(chosen)]]
        loras = [adapters[number] for number in chosen]
        return [one.outputs[0] for one in llm.generate(requests, params, lora_request=loras, use_tqdm=False)]

    def both(chosen, params):
        replayed.clear()
        got = [tokens(run(llm, chosen, params)) for llm in (with_graphs, without)]
        assert got[0] == got[1]
        return got[0], {graph.num_active_loras for graph in replayed}, {graph.ends for graph in replayed}

    plain = sampling(8, policy="fixed_steps", steps_per_block=2, **mode)
    of_all, cases, ends = both([0, 1, 2], plain)
    assert cases == {3} and ends == {Ends.DECIDED}
    base, cases, _ = both([0, 0, 0], plain)
    assert cases == {0} and of_all[0] == base[0] and all(of_all[i] != base[i] for i in (1, 2))
    # Where all have one adapter, steps are launched behind others; rows of logits are fewer there.
    slow = sampling(8, policy="fixed_steps", steps_per_block=8, **mode)
    runner, ahead = runner_of(with_graphs), set()
    run_ahead = runner._run_ahead

    def watching(batch, graph):
        found = run_ahead(batch, graph)
        ahead.add((len(set(runner.lora_state.lora_ids[batch.rows.slots])), found is not None))
        return found

    monkeypatch.setattr(runner, "_run_ahead", watching)
    both([0, 1, 2], slow)
    assert (3, False) in ahead
    both([1, 1, 1], slow)
    assert (1, True) in ahead and not {(2, True), (3, True)} & ahead
    # A block that is done is committed in a step without logits, beside blocks of another adapter.
    both([1, 2, 1], [sampling(16, policy="fixed_steps", steps_per_block=steps, **mode) for steps in (4, 2, 8)])
    # Logits of a policy that compares steps are computed behind a graph of the model alone.
    compared = sampling(8, policy="klass", kl_confidence=0.1, kl_threshold=0.5, kl_steps=1, **mode)
    assert Ends.MODEL in both([1, 2, 0], [plain, compared, plain])[2]
    assert len(runner_of(with_graphs).cudagraph_manager.graphs) == 2 * 5


def test_steps_of_one_adapter_and_one_graph_wait_for_nothing(tmp_path, start_llm):
    """vLLM waits where rows have other adapters than in the step before; one graph for steps with and without."""
    folder = make_checkpoint(tmp_path / "model", seed=1, n_layers=1)
    add_adapter(tmp_path / "adapter", ReferenceLLaDA.load(folder), ("q_proj",), seed=1)
    llm = start_llm(
        folder,
        dtype="bfloat16",
        max_num_seqs=2,
        max_model_len=32,
        max_num_batched_tokens=32,
        enable_lora=True,
        max_lora_rank=RANK,
        additional_config=SERVED,
        compilation_config={"cudagraph_capture_sizes": [16], "cudagraph_specialize_lora": False},
    )
    assert {graph.num_active_loras for graph in runner_of(llm).cudagraph_manager.graphs} == {2}
    manager, waits, replay = runner_of(llm).cudagraph_manager, [], runner_of(llm).cudagraph_manager.replay

    def counted():
        waits.append((LEDGER.waits.total(), manager.chosen.num_logits))
        replay()

    manager.replay = counted
    LEDGER.clear()
    adapter = LoRARequest("a", 1, str(tmp_path / "adapter"))
    params = sampling(8, policy="fixed_steps", steps_per_block=8, cache_mode="dual")
    llm.generate([{"prompt_token_ids": [5, 6, 7]}], params, lora_request=adapter, use_tqdm=False)
    assert len(waits) >= 8 and {number for _, number in waits} == {8, 4}
    assert len({total for total, number in waits[1:] if number == 8}) == 1
    assert len({total for total, number in waits if number == 4}) == 1
