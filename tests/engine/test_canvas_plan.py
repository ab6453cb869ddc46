"""Which rows run next, by kind of attention."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_osdt.engine.cache_modes import BASE_MODES, cache_mode_of
from vllm_osdt.engine.canvas_plan import BlockCausalPlan, CausalCommitPlan, FullAttentionPlan, Rows
from vllm_osdt.geometry import CANVAS_CACHES, Canvas
from vllm_osdt.messages import Decides
from vllm_osdt.options import DecodingOptions

P, L, B = 10, 24, 8  # prompt, canvas, block


@pytest.mark.parametrize(
    ("cache", "later"),
    [("none", Rows(0, P + L, L)), ("prefix", Rows(P, L, L)), ("dual", Rows(P, B, B))],
)
def test_a_canvas_is_refreshed_at_every_block_and_then_computed_as_its_cache_mode_says(cache, later):
    plan = FullAttentionPlan(Canvas(P, P + L, P + L, B), BASE_MODES[cache])
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
    assert rows == Rows(8, 8, 0, Decides.NOTHING)
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
    plan.schedule(8, Rows(0, 8, 0, Decides.NOTHING))
    assert plan.next_rows(8, 100) == Rows(8, 8, 8)
    plan.schedule(8, Rows(8, 8, 8))
    assert plan.num_final == 8
    rows = plan.next_rows(16, 100)
    assert rows == (Rows(8, 16, 8) if is_fused else Rows(8, 8, 0, Decides.NOTHING))
    plan.schedule(16, rows)
    assert plan.num_final == 16
    assert plan.next_rows(16, 100) == Rows(16, 8, 8)


def test_a_causal_pass_over_what_is_decided_gives_the_next_blocks_first_token():
    plan = CausalCommitPlan(8, is_seeded=True)
    plan.admit(5)
    rows = plan.next_rows(29, 17)
    assert rows == Rows(5, 17, 0, Decides.NOTHING)  # a prompt is cut anywhere
    plan.schedule(29, rows)
    assert plan.num_final == 22
    rows = plan.next_rows(29, 100)
    assert rows == Rows(22, 7, 0, Decides.FIRST_POSITION)
    plan.schedule(29, rows)
    assert plan.next_rows(29, 7) is None
    rows = plan.next_rows(29, 100)
    assert rows == Rows(29, 8, 8) and plan.active_length(29) == 8
    plan.schedule(29, rows)
    assert plan.num_final == 29  # the block's keys and values are none to keep yet
    assert plan.next_rows(37, 100) == Rows(29, 8, 0, Decides.FIRST_POSITION)


def test_a_causal_pass_may_be_the_next_blocks_first_step():
    plan = CausalCommitPlan(8, is_seeded=False)
    plan.admit(0)
    assert plan.next_rows(29, 36) == Rows(0, 29, 0, Decides.NOTHING)
    rows = plan.next_rows(29, 37)
    assert rows == Rows(0, 37, 8)
    plan.schedule(29, rows)
    assert plan.num_final == 29
    assert plan.next_rows(29, 100) == Rows(29, 8, 8)
    assert plan.next_rows(37, 100) == Rows(29, 16, 8)
    assert plan.next_rows(37, 15) == Rows(29, 8, 0, Decides.NOTHING)


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


def steps_of(plan, starts, confidences=None):
    """The rows of three steps of each block, as (start, end); a confidence is heard after each step."""
    heard = iter(confidences or [])
    taken = []
    for start in starts:
        for _ in range(3):
            rows = plan.next_rows(start, 100)
            assert rows.num_drafts == rows.end - start
            plan.schedule(start, rows)
            taken.append((rows.start, rows.end))
            confidence = next(heard, None)
            if confidence is not None:
                plan.hear(confidence)
    return taken


def plan_of(cache_mode, decides_first_alone=False, **options):
    options = DecodingOptions(cache_mode=cache_mode, **options)
    canvas = Canvas(P, P + L, P + L, B)
    plan = FullAttentionPlan(canvas, cache_mode_of(options), decides_first_alone, options.suffix_window)
    plan.admit(0)
    return plan


def test_every_mode_of_the_option_has_a_class():
    assert tuple(BASE_MODES) == CANVAS_CACHES


@pytest.mark.parametrize(("cache_mode", "ends"), [("dual", (P + B, P + 2 * B, P + 3 * B)), ("prefix", (P + L,) * 3)])
def test_between_refreshes_a_block_begins_with_the_finished_one_before_it(cache_mode, ends):
    starts, whole = (P, P + B, P + 2 * B), (0, P + L)
    later = [[(start, end)] * 2 for start, end in zip(starts, ends, strict=True)]
    two = steps_of(plan_of(cache_mode, refresh_interval=2), starts)
    assert two == [whole, *later[0], (P, ends[1]), *later[1], whole, *later[2]]
    many = steps_of(plan_of(cache_mode, refresh_interval=9), starts)
    assert many == [whole, *later[0], (P, ends[1]), *later[1], (P + B, ends[2]), *later[2]]
    assert steps_of(plan_of(cache_mode, refresh_interval=1), starts) == steps_of(plan_of(cache_mode), starts)


def test_a_request_that_was_preempted_begins_with_a_refresh_whatever_the_interval():
    plan = plan_of("dual", refresh_interval=9)
    steps_of(plan, (P, P + B))
    plan.admit(0)
    assert plan.next_rows(P + B, 100) == Rows(0, P + L, L - B)


def test_a_step_that_was_unsure_is_followed_by_a_refresh_and_a_refresh_by_none():
    whole, block = (0, P + L), (P, P + B)
    unsure = steps_of(plan_of("dual", refresh_confidence=0.5), (P, P), [0.1, 0.4, 0.3, 0.6, 0.5, 0.49])
    assert unsure == [whole, block, whole, block, block, block]
    sure = steps_of(plan_of("dual", refresh_confidence=0.5), (P, P), [0.9] * 6)
    assert sure == [whole, block, block, block, block, block]
    assert steps_of(plan_of("dual", refresh_confidence=0.5), (P, P)) == sure  # nothing was reported


def test_only_a_blocks_first_step_decides_its_first_position_alone():
    plan = plan_of("dual", decides_first_alone=True, refresh_interval=2, refresh_confidence=0.5)
    for start in (P, P + B):
        for step in range(3):
            rows = plan.next_rows(start, 100)
            assert rows.decides == (Decides.FIRST_POSITION if step == 0 else Decides.BLOCK)
            plan.schedule(start, rows)
            plan.hear(0.1)


@pytest.mark.parametrize("cache_mode", CANVAS_CACHES)
@pytest.mark.parametrize("window", [0, 1, 2, 9])
def test_a_suffix_window_moves_with_the_active_block_and_bounds_rows_and_pages(cache_mode, window):
    plan = plan_of(cache_mode, suffix_window=window)
    for index, start in enumerate((P, P + B, P + 2 * B)):
        end = min(P + L, P + (index + 1 + window) * B)
        first = plan.next_rows(start, 100)
        assert first == Rows(0, end, end - start) and plan.pages_needed(first) == end
        plan.schedule(start, first)
        later = {"none": (0, end), "prefix": (start, end), "dual": (start, start + B)}[cache_mode]
        rows = plan.next_rows(start, 100)
        assert (rows.start, rows.end) == later and plan.pages_needed(rows) == end
        assert plan.active_length(start) == B


def test_between_refreshes_the_window_is_that_of_the_last_one():
    starts = (P, P + B, P + 2 * B)
    dual = steps_of(plan_of("dual", refresh_interval=9, suffix_window=1), starts)
    assert dual[0] == (0, P + 2 * B) and dual[3] == (P, P + 2 * B) and dual[6] == (P + B, P + L)
    prefix = steps_of(plan_of("prefix", refresh_interval=9, suffix_window=1), starts)
    assert prefix[3] == (P, P + L) and prefix[4] == (P + B, P + L)
