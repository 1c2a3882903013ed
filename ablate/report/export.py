"""A study as a small folder of frames that can be committed: all that a report reads, no more.

    <study>/
        README.md              what was run, on what, and what it cost
        study.json             cells, factors, learning rates tuned; as the study wrote it
        trials.csv             one row a trial: arm, factors, seed, figures, seconds by phase, GPU
        curves.csv             validation loss by step
        configs.yaml           the config of every trial: what all share, and what differs
        environments.yaml      versions, commit and hardware, in the same form
        scores/<task>.parquet  every item that a task scored: what paired tests need
        scores.json            the rest of each task's file
        SHA256SUMS             of the files above, so that a part is never taken for the whole
        plan*.txt              what `plan` printed, where it was kept in the study's folder

`report` reads such a folder as it reads run folders. Nothing in it names a machine: paths are
shortened to file names, host names and accounts are left out, and the finished text is checked.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from ablate.errors import UserError
from ablate.run import atomic_write, dump_yaml, find_runs, load_yaml, read_json, write_json
from ablate.study.folder import StudyFolder

TRIALS, CURVES = "trials.csv", "curves.csv"
SUMS = "SHA256SUMS"  # `sha256sum -c` reads it too
CONFIGS, ENVIRONMENTS = "configs.yaml", "environments.yaml"
_LEFT_OUT = {"response", "target", "others", "position", "loglikelihoods"}  # no figure needs them
_PRIVATE = {"host", "platform", "entity", "project", "storage", "pid"}
_PATH = re.compile(r"(?<![\w.$/:~-])(?:~|/|[A-Za-z]:\\)(?:[\w.@+ -]*[\\/])*([\w.@+*-]*)")


def is_export(folder: Path) -> bool:
    files = (folder / TRIALS).is_file() and (folder / CONFIGS).is_file()
    return files and not any(find_runs(folder))


# --- reading -------------------------------------------------------------------------------------


def unreadable(folder: Path, error: Exception) -> UserError:
    return UserError(
        f"'{folder}' is an exported study that cannot be read ({type(error).__name__}: {error}); "
        "export it again from its run folders"
    )


def _sums(folder: Path) -> dict[str, str]:
    """Digest by name of what an export consists of."""
    named = [TRIALS, CURVES, CONFIGS, ENVIRONMENTS, "scores.json", "study.json"]
    files = [*(folder / name for name in named), *sorted((folder / "scores").glob("*.parquet"))]
    return {str(file.relative_to(folder)): _digest(file) for file in files}


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def verify(folder: Path) -> None:
    """UserError where a file of an export is missing or is not as it was written."""
    try:
        lines = (folder / SUMS).read_text().splitlines()
    except FileNotFoundError:  # made before there were sums
        return
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(folder, error) from None
    stated = {n: d for d, n in (line.split(maxsplit=1) for line in lines if len(line.split()) == 2)}
    try:
        found = _sums(folder)
        found |= {name: _digest(folder / name) for name in stated if name not in found}
    except OSError as error:
        raise unreadable(folder, error) from None
    for name, digest in found.items():
        if name not in stated:
            raise UserError(
                f"'{folder / SUMS}' has no sum of {name}: one of them is damaged or was changed "
                "since; export the study again from its run folders"
            )
        if digest != stated[name]:
            raise UserError(
                f"'{folder / name}' is damaged or was changed since it was exported; export the "
                "study again from its run folders"
            )


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """UserError where what is inside meets a file that is not as an export writes it."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise unreadable(folder, error) from None


def read_index(folder: Path, figures: Sequence[str]) -> pd.DataFrame:
    """The frame that `frames` makes of run folders: key, path, state, cause, texts, figures,
    commit, hardware, config and environment (JSON)."""
    verify(folder)
    with _readable(folder):
        text = (folder / TRIALS).read_text()
        table = pd.read_csv(io.StringIO(text), dtype=str, keep_default_na=False)
        configs = _expand(load_yaml((folder / CONFIGS).read_text()))
        environments = _expand(load_yaml((folder / ENVIRONMENTS).read_text()))
        index = pd.DataFrame({"key": table["key"], "path": [str(folder / k) for k in table["key"]]})
        texts = ("state", "cause", "pattern", "fingerprint", "tokenizer", "commit", "hardware")
        index = index.join(table[[*texts]])
        for name in figures:
            index[name] = [float(v) if v else math.nan for v in table[name]]
        index["config"] = [json.dumps(configs[key]) for key in table["key"]]
        index["environment"] = [json.dumps(environments[key]) for key in table["key"]]
    return index


