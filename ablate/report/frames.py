"""Run folders as pandas frames.

`load_study` gives one row a run folder, `load_metrics` one row a logged line, `load_details` the
flat configs and environments. What was read is kept in `index.parquet` beside the run folders, row
by row under the stamp of the run's files: a large study loads fast, and a stale row is read again.

A folder that was exported (`ablate/report/export.py`) is read the same way, from its own files.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from ablate import config as config_tree
from ablate.errors import UserError
from ablate.report import export
from ablate.run import PHASES, RunFolder, atomic_write, find_runs
from ablate.study.folder import StudyFolder

INDEX = "index.parquet"
# column of the frame <- place in result.json
FIGURES = {
    **{
        name: f"architecture.{name}"
        for name in (
            *("n_layers", "d_model", "attention_of_layers", "attention_of_mixers"),
            *("mlp_of_layers", "params", "non_embedding_params", "forward_flops_per_token"),
            *("train_flops_per_token", "state_bytes"),
        )
    },
    **{
        f"{split}_{name}": f"{split}.{name}"
        for split, names in {
            "val_a": ("loss", "bits_per_byte", "perplexity"),
            "val_b": ("loss", "bits_per_byte", "perplexity", "tokens"),
            "mqar": ("accuracy", "loss", "queries"),
        }.items()
        for name in names
    },
    "train_loss": "train.loss",
    "steps": "train.steps",
    "tokens": "train.tokens",
    "text_tokens": "train.text_tokens",
    "train_flops": "train.flops",
    "seconds": "train.seconds",
    "tokens_per_second": "train.tokens_per_second",
    "mfu": "train.mfu",
    "peak_memory_bytes": "train.peak_memory_bytes",
    "skipped_steps": "train.skipped_steps",
    "lr": "train.lr",
    "micro_batch": "train.micro_batch",
    "out_of_memory": "train.out_of_memory.from",  # rows a pass that did not fit
    "unique_tokens": "data.unique_tokens",
    "epochs": "data.epochs",
    **{f"seconds_{phase}": f"seconds.{phase}" for phase in PHASES},
}
# Part of each row's stamp, so that an index of other columns is read anew; the number is raised
# when a column means something else.
SCHEMA = f"3-{hashlib.blake2b(repr(FIGURES).encode(), digest_size=4).hexdigest()}"
TEXTS = {
    "pattern": "architecture.pattern",
    "fingerprint": "data.fingerprint",
    "tokenizer": "data.tokenizer",
}


class _Shared(dict[str, Any]):
    """The content of study.json; pandas would copy it to the last cell with every operation."""

    def __deepcopy__(self, memo: object) -> _Shared:
        return self


def load_study(path: str | Path) -> pd.DataFrame:
    """One row a run folder at or below `path`; runs of every state, and orphans, are there.

    Columns: key, arm, one per factor (dotted name), seed, stage ('tune': looks for its arm's
    learning rate; 'confirm': arms are compared by these), state, cause ('' when all went well),
    pattern, figures (`FIGURES`), trial_seconds (all phases together), commit, hardware, orphan.
    Shares are fractions, losses nats a token, sizes bytes, times seconds. `frame.attrs["study"]` is
    the content of study.json, `attrs["path"]` the folder. An orphan, a run of an earlier form of
    the study, has an arm of its own, by the name that it had.
    A run that nothing holds and that never ended has the state 'interrupted'.
    Raises `UserError` where no run folder is.
    """
    folder = Path(path)
    index = _index(folder)
    study = StudyFolder(folder).index()
    configs = [json.loads(text) for text in index["config"]]
    factors = list(study.get("factors") or [])
    if "cells" not in study:
        factors = _varying(configs)
    cells: Mapping[str, Any] = study.get("cells") or {}
    earlier: Mapping[str, Any] = study.get("orphan_cells") or {}

    rows = []
    for record, tree in zip(records(index), configs, strict=True):
        orphan = bool(cells) and record["key"] not in cells
        cell = cells.get(record["key"]) or earlier.get(record["key"], {})
        given = cell.get("factors") or {}
        values = {f: given.get(f, config_tree.get(tree, f)) for f in factors}
        arm = str(cell.get("arm") or arm_label(values))
        state, cause = _state(RunFolder(Path(record["path"])), record)
        rows.append(
            {
                "key": record["key"],
                "arm": f"{arm} (orphan)" if orphan else arm,
                **{f: _scalar(v) for f, v in values.items()},
                "seed": int(cell.get("seed", tree.get("seed", 0))),
                "stage": str(cell.get("stage", "confirm")),
                "state": state,
                "cause": cause,
                "pattern": record["pattern"],
                **{name: record[name] for name in FIGURES},
                "fingerprint": record["fingerprint"],
                "tokenizer": record["tokenizer"],
                "trial_seconds": _together(record),
                "mqar_share": _number(config_tree.get(tree, "data.mqar.share")),
                "commit": record["commit"],
                "hardware": record["hardware"],
                "devices": max(1.0, _number(config_tree.get(tree, "train.devices"))),
                "orphan": orphan,
            }
        )
    frame = pd.DataFrame(rows)
    frame.attrs = {"study": _Shared({**study, "factors": factors}), "path": str(folder)}
    return frame


def load_metrics(path: str | Path) -> pd.DataFrame:
    """Learning curves: one row a logged line, with the run's key, arm and seed.

    Training lines carry loss, lr, grad_norm, tokens_per_second, mfu, seconds; validation lines
    val_a_loss and, where scored, mqar_accuracy; both carry step and tokens. `flops` is tokens
    times the training FLOPs a token of the run's architecture.
    """
    runs = load_study(path)
    if export.is_export(Path(path)):
        logged = export.read_curves(Path(path))
    else:
        logged = {run.key: run.metrics() for run in find_runs(Path(path))}
    parts = []
    for row in records(runs):
        lines = logged.get(row["key"])
        if not lines:
            continue
        part = pd.DataFrame(lines)
        part.insert(0, "key", row["key"])
        part.insert(1, "arm", row["arm"])
        part.insert(2, "seed", row["seed"])
        part["orphan"] = row["orphan"]
        if "tokens" in part:
            part["flops"] = part["tokens"] * row["train_flops_per_token"]
        parts.append(part)
    if not parts:
        return pd.DataFrame(columns=["key", "arm", "seed", "step", "tokens", "loss", "orphan"])
    return pd.concat(parts, ignore_index=True)


def load_details(path: str | Path) -> pd.DataFrame:
    """Flat configs and environments: one row a run, columns `config.…` and `environment.…`."""
    index = _index(Path(path))
    rows = []
    for record in records(index):
        row = {"key": record["key"]}
        for part in ("config", "environment"):  # lists become JSON text
            leaves = config_tree.flatten(json.loads(record[part]))
            row |= {f"{part}.{name}": _scalar(value) for name, value in leaves}
        rows.append(row)
    return pd.DataFrame(rows)


def load_evaluation(path: str | Path, task: str) -> dict[str, dict[str, Any]]:
    """Per-item scores of `evaluation/<task>.json` by run key, for the runs that have them."""
    if export.is_export(Path(path)):
        return export.read_evaluation(Path(path), task)
    found = {run.key: run.evaluation(task) for run in find_runs(Path(path))}
    return {key: value for key, value in found.items() if value}


def evaluated(path: str | Path) -> list[str]:
    """Names of the tasks that any run was evaluated on."""
    if export.is_export(Path(path)):
        return export.tasks_of(Path(path))
    return sorted({name for run in find_runs(Path(path)) for name in run.evaluations()})


def load_certificates(path: str | Path) -> dict[str, dict[str, Any]]:
    """How the architecture of each run was matched (`ablate/arch/match.py`), by run key."""
    found = {}
    for record in records(_index(Path(path))):
        certificate = config_tree.get(json.loads(record["config"]), "match.certificate")
        if certificate:
            found[str(record["key"])] = certificate
    return found


def missing_cells(frame: pd.DataFrame) -> pd.DataFrame:
    """The planned cells that have no run folder: key, arm, seed, stage and factors."""
    study = frame.attrs.get("study", {})
    known = set(frame["key"])
    rows = [
        {
            "key": key,
            "arm": str(cell.get("arm", "")),
            "seed": cell.get("seed"),
            "stage": str(cell.get("stage", "confirm")),
        }
        | {f: _scalar(v) for f, v in (cell.get("factors") or {}).items()}
        for key, cell in (study.get("cells") or {}).items()
        if key not in known
    ]
    return pd.DataFrame(rows, columns=None if rows else ["key", "arm", "seed", "stage"])


def usable(frame: pd.DataFrame) -> pd.DataFrame:
    """The runs that count: finished with a finite validation loss, asked for by the study, and not
    those that only looked for a learning rate."""
    done = (frame["state"] == "done") & (frame["cause"] == "")
    return frame[done & ~frame["orphan"] & (frame["stage"] == "confirm")]


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows as dicts."""
    return [{str(k): v for k, v in row.items()} for row in frame.to_dict("records")]


