"""The head that writes no logits proposes what one that does proposes, on one rank and on several."""

from types import SimpleNamespace

import pytest
import torch
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
    pad_vocab_size,
)

import csrc_triton
from vllm_osdt.errors import OSDTError
from vllm_osdt.worker import head
from vllm_osdt.worker.head import FusedHead, LogitHead, choose_head

VOCABULARY, HIDDEN_SIZE, MASK_TOKEN_ID = 130, 6, 3
PROBABILITY_RTOL = 1e-5  # the order of sums
GARBAGE = 1e4  # would win, and be NaN in a product with some rows


class Shard(ParallelLMHead):
    """vLLM's output layer as far as it is read, of one rank, without its process groups; padding is garbage."""

    def __init__(self, weight: torch.Tensor, rank: int = 0, num_ranks: int = 1) -> None:
        torch.nn.Module.__init__(self)
        padded = pad_vocab_size(weight.shape[0])
        self.tp_size = num_ranks
        self.shard_indices = VocabParallelEmbedding._get_indices(
            padded, padded, weight.shape[0], weight.shape[0], rank, num_ranks
        )
        own = weight[self.shard_indices.org_vocab_start_index : self.shard_indices.org_vocab_end_index]
        filled = torch.full((padded // num_ranks, weight.shape[1]), GARBAGE)
        filled[: own.shape[0]] = own
        self.weight = torch.nn.Parameter(filled, requires_grad=False)
        self.quant_method = UnquantizedEmbeddingMethod()
        self.bias = None


def make_weight() -> torch.Tensor:
    return torch.randn(VOCABULARY, HIDDEN_SIZE, generator=torch.Generator().manual_seed(0))


def make_batch(num_rows: int, rows: str) -> SimpleNamespace:
    """What a head reads of a step."""
    sampled, by_entropy = "sampled" in rows, "entropy" in rows
    return SimpleNamespace(
        position=torch.arange(num_rows),
        temperature=torch.tensor([0.0, 0.5, 1.0, 2.0]).repeat(num_rows)[:num_rows] if sampled else None,
        noise_key=torch.arange(num_rows) * 2**31 - 5 if sampled else None,
        by_entropy=(torch.arange(num_rows) % 2 == 0) if by_entropy else None,
    )


def model_of(lm_head, **processor) -> SimpleNamespace:
    """A model with this output layer."""
    settings = {"scale": 1.0, "soft_cap": None, "org_vocab_size": VOCABULARY, **processor}
    return SimpleNamespace(lm_head=lm_head, logits_processor=SimpleNamespace(**settings))


SAMPLER = SimpleNamespace(states=SimpleNamespace(mask_token_id=MASK_TOKEN_ID, device=torch.device("cpu")))


def propose_on_ranks(shards, hidden_states, batch, monkeypatch):
    """What each rank proposes; a first pass finds what they exchange."""
    heads = [choose_head(model_of(shard), SAMPLER, is_fused=True) for shard in shards]
    sent = []

    def keep(partials, dim):
        sent.append(partials)
        return partials

    monkeypatch.setattr(head, "tensor_model_parallel_all_gather", keep)
    for one in heads:
        one.propose(hidden_states, batch)
    monkeypatch.setattr(head, "tensor_model_parallel_all_gather", lambda _, dim: torch.cat(sent, dim))
    return [one.propose(hidden_states, batch) for one in heads], sent


@pytest.mark.parametrize("rows", ["greedy", "sampled", "entropy", "sampled, entropy"])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])  # of four ranks the last has padding alone
def test_ranks_propose_what_the_whole_weight_gives(num_ranks, rows, monkeypatch):
    weight, batch = make_weight(), make_batch(9, rows)
    hidden_states = torch.randn(11, HIDDEN_SIZE, generator=torch.Generator().manual_seed(1))  # two rows too many
    shards = [Shard(weight, rank, num_ranks) for rank in range(num_ranks)]
    assert num_ranks < 4 or shards[-1].shard_indices.num_org_elements == 0
    expected = csrc_triton.confidence(
        hidden_states[:9] @ weight.T,
        excluded_token_id=MASK_TOKEN_ID,
        temperature=batch.temperature,
        noise_key=batch.noise_key,
        by_entropy=batch.by_entropy,
    )
    found, sent = propose_on_ranks(shards, hidden_states, batch, monkeypatch)
    assert len(sent) == (num_ranks if num_ranks > 1 else 0)
    assert len({partials.shape for partials in sent}) <= 1
    for proposals in found:
        assert proposals.position is batch.position
        assert torch.equal(proposals.token, expected[0])
        torch.testing.assert_close(proposals.confidence, expected[1], rtol=PROBABILITY_RTOL, atol=1e-30)


