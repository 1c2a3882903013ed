"""Optuna beside the run folders: torn and damaged journals, reconciling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ablate import config
from ablate.errors import UserError
from ablate.study.folder import StudyFolder
from ablate.study.space import cells, proposed
from ablate.study.store import Store


@pytest.fixture
def tree(make: Any) -> dict[str, Any]:
    return make(**{"study.grid": {"train.lr": [1e-3, 2e-3], "arch.pattern": ["M", "*"]}})


def open_store(tree: dict[str, Any], path: Path) -> Store:
    return Store(StudyFolder(path), config.load(tree))


def names(store: Store) -> list[str]:
    return [t.state.name for t in store.study.get_trials()]


def test_reconcile_follows_the_run_folders(tree: dict[str, Any], tmp_path: Path) -> None:
    store = open_store(tree, tmp_path)
    found = cells(tree)
    folder = StudyFolder(tmp_path)
    for cell in found[:3]:
        store.begin(cell)
    assert store.begin(found[0]) == 0  # taken, not made again
    for cell in (found[0], found[3]):
        run = folder.run(cell.key)
        run.path.mkdir()
        run.write_result({"val_a": {"loss": 2.5}}, generation=0)
    held = folder.run(found[2].key)
    with held.lock():
        assert store.reconcile(found) == 3
        assert names(store) == ["COMPLETE", "FAIL", "RUNNING", "COMPLETE"]
    by_key = store.trials()
    assert by_key[found[0].key][0].value == 2.5
    assert by_key[found[1].key][0].user_attrs["cause"] == "its process was killed"
    assert by_key[found[3].key][0].params == {"train.lr": 2e-3}
    assert by_key[found[3].key][0].user_attrs["factors"]["arch.pattern"] == "*"
    assert store.reconcile(found) == 1  # the one whose process has gone since
    assert store.reconcile(found) == 0


def test_a_complete_trial_is_recorded_once(tree: dict[str, Any], tmp_path: Path) -> None:
    one, two = open_store(tree, tmp_path), open_store(tree, tmp_path)
    cell = cells(tree)[0]
    one.begin(cell)
    one.finish(cell, "done", 2.0)
    two.finish(cell, "done", 2.0)
    two.begin(cell)
    two.finish(cell, "done", 2.0)
    assert names(one) == ["COMPLETE", "FAIL"]


def test_a_torn_line_is_cut_off(tree: dict[str, Any], tmp_path: Path) -> None:
    store = open_store(tree, tmp_path)
    found = cells(tree)
    store.begin(found[0])
    journal = StudyFolder(tmp_path).journal
    whole = journal.read_bytes()
    for torn in (b'{"op_code": 4, "work', b"x" * 200_000):
        journal.write_bytes(whole + torn)
        again = open_store(tree, tmp_path)
        assert journal.read_bytes().startswith(whole)
        assert torn not in journal.read_bytes()
        assert names(again) == ["RUNNING"]
    again.begin(found[1])
    assert names(open_store(tree, tmp_path)) == ["RUNNING", "RUNNING"]


def test_a_damaged_journal_is_rebuilt(tree: dict[str, Any], tmp_path: Path) -> None:
    store = open_store(tree, tmp_path)
    found = cells(tree)
    run = StudyFolder(tmp_path).run(found[0].key)
    run.path.mkdir()
    run.write_result({"val_a": {"loss": 2.5}}, generation=0)
    store.begin(found[0])
    store.finish(found[0], "done", 2.5)
    journal = StudyFolder(tmp_path).journal
    lines = journal.read_bytes().splitlines(keepends=True)
    lines[1] = b"\x00" * 30 + b"\n"
    journal.write_bytes(b"".join(lines))
    with pytest.warns(UserWarning, match="damaged"):
        again = open_store(tree, tmp_path)
    again.reconcile(found)
    assert names(again) == ["COMPLETE"]


def test_what_a_search_learns_from_a_failure(make: Any, tmp_path: Path) -> None:
    """A proposal that diverged is its worst, one whose machine failed says nothing."""
    tree = make(
        **{
            "study.search": {
                "train.lr": {"low": 1e-4, "high": 1e-2, "log": True},
                "arch.pattern": {"choices": ["M", "*"]},
                "arch.d_model": {"low": 16, "high": 64, "step": 16, "integer": True},
            },
            "study.n_trials": 4,
        }
    )

    store = open_store(tree, tmp_path)
    for cause in ("diverged: the loss is nan", "killed by signal 9 (SIGKILL)"):
        number, changes = store.propose()
        assert changes["arch.pattern"] in ("M", "*")
        assert changes["arch.d_model"] in (16, 32, 48, 64)
        cell = proposed(tree, changes)[0]
        store.bind(number, cell)
        assert store.begin(cell) == number
        store.finish(cell, "failed", cause=cause)
    assert names(store) == ["PRUNED", "FAIL"]
    # What is resumed under a new number keeps its place in the space.
    number = store.begin(cell)
    trials = store.study.get_trials()
    assert trials[number].params == trials[1].params


def test_an_edited_space_is_another_optuna_study(make: Any, tmp_path: Path) -> None:
    dimension = {"low": 1e-4, "high": 1e-2, "log": True}
    tree = make(**{"study.search": {"train.lr": dimension}, "study.n_trials": 4})
    open_store(tree, tmp_path).propose()
    tree["study"]["search"] = {"train.lr": {**dimension, "log": False}}
    assert names(open_store(tree, tmp_path)) == []


def test_a_storage_that_cannot_be_opened(make: Any, tmp_path: Path) -> None:
    tree = make(**{"study.storage": "nosuchdb://host/name"})
    with pytest.raises(UserError, match=r"study\.storage 'nosuchdb://host/name'"):
        open_store(tree, tmp_path)
