"""Short lists to copy, order, edit or shuffle, and Latin squares: where tokens that hang together are chosen apart.

Some tasks have one right answer. The others have several, all equally likely, and each position alone does not tell
which. In the spirit of ParallelBench (arXiv 2510.04767); wording, items and sizes are our own.
"""

import functools
import itertools
import random
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from vllm_osdt.mini.tasks.base import Problem, tokenize

# In alphabetical order.
ITEMS = (
    "ant", "bear", "cat", "dog", "eel", "fox", "goat", "hen", "ibis", "jay", "koala", "lynx", "mole", "newt", "owl",
    "pig",
)  # fmt: skip
NUM_ITEMS = (4, 5, 6)
SQUARE_SIZE = 4
PLACES = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh")
ROW_END = "/"

Answer = tuple[str, ...]


@dataclass(frozen=True)
class ListProblem(Problem):
    """A list of different items and what to do with it. An answer is tokens; all that are valid are equally likely."""

    wording: ClassVar[str]
    items: tuple[str, ...]

    @abstractmethod
    def answers(self) -> Sequence[Answer]:
        """Every valid answer, once."""

    def sample_answer(self, rng: random.Random) -> str:
        """See the base class."""
        return " ".join(rng.choice(self.answers()))

    def accepts(self, answer: str) -> bool:
        """See the base class."""
        return tuple(tokenize(answer)) in self.answers()


class Copy(ListProblem):
    """The list as it is."""

    task = wording = "copy"

    def answers(self) -> Sequence[Answer]:
        """See the base class."""
        return [self.items]


class Reverse(ListProblem):
    """The list from its end."""

    task = wording = "reverse"

    def answers(self) -> Sequence[Answer]:
        """See the base class."""
        return [self.items[::-1]]


class Sort(ListProblem):
    """The list in alphabetical order."""

    task = wording = "sort"

    def answers(self) -> Sequence[Answer]:
        """See the base class."""
        return [tuple(sorted(self.items))]


class Shuffle(ListProblem):
    """The list in any other order."""

    task = wording = "shuffle"

    def answers(self) -> Sequence[Answer]:
        """See the base class."""
        return [order for order in itertools.permutations(self.items) if order != self.items]

    def sample_answer(self, rng: random.Random) -> str:
        """See the base class; draws again instead of listing all."""
        while (order := rng.sample(self.items, len(self.items))) == list(self.items):
            pass
        return " ".join(order)


@dataclass(frozen=True)
class LatinSquare(ListProblem):
    """The last two rows of a square in which every row and every column has each item once.

    Attributes:
        items: The first row.
        second: The second row.
    """

    task = "latin_square"
    wording = "square"
    second: Answer

    def answers(self) -> Sequence[Answer]:
        """See the base class; two or four."""
        squares = [[tuple(self.items[index] for index in row) for row in rows] for rows in squares_of(len(self.items))]
        return [(*third, ROW_END, *fourth) for _, second, third, fourth in squares if second == self.second]


@functools.cache
def squares_of(size: int) -> list[tuple[tuple[int, ...], ...]]:
    """The rows of every Latin square whose first row is 0, 1, 2, ..."""
    first = tuple(range(size))
    squares: list[tuple[tuple[int, ...], ...]] = [(first,)]
    for _ in range(size - 1):
        squares = [
            (*square, row)
            for square in squares
            for row in itertools.permutations(first)
            if all(row[column] not in (above[column] for above in square) for column in first)
        ]
    return squares


@dataclass(frozen=True)
class Edit(ListProblem):
    """A list changed at one place.

    Attributes:
        new: The item that comes in, none of the list's.
        place: Where, from 0; None leaves it open.
    """

    new: str
    place: int | None

    @abstractmethod
    def edited(self, place: int) -> Answer:
        """The list changed at a place."""

    def places(self) -> range:
        """The places where it can be changed."""
        return range(len(self.items))

    def answers(self) -> Sequence[Answer]:
        """See the base class."""
        return [self.edited(place) for place in (self.places() if self.place is None else (self.place,))]


class Insert(Edit):
    """The new item stands at the place, and the rest behind it moves on."""

    task = "insert"
    wording = "insert {new} {place}"

    def edited(self, place: int) -> Answer:
        """See the base class."""
        return (*self.items[:place], self.new, *self.items[place:])

    def places(self) -> range:
        """See the base class; one more, behind the last item."""
        return range(len(self.items) + 1)


class Remove(Edit):
    """The item at the place is left out."""

    task = "remove"
    wording = "remove {place}"

    def edited(self, place: int) -> Answer:
        """See the base class."""
        return (*self.items[:place], *self.items[place + 1 :])


class Replace(Edit):
    """The new item stands for the one at the place."""

    task = "replace"
    wording = "replace {place} by {new}"

    def edited(self, place: int) -> Answer:
        """See the base class."""
        return (*self.items[:place], self.new, *self.items[place + 1 :])


class InsertRandom(Insert):
    """The new item stands anywhere."""

    task = "insert_random"
    wording = "insert {new} anywhere"


class RemoveRandom(Remove):
    """Any one item is left out."""

    task = "remove_random"
    wording = "remove any"


class ReplaceRandom(Replace):
    """The new item stands for any one."""

    task = "replace_random"
    wording = "replace any by {new}"


WHOLE = (Copy, Reverse, Sort, Shuffle)
EDITS = (Insert, InsertRandom, Remove, RemoveRandom, Replace, ReplaceRandom)
OPEN_EDITS = (InsertRandom, RemoveRandom, ReplaceRandom)


def draw_whole(kind: type[ListProblem], rng: random.Random) -> ListProblem:
    """Draws a problem about a whole list."""
    items = tuple(rng.sample(ITEMS, rng.choice(NUM_ITEMS)))
    return kind(prompt_of(kind.wording, items), items)


def draw_square(rng: random.Random) -> LatinSquare:
    """Draws a square and shows its first two rows."""
    items = tuple(rng.sample(ITEMS, SQUARE_SIZE))
    second = tuple(items[index] for index in rng.choice(squares_of(SQUARE_SIZE))[1])
    return LatinSquare(prompt_of(LatinSquare.wording, (*items, ROW_END, *second)), items, second)


def draw_edit(kind: type[Edit], rng: random.Random) -> Edit:
    """Draws a list, an item that is not in it and, unless the task leaves it open, a place."""
    new, *items = rng.sample(ITEMS, 1 + rng.choice(NUM_ITEMS))
    place, word = None, ""
    if kind not in OPEN_EDITS:
        place = rng.randrange(len(items) + issubclass(kind, Insert))
        word = PLACES[place]
    return kind(prompt_of(kind.wording.format(new=new, place=word), items), tuple(items), new, place)


def prompt_of(wording: str, items: Sequence[str]) -> str:
    """The text of a prompt."""
    return f"{wording} : {' '.join(items)} . Answer:"


# Task name -> draw(rng). Several answers are right where `OPEN_TASKS` has the name.
DRAWS: dict[str, Callable[[random.Random], ListProblem]] = {
    **{kind.task: functools.partial(draw_whole, kind) for kind in WHOLE},
    LatinSquare.task: draw_square,
    **{kind.task: functools.partial(draw_edit, kind) for kind in EDITS},
}
OPEN_TASKS = (Shuffle.task, LatinSquare.task, *(kind.task for kind in OPEN_EDITS))
