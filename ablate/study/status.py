"""States of a study's trials, from its files alone (no torch: it starts at once)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table

from ablate.config import is_number
from ablate.errors import UserError
from ablate.run import RunFolder, find_runs
from ablate.study.folder import StudyFolder, is_held, tuning_name
from ablate.study.show import plain_console

COLUMNS = (
    "key", "arm", "seed", "state", "steps", "tokens", "loss", "val_loss", "cause", "orphan",
)  # fmt: skip


def frame(path: Path | str) -> pd.DataFrame:
    """One row a trial of a study's folder, in the study's order; orphans last.

    state: waiting, running, interrupted (begun, and no live process has it), done, failed, pruned.
    steps, tokens, loss: of the last logged step; val_loss: on validation A. A run folder gives its
    one row. Raises UserError for a folder that is neither.
    """
    folder = StudyFolder(Path(path))
    index = folder.index()
    cells = index.get("cells", {})
    runs = {run.key: run for run in find_runs(folder.path)}
    if not cells and not runs:
        raise UserError(f"'{path}' is not a study's folder: it has no study.json and no runs")
    rows = []
    for key in [*cells, *(key for key in runs if key not in cells)]:
        cell = cells.get(key) or index.get("orphan_cells", {}).get(key, {})
        rows.append(
            {
                "key": key,
                "arm": _arm(cell),
                "seed": cell.get("seed"),
                "orphan": bool(cells) and key not in cells,
                **_state(folder.run(key) if key in cells else runs[key]),
            }
        )
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _arm(cell: dict[str, Any]) -> str | None:
    """The arm's label, with the learning rate of a run that looks for the arm's own."""
    arm, rate = cell.get("arm"), (cell.get("factors") or {}).get("train.lr")
    if cell.get("stage") != "tune" or arm is None or not is_number(rate):
        return arm
    return tuning_name(arm, rate)


def _state(run: RunFolder) -> dict[str, Any]:
    status = run.status()
    result = run.result()
    state, cause = status["state"], status.get("cause")
    if result is not None:
        state, cause = "done", None
    elif is_held(run):
        state = "running"
    elif state == "created":
        state = "waiting"
    elif state == "running":
        state, cause = "interrupted", "its process is gone; the same command continues it"
    row: dict[str, Any] = {"state": state, "cause": cause}
    for line in run.metrics():
        for ours, theirs in (
            ("steps", "step"), ("tokens", "tokens"), ("loss", "loss"), ("val_loss", "val_a_loss"),
        ):  # fmt: skip
            if line.get(theirs) is not None:
                row[ours] = line[theirs]
    return row


def show(path: Path | str, console: Console | None = None) -> None:
    """Print `frame` and the counts of the states."""
    console = console or plain_console()
    states = frame(path)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("arm", "seed", "state", "steps", "train loss", "val A", "key"):
        left = name in ("arm", "state", "key")
        table.add_column(
            name,
            justify="left" if left else "right",
            overflow="fold",  # a narrow terminal breaks names, so that all of them can be read
            no_wrap=name != "arm",
        )
    for row in states.to_dict("records"):
        table.add_row(
            _text(row["arm"]) or "-",
            _text(row["seed"]),
            row["state"] + (" (orphan)" if row["orphan"] else ""),
            _text(row["steps"]),
            _text(row["loss"], "{:.4f}"),
            _text(row["val_loss"], "{:.4f}"),
            row["key"],
        )
    console.print(table)
    for row in states[states["cause"].notna()].to_dict("records"):
        console.print(
            f"{row['state']}: {_text(row['arm']) or row['key']}, seed {_text(row['seed'])}: "
            f"{row['cause']}",
            markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip
    counts = states["state"].value_counts()
    console.print(", ".join(f"{n} {state}" for state, n in counts.items()), highlight=False)


def _text(value: Any, form: str = "{}") -> str:
    if value is None or value != value:
        return ""
    if form == "{}" and isinstance(value, float) and value == int(value):
        return str(int(value))
    return form.format(value)
