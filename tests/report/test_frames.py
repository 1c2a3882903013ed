"""Run folders as frames: every run is there, and the cache never tells of the past."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pandas as pd
import pytest

from ablate.__main__ import main
from ablate.errors import UserError
from ablate.report import frames
from ablate.report.frames import load_details, load_metrics, load_study, missing_cells
from ablate.run import RunFolder, find_runs
from ablate.study import status


def test_one_row_a_run_with_its_factors_and_figures(study: Path) -> None:
    frame = load_study(study)
    assert len(frame) == 8
    assert sorted(frame["arm"].unique())[0] == "attention_share=0"
    assert frame["arch.attention_share"].dtype == float
    row = frame.set_index("key").loc["0100aaaaaaaa"]
    result = RunFolder(study / "0100aaaaaaaa").result()
    assert result is not None
    assert row["state"] == "done"
    assert row["cause"] == ""
    assert row["pattern"] == "MMMMM*"
    assert row["attention_of_layers"] == pytest.approx(1 / 6)
    assert row["val_b_loss"] == result["val_b"]["loss"]
    assert row["mqar_accuracy"] == result["mqar"]["accuracy"]
    assert row["train_flops"] == result["train"]["flops"]
    assert row["commit"] == "55f9b32aaaaa"
    assert row["hardware"] == "Some CPU (2 cores)"
    assert not frame["orphan"].any()
    assert frame.attrs["study"]["question"].startswith("What share")


def test_the_cache_is_used_and_read_again_when_stale(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load_study(study)
    assert (study / "index.parquet").exists()
    read: list[str] = []
    original = frames._read_run
    monkeypatch.setattr(frames, "_read_run", lambda run: read.append(run.key) or original(run))
    pd.testing.assert_frame_equal(load_study(study), first)
    assert read == []
    run = RunFolder(study / "0200aaaaaaaa")
    result = run.result()
    assert result is not None
    result["val_b"]["loss"] = 1.5
    run.write_result(result, run.status()["generation"])
    frame = load_study(study).set_index("key")
    assert read == ["0200aaaaaaaa"]
    assert frame.loc["0200aaaaaaaa", "val_b_loss"] == 1.5


def test_a_damaged_or_forbidden_cache_costs_only_time(study: Path) -> None:
    first = load_study(study)
    (study / "index.parquet").write_bytes(b"no parquet")
    pd.testing.assert_frame_equal(load_study(study), first)
    (study / "index.parquet").unlink()
    (study / "index.parquet").mkdir()  # cannot be replaced by a file
    pd.testing.assert_frame_equal(load_study(study), first)


def test_runs_of_every_state_are_rows(synthetic, study: Path) -> None:
    write = synthetic.write_run
    write(study, "failed000000", state="failed", cause="diverged at step 3")
    write(study, "created00000", state="created")
    write(study, "killed000000", state="running")
    result = synthetic.result(loss=math.nan)
    write(study, "nan000000000", content=result)
    frame = load_study(study).set_index("key")
    assert frame.loc["failed000000", "state"] == "failed"
    assert frame.loc["failed000000", "cause"] == "diverged at step 3"
    assert math.isnan(frame.loc["failed000000", "val_b_loss"])
    assert frame.loc["created00000", "state"] == "created"
    assert frame.loc["killed000000", "state"] == "interrupted"  # nobody holds its lock
    assert frame.loc["nan000000000", "state"] == "done"
    assert "finite" in frame.loc["nan000000000", "cause"]
    assert frame.loc[["failed000000", "nan000000000"], "orphan"].all()  # not in study.json
    orphans = frame.loc[frame["orphan"], "arm"]
    assert orphans.str.endswith(" (orphan)").all()  # or they would count as runs of an arm
    assert not frame.loc[~frame["orphan"], "arm"].str.contains("orphan").any()
    assert len(frames.usable(load_study(study))) == 8


def test_a_run_that_is_held_is_running(synthetic, study: Path) -> None:
    run = synthetic.write_run(study, "running00000", state="running")
    with run.lock():
        frame = load_study(study).set_index("key")
        assert frame.loc["running00000", "state"] == "running"
    assert load_study(study).set_index("key").loc["running00000", "state"] == "interrupted"


def test_planned_cells_without_a_folder_are_missing(study: Path) -> None:
    os.rename(study / "0301aaaaaaaa", study.parent / "elsewhere")
    missing = missing_cells(load_study(study))
    assert missing[["key", "arm", "seed"]].to_numpy().tolist() == [
        ["0301aaaaaaaa", "attention_share=0.5", 1]
    ]


def test_without_study_json_the_factors_are_what_differs(study: Path) -> None:
    (study / "study.json").unlink()
    frame = load_study(study)
    assert frame.attrs["study"]["factors"] == ["arch.attention_share"]
    assert frame["arm"].nunique() == 4
    assert not frame["orphan"].any()


def test_one_run_folder_alone(study: Path) -> None:
    frame = load_study(study / "0100aaaaaaaa")
    assert frame["key"].tolist() == ["0100aaaaaaaa"]
    assert not (study / "0100aaaaaaaa" / "index.parquet").exists()


def test_learning_curves_are_long(study: Path) -> None:
    metrics = load_metrics(study)
    assert set(metrics["key"]) == set(load_study(study)["key"])
    assert metrics["val_a_loss"].notna().sum() == 8 * 5
    last = metrics[metrics["key"] == "0000aaaaaaaa"].iloc[-1]
    assert last["flops"] == pytest.approx(last["tokens"] * 6.3 * 92_000)


def test_details_are_flat(study: Path) -> None:
    details = load_details(study)
    assert details["config.data.mqar.pairs"].tolist() == [8] * 8
    assert details["environment.versions.torch"].tolist() == ["2.13.0"] * 8


def test_a_folder_without_runs_is_a_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run folders"):
        load_study(tmp_path)


def test_factors_that_are_lists_or_mixed_stay_readable(synthetic, tmp_path: Path) -> None:
    path = tmp_path / "positions"
    cells = {}
    for i, value in enumerate(([1, 3], None)):
        key = f"{i}00000000000"
        changes = {"arch.positions": value}
        synthetic.write_run(path, key, changes=changes, content=synthetic.result(loss=2.0))
        cells[key] = {"arm": f"positions={value}", "factors": changes, "seed": 0}
    content = {"name": "positions", "factors": ["arch.positions"], "cells": cells}
    (path / "study.json").write_text(json.dumps(content))
    values = load_study(path)["arch.positions"].tolist()
    assert values[0] == "[1, 3]"
    assert pd.isna(values[1])


@pytest.mark.parametrize("content", [b"[1]", b"5", b"null", b"\xff\xfe", b"{", None])
@pytest.mark.parametrize(
    "name",
    ["config.yaml", "status.json", "result.json", "environment.json", "metrics.jsonl",
     "evaluation/val_b.json", "evaluation/mqar.json"],
)  # fmt: skip
def test_a_damaged_file_costs_its_own_run_at_most(
    study: Path, name: str, content: bytes | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """content: None makes a folder of the file's name."""
    file = study / "0100aaaaaaaa" / name
    file.parent.mkdir(exist_ok=True)
    file.unlink(missing_ok=True)
    if content is None:
        file.mkdir()
    else:
        file.write_bytes(content)
    for verb in ("report", "status"):
        assert main([verb, str(study)]) == 0, capsys.readouterr().err
    frame = load_study(study)
    frame = frame[frame["key"] != "0100aaaaaaaa"]
    assert len(frame) == 7
    assert (frame["state"] == "done").all()
    if name == "result.json":
        states = status.frame(study).set_index("key")
        assert states.loc["0100aaaaaaaa", "state"] == "interrupted"
        assert "result.json is missing or damaged" in states.loc["0100aaaaaaaa", "cause"]


