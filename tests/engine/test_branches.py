"""Who gets the rows and pages of further branches."""

from fractions import Fraction

import pytest
from vllm.v1.core.block_pool import BlockPool

from vllm_osdt.engine.branches import Brancher, BranchPool, rows_under_load, share_rows, step_of
from vllm_osdt.engine.canvas_plan import Rows
from vllm_osdt.messages import BranchPages
from vllm_osdt.options import DecodingOptions
from vllm_osdt.policies import POLICIES
from vllm_osdt.policies.base import BlockStep, Branch

PAGE = 8


@pytest.fixture
def pages():
    """vLLM's pool of eleven pages, one of them its own."""
    return BlockPool(11, enable_caching=True, hash_block_size=PAGE)


def numbers(pages):
    """The free pages, those first that are taken first."""
    return [block.block_id for block in pages.free_block_queue.get_all_free_blocks()]


def nobody(req_id):
    """Who is idle, where all requests have branches."""
    return False


@pytest.fixture
def pool(pages):
    return BranchPool(pages, PAGE)


def test_a_branch_has_a_page_for_each_that_its_rows_lie_in(pool):
    assert [pool.num_pages([Branch(start, rows)]) for start, rows in ((0, 8), (7, 2), (8, 8), (3, 14), (5, 0))] == [
        1,
        2,
        1,
        3,
        0,
    ]


def test_pages_are_held_until_they_are_given_back_and_never_more_than_needed(pool, pages):
    two = (Branch(8, 8), Branch(8, 8))
    assert pool.hold("a", two, nobody) and pool.of_step("a", two) == BranchPages(two, [1, 2])
    assert pool.hold("a", two[:1], nobody) and len(numbers(pages)) == 8
    assert pool.of_step("a", two[:1]) == BranchPages(two[:1], [1])
    assert not pool.hold_spare("b", [Branch(0, 64)], 1) and list(pool._held) == ["a"]
    assert pool.hold_spare("b", [Branch(0, 64)], 0)
    assert pool.release_spare() and not pool.release_spare() and len(numbers(pages)) == 8
    assert pool.hold("b", [Branch(0, 64)], nobody) and not pool.release_spare()
    assert not pool.hold("a", (Branch(8, 24),), nobody) and not numbers(pages)
    pool.release("b")
    pool.release("a")
    assert sorted(numbers(pages)) == list(range(1, 11)) and not pool._held


def test_pages_that_tokens_depend_on_are_lent_by_requests_without_branches_in_the_step(pool, pages):
    assert pool.hold("a", [Branch(0, 32)], nobody) and pool.hold("b", [Branch(0, 16)], nobody)
    assert pool.hold_spare("c", [Branch(0, 8)], 0) and len(numbers(pages)) == 3
    assert pool.hold("d", [Branch(0, 32)], lambda one: True)  # the spare one is enough
    assert list(pool._held) == ["a", "b", "d"] and not numbers(pages)
    assert not pool.hold("e", [Branch(0, 24)], lambda one: one == "b") and list(pool._held) == ["a", "b", "d"]
    assert pool.hold("e", [Branch(0, 24)], lambda one: one == "a")
    assert list(pool._held) == ["b", "d", "e"] and len(numbers(pages)) == 1
    assert pool.hold("e", [Branch(0, 8)], lambda one: True) and len(pool._held["e"]) == 3


def test_spare_branches_take_pages_that_hold_nothing_and_few_of_the_prefix_cache():
    pages = BlockPool(65, enable_caching=True, hash_block_size=PAGE)
    pool, taken = BranchPool(pages, PAGE), pages.get_new_blocks(60)
    for block in taken:
        pages._insert_block_hash(block.block_id.to_bytes(8, "big"), block, num_tokens=PAGE)
    pages.free_blocks(taken)
    assert pool.hold_spare("a", [Branch(0, 24)], 0)  # 3 of 4 pages that hold nothing
    assert len(pages.cached_block_hash_to_block) == 60
    assert not pool.hold_spare("b", [Branch(0, 16)], 0)  # one cached page too many
    assert pool.hold_spare("b", [Branch(0, 8)], 0) and len(pages.cached_block_hash_to_block) == 60
    assert not pool.hold_spare("c", [Branch(0, 8)], 0)
    pool.release("a")
    pages.get_new_blocks(3)  # others take what holds nothing
    assert pool.hold_spare("c", [Branch(0, 24)], 0) and len(pages.cached_block_hash_to_block) == 57
    assert not pool.hold_spare("a", [Branch(0, 8)], 0)
    assert pool.hold("a", [Branch(0, 64)], nobody)  # tokens depend on them


