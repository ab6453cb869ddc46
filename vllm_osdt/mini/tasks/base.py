"""What the tasks share.

The problem, its answers written as templates, and the even splits that need one odd part.
"""

import itertools
import random
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

# Chance of each alternative of a slot, by the number of alternatives.
WEIGHTS = {2: (0.75, 0.25), 3: (0.5, 0.3, 0.2), 4: (0.4, 0.3, 0.2, 0.1)}
MAX_NUMBER = 40


@dataclass(frozen=True)
class Problem(ABC):
    """One prompt with all its valid answers.

    Text is tokens with one space between them; a line break is a token too. A template is such a text in which
    `so|thus|hence` offers alternatives that mean the same and depend on nothing else.
    """

    task: ClassVar[str]
    prompt: str

    @abstractmethod
    def sample_answer(self, rng: random.Random) -> str:
        """Draws a valid answer."""

    @abstractmethod
    def accepts(self, answer: str) -> bool:
        """Whether the answer is valid as a whole."""


class TemplateProblem(Problem):
    """A problem whose valid answers are exactly those its templates allow."""

    @abstractmethod
    def templates(self) -> list[str]:
        """One template for each choice on which other tokens depend; all are equally likely."""

    def sample_answer(self, rng: random.Random) -> str:
        """A right answer, drawn as in training."""
        return render(rng.choice(self.templates()), rng)

    def accepts(self, answer: str) -> bool:
        """Whether an answer is right."""
        tokens = tokenize(answer)
        return any(matches(template, tokens) for template in self.templates())


@dataclass(frozen=True)
class Parts:
    """A total to be split into `count` parts that are each `low` or `low + 1`."""

    count: int
    low: int
    total: int

    def splits(self) -> list[tuple[int, ...]]:
        """All valid splits, in lexical order."""
        candidates = itertools.product((self.low, self.low + 1), repeat=self.count)
        return [split for split in candidates if sum(split) == self.total]


def draw_parts(rng: random.Random, free: bool, lows: tuple[int, ...]) -> Parts:
    """Draws a split into equal parts, or (`free`) into parts of 1 with a single 2 in any place.

    With one odd part among three or four every place prefers the usual value with probability 2/3 or 3/4, but all
    of them at once are wrong: this is what a low threshold gets wrong.
    """
    count = rng.choice((3, 4))
    if free:
        return Parts(count, 1, count + 1)
    low = rng.choice(lows)
    return Parts(count, low, count * rng.choice((low, low + 1)))


def tokenize(text: str) -> list[str]:
    """Splits at spaces; a line break is a token."""
    return re.findall(r"\n|[^ \n]+", text)


def render(template: str, rng: random.Random) -> str:
    """Draws one alternative for every slot of a template."""
    words = []
    for slot in template.split(" "):
        alternatives = slot.split("|")
        words.append(slot if len(alternatives) == 1 else rng.choices(alternatives, WEIGHTS[len(alternatives)])[0])
    return " ".join(words)


def matches(template: str, tokens: list[str]) -> bool:
    """Whether the tokens take one alternative of every slot."""
    slots = template.split(" ")
    return len(slots) == len(tokens) and all(
        token in slot.split("|") for slot, token in zip(slots, tokens, strict=True)
    )
