"""Short stories with the statistics of text: synonyms, free word order, agreement, references over a distance.

How likely each text is follows from the prompt, and so does what a perfect model says of a text with masked words.
"""

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from vllm_osdt.mini.tasks.base import Problem, tokenize

NAMES = ("anna", "carl", "dora", "emil", "fay", "gus", "hana", "ian", "jill", "kurt", "lena", "max")
PLACES = ("garden", "harbor", "forest", "market", "castle", "meadow")
ITEMS = ("lamp", "rope", "cup", "map", "bag", "drum", "kite", "bell", "hat", "coat")
# A style turns the alternatives of a choice, so that each style has favourites of its own.
STYLES = ("plain", "warm", "dry", "bright")
# Words of a choice that leaves all others alone, and the chance of each in the first style.
SYNONYMS: dict[str, dict[str, float]] = {
    "weather": {"cold": 0.40, "misty": 0.30, "quiet": 0.20, "windy": 0.10},
    "time": {"morning": 0.85, "evening": 0.15},
    "walked": {"walked": 0.85, "wandered": 0.15},
    "fine": {"lovely": 0.42, "famous": 0.33, "ancient": 0.25},
    "there": {"there": 0.86, "here": 0.14},
    "found": {"found": 0.66, "noticed": 0.34},
    "small": {"small": 0.95, "thin": 0.05},
    "near": {"near": 0.95, "behind": 0.05},
    "seemed": {"seemed": 0.56, "looked": 0.44},
    "gave": {"gave": 0.95, "offered": 0.05},
    "then": {"then": 0.95, "soon": 0.05},
    "packed": {"packed": 0.40, "took": 0.30, "gathered": 0.20, "collected": 0.10},
    "finally": {"finally": 0.95, "afterwards": 0.05},
    "softly": {"softly": 0.41, "loudly": 0.34, "gently": 0.25},
    "smiled": {"smiled": 0.45, "laughed": 0.33, "waved": 0.22},
}
# Animals and colours come back in the second half of the story; what an animal eats and does agrees with it.
ANIMALS = {"cat": ("milk", "purred"), "dog": ("meat", "barked"), "bird": ("seeds", "sang")}
ANIMAL_CHANCES = (0.45, 0.35, 0.20)
COLOURS = ("grey", "brown", "white")
COLOUR_CHANCES = (0.72, 0.18, 0.10)
# Chance that the story begins with the time of day, and that it names the two in the order of the prompt.
TIME_FIRST, PROMPT_ORDER = 0.65, 0.85


@dataclass(frozen=True)
class Kind:
    """What a list of things has one of: its usual and odd word, and how likely each place is for the odd one.

    Every place prefers the usual word with one minus its chance, but all of them at once are wrong: a threshold at or
    below the least of these gets it wrong.
    """

    usual: str
    odd: str
    chances: tuple[float, ...]


KINDS = (
    Kind("new", "old", (0.28, 0.24, 0.24, 0.24)),
    Kind("red", "blue", (0.38, 0.31, 0.31)),
    Kind("big", "little", (0.44, 0.28, 0.28)),
)
KIND_CHANCES = (0.25, 0.35, 0.4)

# By position, the words that can stand there and the chance of each.
Template = list[dict[str, float]]


@dataclass(frozen=True)
class Choices:
    """What several tokens of a story hang on; `odd` is the place of the odd thing, or None."""

    time_first: bool
    names: tuple[str, str]
    animal: str
    colour: str
    odd: int | None


@dataclass(frozen=True)
class Story(Problem):
    """Two friends find an animal, feed it, pack their things."""

    task: ClassVar[str] = "stories"
    names: tuple[str, str]
    place: str
    style: str
    items: tuple[str, ...]
    kind: Kind
    has_odd: bool

    def templates(self) -> Iterator[tuple[float, Template]]:
        """The chance and the template of every combination of choices."""
        for combination in itertools.product(*self._choices()):
            chance = 1.0
            for _, share in combination:
                chance *= share
            yield chance, self._template(Choices(*(value for value, _ in combination)))

    def sample_answer(self, rng: random.Random) -> str:
        """See the base class."""
        drawn = (rng.choices(*zip(*alternatives, strict=True))[0] for alternatives in self._choices())
        template = self._template(Choices(*drawn))
        return " ".join(rng.choices(list(words), list(words.values()))[0] for words in template)

    def accepts(self, answer: str) -> bool:
        """See the base class."""
        tokens = tokenize(answer)
        return any(
            len(template) == len(tokens) and all(map(dict.__contains__, template, tokens))
            for _, template in self.templates()
        )

    def _choices(self) -> list[list[tuple[Any, float]]]:
        """By field of `Choices`, its values and the chance of each."""
        first, second = self.names
        shift = STYLES.index(self.style)
        odd: list[tuple[Any, float]] = list(enumerate(self.kind.chances)) if self.has_odd else [(None, 1.0)]
        return [
            [(True, TIME_FIRST), (False, 1 - TIME_FIRST)],
            [((first, second), PROMPT_ORDER), ((second, first), 1 - PROMPT_ORDER)],
            list(zip(turned(list(ANIMALS), PLACES.index(self.place)), ANIMAL_CHANCES, strict=True)),
            list(zip(turned(COLOURS, shift), COLOUR_CHANCES, strict=True)),
            odd,
        ]

    def _template(self, choices: Choices) -> Template:
        first, second = choices.names
        food, sound = ANIMALS[choices.animal]
        time = "one {weather} {time}"
        trip = f"{first} and {second} {{walked}} to the {{fine}} {self.place}"
        opening = f"{time} {trip}" if choices.time_first else f"{trip} {time}"
        words = [self.kind.odd if index == choices.odd else self.kind.usual for index in range(len(self.items))]
        *things, last = [f"{word} {item}" for word, item in zip(words, self.items, strict=True)]
        text = (
            f"{opening} . {{there}} they {{found}} a {{small}} {choices.colour} {choices.animal} {{near}} the gate ."
            f" it {{seemed}} hungry , so {first} {{gave}} it some {food} ."
            f" {{then}} they {{packed}} their {' , '.join(things)} and {last} ."
            f" {{finally}} the {choices.colour} {choices.animal} {sound} {{softly}} and {second} {{smiled}} ."
        )
        return [self._words(slot) for slot in text.split(" ")]

    def _words(self, slot: str) -> dict[str, float]:
        if not slot.startswith("{"):
            return {slot: 1.0}
        synonyms = SYNONYMS[slot.strip("{}")]
        return dict(zip(turned(list(synonyms), STYLES.index(self.style)), synonyms.values(), strict=True))


def turned(words: Sequence[str], places: int) -> list[str]:
    """The words from another start, once round."""
    places %= len(words)
    return [*words[places:], *words[:places]]


def draw(rng: random.Random, free: bool) -> Story:
    """Draws a story; `free` ones leave open which of the things is the odd one."""
    first, second = rng.sample(NAMES, 2)
    place, style = rng.choice(PLACES), rng.choice(STYLES)
    kind = rng.choices(KINDS, KIND_CHANCES)[0]
    items = tuple(rng.sample(ITEMS, len(kind.chances) if free else rng.choice((3, 4))))
    which = f"one {kind.odd}" if free else f"all {kind.usual}"
    prompt = f"story : {style} , {first} and {second} , {place} , {which} {kind.usual} : {' '.join(items)} . Answer:"
    return Story(prompt, (first, second), place, style, items, kind, free)