def read_curves(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Logged lines by key."""
    rows: dict[str, list[dict[str, Any]]] = {}
    with _readable(folder):
        table = pd.read_csv(folder / CURVES, dtype=str, keep_default_na=False)
        for row in table.to_dict("records"):
            line = {str(k): float(v) for k, v in row.items() if k != "key" and v}
            rows.setdefault(row["key"], []).append(line)
    return rows


def tasks_of(folder: Path) -> list[str]:
    return sorted(read_json(folder / "scores.json") or {})


def read_evaluation(folder: Path, task: str) -> dict[str, dict[str, Any]]:
    """The contents of a task's files by key, as `RunFolder.evaluation` has them."""
    with _readable(folder):
        contents: dict[str, dict[str, Any]]
        contents = (read_json(folder / "scores.json") or {}).get(task, {})
        place = folder / "scores" / f"{task}.parquet"
        if place.is_file():
            for key, own in pd.read_parquet(place).groupby("key", sort=False):
                _put(contents[str(key)], own.drop(columns="key"))
    return contents


# --- writing -------------------------------------------------------------------------------------


def export_study(path: Path, parent: Path) -> Path:
    """Write `<parent>/<name of the study's folder>/` from the run folders at `path`.

    Raises UserError where there are none, where it would lose finished trials that an earlier
    export has, and where what was written still names a machine.
    """
    from ablate.report import frames

    folder = parent / path.resolve().name
    if is_export(path):
        raise UserError(f"'{path}' is an exported study already; export from its run folders")
    if any(find_runs(folder)):
        raise UserError(
            f"export={parent} would write into '{folder}', which has run folders: give a folder "
            "of its own, such as export=analysis/results"
        )
    frame = frames.load_study(path)
    _keep_what_is_there(folder, frame, path)
    _keep_arms_apart(frame)
    runs = list(find_runs(path))
    study = StudyFolder(path).index()

    scores: dict[str, dict[str, Any]] = {}
    tables: dict[str, list[pd.DataFrame]] = {}
    for run in runs:
        for task in run.evaluations():
            content = run.evaluation(task)
            if content:
                items = _take(content)
                scores.setdefault(task, {})[run.key] = content
                if items is not None:
                    items.insert(0, "key", run.key)
                    tables.setdefault(task, []).append(items)
    values = {
        task: pd.Series({key: content.get("value") for key, content in found.items()}, dtype=float)
        for task, found in scores.items()
        if any("value" in content for content in found.values())
    }
    trials = frame.assign(
        **{task: frame["key"].map(value) for task, value in values.items()},
        versions=[_versions(run.environment()) for run in runs],
    )
    write_json(folder / "study.json", _clean(_without_words(study)))
    told = trials.drop(columns="devices")  # which stands in the configs
    atomic_write(folder / TRIALS, _clean(told).to_csv(index=False))
    atomic_write(folder / CURVES, _curves(frames.load_metrics(path)).to_csv(index=False))
    atomic_write(folder / CONFIGS, _compact({run.key: run.config() or {} for run in runs}))
    atomic_write(folder / ENVIRONMENTS, _compact({run.key: run.environment() for run in runs}))
    write_json(folder / "scores.json", _clean(scores))
    (folder / "scores").mkdir(exist_ok=True)
    for old in (folder / "scores").glob("*.parquet"):
        old.unlink()
    for task, parts in tables.items():
        table = pd.concat(parts, ignore_index=True)
        table.to_parquet(folder / "scores" / f"{task}.parquet", index=False, compression="zstd")
    for plan in sorted(path.glob("plan*.txt")):
        atomic_write(folder / plan.name, _clean(plan.read_text()))
    atomic_write(folder / "README.md", _clean(_readme(folder, study, trials)))
    _check(folder, runs)
    atomic_write(folder / SUMS, "".join(f"{d}  {name}\n" for name, d in _sums(folder).items()))
    return folder


def _keep_what_is_there(folder: Path, frame: pd.DataFrame, path: Path) -> None:
    if not is_export(folder):
        return
    old = pd.read_csv(folder / TRIALS, dtype=str, keep_default_na=False)
    done = (frame["state"] == "done") & (frame["cause"] == "")
    lost = set(old.loc[(old["state"] == "done") & (old["cause"] == ""), "key"])
    lost -= set(frame.loc[done, "key"])
    if lost:
        raise UserError(
            f"'{folder}' has {len(lost)} finished trials that '{path}' lacks, such as "
            f"{min(lost)}: bring their run folders there, or delete '{folder}' first"
        )


def _curves(metrics: pd.DataFrame) -> pd.DataFrame:
    """Validation lines with the seconds of training up to them; of a run without any, its training
    lines."""
    from ablate.report.tables import with_seconds

    parts = []
    for key, run in metrics.groupby("key", sort=False):
        if "val_a_loss" in run and run["val_a_loss"].notna().any():
            run = with_seconds(run)
            names = ["step", "tokens", "val_a_loss", "mqar_accuracy", "seconds"]
        else:
            names = ["step", "tokens", "loss", "seconds"]
        part = run[[c for c in names if c in run]].dropna(axis=1, how="all")
        part.insert(0, "key", str(key))
        parts.append(part)
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["key", "step"])