@pytest.mark.parametrize(
    ("task", "content"),
    [
        ("val_b", {"nats": 3, "tokens": [1]}),
        ("val_b", {"nats": [3.0], "tokens": [1, 2]}),
        ("mqar", {"by_pairs": {"4": {"correct": 1, "queries_per_row": [4]}}}),
        ("mqar", {"by_pairs": [1]}),
        ("mqar", {"by_pairs": {"4": {"correct": ["x"], "queries_per_row": 4}}}),
    ],
)
def test_items_of_other_types_cost_no_more_than_themselves(study: Path, task, content) -> None:
    for run in find_runs(study):
        path = run.path / "evaluation" / f"{task}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    assert main(["report", str(study)]) == 0


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        *(("result.json", f, v) for f in ("train", "seconds", "architecture", "data")
          for v in ("x", None)),
        ("result.json", "train", {"tokens_per_second": "x", "flops": [1]}),
        *(("environment.json", f, v) for f in ("hardware", "numerics", "versions", "commit",
          "commits", "layers") for v in ("x", -1)),
    ],
)  # fmt: skip
def test_a_field_of_another_type_costs_its_own_run_at_most(
    study: Path, name: str, field: str, value: object, tmp_path: Path, monkeypatch
) -> None:
    path = study / "0100aaaaaaaa" / name
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    for verb in ("report", "status"):
        assert main([verb, str(study)]) == 0
    assert main(["report", str(study), f"export={tmp_path / 'out'}"]) == 0
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "scale=cpu", f"study.folder={study.parent}"]) == 0
