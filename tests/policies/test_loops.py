"""Steps of policies on the CPU, compiled loops, against the same as tensor operations."""

from dataclasses import replace

import pytest
import torch

from tests.policies.adjusted import NO_CONFIDENCE, make_step
from vllm_osdt.geometry import DecodeShape
from vllm_osdt.options import DecodingOptions
from vllm_osdt.policies import POLICIES

WIDTH, ROWS = 12, 6
STEPS = {"block_length": WIDTH, "gen_length": WIDTH, "steps": 5}
SHAPE = DecodeShape(2, WIDTH)
BEHIND_TEXT = replace(SHAPE, answer_start=WIDTH + 3)
CASES = [
    {"policy": "klass", "kl_confidence": 0.3, "kl_steps": 1},
    {"policy": "klass", "kl_confidence": 0.3, "kl_steps": 2, **STEPS},
    {"policy": "less", "less_confidence": 0.3, "js_threshold": 0.5, "persistence": 1, **STEPS},
    {"policy": "ccd"},
    {"policy": "ccd", "ccd_dynamic": False, **STEPS},
    {"policy": "ccd", "ccd_window": 3, "ccd_positions": 6},
    {"policy": "multi_block", "part_length": 5, "full_share": 0.6},
    {"policy": "multi_block", "part_length": 4, "enter_share": 0.1, "multi_block_rule": "release"},
    {"policy": "prophet", "prophet_early": 1.0, "prophet_middle": 0.5, "prophet_late": 0.2, **STEPS},
    {"policy": "prophet", "prophet_progress": "release", "exit_scope": "answer", **STEPS},
    {"policy": "prophet", "prophet_early": 1.0, "commit_threshold": 0.9},
    {"policy": "prophet", "prophet_early": 1.0, "prophet_region": 4, "commit_threshold": 0.9},
    {"policy": "prophet", "prophet_late": 0.5, "prophet_region": 7, "exit_scope": "answer", **STEPS},
    {"policy": "sched", "sched_high": 1.0, "sched_low": 0.1, "sched_patience": 1, "sched_max_change": 0.6, **STEPS},
    {"policy": "sched", "sched_form": "exponential", "sched_high": 2.0, "sched_low": 0.1, **STEPS},
    {"policy": "sched", "sched_form": "linear", "exit_scope": "answer", "commit_threshold": 0.9, "sched_high": 2.0,
     "sched_low": 0.1, "sched_min_progress": 0.2},
]  # fmt: skip


def some_step(policy, schedule, seed):
    """A step in the middle of a block."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.rand(shape, generator=generator)  # noqa: E731
    score = (draw(ROWS, WIDTH) * 8).round() / 8  # with ties
    score = score.masked_fill(draw(ROWS, WIDTH) < 0.3, NO_CONFIDENCE)
    score[0, :3], score[1] = -1.0, NO_CONFIDENCE
    step = make_step(score, schedule, ROWS, memory_size=policy.memory_size)
    tokens = (3 * draw(ROWS, WIDTH)).round()
    step.reading.copy_(torch.stack([draw(ROWS, WIDTH) * 2, draw(ROWS, WIDTH).round(), tokens, tokens], dim=-1))
    step.memory.copy_((3 * draw(*step.memory.shape)).round())
    step.reading.mul_(step.is_open.unsqueeze(-1))
    step.state.copy_((draw(*step.state.shape) * 5).round())
    step.carry[:, 0] = (draw(ROWS) < 0.2).float()
    step.num_alone.copy_((draw(ROWS) < 0.5).long())
    step.output_index.copy_((draw(ROWS) * 3).long() * WIDTH)
    step.step_index.copy_((draw(ROWS) * 6).long())
    step.block_index.copy_((draw(ROWS) * 2).long())
    step.num_positions.fill_(2 * WIDTH)
    return step


def clone(step):
    return step._replace(**{name: one.clone() for name, one in step._asdict().items() if torch.is_tensor(one)})


@pytest.mark.parametrize("case", range(len(CASES)))
def test_a_loop_writes_what_tensor_operations_do(case):
    name = CASES[case]["policy"]
    options = DecodingOptions(**{"block_length": WIDTH, "gen_length": 2 * WIDTH, **CASES[case]})
    schedule = POLICIES[name].schedule(options, BEHIND_TEXT if options.prophet_region else SHAPE)
    policy = (POLICIES[name], *POLICIES[name].variants)[schedule.variant]
    changed = 0
    for seed in range(40):
        step = some_step(policy, schedule, seed)
        step.parameter.copy_(torch.from_numpy(schedule.parameters)[step.block_index, step.step_index])
        own, twin = clone(step), clone(step)
        policy.adjust(own)
        policy.adjust_by_tensors(twin)
        for field in ("score", "parameter", "state", "memory", "carry"):
            assert torch.equal(getattr(own, field), getattr(twin, field)), (seed, field)
        changed += not torch.equal(own.parameter, step.parameter) or not torch.equal(own.score, step.score)
    assert changed
