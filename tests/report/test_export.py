"""A study exported as frames: the same report, from files that name no machine."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ablate.__main__ import main
from ablate.errors import UserError
from ablate.report import load_study
from ablate.report.export import export_study, gpu_hours, read_index
from ablate.report.frames import FIGURES
from ablate.report.page import write_report
from ablate.run import find_runs, read_json, write_json

HOST = "trainer-17"


@pytest.fixture(scope="module")
def evaluated(synthetic, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study whose runs were evaluated, on a machine that its files name in many places."""
    study = synthetic.write_study(tmp_path_factory.mktemp("runs") / "attn_ratio")
    for run in find_runs(study):
        rng = np.random.default_rng(int(run.key[:4]))
        hits = (rng.random(40) < 0.2 + 0.2 * int(run.key[:2])).astype(float)
        columns = {
            "cell": ["entries=5"] * 20 + ["entries=20"] * 20,
            "x": [5] * 20 + [20] * 20,
            "depth": [0.5] * 40,
            "cluster": [f"book:{i}" for i in range(40)],
            "exact_match": hits.tolist(),
            "response": ["x"] * 40,
        }
        cells = {
            f"entries={n}": {"x": n, "items": 20, "exact_match": 0.5, "verdict": None}
            for n in (5, 20)
        }
        content = {"task": "phonebook", "metric": "exact_match", "value": hits.mean()}
        run.write_evaluation("phonebook", {**content, "cells": cells, "items": columns})
        items = {str(m): rng.normal(3 - 0.1 * m, 0.2, 8).tolist() for m in (1, 2)}
        content = {"task": "length", "metric": "loss", "documents": 8, "value": 3.0}
        content["by_multiple"] = {m: float(np.mean(v)) for m, v in items.items()}
        content["by_position"] = {"first": [1, 2], "last": [1, 2], "loss": [4.0, 3.0]}
        run.write_evaluation("length", {**content, "items": {**items, "position": [[1.0]] * 8}})
        config = run.config()
        config["data"] |= {"source": "files", "path": ["/mnt/disk/text/train.jsonl.zst"]}
        config["tracker"]["entity"] = "somebody"
        run.create(config, replace=True)
        run.write_environment({**run.environment(), "host": HOST})
    index = read_json(study / "study.json")
    words = ["+sweep=attn_ratio", "data.path=[/mnt/disk/text/train.jsonl.zst]"]
    words += ["study.storage=postgresql://me:secret@host/db"]
    write_json(study / "study.json", {**index, "command": ["python", "-m", "ablate", *words]})
    (study / "plan.txt").write_text("text: /mnt/disk/text/train.jsonl.zst, 1 hour\n")
    return study


@pytest.fixture(scope="module")
def exported(evaluated: Path) -> Path:
    """The same by the command line, with its report."""
    results = evaluated.parent / "results"
    assert main(["report", str(evaluated), f"export={results}"]) == 0
    return results / "attn_ratio"


@pytest.fixture
def copy(evaluated: Path, tmp_path: Path) -> Path:
    """The evaluated study, to be damaged."""
    return Path(shutil.copytree(evaluated, tmp_path / "attn_ratio"))


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((folder / "report").iterdir())}


def test_the_report_of_an_export_is_that_of_the_run_folders(evaluated, exported):
    write_report(evaluated)
    before, after = files(evaluated), files(exported)
    assert before.keys() == after.keys()
    assert {"evaluation.csv", "recall.png", "positions.svg"} <= before.keys()
    differ = {name for name in before if before[name] != after[name]}
    assert differ == {"index.html"}  # which says where the runs were, there

    def body(page: bytes) -> str:
        return page.decode().split("<h2>Environment</h2>")[0]

    assert body(before["index.html"]) == body(after["index.html"])
    write_report(exported)
    assert files(exported) == after  # the second time the same


def test_an_export_names_no_machine_and_is_small(exported):
    folder = exported
    texts = [p for p in folder.rglob("*") if p.suffix in (".csv", ".json", ".yaml", ".md", ".txt")]
    texts.append(folder / "report" / "index.html")
    for path in texts:
        text = path.read_text()
        assert not re.search(r"/mnt|/home|/tmp|secret|somebody|trainer-17", text), path
    assert "train.jsonl.zst" in (folder / "README.md").read_text()
    assert "1 hour" in (folder / "plan.txt").read_text()
    assert not list(folder.glob("*/config.yaml"))
    frame = load_study(folder)
    assert frame["trial_seconds"].tolist() == [59.0] * 8
    items = pd.read_parquet(folder / "scores" / "phonebook.parquet")
    assert len(items) == 8 * 40
    assert "response" not in items


