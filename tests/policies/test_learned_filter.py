"""Learn2PD's filter: the network, its training, what is refused, and an engine that decodes with it."""

import math
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from csrc_triton.types import NO_CONFIDENCE
from tests.calibration.records import KEY, MODEL, recorded
from tests.e2e.engine import canvas_states, generate, nfe, sampling
from tests.policies.adjusted import chosen, make_step
from tests.policies.test_policies import schedule_of
from tests.reference.decode import best_first, decode
from tests.reference.llada import ReferenceLLaDA
from vllm_osdt.calibration.recording import Recording
from vllm_osdt.calibration.store import ProfileStore
from vllm_osdt.cli import main
from vllm_osdt.cli.train_filter import Samples, samples_of, train
from vllm_osdt.errors import InvalidOptionError, OSDTError
from vllm_osdt.options import DecodingOptions, ServerOptions
from vllm_osdt.policies import POLICIES
from vllm_osdt.policies.learned_filter import NAMES, load_filter

FILTER, NAN = POLICIES["learned_filter"], float("nan")


def weights_of(length, num_hidden, seed=0, scale=1.0):
    """A network with random weights."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((num_hidden, length), (num_hidden,), (length, num_hidden), (length,))
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in zip(NAMES, shapes, strict=True)}


def written(folder, weights):
    """The path of a file of them; no other file has had that name."""
    path = folder / f"{time.monotonic_ns()}.safetensors"
    save_file({name: one.contiguous() for name, one in weights.items()}, path)
    return str(path)


class PlainFilter:
    """The published rule: what the network is surer of than the threshold, else the most confident position."""

    def __init__(self, weights, threshold, with_best=False):
        self.layers = [weights[name].double().tolist() for name in NAMES]
        self.threshold, self.margin, self.with_best = threshold, math.inf, with_best

    def __call__(self, block, step, masked):
        first, first_bias, second, second_bias = self.layers
        confidence = [masked.get(i, 1.0) for i in range(len(second_bias))]
        hidden = [
            max(0.0, bias + sum(w * c for w, c in zip(row, confidence, strict=True)))
            for row, bias in zip(first, first_bias, strict=True)
        ]
        passing = []
        for i in masked:
            if i < len(second_bias):
                logit = second_bias[i] + sum(w * h for w, h in zip(second[i], hidden, strict=True))
                share = 1 / (1 + math.exp(-logit))
                self.margin = min(self.margin, abs(share - self.threshold))
                if share > self.threshold:
                    passing.append(i)
        ranking = best_first(masked)
        if self.with_best and len(ranking) > 1 and not set(ranking[:2]) <= set(passing):
            self.margin = min(self.margin, masked[ranking[0]] - masked[ranking[1]])
        return sorted({*passing, ranking[0]}) if self.with_best else passing or ranking[:1]


@pytest.mark.parametrize("with_best", [False, True])
@pytest.mark.parametrize("width", [6, 9, 12])  # of the batch's longest block; the filter's is 9
def test_proposals_pass_that_the_network_takes_for_final(width, with_best):
    weights = weights_of(9, 5)
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        score = torch.rand(4, width, generator=generator)
        score[torch.rand(4, width, generator=generator) < 0.4] = NO_CONFIDENCE
        score[:, 1] = 0.5
        score[:, 9:] = NO_CONFIDENCE  # its own blocks are no longer
        asked = {"filter_threshold": 0.6, "filter_best": with_best, "block_length": 9, "gen_length": 9}
        opts = DecodingOptions(policy="learned_filter", **asked)
        step = make_step(score.clone(), schedule_of("learned_filter", opts), 4)._replace(tensors=weights)
        FILTER.adjust(step)
        got = chosen(step)
        for row in range(4):
            masked = {i: c for i, c in enumerate(score[row].tolist()) if c != NO_CONFIDENCE}
            assert got[row] == set(PlainFilter(weights, 0.6, with_best)(0, 0, masked))
        alone = make_step(score[:1].clone(), schedule_of("learned_filter", opts), 1)._replace(tensors=weights)
        FILTER.adjust(alone)
        assert torch.equal(alone.score[0], step.score[0])


def test_samples_are_the_steps_of_a_record():
    confidence = np.array([[[0.9, 0.4, NAN], [NAN, 0.8, NAN]], [[0.3, 0.2, 0.1], [NAN, NAN, NAN]]], np.float32)[None]
    committed = np.zeros((1, 2, 2, 3), bool)
    committed[0, 0, 0, 0] = committed[0, 0, 1, 1] = committed[0, 1, 0, 0] = True
    wrong = np.zeros((1, 2, 2, 3), bool)
    wrong[0, 0, 0, 1] = True
    one = Recording(confidence, committed, wrong)
    samples = samples_of([one, one])
    assert samples.request.tolist() == [0, 0, 0, 1, 1, 1]
    assert samples.confidence[:3] == pytest.approx(np.array([[0.9, 0.4, 1], [1, 0.8, 1], [0.3, 0.2, 0.1]]))
    assert samples.is_final[:3, :2].tolist() == [[True, False], [True, True], [True, True]]
    # The last two positions of the second block got no token: the answer ended before them.
    assert samples.is_known[:3].tolist() == [[True, True, False], [False, True, False], [True, False, False]]


def test_training_finds_what_final_proposals_have_in_common():
    rng = np.random.default_rng(0)
    confidence = rng.random((2000, 4), dtype=np.float32)
    is_final = confidence > 0.6  # whatever the others are
    samples = Samples(confidence, is_final, rng.random((2000, 4)) < 0.8, np.repeat(np.arange(100), 20))
    weights, outcome = train(samples, 0.7, seed=0, max_updates=400)
    assert outcome["wrong"] < 0.1 < outcome["passing"] and outcome["loss"] < 0.6
    again, _ = train(samples, 0.7, seed=0, max_updates=400)
    assert all(torch.equal(weights[name], again[name]) for name in NAMES)


def test_the_command_writes_a_file_that_an_engine_takes(tmp_path, capsys):
    store = ProfileStore(tmp_path / "profiles", MODEL)
    store.save(recorded(KEY, 1, num_requests=12))
    out = tmp_path / "new" / "filter.safetensors"
    arguments = ["train-filter", "gsm", "--dir", str(tmp_path / "profiles"), "--max-updates", "50", "--out", str(out)]
    assert main(arguments) == 0
    assert "a filter for blocks of 4" in capsys.readouterr().out
    options = DecodingOptions(policy="learned_filter", block_length=4, gen_length=8)
    FILTER.check_operator(options, ServerOptions(filter_file=str(out)))
    few = replace(KEY, task="few")
    store.save(recorded(few, 2, num_requests=3))
    assert main(["train-filter", "few", *arguments[2:]]) == 1
    assert "the profiles have 3 requests, too few to train on" in capsys.readouterr().err
    store.save(recorded(replace(KEY, task="longer", block_length=8), 2, num_requests=12))
    assert main(["train-filter", "gsm", "longer", *arguments[2:]]) == 1
    assert "the profiles are of several models or block lengths" in capsys.readouterr().err
    store.save(recorded(replace(KEY, task="cut", cache="dual:adablock0.3,4,14"), 2, num_requests=12))
    assert main(["train-filter", "cut", *arguments[2:]]) == 1
    assert "a filter is for blocks of one length" in capsys.readouterr().err


def test_a_request_needs_a_filter_of_its_block_length(tmp_path):
    options = DecodingOptions(policy="learned_filter", block_length=16, gen_length=16)
    with pytest.raises(InvalidOptionError, match="policy is 'learned_filter', but this server has no filter"):
        FILTER.check_operator(options, ServerOptions())
    operator = ServerOptions(filter_file=written(tmp_path, weights_of(8, 8)))
    with pytest.raises(InvalidOptionError, match=r"block_length is 16, but the filter of .* is for blocks of 8"):
        FILTER.check_operator(options, operator)
    FILTER.check_operator(replace(options, policy="factor"), ServerOptions())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda weights: weights.pop("out.bias"), r"holds \['hidden.bias', 'hidden.weight', 'out.weight'\]"),
        (lambda weights: weights.update({"out.weight": torch.zeros(3, 4)}), "which are no two layers"),
        (lambda weights: weights["out.bias"].fill_(NAN), "has weights that are no numbers"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, change, words):
    weights = weights_of(4, 4)
    change(weights)
    with pytest.raises(OSDTError, match=words):
        load_filter(written(tmp_path, weights))


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(OSDTError, match="cannot be read"):
        load_filter(str(tmp_path / "none"))
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(OSDTError, match="cannot be read"):
        load_filter(str(tmp_path / "text"))


@pytest.fixture
def weights(tasks_llm, tmp_path, monkeypatch):
    """A filter for blocks of 16, which the engine has as if its operator had named it."""
    from vllm_osdt.frontend import admission
    from vllm_osdt.options.operator import server_options

    # Confident positions pass, and more of them the more confident the others are.
    weights = {
        "hidden.weight": torch.eye(16) * 4,
        "hidden.bias": torch.full((16,), -1.0),
        "out.weight": torch.eye(16) * 3 + 0.1,
        "out.bias": torch.full((16,), -7.0),
    }
    config = tasks_llm.llm_engine.vllm_config
    operator = {**config.additional_config["osdt"], "filter_file": written(tmp_path, weights)}
    monkeypatch.setitem(config.additional_config, "osdt", operator)
    monkeypatch.setattr(admission, "_front_ends", {})
    states = canvas_states(tasks_llm)
    monkeypatch.setattr(states, "policy_tensors", {})
    states.load_policies(server_options(config))
    return weights


@pytest.mark.e2e
def test_an_engine_decodes_as_the_plain_loop(tasks_llm, golden_tasks, weights):
    network = ReferenceLLaDA.load(golden_tasks.folder)
    prompts = [case["prompt_token_ids"] for case in golden_tasks.cases[:12]]
    canvas = {"gen_length": 32, "block_length": 16, "cache_mode": "dual"}
    rules = [PlainFilter(weights, 0.8, with_best=i % 2 == 1) for i in range(len(prompts))]
    expected = [decode(network, prompt, rule, **canvas) for prompt, rule in zip(prompts, rules, strict=True)]
    clear = [i for i, one in enumerate(expected) if min(one.rule_margin, one.proposal_margin) > 1e-5]
    assert len(clear) >= 8
    own = {"policy": "learned_filter", "filter_threshold": 0.8, **canvas}
    params = [sampling(32, filter_best=rule.with_best, **own) for rule in rules]
    longer = sampling(32, policy="static_threshold", threshold=0.7, block_length=32, gen_length=32)
    beside = [one for own in params for one in (own, longer)]
    got = generate(tasks_llm, [prompt for prompt in prompts for _ in range(2)], beside)[::2]
    assert [list(got[i].token_ids) for i in clear] == [expected[i].tokens for i in clear]
    assert [nfe(got[i]) for i in clear] == [expected[i].nfe for i in clear]
    assert sum(map(nfe, got)) < 25 * len(got)
    with pytest.raises(ValueError, match="block_length is 32, but the filter"):
        generate(tasks_llm, prompts[:1], sampling(32, policy="learned_filter", block_length=32))


@pytest.mark.e2e
def test_a_server_without_a_filter_refuses_the_policy(tasks_llm, golden_tasks):
    prompts = [case["prompt_token_ids"] for case in golden_tasks.cases[:1]]
    with pytest.raises(ValueError, match="this server has no filter"):
        generate(tasks_llm, prompts, sampling(32, policy="learned_filter"))
