"""What `status` and the display say."""

from __future__ import annotations

import errno
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from ablate.errors import UserError
from ablate.run import RunFolder
from ablate.study.folder import StudyFolder
from ablate.study.progress import Display, Running, Snapshot
from ablate.study.show import duration
from ablate.study.status import frame, show


@pytest.fixture
def study(tmp_path: Path) -> Path:
    cells = {f"key{i}": {"arm": f"arm {i}", "factors": {}, "seed": i} for i in range(5)}
    index = {"name": "s", "cells": cells, "orphan_cells": {"old": {"arm": "gone", "seed": 0}}}
    (tmp_path / "study.json").write_text(json.dumps(index))
    for key in ("key0", "key1", "key2", "key3", "old"):
        RunFolder(tmp_path / key).create({"seed": 0})
    done, failed, running, killed = (RunFolder(tmp_path / f"key{i}") for i in range(4))
    done.append_metrics({"step": 5, "tokens": 640, "loss": 2.0})
    done.append_metrics({"step": 5, "tokens": 640, "val_a_loss": 2.25})
    done.write_result({"val_a": {"loss": 2.25}}, 0)
    failed.end("failed", failed.begin(), "out of memory")
    running.begin()
    killed.begin()
    killed.append_metrics({"step": 3, "tokens": 384, "loss": 3.0})
    return tmp_path


def test_states(study: Path) -> None:
    with RunFolder(study / "key2").lock():
        states = frame(study)
    assert states["state"].tolist() == [
        "done",
        "failed",
        "running",
        "interrupted",
        "waiting",
        "waiting",
    ]
    assert states["orphan"].tolist() == [False] * 5 + [True]
    assert states["arm"].tolist()[-1] == "gone"
    assert states.loc[0, ["steps", "tokens", "loss", "val_loss"]].tolist() == [5, 640, 2.0, 2.25]
    assert states.loc[3, "steps"] == 3
    assert states.loc[1, "cause"] == "out of memory"


@pytest.mark.parametrize(
    "content",
    ['{"val_a": null}', '{"val_a": "x"}', '{"val_a": {"loss": "x"}}', '{"val_b": {"loss": "x"}}'],
)
def test_a_result_without_a_loss_is_not_finished(study: Path, content: str) -> None:
    run = RunFolder(study / "key0")
    (run.path / "result.json").write_text(content)
    assert run.result() is None
    assert frame(study)["state"][0] == "waiting"


def test_what_is_damaged_in_the_index_costs_no_more_than_itself(study: Path) -> None:
    folder = StudyFolder(study)
    whole = folder.index()
    key, *others = whole["cells"]
    damaged = {**whole, "margin": "abc", "x": {}, "factors": [1], "orphan_cells": [1]}
    damaged["cells"] = {**whole["cells"], key: {"arm": "a", "factors": {}, "seed": "abc"}}
    folder.write_index(damaged)
    left = folder.index()
    assert list(left["cells"]) == others
    assert not left.keys() & {"margin", "x", "factors", "orphan_cells"}
    assert left["name"] == whole["name"]
    frame(study)


def test_a_damaged_generation_begins_anew(study: Path) -> None:
    run = RunFolder(study / "key0")
    (run.path / "status.json").write_text('{"state": "running", "generation": "abc"}')
    assert run.status()["generation"] == 0
    assert run.begin() == 1


def test_a_damaged_line_costs_no_other(study: Path) -> None:
    run = RunFolder(study / "key0")
    with (run.path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 6, \xff\xfe\n{"step": 7}\n')
    assert [row["step"] for row in run.metrics()] == [5, 5, 7]
    run.rewind_metrics(5)
    assert [row["step"] for row in run.metrics()] == [5, 5]


def test_a_full_disk_names_the_file(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*result\.json'"):
        RunFolder(study / "key0").write_result({"val_a": {"loss": 1.0}}, 0)


def test_show(study: Path) -> None:
    console = Console(file=io.StringIO(), width=140)
    show(study, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "failed: arm 1, seed 1: out of memory" in text
    assert "1 done" in text
    assert "2.2500" in text


def test_a_run_folder_and_a_wrong_folder(study: Path, tmp_path: Path) -> None:
    assert frame(study / "key0")["state"].tolist() == ["done"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="not a study's folder"):
        frame(tmp_path / "empty")


ROW = {
    "phase": "train",
    "step": 30,
    "steps": 120,
    "loss": 2.34567,
    "tokens_per_second": 123_456.0,
    "mfu": 0.4321,
    "seconds_left": 80.0,
}


@pytest.mark.parametrize("terminal", [True, False])
def test_the_display_names_every_figure(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ablate.study.progress.PLAIN_SECONDS", 0.0)
    console = Console(file=io.StringIO(), width=140, force_terminal=terminal)
    running = [Running("M*-", 3, 0.0, ROW), Running("late", 4, 0.0)]
    with Display(console, "study") as display:
        display.update(Snapshot(total=8, done=2, failed=1, running=running, seconds_left=7200))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for word in ("2 of 8", "1 failed", "2.0 h", "M*-", "25%", "2.3457", "123k", "43.2%", "80 s"):
        assert word in text, word
    assert "starting" in text


def test_durations() -> None:
    assert [duration(s) for s in (4.4, 600, 7000)] == ["4 s", "10 min", "1.9 h"]


@pytest.mark.parametrize(
    "cell", [{"stage": "tune"}, {"stage": "tune", "arm": "a"},
             {"stage": "tune", "arm": "a", "factors": {"train.lr": "x"}}],
)  # fmt: skip
def test_a_damaged_cell_costs_its_name_at_most(study: Path, cell) -> None:
    index = json.loads((study / "study.json").read_text())
    index["cells"]["key0"] = cell
    (study / "study.json").write_text(json.dumps(index))
    assert frame(study).set_index("key").loc["key1", "arm"] == "arm 1"