def _versions(environment: Mapping[str, Any]) -> str:
    versions = environment.get("versions") or {}
    return "; ".join(f"{name} {version}" for name, version in versions.items() if version)


# --- items ---------------------------------------------------------------------------------------


def _take(content: dict[str, Any]) -> pd.DataFrame | None:
    """Take the lists with one entry an item out of a task's content; None where it has none."""
    if isinstance(content.get("items"), dict):
        columns = {k: v for k, v in content["items"].items() if k not in _LEFT_OUT}
        content["items"] = {}
        return pd.DataFrame(columns)
    groups = content.get("by_pairs")
    if isinstance(groups, dict) and all(isinstance(g, dict) for g in groups.values()):
        parts = []
        for pairs, group in groups.items():
            columns = {k: group.pop(k) for k in list(group) if isinstance(group[k], list)}
            parts.append(pd.DataFrame({"pairs": pairs, **columns}))
        return pd.concat(parts, ignore_index=True) if parts else None
    names = [k for k, v in content.items() if isinstance(v, list)]
    return pd.DataFrame({name: content.pop(name) for name in names}) if names else None


def _put(content: dict[str, Any], items: pd.DataFrame) -> None:
    """The opposite of `_take`."""
    items = items.dropna(axis=1, how="all")
    if "items" in content:
        content["items"] = {str(c): items[c].tolist() for c in items}
    elif "pairs" in items:
        for pairs, own in items.groupby("pairs", sort=False):
            own = own.drop(columns="pairs")
            content["by_pairs"][str(pairs)] |= {str(c): own[c].tolist() for c in own}
    else:
        content |= {str(c): items[c].tolist() for c in items}


# --- trees ---------------------------------------------------------------------------------------


def _compact(trees: Mapping[str, Mapping[str, Any]]) -> str:
    """YAML of many trees: the first whole, of the others what differs from it."""
    cleaned = {key: _clean(tree) for key, tree in trees.items()}
    base: Any = next(iter(cleaned.values()), {})
    runs = {key: dict(_changes(base, tree)) for key, tree in cleaned.items()}
    return dump_yaml({"shared": base, "runs": runs}, width=100)


