"""Which further branches of requests' blocks a step computes, and the KV pages that they are computed in.

vLLM's attention keeps one key for each position of a page, so every branch beside the block itself needs pages of its
own. They belong to the request, are of no use to another step, and are never cached. A policy whose tokens do not
depend on the number of branches takes rows and pages that nobody else wants, and gives pages back when somebody does.
One whose tokens do keeps its pages until the request ends, as it keeps those of its canvas. Where they are too few for
all such requests, those that have branches in a step have them, in turns, and others wait (``CanvasScheduler``).
"""

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any, NamedTuple

from vllm_osdt.engine.canvas_plan import Rows
from vllm_osdt.messages import BranchPages
from vllm_osdt.policies.base import MAX_BRANCHES, BlockStep, Branch, Policy

MAX_SPARE_SHARE = 1 / 16  # of an engine's pages that spare branches may hold where they evict cached ones


class Brancher(NamedTuple):
    """A request whose policy has branches.

    Attributes:
        policy: Its policy.
        options: The request's, resolved.
        max_pages: Pages that its branches may take, so that the request alone fits the engine.
    """

    policy: Policy
    options: Any
    max_pages: int

    @property
    def needs_all(self) -> bool:
        """See ``Policy.needs_branches``."""
        return self.policy.needs_branches(self.options)


