"""LoRA adapters: requests with different ones in a batch decode as plain networks with merged weights do."""

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from vllm.lora.request import LoRARequest

import vllm_osdt
from tests.e2e.engine import assert_idle, nfe, sampling
from tests.e2e.jobs import MIN_MARGIN, above
from tests.reference.block_causal import ReferenceSDAR, decode_block_causal
from tests.reference.block_causal_checkpoints import make_sdar_checkpoint
from tests.reference.decode import decode, fixed_steps, static_threshold
from tests.reference.llada import ReferenceLLaDA, make_checkpoint
from tests.reference.nemotron_labs_diffusion import ReferenceNemotron, decode_nemotron, make_nemotron_checkpoint

pytestmark = pytest.mark.e2e

RANK, ALPHA = 8, 16


def add_adapter(folder: Path, network, modules: tuple[str, ...], seed: int):
    """Write a random adapter of a network in PEFT's format, and return the network with it merged."""
    generator = torch.Generator().manual_seed(seed)
    merged, adapter = type(network)(network.config, dict(network.weights)), {}
    for name, weight in network.weights.items():
        if name.removesuffix(".weight").rsplit(".", 1)[-1] not in modules:
            continue
        a = torch.randn(RANK, weight.shape[1], generator=generator) / weight.shape[1] ** 0.5
        b = 0.5 * torch.randn(weight.shape[0], RANK, generator=generator)
        merged.weights[name] = weight + ALPHA / RANK * b @ a
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        if stem.endswith("embed_tokens"):  # rows are what is looked up
            adapter |= {f"{stem}.lora_embedding_A": b.T.contiguous(), f"{stem}.lora_embedding_B": a.T.contiguous()}
        else:
            adapter |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
    assert adapter
    folder.mkdir(parents=True)
    save_file(adapter, folder / "adapter_model.safetensors")
    config = {"r": RANK, "lora_alpha": ALPHA, "target_modules": list(modules), "peft_type": "LORA", "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_dropout": 0.0, "task_type": "CAUSAL_LM"}))
    return merged


def block_causal(network, prompt, threshold):
    return decode_block_causal(network, prompt, above(threshold), block_length=8, max_tokens=24)


def whole_canvas(network, prompt, threshold):
    return decode(network, prompt, static_threshold(threshold), gen_length=24, block_length=8, cache_mode="dual")


def causal_commits(network, prompt, threshold):
    return decode_nemotron(network, prompt, static_threshold(threshold), block_length=8, max_tokens=24)