def test_a_step_without_logits_exchanges_nothing(monkeypatch):
    shards = [Shard(make_weight(), rank, 2) for rank in range(2)]
    found, sent = propose_on_ranks(shards, torch.zeros(1, HIDDEN_SIZE), make_batch(0, "greedy"), monkeypatch)
    assert not sent
    assert all(proposals.token.shape == proposals.confidence.shape == (0,) for proposals in found)


def test_written_logits_are_the_default():
    read = []
    model = SimpleNamespace(compute_logits=lambda hidden: hidden + 1)
    sampler = SimpleNamespace(propose=lambda logits, batch: read.append((logits.tolist(), batch)))
    one = choose_head(model, sampler, is_fused=False)
    assert isinstance(one, LogitHead)
    one.propose(torch.zeros(1, 2), "batch")
    assert read == [([[1.0, 1.0]], "batch")]


def test_a_step_of_more_rows_than_the_operator_says_writes_logits():
    read = []
    sampler = SimpleNamespace(states=SAMPLER.states, propose=lambda logits, batch: read.append(logits.shape))
    model = model_of(Shard(make_weight()))
    model.compute_logits = lambda hidden: hidden
    head = choose_head(model, sampler, is_fused=True, max_rows=2)
    for num_rows in (1, 2):
        assert head.propose(torch.zeros(4, HIDDEN_SIZE), make_batch(num_rows, "greedy")).token.shape == (num_rows,)
    assert not read and [head.writes_logits(number) for number in (1, 2, 3)] == [False, False, True]
    head.propose(torch.zeros(4, HIDDEN_SIZE), make_batch(3, "greedy"))
    assert read == [(3, HIDDEN_SIZE)]
    fused, logits = head.ways  # what a warm-up takes, whatever its number of rows
    assert fused.propose(torch.zeros(4, HIDDEN_SIZE), make_batch(3, "greedy")).token.shape == (3,)
    assert isinstance(logits, LogitHead) and logits.ways == (logits,)


def changed(**attributes) -> Shard:
    shard = Shard(make_weight())
    for name, value in attributes.items():
        setattr(shard, name, value)
    return shard


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (model_of(torch.nn.Linear(2, 2)), "output layer is a Linear"),
        (model_of(changed(quant_method=SimpleNamespace())), r"output weight is quantized \(SimpleNamespace\)"),
        (model_of(changed(bias=torch.nn.Parameter(torch.zeros(1)))), "logits have a bias"),
        (model_of(changed(), scale=0.5), "logits are scaled by 0.5"),
        (model_of(changed(), soft_cap=30.0), "logits are capped at 30"),
    ],
)
def test_logits_that_are_more_than_a_product_are_refused(model, words):
    with pytest.raises(OSDTError, match=rf"^fused_lm_head is true, but this model's {words}.*leave it out"):
        choose_head(model, SAMPLER, is_fused=True)
    assert isinstance(choose_head(model, SAMPLER, is_fused=False), LogitHead)


def test_an_output_weight_that_quantization_leaves_alone_is_taken():
    model = model_of(changed(quant_method=UnquantizedLinearMethod.__new__(UnquantizedLinearMethod)))
    assert isinstance(choose_head(model, SAMPLER, is_fused=True), FusedHead)