class BranchPool:
    """The pages of branches, by request.

    Args:
        block_pool: vLLM's, of which they are taken.
        page_size: Positions of a page.
    """

    def __init__(self, block_pool: Any, page_size: int) -> None:
        self._pool = block_pool
        self._page_size = page_size
        self._held: dict[str, list[Any]] = {}  # vLLM's blocks, by request
        self._spare: set[str] = set()  # requests whose tokens do not depend on the pages that they hold

    def num_pages(self, branches: Iterable[Branch]) -> int:
        """Pages of these branches: those that their rows lie in, of each anew."""
        size = self._page_size
        return sum(
            (branch.start + branch.num_rows - 1) // size - branch.start // size + 1
            for branch in branches
            if branch.num_rows
        )

    def pages_left_by(self, end: int) -> int:
        """Pages of the engine that a request with positions up to ``end`` leaves when it is alone."""
        return self._pool.num_gpu_blocks - 1 - -(-end // self._page_size)  # one is vLLM's null page

    def branches_that_fit(self, brancher: Brancher, step: BlockStep, max_rows: int) -> tuple[Branch, ...]:
        """The first branches of a step that an engine could compute if it had no other request.

        Args:
            brancher: The request.
            step: Its step.
            max_rows: Rows of a step at most.
        """
        branches = brancher.policy.branches(brancher.options, step)
        return self.those_that_fit(branches, max_rows - step.num_rows, brancher.max_pages)

    def those_that_fit(self, branches: Iterable[Branch], max_rows: int, max_pages: int) -> tuple[Branch, ...]:
        """The first branches that fit so many rows and pages."""
        chosen: list[Branch] = []
        num_rows = num_pages = 0
        for branch in branches:
            num_rows += branch.num_rows
            num_pages += self.num_pages([branch])
            if num_rows > max_rows or num_pages > max_pages or len(chosen) == MAX_BRANCHES - 1:
                break
            chosen.append(branch)
        return tuple(chosen)

    def hold(self, req_id: str, branches: Iterable[Branch], is_idle: Callable[[str], bool]) -> bool:
        """Have pages for branches that tokens depend on; False, and nothing changes, when there are too few.

        Args:
            req_id: The request.
            branches: All of a step.
            is_idle: Of a request that holds pages: whether it has no branches in this step. Such requests lend theirs
                for good, and spare ones before them.
        """
        held = self._held.get(req_id, [])
        missing = self.num_pages(branches) - len(held)
        if missing <= 0:
            return True
        num_free = self._pool.get_num_free_blocks()
        if missing > num_free:
            lenders = [one for one in self._held if one != req_id and (one in self._spare or is_idle(one))]
            if missing > num_free + sum(len(self._held[one]) for one in lenders):
                return False
            for lender in sorted(lenders, key=lambda one: one not in self._spare):
                self.release(lender)
                if missing <= self._pool.get_num_free_blocks():
                    break
        self._held[req_id] = held + self._pool.get_new_blocks(missing)
        return True

    def hold_spare(self, req_id: str, branches: Iterable[Branch], num_spared: int) -> bool:
        """Have pages for branches that tokens do not depend on; False, and nothing changes, when none are to spare.

        Free pages that hold nothing are taken. So are cached ones, the oldest, while all such requests have at most
        ``MAX_SPARE_SHARE`` of the pool: when an engine has run for long, nearly all of its free pages are cached ones.

        Args:
            req_id: The request.
            branches: All of a step.
            num_spared: Free pages to leave to others.
        """
        held = self._held.get(req_id, [])
        missing = self.num_pages(branches) - len(held)
        if missing <= 0:
            return True
        if missing + num_spared > self._pool.get_num_free_blocks():
            return False
        if self._would_evict(missing):
            num_spare = sum(len(self._held[one]) for one in self._spare) + missing
            if num_spare > self._pool.num_gpu_blocks * MAX_SPARE_SHARE:
                return False
        self._held[req_id] = held + self._pool.get_new_blocks(missing)
        self._spare.add(req_id)
        return True

    def _would_evict(self, number: int) -> bool:
        """Whether one of the next pages is in the prefix cache; vLLM takes those behind all others."""
        next_pages = islice(self._pool.free_block_queue.iter_blocks_after(None), number)
        return any(page.block_hash is not None for page in next_pages)

    def release(self, req_id: str) -> None:
        """A request gives its pages back."""
        self._spare.discard(req_id)
        held = self._held.pop(req_id, None)
        if held:
            self._pool.free_blocks(held)

    def release_spare(self) -> bool:
        """Requests give back the pages that they can do without; False when they had none."""
        spare = list(self._spare)
        for req_id in spare:
            self.release(req_id)
        return bool(spare)

    def of_step(self, req_id: str, branches: tuple[Branch, ...]) -> BranchPages:
        """What workers are told of a request's branches, which it has pages for."""
        held = self._held.get(req_id, [])
        return BranchPages(branches, [block.block_id for block in held[: self.num_pages(branches)]])


def share_rows(
    wanted: dict[str, tuple[Branch, ...]], pool: BranchPool, room: int, num_spared: int
) -> dict[str, tuple[Branch, ...]]:
    """Branches for rows and pages that nobody else wants: the first one of every request, then the second ones.

    Args:
        wanted: By request.
        pool: Gives the pages, and holds them for the requests.
        room: Rows.
        num_spared: Free pages to leave to others.
    """
    found: dict[str, tuple[Branch, ...]] = {req_id: () for req_id in wanted}
    going_on = list(wanted)
    while going_on:
        still = []
        for req_id in going_on:
            branches = wanted[req_id][: len(found[req_id]) + 1]
            if len(branches) == len(found[req_id]) or branches[-1].num_rows > room:
                continue
            if pool.hold_spare(req_id, branches, num_spared):
                found[req_id] = branches
                room -= branches[-1].num_rows
                still.append(req_id)
        going_on = still
    return found


def rows_under_load(bounds: tuple[int, int], num_rows: int, num_wanted: int) -> int:
    """Rows that spare branches may have in a step, at most.

    Where each row of a step's own wants w of them, there are w * ``low`` at the low bound. From there they fall in a
    line to none at the high one. So all steps between have ``high`` rows where ``high`` is (w + 1) * ``low``.

    Rows are counted, not requests, since they are what a step costs: a prompt or a refresh leaves drafts less room,
    too. The idea is SmartSpec's (arXiv 2406.14066), the rule is ours.

    Args:
        bounds: Low and high, of the operator: own rows of a step up to which spare branches are as many as wanted, and
            from which on there are none.
        num_rows: The step's own rows: without spare branches; at least 1.
        num_wanted: Rows of the spare branches that its requests want.
    """
    low, high = bounds
    if num_rows <= low:
        return num_wanted
    return max(num_wanted * low * (high - num_rows), 0) // (num_rows * (high - low))


def step_of(rows: Rows, num_tokens: int, active_length: int, num_before: int) -> BlockStep:
    """What a policy is told of a planned step.

    Args:
        rows: Of the step.
        num_tokens: Prompt and committed tokens of the request.
        active_length: Positions of the active block that are not prompt.
        num_before: Steps that the block has had.
    """
    return BlockStep(rows.start, rows.num_rows, num_tokens, num_tokens + active_length, num_before)
