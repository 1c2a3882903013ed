"""Fuzzy memory, with its nulls: is a wrong number near the right one?

Waleffe et al. 2024 (arXiv 2406.07887, section 3.3) see that a pure SSM's wrong phone numbers share
digits with the right ones. Chance makes one digit in ten agree, a model that favours some digits
more, and a model that answers with another entry's number has retrieved, not blurred. So agreement
is taken over wrong answers that are no other entry's number, and compared with

    permuted    the same answers against the other documents' right numbers: what the model's
                favourite digits alone would give
    neighbours  the same answers against a number of the same text, drawn with the right one among
                them: what looking at the text alone would give
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

NAN = float("nan")
DRAWS = 2000  # under each null


@dataclass(frozen=True)
class Fuzzy:
    """Shares of digits that agree by position; p: one-sided, of an agreement so high under a null.

    wrong, retrieved: numbers of wrong answers, and of those that are another entry's number.
    by_digit: agreement of the rest with the right number at each place.
    """

    wrong: int
    retrieved: int
    agreement: float
    by_digit: list[float]
    permuted: float
    permuted_p: float
    neighbours: float
    neighbours_p: float

    @property
    def is_fuzzy(self) -> bool:
        """Above both nulls at 5%."""
        return self.permuted_p < 0.05 and self.neighbours_p < 0.05

    def summary(self) -> dict[str, Any]:
        return {**asdict(self), "is_fuzzy": self.is_fuzzy}


def fuzzy(answers: Sequence[str], targets: Sequence[str], others: Sequence[Sequence[str]]) -> Fuzzy:
    """Agreement of wrong answers with the right numbers, and under the two nulls.

    answers: digits that the model gave, of any length; targets: the right numbers, of one length;
    others: the other numbers in each document's text.
    """
    wrong = [i for i, (a, t) in enumerate(zip(answers, targets, strict=True)) if a != t]
    kept = [i for i in wrong if answers[i] not in others[i]]
    retrieved = len(wrong) - len(kept)
    if not kept:
        return Fuzzy(len(wrong), retrieved, NAN, [], NAN, NAN, NAN, NAN)
    size = len(targets[0])
    right = np.array([_digits(targets[i], size) for i in kept])
    given = np.array([_digits(answers[i], size) for i in kept])
    same = given == right
    observed = float(same.mean())
    rng = np.random.default_rng(0)

    # every answer against every right number: a permutation reads one entry of each row
    pairs = (given[:, None, :] == right[None, :, :]).mean(axis=2)
    each = np.arange(len(kept))
    shuffled = [pairs[each, rng.permutation(len(kept))].mean() for _ in range(DRAWS)]

    neighbours, drawn = [], np.zeros(DRAWS)
    for row, i in enumerate(kept):
        theirs = np.array([_digits(o, size) for o in others[i]] or [right[row]])
        agree = (given[row] == theirs).mean(axis=1)
        neighbours.append(float(agree.mean()))
        drawn += rng.choice(np.append(agree, same[row].mean()), size=DRAWS) / len(kept)
    return Fuzzy(
        wrong=len(wrong),
        retrieved=retrieved,
        agreement=observed,
        by_digit=[float(x) for x in same.mean(axis=0)],
        permuted=_off_diagonal(pairs),
        permuted_p=_p(np.array(shuffled), observed),
        neighbours=float(np.mean(neighbours)),
        neighbours_p=_p(drawn, observed),
    )


def _digits(number: str, size: int) -> list[int]:
    """Digits by place, -1 where the number is too short."""
    return [int(number[i]) if i < len(number) and number[i].isdigit() else -1 for i in range(size)]


def _off_diagonal(pairs: np.ndarray) -> float:
    n = len(pairs)
    return NAN if n < 2 else float((pairs.sum() - np.trace(pairs)) / (n * (n - 1)))


def _p(null: np.ndarray, observed: float) -> float:
    return float((1 + (null >= observed - 1e-12).sum()) / (1 + len(null)))
