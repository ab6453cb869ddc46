"""Word problems with worked steps, after GSM8K: gifts of one or another size, a running count, a closing sentence."""

import itertools
import random
from dataclasses import dataclass
from typing import ClassVar

from vllm_osdt.mini.tasks.base import Parts, TemplateProblem, draw_parts

NAMES = ("mia", "tom", "zoe", "leo", "eve", "sam", "ivy", "ben")
# The count stays among these.
COUNTS = range(8, 25)
STARTS = (13, 20)
ITEMS = ("pens", "cards", "coins", "books")


@dataclass(frozen=True)
class WordProblem(TemplateProblem):
    """Gifts to friends, then the count of what someone has left through a few changes."""

    task: ClassVar[str] = "word_problems"
    name: str
    item: str
    start: int
    changes: tuple[int, ...]
    friends: tuple[str, ...]
    gifts: Parts

    def templates(self) -> list[str]:
        """See the base class."""
        return [self._template(split) for split in self.gifts.splits()]

    def _template(self, split: tuple[int, ...]) -> str:
        shares = " , ".join(f"{friend} gets {gift}" for friend, gift in zip(self.friends, split, strict=True))
        lines = [f"start with {self.start} {self.item} .", f"{shares} .", f"that makes {self.gifts.total} in all ."]
        count = self.start
        for number, change in enumerate(self.changes, 1):
            sign = "+" if change > 0 else "-"
            lines.append(f"step {number} : {count} {sign} {abs(change)} = {count + change} .")
            count += change
        lines.append(
            f"so|thus|hence|therefore , {self.name} now|finally has|holds|keeps|owns exactly|just|only {count}"
            f" {self.item} left|remaining , which answers|settles|solves|ends the question|problem|puzzle|riddle ."
        )
        return " \n ".join((*lines, f"#### {count}"))


def draw(rng: random.Random, free: bool) -> WordProblem:
    """Draws a problem; `free` ones leave open who gets the gift of the other size."""
    gifts = draw_parts(rng, free, (1, 2))
    start = rng.randint(*STARTS)
    num_changes = rng.choice((3, 4))
    while True:
        changes = tuple(rng.choice((-1, 1)) * rng.randint(1, 3) for _ in range(num_changes))
        if all(count in COUNTS for count in itertools.accumulate(changes, initial=start)):
            break
    name, *friends = rng.sample(NAMES, gifts.count + 1)
    item = rng.choice(ITEMS)
    events = " , ".join(f"{'finds' if change > 0 else 'loses'} {abs(change)}" for change in changes)
    prompt = (
        f"math : {name} gives {gifts.total} to {' '.join(friends)} , {gifts.low} or {gifts.low + 1} each ,"
        f" now has {start} {item} , {events} . Answer:"
    )
    return WordProblem(prompt, name, item, start, changes, tuple(friends), gifts)
