"""Run folders again from an exported study, so that a study that was published goes on.

An export (`ablate/report/export.py`) keeps every finished trial's config and figures. From them run
folders are made that `run` counts as done: more seeds, arms or points of a grid are trained beside
them, `rerun` trains one of them again, and `report` says what differs between the old and the new.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import Timeout

from ablate import config
from ablate.arch.spec import Architecture
from ablate.errors import UserError
from ablate.report import export
from ablate.report.frames import FIGURES, TEXTS, records
from ablate.run import RunFolder, read_json, write_json
from ablate.study.trial import key, vocabulary


def import_study(folder: Path, parent: Path) -> Path:
    """Write `<parent>/<name of folder>/` from an exported study, and say what was done.

    Trials that are there already stay as they are; those that had not finished are left out.
    Raises UserError where `folder` is no export, or where a trial would not be known by its config:
    an export shortens absolute paths, which are part of what a trial is.
    """
    if not export.is_export(folder):
        raise UserError(
            f"'{folder}' is no exported study: `python -m ablate report runs/NAME export=DIR` "
            "makes one"
        )
    study = parent / folder.resolve().name
    if study.resolve() == folder.resolve():
        raise UserError(f"study.folder is '{parent}', where the export itself lies: give another")
    if parent.exists() and not parent.is_dir():
        raise UserError(f"study.folder is '{parent}', which is a file: give a folder")
    index = export.read_index(folder, tuple(FIGURES))
    trials = [row for row in records(index) if row["state"] == "done" and not row["cause"]]
    for row in trials:
        _check_key(row, folder)
    there = read_json(study / "study.json")
    if there is not None and not {row["key"] for row in trials} & set(there.get("cells") or {}):
        raise UserError(
            f"'{study}' is another study, with none of these trials: give study.folder=DIR"
        )
    contents, curves, cells = _read(folder)
    new = 0
    for row in trials:
        run = RunFolder(study / row["key"])
        try:
            with run.lock():
                if run.config() is None:  # or else it is there, whole or begun
                    evaluations = {t: c[run.key] for t, c in contents.items() if run.key in c}
                    _write(run, row, curves.get(run.key, []), evaluations)
                    new += 1
        except Timeout:  # another process trains it, or imports it too
            continue
    if not (study / "study.json").is_file():
        write_json(study / "study.json", cells)
    for plan in folder.glob("plan*.txt"):
        if not (study / plan.name).exists():
            shutil.copy(plan, study / plan.name)
    already = f", {len(trials) - new} were there or under way" if new < len(trials) else ""
    left = f"; {len(index) - len(trials)} had not finished" if len(index) > len(trials) else ""
    print(f"imported: {study}: {new} finished trials{already}{left}")
    return study


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Scores by task and key, curves by key, study.json; UserError where a file is damaged."""
    try:
        index, cells = (json.loads((folder / n).read_text()) for n in ("scores.json", "study.json"))
        contents = {task: export.read_evaluation(folder, task) for task in index}
        for task, runs in contents.items():
            if any(own.get("items") == {} for own in runs.values()):
                raise ValueError(f"scores/{task}.parquet lacks items")
        return contents, export.read_curves(folder), cells
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise export.unreadable(folder, error) from None


def _check_key(row: dict[str, Any], folder: Path) -> None:
    cfg = config.load(json.loads(row["config"]))
    if key(cfg, Architecture.from_config(cfg.arch, vocabulary(cfg))) != row["key"]:
        raise UserError(
            f"'{folder}': the config of trial {row['key']} gives another key: made by a version "
            "with other fields, or with an absolute path of text, which an export shortens, "
            "it can be read and not gone on with"
        )


def _write(
    run: RunFolder,
    row: dict[str, Any],
    curve: list[dict[str, Any]],
    evaluations: dict[str, dict[str, Any]],
) -> None:
    generation = run.begin(imported=True)
    run.create(json.loads(row["config"]), replace=True)
    run.write_environment(json.loads(row["environment"]))
    run.rewind_metrics(-1)
    for line in curve:
        whole: dict[str, Any] = {n: int(line[n]) for n in ("step", "tokens") if n in line}
        run.append_metrics({**line, **whole})
    for task, content in evaluations.items():
        run.write_evaluation(task, content)
    result: dict[str, Any] = {}
    for place, value in _figures(row):
        *parents, name = place.split(".")
        part = result
        for parent in parents:
            part = part.setdefault(parent, {})
        part[name] = value
    run.write_result(result, generation)
    run.end("done", generation, imported=True)


def _figures(row: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """(place in result.json, value); what a trial does not have is left out."""
    for name, place in FIGURES.items():
        value = float(row[name])
        if value == value:
            yield place, int(value) if value.is_integer() else value
    for name, place in TEXTS.items():
        if row[name]:
            yield place, row[name]
