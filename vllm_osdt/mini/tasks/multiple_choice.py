"""Multiple choice with reasoning, after GPQA: the category of every option, a verdict for each, the letter."""

import random
from dataclasses import dataclass
from typing import ClassVar

from vllm_osdt.mini.tasks.base import TemplateProblem

LETTERS = "ABCDE"
CATEGORIES = {
    "beast": ("dog", "cow", "fox", "hen", "pig", "owl"),
    "fruit": ("apple", "pear", "plum", "fig", "lime", "grape"),
    "tool": ("saw", "axe", "drill", "file", "rake", "hammer"),
    "color": ("red", "blue", "green", "pink", "gray", "teal"),
}
CATEGORY_OF = {word: category for category, words in CATEGORIES.items() for word in words}


@dataclass(frozen=True)
class ChoiceProblem(TemplateProblem):
    """Options of which one that fits the category is to be picked, and only one."""

    task: ClassVar[str] = "multiple_choice"
    category: str
    options: tuple[str, ...]

    def templates(self) -> list[str]:
        """See the base class."""
        return [self._template(letter) for letter, fits in self._fits().items() if fits]

    def _fits(self) -> dict[str, bool]:
        lettered = zip(LETTERS, self.options, strict=False)
        return {letter: CATEGORY_OF[option] == self.category for letter, option in lettered}

    def _template(self, picked: str) -> str:
        lines = ["now|first|here we check|test|weigh|judge each|every|any option|choice|word with care ."]
        for letter, option in zip(LETTERS, self.options, strict=False):
            lines.append(f"{letter} is|means {option} , a|one {CATEGORY_OF[option]} .")
        verdicts = {letter: "skip" if fits else "no" for letter, fits in self._fits().items()} | {picked: "pick"}
        judged = " ".join(
            f"{letter} {CATEGORY_OF[option]} {self.category} {verdict}"
            for (letter, verdict), option in zip(verdicts.items(), self.options, strict=True)
        )
        lines.append(f"verdict : {judged} .")
        return " \n ".join((*lines, f"so|thus|hence the answer is {picked} ."))


def draw(rng: random.Random, free: bool) -> ChoiceProblem:
    """Draws a problem; in `free` ones three or four options fit, else one does."""
    category = rng.choice(list(CATEGORIES))
    others = [word for word, other in CATEGORY_OF.items() if other != category]
    num_options = rng.choice((3, 4, 5))
    num_fitting = rng.randint(3, min(4, num_options)) if free else 1
    options = rng.sample(CATEGORIES[category], num_fitting) + rng.sample(others, num_options - num_fitting)
    rng.shuffle(options)
    listed = " ".join(f"{letter} {option}" for letter, option in zip(LETTERS, options, strict=False))
    return ChoiceProblem(f"quiz : pick one {category} . {listed} . Answer:", category, tuple(options))
