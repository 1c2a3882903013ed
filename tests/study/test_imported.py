"""An exported study goes on: its trials count as done, and one of them trains again the same."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from ablate.__main__ import main
from ablate.errors import UserError
from ablate.report import load_study
from ablate.report.export import export_study
from ablate.report.imported import import_study
from ablate.run import RunFolder, find_runs, read_json, write_json
from ablate.study.rerun import compare
from ablate.study.supervisor import run_study

COMMITTED = Path(__file__).parents[2] / "analysis" / "results"


@pytest.fixture
def trained(make: Any, text: Path, console: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A study of two rates and a seed, its text named by a relative path."""
    monkeypatch.chdir(text.parent)
    rates = {"study.grid": {"train.lr": [1e-3, 3e-3]}, "study.seeds": [0]}
    tree = make(**{"data.path": text.name, **rates})
    assert run_study(tree, console=console).exit_code == 0
    return tree


def test_a_study_goes_on_from_its_export(
    trained: dict[str, Any], console: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = Path(trained["study"]["folder"]) / "tiny"
    exported = export_study(first, tmp_path / "results")
    assert main(["import", str(exported), f"study.folder={tmp_path / 'elsewhere'}"]) == 0
    study = tmp_path / "elsewhere" / "tiny"
    assert capsys.readouterr().out.endswith("2 finished trials\n")
    old = {run.key: run.result() for run in find_runs(first)}
    assert {run.key: run.result()["val_b"]["loss"] for run in find_runs(study)} == {
        key: result["val_b"]["loss"] for key, result in old.items()
    }
    again = compare(study / min(old))
    assert again.old == again.new

    more = {**trained["study"], "folder": str(study.parent), "seeds": [0, 1]}
    outcome = run_study({**trained, "study": more}, console=console)
    assert outcome.exit_code == 0
    assert len(outcome.done) == 4
    new = set(outcome.done) - set(old)
    assert len(new) == 2
    for run in find_runs(study):
        assert bool(run.status().get("imported")) == (run.key not in new)
    assert import_study(exported, study.parent) == study
    assert capsys.readouterr().out.endswith("0 finished trials, 2 were there or under way\n")
    assert len(load_study(study)) == 4


def test_absolute_paths_of_text_cannot_be_gone_on_with(
    make: Any, console: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = make()
    assert run_study(tree, console=console).exit_code == 0
    exported = export_study(Path(tree["study"]["folder"]) / "tiny", tmp_path / "results")
    assert main(["import", str(exported), f"study.folder={tmp_path / 'elsewhere'}"]) == 2
    assert "with an absolute path of text, which an export shortens" in capsys.readouterr().err
    assert not (tmp_path / "elsewhere").exists()


def finished(name: str) -> set[str]:
    """Keys of what has a result in a committed study; others come along in it, but not back."""
    trials = pd.read_csv(COMMITTED / name / "trials.csv", dtype=str)
    return set(trials.loc[trials["state"] == "done", "key"])


@pytest.mark.parametrize("name", ["attn_ratio", "recall"])
def test_what_is_committed_is_the_same_once_imported_and_exported(
    name: str, tmp_path: Path
) -> None:
    committed, done = COMMITTED / name, finished(name)
    again = export_study(import_study(committed, tmp_path / "runs"), tmp_path / "results")
    for file in ("trials.csv", "curves.csv"):
        header, *rows = (committed / file).read_text().splitlines()
        kept = [row for row in rows if row.partition(",")[0] in done]
        assert (again / file).read_text().splitlines() == [header, *kept]
    configs = yaml.safe_load((committed / "configs.yaml").read_text())
    configs["runs"] = {key: own for key, own in configs["runs"].items() if key in done}
    assert yaml.safe_load((again / "configs.yaml").read_text()) == configs
    scores = read_json(committed / "scores.json")
    scores = {t: {k: v for k, v in by.items() if k in done} for t, by in scores.items()}
    assert read_json(again / "scores.json") == scores
    assert (again / "study.json").read_bytes() == (committed / "study.json").read_bytes()
    for path in (committed / "scores").iterdir():
        frame = pd.read_parquet(path)
        frame = frame[frame["key"].isin(done)].reset_index(drop=True)
        pd.testing.assert_frame_equal(pd.read_parquet(again / "scores" / path.name), frame)
    if len(pd.read_csv(committed / "trials.csv")) == len(done):  # then to the byte
        files = ("trials.csv", "curves.csv", "configs.yaml", "scores.json")
        for file in (*files, *(f"scores/{path.name}" for path in (committed / "scores").iterdir())):
            assert (again / file).read_bytes() == (committed / file).read_bytes()

    third = export_study(import_study(again, tmp_path / "runs_again"), tmp_path / "third")
    files = [path for path in again.rglob("*") if path.is_file() and "report" not in path.parts]
    assert files
    for path in files:
        assert (third / path.relative_to(again)).read_bytes() == path.read_bytes(), path.name


def test_what_had_not_finished_is_trained(
    trained: dict[str, Any], console: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = Path(trained["study"]["folder"]) / "tiny"
    run = next(find_runs(first))
    (run.path / "result.json").unlink()
    write_json(run.path / "status.json", {"state": "failed", "generation": 1, "cause": "a disk"})
    exported = export_study(first, tmp_path / "results")
    study = import_study(exported, tmp_path / "elsewhere")
    assert capsys.readouterr().out.endswith("1 finished trials; 1 had not finished\n")
    assert RunFolder(study / run.key).config() is None
    assert run.key in read_json(study / "study.json")["cells"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "import needs a folder"),
        (["."], "'.' is no exported study"),
        ([".", "study.folder="], "import takes one study.folder=DIR"),
    ],
)
def test_wrong_words(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["import", *words]) == 2
    assert told in capsys.readouterr().err


def test_a_trial_that_another_process_has_is_left_to_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = finished("recall")
    first = min(keys)
    held = RunFolder(tmp_path / "recall" / first)
    with held.lock():
        import_study(COMMITTED / "recall", tmp_path)
    told = f"{len(keys) - 1} finished trials, 1 were there or under way"
    assert told in capsys.readouterr().out
    assert held.config() is None
    held.create({"begun": True})
    import_study(COMMITTED / "recall", tmp_path)
    assert held.result() is None  # begun here: `run` ends it
    (held.path / "config.yaml").unlink()
    import_study(COMMITTED / "recall", tmp_path)
    assert held.result() is not None


def test_another_study_and_damaged_files_are_told(tmp_path: Path) -> None:
    write_json(tmp_path / "runs" / "recall" / "study.json", {"cells": {"other": {}}})
    with pytest.raises(UserError, match="is another study, with none of these trials"):
        import_study(COMMITTED / "recall", tmp_path / "runs")
    with pytest.raises(UserError, match="where the export itself lies"):
        import_study(COMMITTED / "recall", COMMITTED)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="which is a file"):
        import_study(COMMITTED / "recall", tmp_path / "file")
    for name in ("scores.json", "study.json", "curves.csv", "scores/phonebook.parquet"):
        copy = Path(shutil.copytree(COMMITTED / "recall", tmp_path / "copies" / "recall"))
        (copy / "SHA256SUMS").unlink()  # as of an export made before there were sums
        (copy / name).write_text("{") if name.endswith("json") else (copy / name).unlink()
        with pytest.raises(UserError, match="is an exported study that cannot be read"):
            import_study(copy, tmp_path / "new")
        assert not (tmp_path / "new").exists()
        shutil.rmtree(copy)