def test_spare_rows_and_pages_go_to_every_request_in_turn(pool):
    branch = Branch(8, 8)
    assert share_rows({"a": (branch,) * 3, "b": (branch,), "c": ()}, pool, 32, 0) == {
        "a": (branch,) * 3,
        "b": (branch,),
        "c": (),
    }
    assert share_rows({"a": (branch,) * 3, "b": (branch,) * 3}, pool, 31, 0) == {"a": (branch,) * 2, "b": (branch,)}
    assert pool.release_spare()
    found = share_rows({"a": (branch,) * 9, "b": (branch,) * 9}, pool, 1000, 3)  # 10 pages, of which 3 are others'
    assert {name: len(branches) for name, branches in found.items()} == {"a": 4, "b": 3}


@pytest.mark.parametrize(("low", "high"), [(1, 2), (1, 300), (16, 17), (16, 128), (16, 40), (64, 65), (100, 250)])
@pytest.mark.parametrize("wanted", [0, 1, 3, 7, 32])
def test_rows_of_spare_branches_fall_in_a_line_from_the_low_bound_to_none_at_the_high_one(low, high, wanted):
    """``wanted``: of each of the step's own rows."""
    rows = [rows_under_load((low, high), own, wanted * own) for own in range(1, 301)]
    assert rows[:low] == [wanted * own for own in range(1, low + 1)]
    assert set(rows[high - 1 :]) <= {0}
    for own in range(low, min(high, 300) + 1):
        line = Fraction(wanted * low) * Fraction(high - own, high - low)
        assert line - 1 < rows[own - 1] <= line
    assert all(before >= after for before, after in zip(rows[low - 1 :], rows[low:], strict=False))
    shares = [Fraction(number, own) for own, number in enumerate(rows, start=1)]
    assert shares[low - 1 :] == sorted(shares[low - 1 :], reverse=True)


def test_steps_between_the_bounds_have_as_many_rows_where_the_bounds_are_as_far_apart_as_the_drafts():
    bounds = 16, 128  # eight states of a block
    assert {own + rows_under_load(bounds, own, 7 * own) for own in range(16, 129)} == {128}
    assert rows_under_load(bounds, 40 + 60, 7 * 40) < rows_under_load(bounds, 40, 7 * 40)  # a prompt counts, too


@pytest.mark.parametrize(
    ("drafts", "max_rows", "max_pages", "expected"),
    [(8, 1000, 100, 7), (1, 1000, 100, 0), (8, 47, 100, 4), (8, 1000, 5, 2)],
)
def test_a_step_has_the_branches_that_fit_an_engine_without_other_requests(pool, drafts, max_rows, max_pages, expected):
    options = DecodingOptions(policy="freedave", freedave_drafts=drafts)
    brancher = Brancher(POLICIES["freedave"], options, max_pages)
    step = step_of(Rows(12, 8, 8), 12, 8, 3)
    assert step == BlockStep(12, 8, 12, 20, 3)
    assert pool.branches_that_fit(brancher, step, max_rows) == (Branch(12, 8),) * expected
    assert pool.pages_left_by(17) == 7  # 10 pages without vLLM's own, 3 of them the request's


def test_tokens_over_a_threshold_depend_on_all_branches_and_others_do_not():
    policy = POLICIES["freedave"]
    assert not policy.needs_branches(DecodingOptions(policy="freedave"))
    assert policy.needs_branches(DecodingOptions(policy="freedave", freedave_base="threshold"))
