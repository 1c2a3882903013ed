"""Made-up names, words and numbers, a function of a seed alone.

Recall is measured and trained on what no corpus holds: names are put together from syllables, and
numbers are drawn. Draws use nothing of `random.Random` but `random()`, the one method whose
sequence Python promises to keep.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

from ablate.errors import UserError

CONSONANTS = "bdfgklmnprstvz"
VOWELS = "aeiou"
SYLLABLES = tuple(c + v for c in CONSONANTS for v in VOWELS)

T = TypeVar("T")


class Draw:
    """Draws named by what they are for: `Draw(seed, "phonebook", 20, 3)`."""

    def __init__(self, *name: object) -> None:
        self._random = random.Random(":".join(map(str, name))).random

    def below(self, n: int) -> int:
        return int(self._random() * n)

    def unit(self) -> float:
        return self._random()

    def one(self, values: Sequence[T]) -> T:
        return values[self.below(len(values))]

    def sample(self, values: Sequence[T], n: int) -> list[T]:
        """`n` of the values without replacement, in random order (Fisher and Yates)."""
        pool = list(values)
        for i in range(n):
            j = i + self.below(len(pool) - i)
            pool[i], pool[j] = pool[j], pool[i]
        return pool[:n]

    def word(self, syllables: int = 2) -> str:
        return "".join(self.one(SYLLABLES) for _ in range(syllables))

    def name(self) -> str:
        """A first and a last name."""
        return f"{self.word(2).capitalize()} {self.word(3).capitalize()}"

    def digits(self, n: int) -> str:
        return "".join(str(self.below(10)) for _ in range(n))

    def distinct(self, n: int, make: str, size: int = 0) -> list[str]:
        """`n` different outcomes of a method of this class: "word", "name" or "digits"."""
        outcomes = {"word": len(SYLLABLES), "digits": 10}.get(make, len(SYLLABLES) ** 5) ** (
            size or 1
        )
        if n > outcomes // 2:  # the last ones would be drawn for ever
            raise UserError(
                f"a recall document of {n:,} different {make} is too large: there are {outcomes:,}"
            )
        method = getattr(self, make)
        found: dict[str, None] = {}
        while len(found) < n:
            found[method(size) if size else method()] = None
        return list(found)
