"""Which rows run next, by kind of attention."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_osdt.engine.canvas_plan import BlockCausalPlan, FullAttentionPlan, Rows

P, L, B = 10, 24, 8  # prompt, canvas, block


@pytest.mark.parametrize(
    ("cache", "later"),
    [("none", Rows(0, P + L, L)), ("prefix", Rows(P, L, L)), ("dual", Rows(P, B, B))],
)
def test_a_canvas_is_refreshed_at_every_block_and_then_computed_as_its_cache_mode_says(cache, later):
    plan = FullAttentionPlan(P + L, B, cache)
    plan.admit(0)
    first = plan.next_rows(P, 100)
    assert first == Rows(0, P + L, L) and first.end == plan.pages_needed(first) == P + L
    plan.schedule(P, first)
    assert plan.next_rows(P, 100) == later
    assert plan.next_rows(P + B, 100) == Rows(0, P + L, L - B)
    assert plan.next_rows(P + B, P + L - 1) is None
    assert plan.num_final == 0
    plan.admit(0)
    assert plan.next_rows(P, 100) == first  # a preempted request starts again


def test_a_prompt_is_computed_in_whole_blocks_and_its_tail_with_the_first_active_one():
    plan = BlockCausalPlan(8, is_fused=True)
    plan.admit(8)
    rows = plan.next_rows(29, 15)
    assert rows == Rows(8, 8, 0)
    plan.schedule(29, rows)
    assert plan.num_final == 16
    assert plan.next_rows(29, 7) is None
    rows = plan.next_rows(29, 16)
    assert rows == Rows(16, 16, 3)  # block 2, and block 3 with 5 tokens of the prompt
    plan.schedule(29, rows)
    assert plan.num_final == 24
    assert plan.next_rows(29, 8) == Rows(24, 8, 3)


@pytest.mark.parametrize("is_fused", [True, False])
def test_a_finished_block_is_computed_once_more_alone_or_with_the_next_one(is_fused):
    plan = BlockCausalPlan(8, is_fused)
    plan.admit(0)
    plan.schedule(8, Rows(0, 8, 0))
    assert plan.next_rows(8, 100) == Rows(8, 8, 8)
    plan.schedule(8, Rows(8, 8, 8))
    assert plan.num_final == 8
    rows = plan.next_rows(16, 100)
    assert rows == (Rows(8, 16, 8) if is_fused else Rows(8, 8, 0))
    plan.schedule(16, rows)
    assert plan.num_final == 16
    assert plan.next_rows(16, 100) == Rows(16, 8, 8)


@given(
    st.integers(1, 16), st.integers(1, 200), st.integers(0, 12), st.integers(1, 60), st.booleans(), st.integers(2, 100)
)
def test_steps_are_whole_blocks_within_budget_and_end_at_the_active_one(block, num_tokens, hit, extra, fused, budget):
    budget = max(budget, 2 * block)
    plan = BlockCausalPlan(block, fused)
    plan.admit(min(hit * block, (num_tokens - 1) // block * block))
    for _ in range(300):
        before = plan.num_final
        rows = plan.next_rows(num_tokens, budget)
        assert rows is not None  # two blocks always fit
        assert rows.num_rows <= budget and rows.start == before
        assert rows.start % block == rows.num_rows % block == 0
        plan.schedule(num_tokens, rows)
        assert plan.num_final == min(rows.end, num_tokens // block * block)
        if rows.num_drafts:
            assert rows.end == (num_tokens // block + 1) * block == num_tokens + rows.num_drafts
            break
        assert plan.num_final > before
    else:
        raise AssertionError("the prompt never ends")
