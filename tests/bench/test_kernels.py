"""Which cases of `bench kernels` are measured; the measuring itself needs a GPU."""

from __future__ import annotations

import dataclasses

import pytest

from ablate.bench import kernels
from ablate.errors import UserError


def chosen(only: str) -> list[tuple[str, str]]:
    return [(case.operation, case.size) for case in kernels._chosen(only)]


def test_a_word_of_an_operation_or_of_a_size_chooses():
    every, windows = chosen(""), chosen("window")
    assert len(set(every)) == len(every)
    assert {operation for operation, _ in windows} == {"attention"}
    assert len(windows) < len(chosen("attention"))
    assert chosen("gla, window") == [c for c in every if c[0] == "gla" or c in windows]


def test_a_word_of_none_is_told_with_what_there_is():
    with pytest.raises(UserError, match=r"--only is 'windov', .*attention"):
        kernels._chosen("gla,windov")


def test_doubled_is_the_length_or_the_batch():
    case = kernels._chosen("ssd")[0]
    found = [(c.batch, c.length, c.must) for c in kernels._doubled(case)]
    b, length = case.batch, case.length
    none = (None, None)
    assert found == [(b, length, case.must), (b, 2 * length, none), (2 * b, length, none)]


def test_a_peer_that_refuses_its_backward_pass_keeps_its_forward_time(monkeypatch):
    def timed(case, who, fn, milliseconds, backward):
        row = kernels.Row(case.operation, case.size, who)
        if backward:
            row.failed = "RuntimeError: wrong on this GPU"
        else:
            row.forward, row.forward_device, row.error = 0.824, 0.810, 4.4e-3
        return row

    monkeypatch.setattr(kernels, "_timed", timed)
    case = next(c for c in kernels._cases() if c.operation == "gated_delta_rule")
    line = kernels.table([kernels._measure(case, "fla", case.ours, 10)]).splitlines()[-1]
    assert "| 0.824 / - | 0.810 / - |" in line
    assert "no backward pass: RuntimeError: wrong on this GPU" in line


def test_what_a_case_does_besides_the_operation_is_taken_off(monkeypatch):
    times = {"whole": 3.0, "besides": 1.25}
    monkeypatch.setattr(
        kernels, "_figures", lambda case, inputs, fn, *_: {"both_device": times[fn], "memory": 0.5}
    )
    monkeypatch.setattr(kernels, "_errors", lambda *_: (0.0, "z"))
    case = kernels.Case("core", "in a layer", 1, 8, dict, "whole", "exact", dict)
    assert kernels._timed(case, "ours", case.ours, 10, True).both_device == 3.0
    less = dataclasses.replace(case, less=(dict, "besides"))
    row = kernels._timed(less, "ours", case.ours, 10, True)
    assert (row.both_device, row.memory) == (1.75, None)


def test_first_calls_are_of_each_operation_once_at_its_first_size(monkeypatch):
    monkeypatch.setattr(kernels, "_first_call", lambda case, together: 2.0 if together else 5.0)
    found = list(kernels.first_calls("ssd,gla"))
    sizes = {case.operation: case.size for case in reversed(kernels._cases())}
    assert [(case.operation, case.size) for case, *_ in found] == [
        (operation, sizes[operation]) for operation in ("ssd", "gla")
    ]
    assert {(alone, together) for _, alone, together in found} == {(5.0, 2.0)}