def varies(values: pd.Series) -> bool:
    """Whether there are two different values, or more, among those that are there."""
    return len(values.dropna().unique()) > 1


def arm_label(factors: Mapping[str, Any]) -> str:
    """'attention_share=0.08, placement=even': what an arm is called when nobody named it."""
    shown = {k: f"{v:g}" if isinstance(v, float) else _scalar(v) for k, v in factors.items()}
    parts = [
        str(v) if k == "match.arms" else f"{k.rpartition('.')[2]}={v}" for k, v in shown.items()
    ]
    return ", ".join(parts) or "all"


# --- reading the folders -------------------------------------------------------------------------


def _index(folder: Path) -> pd.DataFrame:
    """What the run folders say, from `index.parquet` where their stamps are unchanged."""
    if export.is_export(folder):
        return export.read_index(folder, list(FIGURES))
    runs = list(find_runs(folder))
    if not runs:
        raise UserError(f"'{folder}' has no run folders (folders with a config.yaml)")
    cached = _read_index(folder / INDEX)
    rows, fresh = [], len(runs) != len(cached)
    for run in runs:
        stamp = f"{SCHEMA} {run.stamp()}"
        row = cached.get(run.key)
        if row is None or row["stamp"] != stamp or row["path"] != str(run.path):
            row, fresh = {**_read_run(run), "stamp": stamp}, True
        rows.append(row)
    index = pd.DataFrame(rows)
    if fresh and runs[0].path != folder:
        # a folder that cannot be written, or no pyarrow, costs only time
        with contextlib.suppress(OSError, ImportError):
            atomic_write(folder / INDEX, index.to_parquet(index=False))
    return index


