"""Who gets the rows and pages of further branches."""

from types import SimpleNamespace

import pytest

from vllm_osdt.engine.branches import Brancher, BranchPool, share_rows, step_of
from vllm_osdt.engine.canvas_plan import Rows
from vllm_osdt.messages import BranchPages
from vllm_osdt.options import DecodingOptions
from vllm_osdt.policies import POLICIES
from vllm_osdt.policies.base import BlockStep, Branch

PAGE = 8


class Pool:
    """vLLM's pool of pages, as far as it is used."""

    def __init__(self, number):
        self.num_gpu_blocks, self.free = number, list(range(1, number))

    def get_num_free_blocks(self):
        return len(self.free)

    def get_new_blocks(self, number):
        taken, self.free = self.free[:number], self.free[number:]
        return [SimpleNamespace(block_id=one) for one in taken]

    def free_blocks(self, blocks):
        self.free += [block.block_id for block in blocks]


@pytest.fixture
def pages():
    return Pool(11)


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
    assert pool.hold("a", two) and pool.of_step("a", two) == BranchPages(two, [1, 2])
    assert pool.hold("a", two[:1]) and len(pages.free) == 8
    assert pool.of_step("a", two[:1]) == BranchPages(two[:1], [1])
    assert not pool.hold("b", [Branch(0, 64)], num_spared=1) and pool.holders == ["a"]
    assert pool.hold("b", [Branch(0, 64)])
    assert not pool.hold("a", (Branch(8, 24),)) and len(pages.free) == 0
    assert pool.release_all(["b"]) and not pool.release_all(["b"])
    pool.release("a")
    assert sorted(pages.free) == list(range(1, 11)) and not pool.holders


def test_spare_rows_and_pages_go_to_every_request_in_turn(pool):
    branch = Branch(8, 8)
    assert share_rows({"a": (branch,) * 3, "b": (branch,), "c": ()}, pool, 32, 0) == {
        "a": (branch,) * 3,
        "b": (branch,),
        "c": (),
    }
    assert share_rows({"a": (branch,) * 3, "b": (branch,) * 3}, pool, 31, 0) == {"a": (branch,) * 2, "b": (branch,)}
    pool.release_all(["a", "b"])
    found = share_rows({"a": (branch,) * 9, "b": (branch,) * 9}, pool, 1000, 3)  # 10 pages, of which 3 are others'
    assert {name: len(branches) for name, branches in found.items()} == {"a": 4, "b": 3}


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
