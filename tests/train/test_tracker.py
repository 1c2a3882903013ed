"""The W&B mirror: it works, and nothing it does can hurt a run."""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

import pytest

from ablate.run import RunFolder, write_json
from ablate.train import tracker, train
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
        self.finished = False
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

    def finish(self) -> None:
        self._maybe_fail("finish")
        self.finished = True


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
    assert run.finished
    assert run.summary["val_b.loss"] == result["val_b"]["loss"]
    assert (asked["group"], asked["name"], asked["mode"]) == ("ratio", "abc", "offline")
    assert asked["dir"] == str(folder.path)


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
    mirror.finish({})
    assert time.perf_counter() - started < 5
    run.go_on.set()
    assert "left" in caplog.text


def test_none_imports_nothing(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    mirror = Tracker(tiny(), RunFolder(tmp_path))
    mirror.log({"step": 1})
    mirror.finish()
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
        mirror = Tracker(tiny(tracker=MIRROR), folder)
        mirror.log({"step": 1, "tokens": 64, "loss": 0.5})
        mirror.finish(json.loads('{"train": {"loss": 0.5}}'))
    assert caplog.records == []
    (written,) = (folder.path / "wandb").glob("offline-run-*/*.wandb")
    assert written.stat().st_size > 0
