"""What ``benchmarks/gpu`` reckons without a GPU: arrivals, floors, the crossover."""

import pytest
import torch.nn as nn

from benchmarks.gpu.lm_head import crossover
from benchmarks.gpu.load import Load
from benchmarks.gpu.shapes import SHAPES, Weights
from vllm_osdt.models.registry import config_class


def load(requests, is_staggered, tokens_per_forward=4):
    return Load(requests, tokens_per_forward, block_length=32, is_staggered=is_staggered, max_tokens=64)


def test_a_burst_arrives_at_once_and_a_stagger_within_twice_a_request():
    assert load(8, False).arrivals == [0] * 8
    arrivals = load(8, True).arrivals
    assert arrivals == sorted(arrivals) and arrivals == [0, 2, 4, 6, 8, 10, 12, 14, *range(16, 32, 2)]
    assert load(128, True).arrivals.count(0) == 128 // 16


class Experts(nn.Module):
    """Weights with the names of vLLM's."""

    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(100, 8)
        self.layer = nn.Linear(8, 8, bias=False)
        self.experts = nn.Module()
        self.experts.w13_weight = nn.Parameter(nn.init.zeros_(nn.Linear(8, 40).weight.new_empty(4, 10, 8)))
        self.lm_head = nn.Linear(8, 100, bias=False)


class Config:
    num_experts = 4
    num_experts_per_tok = 1


def test_weights_are_told_apart_by_what_a_forward_reads():
    assert Weights.of(Experts(), Config()) == Weights(64, 800, 320, 4, 1)
    assert Weights.of(Experts(), object()).dense == 64 + 320


def test_few_rows_are_bound_by_bytes_and_many_by_operations():
    weights = Weights(dense=1000, head=100, experts=0, num_experts=0, num_active=0)
    assert weights.floor_s(1, 1, bytes_per_s=1, operations_per_s=1e9) == 2 * 1100
    assert weights.floor_s(10, 0, bytes_per_s=1e9, operations_per_s=1) == 2 * 10 * 1000
    assert weights.floor_s(10, 3, bytes_per_s=1e9, operations_per_s=1) == 2 * (10 * 1000 + 3 * 100)


def test_a_row_reads_its_experts_and_many_rows_read_all():
    weights = Weights(dense=0, head=0, experts=1000, num_experts=10, num_active=1)
    floors = [weights.floor_s(rows, 0, bytes_per_s=1, operations_per_s=1e9) for rows in (1, 2, 1000)]
    assert floors == [pytest.approx(200), pytest.approx(380), pytest.approx(2000)]


def test_the_crossover_ends_where_written_logits_are_faster():
    times = [
        {"rows": rows, "us": us, "with_logits_us": 10.0} for rows, us in ((1, 9.0), (64, 10.0), (8, 9.0), (256, 11.0))
    ]
    assert crossover(times) == 64
    assert crossover([{"rows": 1, "us": 11.0, "with_logits_us": 10.0}, *times[1:]]) == 0
    assert crossover([{"rows": 1, "us": None, "with_logits_us": None}]) is None


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_is_a_config_that_we_serve(name):
    shape = dict(SHAPES[name])
    config = config_class(shape["architectures"][0])(**shape)
    assert config.model_type == shape["model_type"]
    assert config.traits.mask_token_id == shape["mask_token_id"] < config.vocab_size
    assert config.traits.block_length == shape.get("block_length", shape.get("block_size", 32))