def test_an_export_never_loses_finished_trials(copy, exported, tmp_path, capsys):
    next(find_runs(copy)).path.rename(tmp_path / "gone")
    with pytest.raises(
        UserError, match=r"has 1 finished trials that .* lacks, such as 0000aaaaaaaa"
    ):
        export_study(copy, exported.parent)
    with pytest.raises(UserError, match="is an exported study already"):
        export_study(exported, tmp_path / "more")
    capsys.readouterr()
    assert main(["report", str(copy), "export="]) == 2
    assert "report takes one export=DIR" in capsys.readouterr().err


def test_a_damaged_export_is_told_in_one_sentence(exported, tmp_path):
    folder = Path(shutil.copytree(exported, tmp_path / "attn_ratio"))
    (folder / "configs.yaml").write_text("runs: [")
    with pytest.raises(UserError, match=r"configs\.yaml' is damaged or was changed since"):
        load_study(folder)
    (folder / "SHA256SUMS").unlink()  # as of an export made before there were sums
    with pytest.raises(UserError, match="is an exported study that cannot be read"):
        load_study(folder)


@pytest.mark.parametrize(
    "name", ["trials.csv", "curves.csv", "scores.json", "scores/val_b.parquet"]
)
def test_a_part_of_an_export_is_not_taken_for_the_whole(exported, tmp_path, name, capsys):
    folder = Path(shutil.copytree(exported, tmp_path / "attn_ratio"))
    file = folder / name
    if not file.exists():
        file = next((folder / "scores").glob("*.parquet"))
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    for words in (
        ["report", str(folder)],
        ["import", str(folder), f"study.folder={tmp_path / 'r'}"],
    ):
        assert main(words) == 2
        assert f"{file.name}' is damaged" in capsys.readouterr().err
    file.unlink()
    assert main(["import", str(folder), f"study.folder={tmp_path / 'r'}"]) == 2
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("lines", [0, 2])
def test_sums_that_lack_a_file_are_damaged(exported, tmp_path, lines, capsys):
    folder = Path(shutil.copytree(exported, tmp_path / "attn_ratio"))
    sums = folder / "SHA256SUMS"
    sums.write_text("".join(sums.read_text().splitlines(keepends=True)[:lines]))
    assert main(["import", str(folder), f"study.folder={tmp_path / 'r'}"]) == 2
    assert "SHA256SUMS' has no sum of" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_damaged_scores_of_an_export_without_sums(exported, tmp_path, capsys):
    folder = Path(shutil.copytree(exported, tmp_path / "attn_ratio"))
    (folder / "SHA256SUMS").unlink()
    for file in (folder / "scores").glob("*.parquet"):
        file.write_bytes(file.read_bytes()[:50])
    assert main(["report", str(folder)]) == 2
    assert "is an exported study that cannot be read" in capsys.readouterr().err


def test_names_with_dots_come_back(copy, tmp_path):
    """Modules of layers of one's own, by which runs differ."""
    for i, run in enumerate(find_runs(copy)):
        run.write_environment({**run.environment(), "layers": {"my_pkg.my_layer": f"digest {i}"}})
    folder = export_study(copy, tmp_path / "results")
    told = [json.loads(text)["layers"] for text in read_index(folder, list(FIGURES))["environment"]]
    assert told == [{"my_pkg.my_layer": f"digest {i}"} for i in range(len(told))]


def test_an_export_never_overwrites_a_study_that_runs(copy, capsys):
    assert main(["report", str(copy), f"export={copy.parent}"]) == 2
    assert "which has run folders" in capsys.readouterr().err
    assert not (copy / "trials.csv").exists()


def test_trials_that_are_no_longer_finished_are_not_exported_over_finished_ones(copy, exported):
    results = copy.parent / "results"
    shutil.copytree(exported, results / "attn_ratio")
    run = next(find_runs(copy))
    (run.path / "result.json").write_text("{")
    with pytest.raises(UserError, match="has 1 finished trials that"):
        export_study(copy, results)
    assert (load_study(results / "attn_ratio")["state"] == "done").all()


def test_a_text_that_names_the_machine_is_refused(copy, tmp_path):
    index = read_json(copy / "study.json")
    write_json(copy / "study.json", {**index, "question": f"Does {HOST} work?"})
    with pytest.raises(UserError, match=rf"names this machine \('{HOST}'\)"):
        export_study(copy, tmp_path / "results")


def test_arms_that_an_export_would_call_the_same_are_refused(copy, tmp_path):
    index = read_json(copy / "study.json")
    for i, cell in enumerate(index["cells"].values()):
        cell["arm"] = f"path=/data/{'de' if i % 2 else 'en'}/text"
    write_json(copy / "study.json", index)
    with pytest.raises(UserError, match="would both be 'path=text' in an export"):
        export_study(copy, tmp_path / "results")


def test_device_hours_count_every_device(copy):
    frame = load_study(copy)
    alone = gpu_hours(frame)
    assert gpu_hours(frame.assign(devices=4)) == pytest.approx(4 * alone)