def _read_index(path: Path) -> dict[str, dict[str, Any]]:
    """Rows by key; nothing where the file is missing, damaged or of another schema."""
    try:
        rows = records(pd.read_parquet(path))
        return {row["key"]: row for row in rows if row["stamp"].startswith(f"{SCHEMA} ")}
    except (OSError, ImportError, ValueError, KeyError, AttributeError):
        return {}


def _read_run(run: RunFolder) -> dict[str, Any]:
    result = run.result() or {}
    status = run.status()
    environment = run.environment()
    figures = {name: _number(config_tree.get(result, place)) for name, place in FIGURES.items()}
    texts = {name: _text(config_tree.get(result, place)) for name, place in TEXTS.items()}
    return {
        "key": run.key,
        "path": str(run.path),
        "state": "done" if result else str(status.get("state", "created")),
        "cause": _text(status.get("cause")),
        **texts,
        **figures,
        "commit": _commit(environment),
        "hardware": _hardware(environment.get("hardware")),
        "config": json.dumps(run.config() or {}, default=str),
        "environment": json.dumps(environment, default=str),
    }


def _state(run: RunFolder, record: Mapping[str, Any]) -> tuple[str, str]:
    """State and cause, where a run that claims to be running but is held by nobody has stopped."""
    state, cause = record["state"], record["cause"]
    if state == "running" and not run.is_held():
        return "interrupted", "stopped before its end (killed, or the machine went down)"
    if state == "done":
        finite = any(math.isfinite(record[name]) for name in ("val_a_loss", "val_b_loss"))
        return state, "" if finite else "finished without a finite validation loss"
    return state, cause


def _together(record: Mapping[str, Any]) -> float:
    """Seconds of all phases; NaN where none was recorded."""
    seconds = [record[f"seconds_{phase}"] for phase in PHASES]
    known = [s for s in seconds if math.isfinite(s)]
    return math.fsum(known) if known else math.nan


def _commit(environment: Mapping[str, Any]) -> str:
    """The short commit, or all that worked on the run; marked where sources were not committed."""
    commits = environment.get("commits") or [environment.get("commit")]
    text = " then ".join(_text(commit)[:12] for commit in commits)
    return f"{text} with uncommitted changes" if text and environment.get("dirty") else text


def _hardware(hardware: Any) -> str:
    """The GPU's name, or the CPU's with its cores."""
    if not isinstance(hardware, Mapping):
        return _text(hardware)
    if hardware.get("gpu"):
        return str(hardware["gpu"])
    name = str(hardware.get("cpu") or "")
    return f"{name} ({hardware['cores']} cores)" if hardware.get("cores") else name


def _varying(configs: list[dict[str, Any]]) -> list[str]:
    """Scientific fields that differ between runs, the seed apart: the factors nobody wrote down."""
    hidden = operational_fields()
    flat = [dict(config_tree.flatten(tree)) for tree in configs]
    names = dict.fromkeys(name for row in flat for name in row)
    return [
        name
        for name in names
        if name != "seed"
        and name not in hidden
        and not name.startswith(("study.", "tracker."))
        and len({repr(row.get(name)) for row in flat}) > 1
    ]


def operational_fields() -> set[str]:
    """Dotted names of the config fields that never change what a run computes."""
    return {name for name, _, is_operational in config_tree.fields() if is_operational}


def _scalar(value: Any) -> Any:
    return value if isinstance(value, str | int | float | None) else json.dumps(value, default=str)


def _number(value: Any) -> float:
    return float(value) if config_tree.is_number(value) else math.nan


def _text(value: Any) -> str:
    """Text for a cell, '' for nothing, so that Parquet sees one type a column."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, default=str)
