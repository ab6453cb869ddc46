"""Word problems with worked steps, after GSM8K: gifts of one or another size, a running count, a closing sentence."""

import random
from dataclasses import dataclass
from typing import ClassVar

from vllm_osdt.mini.tasks.base import MAX_NUMBER, Parts, TemplateProblem, draw_parts

NAMES = ("mia", "tom", "zoe", "leo", "eve", "sam", "ivy", "ben")
ITEMS = ("pens", "cards", "coins", "books")


@dataclass(frozen=True)
class WordProblem(TemplateProblem):
    """Someone's count of items after a few changes and the gifts to friends."""

    task: ClassVar[str] = "word_problems"
    name: str
    item: str
    start: int
    changes: tuple[int, ...]
    friends: tuple[str, ...]
    gifts: Parts

    def templates(self) -> list[str]:
        return [self._template(split) for split in self.gifts.splits()]

    def _template(self, split: tuple[int, ...]) -> str:
        shares = " , ".join(f"{friend} gets {gift}" for friend, gift in zip(self.friends, split, strict=True))
        lines = [f"start with {self.start} {self.item} .", f"{shares} .", f"that makes {self.gifts.total} in all ."]
        count = self.start
        for number, change in enumerate((*self.changes, -self.gifts.total), 1):
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
    gifts = draw_parts(rng, free)
    while True:
        start = rng.randint(10, 24)
        changes = tuple(rng.choice((-1, 1)) * rng.randint(1, 5) for _ in range(rng.choice((2, 3))))
        counts = [start + sum(changes[:taken]) for taken in range(1, len(changes) + 1)]
        if max(counts) <= MAX_NUMBER and min(counts) >= gifts.total:
            break
    name, *friends = rng.sample(NAMES, gifts.count + 1)
    item = rng.choice(ITEMS)
    events = " , ".join(f"{'finds' if change > 0 else 'loses'} {abs(change)}" for change in changes)
    prompt = (
        f"math : {name} has {start} {item} , {events} , gives {gifts.total} to {' '.join(friends)} ,"
        f" {gifts.low} or {gifts.low + 1} each . Answer:"
    )
    return WordProblem(prompt, name, item, start, changes, tuple(friends), gifts)