FAMILIES = {
    "SDAR": (make_sdar_checkpoint, ReferenceSDAR, ("q_proj", "v_proj", "o_proj", "down_proj"), block_causal),
    "SDAR, embeddings and head": (
        make_sdar_checkpoint,
        ReferenceSDAR,
        ("embed_tokens", "lm_head", "k_proj"),
        block_causal,
    ),
    "LLaDA": (make_checkpoint, ReferenceLLaDA, ("q_proj", "v_proj", "attn_out", "ff_proj", "up_proj"), whole_canvas),
    "Nemotron-Labs-Diffusion": (
        make_nemotron_checkpoint,
        ReferenceNemotron,
        ("q_proj", "o_proj", "gate_proj"),
        causal_commits,
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_of_a_batch_keep_to_their_requests(tmp_path, start_llm, family):
    make, network, modules, decode_one = FAMILIES[family]
    folder = make(tmp_path / "model", seed=1)
    network = network.load(folder)
    networks = [network, *(add_adapter(tmp_path / f"adapter{n}", network, modules, seed=n) for n in (1, 2))]
    adapters = [None, *(LoRARequest(f"a{n}", n, str(tmp_path / f"adapter{n}")) for n in (1, 2))]
    arguments = {"enable_lora": True, "max_loras": 2, "max_lora_rank": RANK}
    config = {"osdt": {"profile_dir": "", "kept_logits_gib": 0}}
    llm = start_llm(folder, max_num_seqs=32, max_model_len=128, additional_config=config, **arguments)
    rng = random.Random(7)
    prompts = [[rng.randrange(3, 99) for _ in range(rng.randrange(1, 40))] for _ in range(18)]
    expected = [decode_one(networks[i % 3], prompt, 0.4) for i, prompt in enumerate(prompts)]
    clear = [i for i, e in enumerate(expected) if min(e.proposal_margin, e.rule_margin) > MIN_MARGIN]
    assert len(clear) >= 15
    assert sum(decode_one(network, prompts[i], 0.4).tokens != expected[i].tokens for i in clear if i % 3) >= 8

    def run(chosen, params):
        requests = [{"prompt_token_ids": prompts[i]} for i in chosen]
        loras = [adapters[i % 3] for i in chosen]
        return [o.outputs[0] for o in llm.generate(requests, params, lora_request=loras, use_tqdm=False)]

    params = sampling(24, policy="static_threshold", threshold=0.4, block_length=8)
    for order in (clear, rng.sample(clear, len(clear))):
        assert [list(c.token_ids) for c in run(order, params)] == [expected[i].tokens for i in order]
    alone = [run([i], params)[0] for i in clear[:6]]
    assert [list(c.token_ids) for c in alone] == [expected[i].tokens for i in clear[:6]]
    # A policy that compares steps has the output layer compute some of a step's rows once more, as no logits are kept.
    klass = sampling(24, policy="klass", kl_confidence=0.1, kl_threshold=0.5, kl_steps=1, block_length=8)
    mixed = run(clear[:6], [klass if place % 2 else params for place in range(6)])
    alone[1::2] = [run([i], klass)[0] for i in clear[1:6:2]]
    assert [list(c.token_ids) for c in mixed] == [list(c.token_ids) for c in alone]
    # Rows of further branches stand behind those of all requests.
    base, drafted = (run(clear[:6], sampling(24, policy=name, block_length=8)) for name in ("fixed_steps", "freedave"))
    assert [list(c.token_ids) for c in drafted] == [list(c.token_ids) for c in base]
    assert sum(map(nfe, drafted)) < sum(map(nfe, base))
    assert_idle(llm)


def test_adapters_have_profiles_of_their_own(tmp_path, start_llm):
    folder = make_sdar_checkpoint(tmp_path / "model", seed=1)
    add_adapter(tmp_path / "adapter", ReferenceSDAR.load(folder), ("q_proj", "v_proj"), seed=1)
    llm = start_llm(folder, max_num_seqs=8, max_model_len=128, enable_lora=True, max_lora_rank=RANK)
    params = sampling(24, task="maths", statistic="q1", num_calibration_requests=1, block_length=8)
    adapter = LoRARequest("tuned", 1, str(tmp_path / "adapter"))
    told = []
    for lora in (None, adapter, None, adapter):
        [output] = llm.generate([{"prompt_token_ids": [5, 6, 7]}], params, lora_request=lora, use_tqdm=False)
        told.append(vllm_osdt.describe(output.outputs[0]))
    assert [one["task"] for one in told] == ["maths", "maths@tuned"] * 2
    assert [one["calibrating"] for one in told] == [True, True, False, False]
    assert told[2]["profile"] != told[3]["profile"]


def test_an_adapter_waits_while_those_of_postponed_requests_take_its_place(tmp_path, start_llm):
    """Requests that wait for room in a step keep their adapters, though vLLM counts those of the step alone."""
    folder = make_checkpoint(tmp_path / "model", seed=1)
    network, paths = ReferenceLLaDA.load(folder), [tmp_path / f"adapter{n}" for n in (1, 2)]
    networks = [
        network,
        *(add_adapter(path, network, ("q_proj", "v_proj"), seed=n) for n, path in enumerate(paths, start=1)),
    ]
    adapters = [None, *(LoRARequest(f"a{n}", n, str(path)) for n, path in enumerate(paths, start=1))]
    llm = start_llm(
        folder, max_num_seqs=8, max_model_len=256, max_num_batched_tokens=256, enable_lora=True, max_lora_rank=RANK
    )
    prompts = [[5 + i % 80 for i in range(length)] for length in (92, 128, 20)]
    params = [sampling(32, steps=steps, policy="fixed_steps", block_length=8) for steps in (8, 12, 8)]
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    got = llm.generate(requests, params, lora_request=adapters, use_tqdm=False)
    rules = [fixed_steps(steps // 4, 8) for steps in (8, 12, 8)]
    canvas = {"gen_length": 32, "block_length": 8, "cache_mode": "dual"}
    expected = [decode(*job, **canvas) for job in zip(networks, prompts, rules, strict=True)]
    assert min(e.proposal_margin for e in expected) > MIN_MARGIN
    assert [list(one.outputs[0].token_ids) for one in got] == [e.tokens for e in expected]
    assert_idle(llm)
