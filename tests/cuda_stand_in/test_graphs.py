"""Steps that run as CUDA graphs give what they give without them, and ask the host for next to nothing."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.sampling_params import StructuredOutputsParams

import vllm_osdt
from tests.cuda_stand_in.cuda import LEDGER
from tests.cuda_stand_in.test_default_settings import num_copies, prompts_of, watch_steps
from tests.e2e.engine import generate, submit, tokens
from vllm_osdt.mini import model_path
from vllm_osdt.worker.graphs import Ends

OURS = ("worker/", "csrc_triton/", "models/canvas", "policies/")
# What precedes a replay: vLLM's kernels that write pages into its tables, and take those of the step's requests out.
LAUNCHES = {"_gather_block_tables_kernel", "_compute_slot_mappings_kernel", "_apply_write_kernel"}
PLAIN = ("static_threshold", "fixed_steps", "factor", "entropy_bound", "joint_bound")


def runner_of(llm):
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def count_replays(llm):
    """The graphs that are replayed from now on, in order."""
    manager, replayed = runner_of(llm).cudagraph_manager, []
    replay = type(manager).replay

    def counted():
        replayed.append(manager.chosen)
        replay(manager)

    manager.replay = counted
    return replayed


@pytest.fixture(scope="module")
def pair(mini, start_llm):
    """An engine with graphs and one without, in bfloat16."""
    settings = {"dtype": "auto", "tokenizer": model_path(mini), "max_num_seqs": 6}
    return SimpleNamespace(
        with_graphs=start_llm(model_path(mini), **settings),
        without=start_llm(model_path(mini), enforce_eager=True, compilation_config=None, **settings),
    )


@pytest.fixture
def prompts(pair, cpu_tokens, mini):
    return prompts_of(pair.with_graphs, cpu_tokens["models"][mini])


def params(**options):
    return vllm_osdt.sampling_params(**{"max_tokens": 32, "policy": "static_threshold", **options})


def random_params(seed, policies):
    """Options of a request, at random."""
    random = np.random.default_rng(seed)
    policy = str(random.choice(policies))
    options = {"steps_per_block": int(random.integers(2, 5))} if policy == "fixed_steps" else {}
    return params(
        policy=policy,
        max_tokens=int(random.choice([8, 24, 48])),
        temperature=float(random.choice([0.0, 0.0, 0.8])),
        seed=int(random.integers(100)),
        ignore_eos=bool(random.random() < 0.5),
        **options,
    )


@pytest.mark.parametrize(("policies", "ends"), [(PLAIN, Ends.DECIDED), ((*PLAIN, "local_leap", "bacd"), Ends.PROPOSED)])
def test_random_requests_decode_the_same(pair, prompts, policies, ends):
    replayed = count_replays(pair.with_graphs)
    asked = [random_params(seed, policies) for seed in range(12)]
    texts = [prompts[index % len(prompts)] for index in range(len(asked))]
    outcomes = [generate(llm, texts, asked) for llm in (pair.with_graphs, pair.without)]
    assert tokens(outcomes[0]) == tokens(outcomes[1])
    assert [vllm_osdt.describe(one)["nfe"] for one in outcomes[0]] == [
        vllm_osdt.describe(one)["nfe"] for one in outcomes[1]
    ]
    assert ends in {graph.ends for graph in replayed}


def test_drafted_requests_decode_the_same(pair, prompts):
    """Beside others; the graph proposes, and the draft is compared behind it."""
    answers = tokens(generate(pair.without, prompts[:3], params()))
    drafts = [answers[0], [*answers[1][:5], 7, *answers[1][6:]], answers[1]]
    asked = [params(draft=draft, draft_threshold=0.1, policy="fixed_steps") for draft in drafts]
    asked += [params(draft_ngram=1), params(), params(draft=answers[2], policy="entropy_bound", logprobs=1)]
    texts = [*prompts[:3], *prompts[:3]]
    replayed = count_replays(pair.with_graphs)
    outcomes = [
        [*generate(llm, texts, asked), *generate(llm, texts[5:], asked[5:])] for llm in (pair.with_graphs, pair.without)
    ]
    assert tokens(outcomes[0]) == tokens(outcomes[1])
    forwards = [[vllm_osdt.describe(one)["nfe"] for one in outcome] for outcome in outcomes]
    assert forwards[0] == forwards[1]
    assert forwards[0][0] < len(outcomes[0][0].token_ids)  # one token a step without a draft
    assert {graph.ends for graph in replayed} >= {Ends.PROPOSED, Ends.MODEL}


def test_structured_requests_decode_the_same(pair, prompts):
    replayed = count_replays(pair.with_graphs)
    outcomes = []
    for llm in (pair.with_graphs, pair.without):
        asked = [params(max_tokens=32) for _ in range(3)]
        asked[0].structured_outputs = StructuredOutputsParams(choice=["A", "B"])
        asked[1].structured_outputs = StructuredOutputsParams(regex=r"[\s\S]*")
        outcomes.append(generate(llm, prompts[:3], asked))
    assert tokens(outcomes[0]) == tokens(outcomes[1])
    assert outcomes[0][0].text.strip() in ("A", "B") and outcomes[0][0].finish_reason == "stop"
    assert list(outcomes[0][1].token_ids) == tokens(generate(pair.without, prompts[1:2], params(max_tokens=32)))[0]
    assert {graph.ends for graph in replayed} >= {Ends.MODEL}


SHAPED = [
    {"logit_bias": {5: 2.0, 9: -100.0}},
    {"repetition_penalty": 1.5, "presence_penalty": 0.5},
    {"temperature": 1.0, "seed": 3, "top_k": 4},
    {"temperature": 1.0, "seed": 4, "top_p": 0.8, "min_p": 0.01},
    {"min_tokens": 12},
]


def test_requests_that_change_logits_or_want_them_replay_the_model(pair, prompts):
    replayed = count_replays(pair.with_graphs)
    asked = [
        params(**{"policy": str(policy), "max_tokens": 24, **values}, logprobs=number, return_trace=number is not None)
        for (policy, number), values in zip(
            [
                ("static_threshold", 2),
                ("factor", None),
                ("static_threshold", 0),
                ("local_leap", None),
                ("joint_bound", 1),
            ],
            SHAPED,
            strict=True,
        )
    ]
    texts = [prompts[index % len(prompts)] for index in range(len(asked))]
    outcomes = [generate(llm, texts, asked) for llm in (pair.with_graphs, pair.without)]
    assert tokens(outcomes[0]) == tokens(outcomes[1])
    assert [str(one.logprobs) for one in outcomes[0]] == [str(one.logprobs) for one in outcomes[1]]
    told = [[vllm_osdt.describe(one).get("trace") for one in found] for found in outcomes]
    assert told[0] == told[1] and sum(one is not None for one in told[0]) == 3
    assert Ends.MODEL in {graph.ends for graph in replayed}


def test_what_a_request_records_is_the_same(pair, prompts):
    options = {"policy": "osdt", "task": "recorded", "statistic": "q1", "num_calibration_requests": 2}
    replayed = count_replays(pair.with_graphs)
    profiles = []
    for llm in (pair.with_graphs, pair.without):
        generate(llm, prompts[:3], params(**options))
        core = llm.llm_engine.engine_core.engine_core
        [profile] = [one for one in core.calibration_profiles() if one["task"] == "recorded"]
        profiles.append({name: value for name, value in profile.items() if not name.startswith(("created", "id"))})
    assert replayed
    assert str(profiles[0]) == str(profiles[1])


def test_the_next_step_is_launched_before_the_outcome_is_known(pair, prompts):
    llm, reports = pair.with_graphs, []
    recorder = runner_of(llm).model_state.recorder
    finish = recorder.see

    def seen(*args):
        reports.append(args[-1])
        finish(*args)

    asked = params(policy="fixed_steps", steps_per_block=8, max_tokens=32, ignore_eos=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recorder, "see", seen)
        outcomes = [generate(one, prompts[:2], asked) for one in (llm, pair.without)]
    assert tokens(outcomes[0]) == tokens(outcomes[1])
    ahead = [report for report in reports if report is not None]
    assert ahead and all(report.all() for report in ahead)  # as many positions a step: no guess fails


def test_longer_blocks_than_the_served_ones_are_decided_behind_a_graph(pair, prompts):
    """Beside served ones, and where logits are asked for."""
    served = runner_of(pair.with_graphs).decode_query_len
    states = runner_of(pair.with_graphs).model_state.canvas_states
    if states.is_block_causal:
        pytest.skip("blocks of a block-causal model have one length")
    replayed = count_replays(pair.with_graphs)
    own = {"policy": "fixed_steps", "steps_per_block": 3, "cache_mode": "dual"}
    asked = [params(**own, block_length=length, max_tokens=length) for length in (2 * served, served, served + 8)]
    asked.append(params(**own, block_length=2 * served, max_tokens=2 * served, temperature=0.7, seed=5))
    both = [tokens(generate(llm, prompts[:2], asked[:2])) for llm in (pair.with_graphs, pair.without)]
    assert both[0] == both[1]
    assert replayed and {graph.ends for graph in replayed[:1]} == {Ends.PROPOSED}
    replayed.clear()
    both = [tokens(generate(llm, prompts[:2], asked[2:])) for llm in (pair.with_graphs, pair.without)]
    assert both[0] == both[1]
    assert replayed and {graph.ends for graph in replayed} == {Ends.PROPOSED}
    asked = [params(**own, block_length=2 * served, max_tokens=2 * served, logprobs=1), params(**own)]
    replayed.clear()
    both = [generate(llm, prompts[:2], asked) for llm in (pair.with_graphs, pair.without)]
    assert tokens(both[0]) == tokens(both[1]) and str(both[0][0].logprobs) == str(both[1][0].logprobs)
    assert Ends.MODEL in {graph.ends for graph in replayed}


def test_a_step_is_one_replay_one_copy_and_no_memory_of_ours(pair, prompts):
    llm = pair.with_graphs
    length = runner_of(llm).decode_query_len
    for prompt in prompts[:3]:
        submit(llm, prompt, params(policy="fixed_steps", steps_per_block=8, max_tokens=length, ignore_eos=True))
    replayed, seen = count_replays(llm), []

    def note():
        ours = {line: number for line, number in LEDGER.allocations.items() if any(one in line for one in OURS)}
        seen.append((len(replayed), ours, {launch[0] for launch in LEDGER.launches}))

    steps = watch_steps(llm, note)
    assert len(steps) >= 4
    for (to_device, _, waits), before, after in zip(steps[1:], seen[1:], seen[2:], strict=False):
        number = after[0] - before[0]
        assert number in (1, 2) and num_copies(to_device) == number and not waits
        assert not after[1], after[1]
        assert after[2] <= LAUNCHES


def test_a_capture_runs_no_kernel_and_lets_the_host_read_nothing():
    tensor = torch.ones(3, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="captured"), torch.cuda.graph(graph):
        tensor.sum().item()


def test_a_replay_reads_the_memory_of_its_capture():
    source, result = torch.ones(3, device="cuda"), torch.zeros(3, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result.copy_(source * 2)
        doubled = result.view(3)[:2] + 1
    source.fill_(5)
    assert result.tolist() != [10, 10, 10]
    graph.replay()
    assert result.tolist() == [10, 10, 10] and doubled.tolist() == [11, 11]
