"""Fuzzy memory against its nulls: only a blurred right number counts."""

from __future__ import annotations

import pytest

from ablate.data.made import Draw
from ablate.evaluate.fuzzy import fuzzy


def case(answer, n=60, seed=0):
    draw = Draw("fuzzy", seed)
    targets, others, answers = [], [], []
    for _ in range(n):
        numbers = draw.distinct(8, "digits", 10)
        targets.append(numbers[0])
        others.append(numbers[1:])
        answers.append(answer(draw, numbers))
    return fuzzy(answers, targets, others)


def blurred(draw, numbers):
    keep = set(draw.sample(range(10), 4))
    return "".join(d if i in keep else str(draw.below(10)) for i, d in enumerate(numbers[0]))


def test_a_blurred_number_is_fuzzy():
    found = case(blurred)
    assert found.is_fuzzy
    assert found.agreement > 0.4
    assert found.permuted == pytest.approx(0.1, abs=0.03)
    assert len(found.by_digit) == 10


def test_another_entry_is_retrieval():
    found = case(lambda draw, numbers: numbers[3])
    assert (found.wrong, found.retrieved) == (60, 60)
    assert not found.is_fuzzy


def test_a_favourite_number_is_not_fuzzy():
    found = [case(lambda draw, numbers: "1111122222", seed=s).is_fuzzy for s in range(8)]
    assert sum(found) <= 1


def test_random_answers_are_not_fuzzy():
    found = [case(lambda draw, numbers: draw.digits(10), seed=s).is_fuzzy for s in range(8)]
    assert sum(found) <= 1


def test_a_blur_of_a_neighbour_is_not_fuzzy():
    def neighbour(draw, numbers):
        return blurred(draw, [numbers[1 + draw.below(7)]])

    assert not case(neighbour).is_fuzzy


def test_answers_that_are_short_empty_or_all_right():
    assert case(lambda draw, numbers: numbers[0]).wrong == 0
    assert case(lambda draw, numbers: "").agreement == 0.0
    assert case(lambda draw, numbers: numbers[0][:4]).agreement == pytest.approx(0.4)
