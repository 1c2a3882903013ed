"""Which cases of `bench kernels` are measured; the measuring itself needs a GPU."""

from __future__ import annotations

import pytest

from ablate.bench.kernels import _chosen
from ablate.errors import UserError


def chosen(only: str) -> list[tuple[str, str]]:
    return [(case.operation, case.size) for case in _chosen(only)]


def test_a_word_of_an_operation_or_of_a_size_chooses():
    every, windows = chosen(""), chosen("window")
    assert len(set(every)) == len(every)
    assert {operation for operation, _ in windows} == {"attention"}
    assert len(windows) < len(chosen("attention"))
    assert chosen("gla, window") == [c for c in every if c[0] == "gla" or c in windows]


def test_a_word_of_none_is_told_with_what_there_is():
    with pytest.raises(UserError, match=r"--only is 'windov', .*attention"):
        _chosen("gla,windov")
