"""The supervisor with a make-believe trainer: what ends how, what runs again, what never does."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from ablate import config
from ablate.data import prepare
from ablate.errors import UserError
from ablate.run import write_json
from ablate.study import space, supervisor
from ablate.study.folder import StudyFolder
from ablate.study.status import frame
from ablate.study.store import Store
from ablate.study.supervisor import run_study

from .conftest import FAKE, calls, start
from .fake_child import DEAF, EXITS, FULL, KILLED, ONCE, RAISES, SLOW


def folder_of(tree: dict[str, Any]) -> StudyFolder:
    return StudyFolder(Path(tree["study"]["folder"]) / tree["study"]["name"])


def optuna_states(tree: dict[str, Any]) -> dict[str, list[TrialState]]:
    store = Store(folder_of(tree), config.load(tree))
    return {key: [t.state for t in trials] for key, trials in store.trials().items()}


def run(tree: dict[str, Any], console: Any) -> Any:
    return run_study(tree, console=console, child_command=FAKE)


def text(console: Any) -> str:
    return console.file.getvalue()


def wait_for(condition: Any, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def test_grid_and_seeds_run_once_and_never_again(make: Any, console: Any) -> None:
    tree = make(**{"study.grid": {"train.lr": [1e-3, 3e-3]}, "study.seeds": [0, 1]})
    tree["study"] |= {"question": "Which?", "finding": "learning_rate"}
    outcome = run(tree, console)
    assert outcome.exit_code == 0
    assert len(outcome.done) == 4
    index = folder_of(tree).index()
    assert (index["name"], index["question"], index["finding"]) == (
        "tiny",
        "Which?",
        "learning_rate",
    )
    assert index["factors"] == ["train.lr"]
    assert index["x"] == "train.lr"
    cells = index["cells"]
    assert {(c["arm"], c["seed"]) for c in cells.values()} == {
        ("lr=0.001", 0),
        ("lr=0.003", 0),
        ("lr=0.001", 1),
        ("lr=0.003", 1),
    }
    assert all(c["factors"]["train.lr"] in (1e-3, 3e-3) for c in cells.values())
    assert all(s == [TrialState.COMPLETE] for s in optuna_states(tree).values())
    assert "printed by the trial" in folder_of(tree).run(outcome.done[0]).log.read_text()
    before = calls(tree)
    assert run(tree, console).exit_code == 0
    assert calls(tree) == before
    assert all(s == [TrialState.COMPLETE] for s in optuna_states(tree).values())


def test_a_process_that_asks_for_fewer_meanwhile_hides_none(
    make: Any, console: Any, monkeypatch: Any
) -> None:
    tree = make(**{"study.grid": {"train.lr": [1e-3, 2e-3]}, "study.seeds": [0, 1]})
    fewer = {**tree, "study": {**tree["study"], "seeds": [0]}}
    finish = supervisor._Supervisor._finish_records

    def meanwhile(self: Any) -> None:
        finish(self)
        index = folder_of(tree).index()
        cells = {key: c for key, c in index["cells"].items() if c["seed"] == 0}
        folder_of(tree).write_index({**index, "cells": cells, "config": fewer})

    monkeypatch.setattr(supervisor._Supervisor, "_finish_records", meanwhile)
    assert len(run(tree, console).done) == 4
    assert len(folder_of(tree).index()["cells"]) == 4
    assert folder_of(tree).index()["orphans"] == []


def test_what_finished_trials_were_not_asked_is_said(make: Any, console: Any) -> None:
    tree = make(**{"study.grid": {"train.lr": [1e-3, 2e-3]}})
    run(tree, console)
    assert "evaluated with another" not in text(console)
    run({**tree, "evaluate": {**tree["evaluate"], "length": [1, 2]}}, console)
    said = " ".join(text(console).split())
    assert "2 finished trials were evaluated with another evaluate.length" in said


def test_a_failed_trial_costs_itself_and_says_why(make: Any, console: Any) -> None:
    values = [RAISES, 1e-3, KILLED, EXITS, FULL, 2e-3]
    tree = make(**{"study.grid": {"train.lr": values}})
    outcome = run(tree, console)
    assert outcome.exit_code == 1
    states = frame(outcome.folder).set_index("arm")
    assert states.loc[["lr=0.001", "lr=0.002"], "state"].tolist() == ["done", "done"]
    expected = {
        RAISES: "RuntimeError: the line says why",
        KILLED: "killed by signal 9 (SIGKILL)",
        EXITS: "exit code 7: something on stderr",
        FULL: "disk full",
    }
    for lr, cause in expected.items():
        row = states.loc[f"lr={lr:g}"]
        assert row["state"] == "failed"
        assert cause in row["cause"]
        assert f"lr={lr:g}, seed 0" in text(console)
    assert "study.retry=failed" in text(console)
    # A failed trial is left alone until it is asked for.
    before = len(calls(tree))
    assert run(tree, console).exit_code == 1
    assert len(calls(tree)) == before


def test_retry_runs_failed_trials_once_more(make: Any, console: Any) -> None:
    tree = make(**{"study.grid": {"train.lr": [ONCE, RAISES, 1e-3]}})
    assert len(run(tree, console).causes) == 2
    tree["study"]["retry"] = "failed"
    outcome = run(tree, console)
    assert list(outcome.causes.values()) == ["RuntimeError: the line says why"]
    begun = Counter(call[0] for call in calls(tree) if call[2] == "begins")
    assert sorted(begun.values()) == [1, 2, 2]
    states = optuna_states(tree)
    assert sorted([s.name for s in trials] for trials in states.values()) == [
        ["COMPLETE"],
        ["FAIL", "COMPLETE"],
        ["FAIL", "FAIL"],
    ]


def test_an_edited_study_keeps_its_orphans(make: Any, console: Any) -> None:
    tree = make(**{"study.grid": {"train.lr": [1e-3, 2e-3]}})
    first = run(tree, console)
    tree["study"]["grid"] = {"train.lr": [2e-3, 4e-3]}
    tree["study"]["question"] = "Another?"
    second = run(tree, console)
    index = folder_of(tree).index()
    assert index["orphans"] == [first.cells[0].key]
    assert index["question"] == "Another?"
    assert len([c for c in calls(tree) if c[2] == "begins"]) == 3
    assert set(second.done) == set(index["cells"])
    states = frame(second.folder)
    assert states["orphan"].tolist() == [False, False, True]
    assert states["arm"].tolist() == ["lr=0.002", "lr=0.004", "lr=0.001"]


def test_two_invocations_share_the_work(make: Any) -> None:
    tree = make(**{"study.grid": {"train.lr": [i / 1000 for i in range(1, 7)]}})
    processes = [start(tree, "fake", FAKE_STEP_SECONDS="0.1") for _ in range(2)]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [p.returncode for p in processes] == [0, 0], outputs
    begun = Counter(call[0] for call in calls(tree) if call[2] == "begins")
    assert sorted(begun.values()) == [1] * 6
    assert list(optuna_states(tree).values()) == [[TrialState.COMPLETE]] * 6


def test_another_study_cannot_join_one_that_is_at_work(make: Any, console: Any) -> None:
    tree = make(**{"study.grid": {"train.lr": [1e-3, 2e-3]}})
    process = start(tree, "fake", FAKE_STEP_SECONDS="0.3")
    wait_for(lambda: folder_of(tree).path.exists() and len(calls(tree)) >= 1)
    index = folder_of(tree).index()
    dimension = {"train.lr": {"low": 1e-3, "high": 1e-2}}
    for changes in (
        {"grid": {"train.lr": [4e-3]}},
        {"grid": {}, "search": dimension, "n_trials": 1},
    ):
        other = {**tree, "study": {**tree["study"], **changes}}
        with pytest.raises(UserError, match=r"study\.name: another study is at work in .*/tiny"):
            run(other, console)
    assert folder_of(tree).index() == index
    assert process.communicate(timeout=300)
    assert process.returncode == 0
    assert run(other, console).exit_code == 0  # once it is done, its runs become orphans


def test_ctrl_c_checkpoints_and_the_same_command_goes_on(make: Any, console: Any) -> None:
    tree = make(**{"study.grid": {"train.lr": [1e-3, 2e-3, 3e-3]}})
    process = start(tree, "fake", FAKE_STEP_SECONDS="0.5")
    wait_for(lambda: folder_of(tree).path.exists() and len(calls(tree)) >= 2)
    keys = {call[0] for call in calls(tree)}
    wait_for(lambda: all((folder_of(tree).run(k).checkpoint / "step").exists() for k in keys))
    os.kill(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert {folder_of(tree).run(k).status()["state"] for k in keys} == {"interrupted"}
    assert run(tree, console).exit_code == 0
    resumed = [call for call in calls(tree) if call[2] == "begins" and int(call[3]) > 0]
    assert {call[0] for call in resumed} == keys
    states = optuna_states(tree)
    assert all([s.name for s in t].count("COMPLETE") == 1 for t in states.values())


def test_a_folder_that_is_moved_while_the_study_runs_is_not_made_again(
    make: Any, console: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_STEP_SECONDS", "0.3")
    tree = make(**{"study.grid": {"train.lr": [1e-3, 2e-3, 3e-3]}})
    there, elsewhere = folder_of(tree).path, folder_of(tree).path.with_name("elsewhere")

    def move() -> None:
        wait_for(lambda: len(calls(tree)) >= 2)
        there.rename(elsewhere)

    mover = threading.Thread(target=move)
    mover.start()
    with pytest.raises(UserError, match=r"the study's folder '.*/tiny' is gone \(moved or deleted"):
        run(tree, console)
    mover.join()
    assert not there.exists()
    assert "failed" not in text(console)
    elsewhere.rename(there)
    for _, pid, *_ in calls(tree):
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)
    monkeypatch.setenv("FAKE_STEP_SECONDS", "0.02")
    assert run(tree, console).exit_code == 0


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_folder_that_is_moved_while_the_text_is_prepared_is_not_made_again(
    make: Any, console: Any, monkeypatch: pytest.MonkeyPatch, interrupted: bool
) -> None:
    tree = make()
    assert run(tree, console).exit_code == 0
    tree["study"]["seeds"] = [0, 1]
    there = folder_of(tree).path
    if interrupted:  # nothing has ended there, but there is something to go on with
        for file in there.rglob("result.json"):
            file.unlink()
            write_json(file.with_name("status.json"), {"state": "interrupted", "generation": 1})
    moved = there.with_name("elsewhere")
    monkeypatch.setattr(supervisor, "prepare", lambda data: (prepare(data), there.rename(moved))[0])
    with pytest.raises(UserError, match="is gone"):
        run(tree, console)
    assert not there.exists()


def test_a_second_ctrl_c_kills(make: Any) -> None:
    tree = make(**{"study.grid": {"train.lr": [DEAF]}})
    process = start(tree, "fake")
    wait_for(lambda: folder_of(tree).path.exists() and len(calls(tree)) == 1)
    began = time.monotonic()
    os.kill(process.pid, signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None
    os.kill(process.pid, signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert time.monotonic() - began < 8


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("whole_group", [False, True])
def test_a_killed_parent_leaves_no_orphans(make: Any, console: Any, whole_group: bool) -> None:
    tree = make(**{"study.grid": {"train.lr": [1e-3, 2e-3, 3e-3]}})
    process = start(tree, "fake", FAKE_STEP_SECONDS="0.5")
    wait_for(lambda: folder_of(tree).path.exists() and len(calls(tree)) >= 2)
    (os.killpg if whole_group else os.kill)(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    wait_for(lambda: "running" not in set(frame(folder_of(tree).path)["state"]), 10)
    wait_for(lambda: not any(alive(int(call[1])) for call in calls(tree)), 10)
    assert "interrupted" in set(frame(folder_of(tree).path)["state"])
    assert run(tree, console).exit_code == 0
    ends = Counter(call[0] for call in calls(tree) if call[2] == "ends")
    assert set(ends.values()) == {1}
    assert len(ends) in (2, 3)  # one may have been killed between its result and its note
    assert all(
        [s.name for s in trials].count("COMPLETE") == 1
        and "RUNNING" not in [s.name for s in trials]
        for trials in optuna_states(tree).values()
    )


def test_a_kill_between_result_and_report(make: Any, console: Any) -> None:
    """The result is on the disk, Optuna and status.json do not know it yet."""
    tree = make(**{"study.grid": {"train.lr": [1e-3]}})
    outcome = run(tree, console)
    folder = folder_of(tree)
    folder.journal.unlink()
    path = folder.run(outcome.done[0]).path / "status.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "state": "running"}))
    store = Store(folder, config.load(tree))
    store.begin(outcome.cells[0])
    assert run(tree, console).exit_code == 0
    assert list(optuna_states(tree).values()) == [[TrialState.COMPLETE]]
    assert folder.run(outcome.done[0]).status()["state"] == "done"
    assert len([c for c in calls(tree) if c[2] == "begins"]) == 1


def test_no_trial_starts_that_cannot_end_before_the_deadline(make: Any, console: Any) -> None:
    tree = make(**{"study.grid": {"train.lr": [1e-3, 2e-3]}, "study.workers": 1})
    outcome = run({**tree, "study": {**tree["study"], "grid": {"train.lr": [1e-3]}}}, console)
    assert outcome.exit_code == 0  # and it took one second, says its result
    tree["study"]["deadline"] = 0.5 / 60
    outcome = run(tree, console)
    assert outcome.exit_code == 1
    assert len(outcome.unfinished) == 1
    assert len([c for c in calls(tree) if c[2] == "begins"]) == 1


def test_what_evaluation_takes_does_not_grow_with_tokens(make: Any, console: Any) -> None:
    tree = make(**{"study.grid": {"train.tokens": [640, 2560]}})
    cfg, cells = config.load(tree), space.cells(tree)
    study = supervisor._Supervisor(space.full(tree), cfg, cells, console, FAKE)
    short, long = sorted(cells, key=lambda cell: cell.trial.tokens)
    study.seconds[short.key], study.training[short.key] = 60.0, 10.0
    times = long.trial.flops / short.trial.flops
    assert study._estimate(long) == pytest.approx(10 * times + 50)
    assert times > 3


def test_at_the_deadline_trials_checkpoint(make: Any, console: Any) -> None:
    tree = make(**{"study.grid": {"train.lr": [SLOW]}, "study.deadline": 8 / 60})
    outcome = run(tree, console)
    assert (outcome.exit_code, len(outcome.unfinished), outcome.causes) == (1, 1, {})
    assert folder_of(tree).run(outcome.unfinished[0]).status()["state"] == "interrupted"


def test_children_that_never_start_end_the_study(
    make: Any, console: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_DOES_NOT_START", "1")
    with pytest.raises(UserError, match=r"do not start.*cannot import the trainer"):
        run(make(), console)


def test_a_mistake_in_one_cell_stops_the_study_before_it_begins(make: Any, console: Any) -> None:
    tree = make(**{"study.grid": {"arch.pattern": ["M*-", "M?"]}})
    with pytest.raises(UserError, match=r"cell 'pattern=M\?'"):
        run(tree, console)
    assert not Path(tree["study"]["folder"]).exists()


def test_documents_too_short_for_length_are_told_before_training(make: Any, console: Any) -> None:
    tree = make(**{"evaluate.length": [1, 100_000]})
    with pytest.raises(UserError, match=r"evaluate\.length: 100000 times"):
        run(tree, console)
    assert calls(tree) == []


def search(make: Any, **changes: Any) -> dict[str, Any]:
    dimension = {"low": 1e-4, "high": 1e-1, "log": True}
    return make(**{"study.search": {"train.lr": dimension}, "study.n_trials": 6, **changes})


def test_a_search_stops_and_continues(make: Any, console: Any) -> None:
    tree = search(make)
    outcome = run(tree, console)
    assert outcome.exit_code == 0
    assert len(outcome.done) == 6
    assert run(tree, console).exit_code == 0
    assert len([c for c in calls(tree) if c[2] == "begins"]) == 6
    tree["study"]["n_trials"] = 9
    outcome = run(tree, console)
    assert len(outcome.done) == len(set(outcome.done)) == 9
    index = folder_of(tree).index()
    proposed = [p["factors"]["train.lr"] for p in index["proposals"]]
    assert len(set(proposed)) == 9  # a restarted sampler does not repeat its first points
    assert index["factors"] == ["train.lr"]
    assert {c["factors"]["train.lr"] for c in index["cells"].values()} == set(proposed)
    store = Store(folder_of(tree), config.load(tree))
    assert store.study.best_params["train.lr"] in proposed
    assert abs(store.study.best_value - 3.125) < 0.5


def test_a_killed_search_loses_nothing(make: Any, console: Any) -> None:
    tree = search(make)
    process = start(tree, "fake", FAKE_STEP_SECONDS="0.3")
    wait_for(lambda: folder_of(tree).path.exists() and len(calls(tree)) >= 2)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    begun = {call[0] for call in calls(tree)}
    folder_of(tree).journal.unlink()  # even this is made again
    outcome = run(tree, console)
    assert (outcome.exit_code, len(outcome.done)) == (0, 6)
    assert begun <= set(outcome.done)
    states = optuna_states(tree)
    assert [[s.name for s in t] for t in states.values()] == [["COMPLETE"]] * 6


def test_every_proposal_runs_with_every_seed(make: Any, console: Any) -> None:
    tree = search(make, **{"study.seeds": [3, 4], "study.n_trials": 2})
    outcome = run(tree, console)
    assert sorted(cell.seed for cell in outcome.cells) == [3, 3, 4, 4]
    assert len({cell.factors["train.lr"] for cell in outcome.cells}) == 2


def test_a_small_space_is_exhausted(make: Any, console: Any) -> None:
    tree = make(
        **{
            "study.search": {"train.lr": {"choices": [1e-3, 2e-3]}},
            "study.n_trials": 5,
            "study.sampler": "random",
        }
    )
    outcome = run(tree, console)
    assert len(outcome.done) == 2
    assert "nothing new" in text(console)


def test_a_search_of_which_nothing_can_be_run_has_failed(
    make: Any, console: Any, monkeypatch: Any
) -> None:
    def refuse(*_: Any) -> Any:
        raise UserError("no")

    monkeypatch.setattr(space, "proposed", refuse)
    outcome = run(search(make, **{"study.n_trials": 2, "study.workers": 1}), console)
    assert (outcome.exit_code, outcome.cells) == (1, [])


@pytest.mark.parametrize(
    ("changes", "most"),
    [
        ({"study.search": {"train.lr": {"low": 1e-3, "high": 1e-2}}, "study.n_trials": 2}, 2),
        ({"study.tune": {"points": 5}}, 6),  # of tuning, and the one that confirms
    ],
)
def test_no_more_processes_than_trials(
    make: Any, console: Any, changes: dict[str, Any], most: int
) -> None:
    tree = make(**{**changes, "study.workers": 10**6})
    cfg = config.load(tree)
    work = supervisor._Supervisor(space.full(tree), cfg, space.cells(tree), console, FAKE)
    assert len(work._slots()) == most


def test_a_storage_that_cannot_be_opened_is_told_before_the_text_is_made(
    make: Any, console: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(supervisor, "prepare", lambda data: pytest.fail("text was made"))
    with pytest.raises(UserError, match=r"study\.storage 'nosuchdb://x'"):
        run(make(**{"study.storage": "nosuchdb://x"}), console)


def test_pruning(make: Any, console: Any) -> None:
    tree = search(make, **{"study.prune": True, "study.n_trials": 10, "study.workers": 2})
    outcome = run(tree, console)
    assert outcome.exit_code == 0
    states = frame(outcome.folder)["state"].value_counts()
    assert states["pruned"] >= 1
    assert states["done"] >= 5
    names = Counter(s.name for t in optuna_states(tree).values() for s in t)
    assert names["PRUNED"] == states["pruned"]
    begun = len([c for c in calls(tree) if c[2] == "begins"])
    assert run(tree, console).exit_code == 0
    assert len([c for c in calls(tree) if c[2] == "begins"]) == begun


def test_sqlite_storage(make: Any, console: Any, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/optuna.db"
    tree = search(make, **{"study.storage": url, "study.n_trials": 3, "study.workers": 1})
    assert run(tree, console).exit_code == 0
    name = optuna.get_all_study_names(url)[0]
    assert len(optuna.load_study(study_name=name, storage=url).get_trials()) == 3
