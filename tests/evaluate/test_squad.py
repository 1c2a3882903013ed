"""Scores of SQuAD beside lm-eval's own of another set in that form."""

from __future__ import annotations

import random

import pytest

utils = pytest.importorskip("lm_eval.tasks.tydiqa.utils")

from ablate.evaluate.squad import scores  # noqa: E402

WORDS = [
    "The",
    "a",
    "cat",
    "Cat's",
    "sat,",
    "on",
    "an",
    "mat",
    "--",
    "mat.",
    "theatre",
    "I",
    "",
    "7",
]


@pytest.mark.parametrize("seed", range(20))
def test_as_lm_eval_has_them(seed):
    draw = random.Random(seed)
    for _ in range(50):
        answer, *golds = (" ".join(draw.choices(WORDS, k=draw.randint(1, 6))) for _ in range(4))
        golds = [g for g in golds if utils.normalize_answer(g, "en")] or ["cat"]
        found = scores(answer, golds)
        assert found["f1"] == pytest.approx(max(utils.f1_score(answer, g, "en") for g in golds))
        normal = [utils.normalize_answer(g, "en") for g in golds]
        assert found["exact"] == (utils.normalize_answer(answer, "en") in normal)


@pytest.mark.parametrize(
    ("answer", "right"), [("", 1.0), (" the ", 1.0), ("unanswerable", 0.0), ("no", 0.0)]
)
def test_what_cannot_be_answered_is_answered_by_no_words(answer, right):
    assert scores(answer, []) == scores(answer, ["", "the"]) == {"exact": right, "f1": right}
