"""The W&B mirror: it works, and nothing it does can hurt a run."""

from __future__ import annotations

import logging
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

import pytest

from ablate.run import RunFolder, StaleWriter, write_json
from ablate.train import tracker, train
from ablate.train.stop import Pruned, TrialFailed
from ablate.train.tracker import Tracker, label
from tests.train.conftest import Make

MIRROR = {"kind": "wandb", "mode": "offline"}


class FakeRun:
    """Remembers what it is told; `fail` names the method that raises, or "hang"."""

    def __init__(self, fail: str | None = None) -> None:
        self.fail = fail
        self.rows: list[dict[str, Any]] = []
        self.metrics: dict[str, str | None] = {}
        self.summary: dict[str, Any] = {}
        self.exit_code: int | None = None
        self.go_on = threading.Event()

    def _maybe_fail(self, method: str) -> None:
        if self.fail == "hang" and method == "finish":
            self.go_on.wait(30)
        if self.fail == method:
            raise SystemExit(f"{method} broke")

    def log(self, row: dict[str, Any]) -> None:
        self._maybe_fail("log")
        self.rows.append(row)

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.metrics[name] = step_metric

    def finish(self, exit_code: int) -> None:
        self._maybe_fail("finish")
        self.exit_code = exit_code


def install(monkeypatch: pytest.MonkeyPatch, run: FakeRun, fail_init: bool = False) -> dict:
    asked: dict[str, Any] = {}

    def init(**kwargs: Any) -> FakeRun:
        if fail_init:
            raise RuntimeError("api key not configured\nmore lines")
        asked.update(kwargs)
        return run

    fake = types.SimpleNamespace(init=init, Settings=lambda **k: k)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return asked


def test_mirrors_rows_and_result(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = FakeRun()
    asked = install(monkeypatch, run)
    folder = RunFolder(tmp_path / "study" / "abc")
    result = train(tiny(tracker=MIRROR, study={"name": "ratio"}), folder)
    assert run.rows == folder.metrics()
    assert run.metrics == {"tokens": None, "*": "tokens"}
    assert (run.exit_code, run.summary["state"], run.summary["cause"]) == (0, "done", None)
    assert run.summary["val_b.loss"] == result["val_b"]["loss"]
    assert (asked["group"], asked["name"], asked["mode"]) == ("ratio", "abc", "offline")
    assert asked["dir"] == str(folder.path)
    assert (asked["id"], asked["resume"]) == ("study-abc", "allow")


@pytest.mark.parametrize(
    ("how", "state", "cause"),
    [
        (TrialFailed("diverged: so it goes"), "failed", "diverged: so it goes"),
        (Pruned("pruned"), "pruned", None),
        (KeyboardInterrupt(), "interrupted", None),
    ],
)
def test_a_run_that_is_not_done_has_failed_with_its_cause(
    tiny: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    how: BaseException,
    state: str,
    cause: str | None,
) -> None:
    def end(step: int, loss: float) -> bool:
        raise how

    run = FakeRun()
    install(monkeypatch, run)
    with pytest.raises(type(how)):
        train(tiny(tracker=MIRROR), RunFolder(tmp_path / "run"), should_prune=end)
    assert run.summary == {"state": state, "cause": cause}
    assert run.exit_code == (state != "pruned")


def test_a_writer_that_was_replaced_leaves_the_mirror_to_the_next(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, folder = FakeRun(), RunFolder(tmp_path / "run")
    install(monkeypatch, run)

    def replace(step: int, loss: float) -> bool:
        folder.begin()
        return False

    with pytest.raises(StaleWriter):
        train(tiny(tracker=MIRROR), folder, should_prune=replace)
    assert (run.exit_code, run.summary) == (0, {})


@pytest.mark.parametrize(
    ("asked", "there", "means"),
    [
        (None, None, "offline"),
        (None, "online", "online"),
        ("online", None, "online"),
        ("online", "offline", "online"),
        ("offline", "online", "offline"),
        (None, "disabled", "disabled"),
        ("online", "disabled", "disabled"),
    ],
)
def test_the_mode_is_disabled_or_as_configured_or_as_the_environment_says(
    tiny: Make, monkeypatch: pytest.MonkeyPatch, asked: str | None, there: str | None, means: str
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if there is not None:
        monkeypatch.setenv("WANDB_MODE", there)
    assert tracker.mode(tiny(tracker={"kind": "wandb", "mode": asked})) == means


def test_disabled_by_the_environment_writes_nothing(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    asked = install(monkeypatch, FakeRun())
    folder = RunFolder(tmp_path / "run")
    train(tiny(tracker=MIRROR), folder)
    assert not asked
    assert not (folder.path / "wandb").exists()


def test_ids_tell_studies_apart_and_have_no_letters_that_wandb_refuses(tmp_path: Path) -> None:
    one, other = (RunFolder(tmp_path / study / "key1") for study in ("what: #1?", "ratio"))
    assert tracker.run_id(one) == "what___1_-key1"
    assert tracker.run_id(other) == "ratio-key1"
    assert len(tracker.run_id(RunFolder(tmp_path / ("x" * 99) / "key1"))) == 64


@pytest.mark.parametrize("fail", ["missing", "init", "log", "finish"])
def test_a_failure_is_one_line_and_the_run_goes_on(
    tiny: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fail: str,
) -> None:
    install(monkeypatch, FakeRun(fail), fail_init=fail == "init")
    if fail == "missing":
        monkeypatch.setitem(sys.modules, "wandb", None)
    plain = train(tiny(), RunFolder(tmp_path / "plain"))
    folder = RunFolder(tmp_path / "mirrored")
    result = train(tiny(tracker=MIRROR), folder)
    assert result["val_b"] == plain["val_b"]
    assert folder.status()["state"] == "done"
    assert [len(r.message.splitlines()) for r in caplog.records] == [1]


def test_a_hanging_mirror_does_not_hold_the_end(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = FakeRun("hang")
    install(monkeypatch, run)
    monkeypatch.setattr(tracker, "FINISH_SECONDS", 0.2)
    mirror = Tracker(tiny(tracker=MIRROR), RunFolder(tmp_path))
    started = time.perf_counter()
    mirror.finish("done")
    assert time.perf_counter() - started < 5
    run.go_on.set()
    assert "left" in caplog.text


def test_none_imports_nothing(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    mirror = Tracker(tiny(), RunFolder(tmp_path))
    mirror.log({"step": 1})
    mirror.finish("done")
    assert caplog.records == []


def test_the_name_is_the_arm_where_the_study_knows_it(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "key1")
    assert label(folder) == "key1"
    write_json(tmp_path / "study.json", {"cells": {"key1": {"arm": "12%", "seed": 3}}})
    assert label(folder) == "12%/3"


def test_offline_wandb_writes_under_the_run_folder(
    tiny: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setattr(tracker, "FINISH_SECONDS", 120.0)  # however busy the machine is
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    with caplog.at_level(logging.WARNING, logger="ablate"):
        for state in ("interrupted", "done"):  # two processes of one run
            mirror = Tracker(tiny(tracker=MIRROR), folder)
            mirror.log({"step": 1, "tokens": 64, "loss": 0.5})
            mirror.finish(state, None, {"train": {"loss": 0.5}})
            time.sleep(1.0)  # the name of their folder has the second in which they began
    assert caplog.records == []
    parts = list((folder.path / "wandb").glob("offline-run-*/*.wandb"))
    assert len(parts) == 2
    assert {part.name for part in parts} == {f"run-{tracker.run_id(folder)}.wandb"}
    assert all(part.stat().st_size > 0 for part in parts)
