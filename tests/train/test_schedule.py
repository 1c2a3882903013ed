"""Schedules as a function of progress, and the three budgets."""

from __future__ import annotations

import math

import pytest

from ablate.config import load
from ablate.train.budget import Budget
from ablate.train.schedule import lr_scale


def scale(kind: str, progress: float) -> float:
    return lr_scale(kind, progress, warmup=0.1, decay_start=0.8, min_ratio=0.1)


@pytest.mark.parametrize("kind", ["cosine", "wsd", "constant"])
def test_warms_up_linearly(kind: str) -> None:
    assert scale(kind, 0.05) == pytest.approx(0.5)
    assert scale(kind, 0.1) == 1.0


def test_cosine_passes_the_middle_and_ends_at_the_minimum() -> None:
    assert scale("cosine", 0.55) == pytest.approx(0.55)
    assert scale("cosine", 1.0) == pytest.approx(0.1)


def test_wsd_holds_and_then_falls_by_one_minus_sqrt() -> None:
    assert {scale("wsd", p) for p in (0.1, 0.5, 0.8)} == {1.0}
    assert scale("wsd", 0.85) == pytest.approx(0.1 + 0.9 * (1 - math.sqrt(0.25)))
    assert scale("wsd", 1.0) == pytest.approx(0.1)
    falling = [scale("wsd", 0.8 + 0.02 * i) for i in range(11)]
    assert falling == sorted(falling, reverse=True)


def test_constant_stays() -> None:
    assert scale("constant", 1.0) == 1.0


def test_unknown_schedule() -> None:
    with pytest.raises(ValueError, match="linear"):
        scale("linear", 0.5)


def test_budgets_become_steps() -> None:
    tokens = load({"train": {"tokens": 1001}}).train
    assert Budget.of(tokens, 100, 7.0).steps == 11
    flops = load({"train": {"flops": 7.0 * 1000}}).train
    assert Budget.of(flops, 100, 7.0).steps == 10
    seconds = Budget.of(load({"train": {"seconds": 8.0}}).train, 100, 7.0)
    assert seconds.steps is None
    assert seconds.progress(5, 2.0) == 0.25
    assert seconds.total_steps(5, 2.0) == 20


def test_decay_begins_at_a_whole_step() -> None:
    budget = Budget(steps=7, seconds=None)
    assert budget.decay_start(0.3, None) == 5 / 7
    assert budget.decay_start(0.3, 4) == 4 / 7
