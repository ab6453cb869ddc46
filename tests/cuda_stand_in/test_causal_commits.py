"""A model that commits causally: graphs replay steps of causal and bidirectional queries, whatever their mix."""

import random

from tests.cuda_stand_in.cuda import LEDGER
from tests.cuda_stand_in.test_graphs import count_replays, runner_of
from tests.e2e.engine import generate, nfe, sampling, tokens
from tests.reference.decode import static_threshold
from tests.reference.nemotron_labs_diffusion import ReferenceNemotron, decode_nemotron, make_nemotron_checkpoint
from tests.reference.self_speculation import NemotronView, Settings, decode_s2d2

MODES = ("causal", "causal_fused")


def test_graphs_decode_as_a_plain_loop_does(tmp_path, start_llm, monkeypatch):
    monkeypatch.setenv("TRITON_F32_DEFAULT", "ieee")
    folder = make_nemotron_checkpoint(tmp_path / "model", seed=3, num_hidden_layers=1)
    network, rng = ReferenceNemotron.load(folder), random.Random(2)
    sizes = {"cudagraph_capture_sizes": [16, 48]}
    llm = start_llm(folder, max_num_seqs=6, max_model_len=128, compilation_config=sizes)
    assert {group.backend.get_name() for groups in runner_of(llm).attn_groups for group in groups} == {"TRITON_ATTN"}
    prompts = [[rng.randrange(8, 100) for _ in range(rng.randrange(1, 40))] for _ in range(6)]
    modes = [MODES[index % 2] for index in range(6)]
    expected = [
        decode_nemotron(network, prompt, static_threshold(0.3), block_length=8, max_tokens=20, cache_mode=mode)
        for prompt, mode in zip(prompts, modes, strict=True)
    ]
    clear = [index for index, one in enumerate(expected) if min(one.proposal_margin, one.rule_margin) > 1e-4]
    assert {modes[index] for index in clear} == set(MODES)
    replayed = count_replays(llm)
    asked = [sampling(20, policy="static_threshold", threshold=0.3, cache_mode=mode) for mode in modes]
    got = generate(llm, prompts, asked)
    assert [tokens(got)[index] for index in clear] == [expected[index].tokens for index in clear]
    assert [nfe(got[index]) for index in clear] == [expected[index].nfe for index in clear]
    assert {graph.num_tokens for graph in replayed} == {16, 48}
    replayed.clear()
    settings = Settings(is_strict=False, threshold=0.2, cost=1.3)
    plain = [decode_s2d2(NemotronView(network, 8), prompt, settings, max_tokens=20) for prompt in prompts]
    clear = [index for index, one in enumerate(plain) if min(one.proposal_margin, one.rule_margin) > 1e-4]
    LEDGER.clear()
    verifications, prepare = [], runner_of(llm).prepare_inputs

    def prepared(*args):
        batch = prepare(*args)
        if batch.rows.is_verified.any():
            verifications.append(batch.graph is not None)
        return batch

    monkeypatch.setattr(runner_of(llm), "prepare_inputs", prepared)
    got = generate(llm, prompts, sampling(20, policy="s2d2", threshold=0.2, verify_cost=1.3))
    assert not LEDGER.waits and len(clear) >= 4
    assert [tokens(got)[index] for index in clear] == [plain[index].tokens for index in clear]
    assert [nfe(got[index]) for index in clear] == [plain[index].nfe for index in clear]
    assert replayed and any(plain[index].taken for index in clear)
    assert verifications and all(verifications)  # attention has a flag for their rows