def _changes(base: Any, tree: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Dotted places with what differs there; one whose names have dots themselves differs whole."""
    alike = isinstance(base, dict) and isinstance(tree, dict) and list(base) == list(tree)
    if not alike or any("." in str(name) for name in base):
        return [] if base == tree else [(prefix, tree)]
    found = []
    for name in base:
        found += _changes(base[name], tree[name], f"{prefix}.{name}" if prefix else str(name))
    return found


def _expand(content: Mapping[str, Any]) -> dict[str, Any]:
    trees = {}
    for key, changes in content["runs"].items():
        tree: dict[str, Any] = {"": json.loads(json.dumps(content["shared"]))}
        for place, value in changes.items():
            *parents, name = ["", *place.split(".")] if place else [""]
            part = tree
            for parent in parents:
                part = part[parent]
            part[name] = value
        trees[str(key)] = tree[""]
    return trees


# --- nothing that names a machine ----------------------------------------------------------------


def _clean(value: Any) -> Any:
    """A copy without hosts and accounts, with paths shortened to the names of their files."""
    if isinstance(value, str):
        return _PATH.sub(lambda found: found[1] or ".", value)
    if isinstance(value, pd.DataFrame):
        texts = value.select_dtypes(include=["object", "string"]).columns
        return value.assign(**{c: value[c].map(_clean) for c in texts})
    if isinstance(value, Mapping):
        return {k: _clean(v) for k, v in value.items() if k not in _PRIVATE}
    return [_clean(v) for v in value] if isinstance(value, list | tuple) else value


def _keep_arms_apart(frame: pd.DataFrame) -> None:
    names: dict[str, str] = {}
    for arm in map(str, frame["arm"].unique()):
        other = names.setdefault(_clean(arm), arm)
        if other != arm:
            raise UserError(
                f"arms '{other}' and '{arm}' would both be '{_clean(arm)}' in an export, which "
                "names no folders: give them names of their own in study.arms"
            )


def _without_words(study: Mapping[str, Any]) -> dict[str, Any]:
    """A study's index without the words of its command that are about this machine alone."""
    study = {k: v for k, v in study.items() if k not in ("config", "orphan_cells")}
    if isinstance(study.get("command"), list):
        local = ("study.storage=", "study.folder=", "tracker", "data.cache=")
        study["command"] = [w for w in study["command"] if not str(w).startswith(local)]
    return study


def _check(folder: Path, runs: Sequence[Any]) -> None:
    hosts = {str(run.environment().get("host") or "") for run in runs} - {""}
    home = str(Path.home().name)
    names = [re.escape(name) for name in sorted(hosts) if len(name) > 3]
    names += [rf"/home/{re.escape(home)}", re.escape(str(Path.home())) + "/"]
    for file in sorted(folder.glob("*.*")):
        text = file.read_text()
        found = re.search("|".join(names), text) or _PATH.search(text)
        if found and len(found[0]) > 1:
            raise UserError(f"'{file}' names this machine ('{found[0]}'): do not commit it")


# --- what a reader sees first --------------------------------------------------------------------


def gpu_hours(frame: pd.DataFrame) -> float:
    """Hours of all finished trials together, every phase counted, times the devices of each."""
    return float((frame["trial_seconds"] * frame["devices"]).sum()) / 3600


def command_of(study: Mapping[str, Any]) -> str:
    command = study.get("command")
    if isinstance(command, list):
        command = shlex.join(map(str, command))
    return str(command or f"python -m ablate +sweep={study.get('name')}")


def _readme(folder: Path, study: Mapping[str, Any], trials: pd.DataFrame) -> str:
    done = trials[trials["state"] == "done"]

    def each(column: str) -> str:
        return "; ".join(f"{v} ({n})" for v, n in done[column].value_counts().items()) or "–"

    def one(column: str, form: str) -> str:
        values = done[column].dropna()
        if values.empty:
            return "–"
        low, high = form.format(values.min()), form.format(values.max())
        return low if low == high else f"{low} to {high}"

    rows = {
        "trials": ", ".join(f"{n} {s}" for s, n in trials["state"].value_counts().items()),
        "hardware (trials)": each("hardware"),
        "device hours of finished trials, all phases": f"{gpu_hours(trials):.2f}",
        "training tokens a trial": one("tokens", "{:,.0f}"),
        "unique tokens": one("unique_tokens", "{:,.0f}"),
        "epochs": one("epochs", "{:.2f}"),
        "tokens a second": one("tokens_per_second", "{:,.0f}"),
        "text (fingerprint)": each("fingerprint"),
        "commit (trials)": each("commit"),
        "versions (trials)": each("versions"),
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    plans = [p.name for p in sorted(folder.glob("plan*.txt"))]
    named = ", ".join(f"`{p}`" for p in plans)
    kept = f"The plan, as the study last went on: {named}.\n\n" if plans else ""
    command = command_of(_clean(_without_words(study)))
    return (
        f"# {study.get('name', folder.name)}\n\n{study.get('question') or ''}\n\n"
        f"    {command}\n\n{kept}| | |\n|---|---|\n{table}\n\n"
        "`report/index.html` is the page; `python -m ablate report` on this folder makes it again. "
        "`ablate/report/export.py` says what each file is.\n"
    )
