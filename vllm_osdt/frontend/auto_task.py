"""Names tasks by what their prompts share, for ``task: auto``.

In practice a task is an adapter and a prompt that always begins alike: a system prompt, an instruction, few-shot
examples. Prompts are put into a tree by their first 1, 2, 4, 8, ... tokens. A prefix is looked at when enough requests
have come that no branch of it took. Where a few branches (a fifth or more each) took most of them, tasks part there and
each branch is looked at on its own. Where requests spread over many, the questions begin: the prefix is a task, and
later only a branch that takes half of its requests leaves it, or a small one whose prompts go on alike. Branches are
added and never removed.

A name is made from the adapter and the prefix alone, so every process gives a prefix the same name and finds its
profiles on disk; how far a prefix reaches is what a process learns from its requests. It knows at once the prefixes
that have a profile on disk.
"""

import hashlib
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from vllm_osdt.options import UNDECIDED_TASK

MAX_PREFIX = 4096
NUM_REQUESTS = 24  # looked at before a branch is decided
MIN_SHARE, MIN_COVERAGE = 0.2, 0.6  # of them: a branch where tasks part, all such branches together
MIN_MAIN_SHARE = 0.5  # of them, a branch that leaves a task
MIN_ALIKE, MIN_ALIKE_SHARE = 4, 0.75  # requests of a small branch, and how many of them go on alike


@dataclass
class _Node:
    """A prefix: its branches that are nodes too, and the names of recent requests that took none of them."""

    branches: dict[str, "_Node"] = field(default_factory=dict)
    recent: deque[tuple[str, ...]] = field(default_factory=lambda: deque(maxlen=NUM_REQUESTS))
    num_since: int = 0  # requests since branches were last looked for
    is_decided: bool = False
    is_task: bool = False  # questions begin here


def prefix_names(token_ids: Sequence[int], adapter: str = "") -> tuple[str, ...]:
    """The names of a prompt's prefixes, shortest first; the empty one is the adapter's."""
    names = [_name(token_ids[:0], adapter)]
    length = 1
    while length <= min(len(token_ids), MAX_PREFIX):
        names.append(_name(token_ids[:length], adapter))
        length *= 2
    return tuple(names)


def _name(prefix: Sequence[int], adapter: str) -> str:
    digest = hashlib.sha256(f"{adapter}:{','.join(map(str, prefix))}".encode()).hexdigest()
    return f"auto:{len(prefix)}:{digest[:12]}"


class AutoTasks:
    """The tasks of one front-end process.

    Args:
        max_tasks: Prefixes that may become tasks; later ones stay with the prefix they come from.
        is_known: Whether a name has a profile already.
    """

    def __init__(self, max_tasks: int, is_known: Callable[[str], bool] = lambda name: False) -> None:
        self._max_tasks = max_tasks
        self._is_known = is_known
        self._roots: dict[str, _Node] = {}
        self._num_nodes = 0

    def name(self, token_ids: Sequence[int], adapter: str = "") -> str:
        """The task of a prompt; :data:`UNDECIDED_TASK` while too little was seen to tell."""
        names = prefix_names(token_ids, adapter)
        learned = self._learn(names)
        for index in range(len(names) - 1, learned, -1):
            if self._is_known(names[index]):
                return names[index]
        return names[learned] if learned >= 0 else UNDECIDED_TASK

    def _learn(self, names: tuple[str, ...]) -> int:
        """Count a prompt; returns the index of its task's name, -1 while undecided."""
        node = self._roots.get(names[0])
        if node is None:
            if self._num_nodes >= self._max_tasks:
                return 0
            node = self._roots[names[0]] = _Node()
            self._num_nodes += 1
        node, depth = _descend(node, names)
        node.recent.append(names)
        node.num_since += 1
        if node.num_since >= NUM_REQUESTS:
            self._decide(node, depth)
            node, depth = _descend(node, names, depth)
        return depth if node.is_decided else -1

    def _decide(self, node: _Node, depth: int) -> None:
        node.is_decided = True
        node.num_since = 0
        taken = Counter(names[depth + 1] for names in node.recent if len(names) > depth + 1)
        parting = [name for name, count in taken.items() if count >= MIN_SHARE * NUM_REQUESTS]
        if node.is_task or sum(taken[name] for name in parting) < MIN_COVERAGE * NUM_REQUESTS:
            parting = [name for name in parting if taken[name] >= MIN_MAIN_SHARE * NUM_REQUESTS]
        node.is_task = node.is_task or not (parting or node.branches)
        parting += [name for name in taken if name not in parting and _goes_on_alike(node, name, depth)]
        for name in parting:
            if self._num_nodes >= self._max_tasks:
                break
            self._num_nodes += 1
            branch = node.branches[name] = _Node()
            own = [names for names in node.recent if len(names) > depth + 1 and names[depth + 1] == name]
            branch.recent.extend(own)
            branch.num_since = len(own)
            if branch.num_since >= NUM_REQUESTS:
                self._decide(branch, depth + 1)
        rest = [names for names in node.recent if len(names) == depth + 1 or names[depth + 1] not in node.branches]
        node.recent.clear()
        node.recent.extend(rest)


def _goes_on_alike(node: _Node, name: str, depth: int) -> bool:
    """Whether the prompts of a branch share what comes after it too, which questions do not."""
    own = [names for names in node.recent if len(names) > depth + 1 and names[depth + 1] == name]
    onward = Counter(names[depth + 2] for names in own if len(names) > depth + 2)
    return len(own) >= MIN_ALIKE and max(onward.values(), default=0) >= MIN_ALIKE_SHARE * len(own)


def _descend(node: _Node, names: tuple[str, ...], depth: int = 0) -> tuple[_Node, int]:
    while depth + 1 < len(names) and names[depth + 1] in node.branches:
        node, depth = node.branches[names[depth + 1]], depth + 1
    return node, depth
