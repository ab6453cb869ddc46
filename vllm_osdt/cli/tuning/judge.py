"""When a request loses: what ``vllm-osdt tune`` compares of a candidate's answers and the reference's."""

import collections
import importlib
import re
import sys
from collections.abc import Callable, Sequence
from enum import IntEnum
from pathlib import Path

from vllm_osdt.cli.common import CommandError

Checker = Callable[[str, str], bool]


class Verdict(IntEnum):
    """What a request has of a candidate."""

    SAME = 0
    LOST = 1
    WON = 2


def load_checker(name: str) -> Checker:
    """The function ``MODULE:FUNCTION``; modules of the working directory are found.

    Raises:
        CommandError: There is no such function.
    """
    module, _, function = name.partition(":")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        found = getattr(importlib.import_module(module), function) if module and function else None
    except Exception as error:  # a module of the user's may fail in any way
        raise CommandError(f"the checker {name!r} cannot be loaded: {type(error).__name__}: {error}") from None
    if not callable(found):
        raise CommandError(
            f"the checker is {name!r}; expected MODULE:FUNCTION, a function of a prompt and a text that says whether "
            "the text answers the prompt"
        )
    return found


class Judge:
    """Compares a candidate's text with the reference's, or both with what is right.

    Args:
        prompts: What was asked.
        answers: The right answer of each prompt; None where they are not known.
        checker: What tells whether a text answers its prompt; None without one.
        pattern: What of a text is the answer: the first group of the last match, or the whole match; the whole text
            where nothing matches. None for the whole text.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        answers: Sequence[str] | None = None,
        checker: Checker | None = None,
        pattern: re.Pattern[str] | None = None,
    ) -> None:
        self._prompts = prompts
        self._answers = answers
        self._checker = checker
        self._pattern = pattern
        self._right: dict[tuple[int, str], bool] = {}  # what was asked before, by prompt and text

    @property
    def knows_right(self) -> bool:
        """Whether it can tell a right answer."""
        return self._answers is not None or self._checker is not None

    @property
    def loss(self) -> str:
        """In words, what a request has that loses."""
        if self.knows_right:
            return "a wrong answer where the reference has a right one"
        return "another answer than the reference" if self._pattern else "another text than the reference"

    def answer(self, text: str) -> str:
        """What of a text is the answer."""
        found = None if self._pattern is None else collections.deque(self._pattern.finditer(text), maxlen=1)
        if found:
            match = found[0]
            text = match[1] if match.re.groups and match[1] is not None else match[0]
        return " ".join(text.split())

    def is_right(self, index: int, text: str) -> bool:
        """Whether a text answers a prompt.

        Raises:
            CommandError: The checker failed.
        """
        if (index, text) not in self._right:
            self._right[index, text] = self._check(index, text)
        return self._right[index, text]

    def _check(self, index: int, text: str) -> bool:
        if self._checker is None:
            assert self._answers is not None
            return self.answer(text) == " ".join(self._answers[index].split())
        try:
            found = self._checker(self._prompts[index], text)
        except Exception as error:  # a function of the user's may fail in any way
            what = f"{type(error).__name__}: {error}"
        else:
            if isinstance(found, bool | int):
                return bool(found)
            what = f"it returned {found!r}, expected True or False"
        raise CommandError(f"the checker failed on prompt {index + 1}, {self._prompts[index][:80]!r}: {what}")

    def compare(self, index: int, reference: str, text: str) -> Verdict:
        """What a request has of a candidate's text in place of the reference's."""
        if not self.knows_right:
            return Verdict.SAME if self.answer(reference) == self.answer(text) else Verdict.LOST
        before, after = self.is_right(index, reference), self.is_right(index, text)
        return Verdict.SAME if before == after else Verdict.LOST if before else Verdict.WON
