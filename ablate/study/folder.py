"""A study's folder: its index `study.json`, its lock, and the run folders beside them.

    runs/<study>/
        study.json       name, question, what every key stands for; written atomically
        optuna.journal   the Optuna study, when its storage is the default one
        worker-N.lock    held by the N-th process that works on the study now
        study.lock       held for moments, while the index or the Optuna study is changed
        <key>/           one run folder a trial (ablate/run.py)

The run folders are the truth. Everything else here is made again from them and from the YAML.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ablate.errors import UserError
from ablate.run import RunFolder, read_json, write_json

_TYPES: dict[str, Any] = {  # of the fields of study.json
    **dict.fromkeys(("name", "question"), str),
    **dict.fromkeys(("finding", "x"), str | None),
    **dict.fromkeys(("cells", "orphan_cells"), dict),
    **dict.fromkeys(("tuned", "search"), dict | None),
    **dict.fromkeys(("factors", "orphans", "proposals", "command"), list),
    "margin": int | float | None,
}


def _is_cell(cell: Any) -> bool:
    """What study.json says of a key."""
    return (
        isinstance(cell, dict)
        and isinstance(cell.get("arm", ""), str)
        and isinstance(cell.get("factors", {}), dict)
        and isinstance(cell.get("seed", 0), int)
    )


def tuning_name(arm: str, rate: float) -> str:
    """What a run is called that looks for its arm's learning rate."""
    return f"{arm}, tuning lr={rate:.3g}"


def is_held(run: RunFolder) -> bool:
    """Whether a live process works in a run folder; False where its lock cannot be read."""
    try:
        return run.is_held()
    except OSError:
        return False


@dataclass(frozen=True)
class StudyFolder:
    """One study's folder. Cheap to make; touches the disk only through its methods."""

    path: Path

    @property
    def journal(self) -> Path:
        return self.path / "optuna.journal"

    def worker(self) -> tuple[int, FileLock]:
        """The lowest number that no living process has, and the lock that keeps it taken."""
        self.path.mkdir(parents=True, exist_ok=True)
        for number in itertools.count():
            lock = FileLock(self.path / f"worker-{number}.lock", timeout=0)
            with contextlib.suppress(Timeout):
                lock.acquire()
                return number, lock
        raise AssertionError

    def run(self, key: str) -> RunFolder:
        return RunFolder(self.path / key)

    def index(self) -> dict[str, Any]:
        """The content of study.json without what is damaged in it; empty where there is none."""
        content = read_json(self.path / "study.json") or {}
        sound = {k: v for k, v in content.items() if isinstance(v, _TYPES.get(k, object))}
        if not all(isinstance(factor, str) for factor in sound.get("factors", [])):
            del sound["factors"]
        for name in sound.keys() & {"cells", "orphan_cells"}:
            sound[name] = {key: cell for key, cell in sound[name].items() if _is_cell(cell)}
        return sound

    def write_index(self, index: dict[str, Any]) -> None:
        write_json(self.path / "study.json", index)

    def check(self) -> None:
        """UserError where the folder is gone: made again, it would stand in the way of the one that
        was moved."""
        if not self.path.is_dir():
            raise UserError(
                f"the study's folder '{self.path}' is gone (moved or deleted while the study ran); "
                "nothing is written there"
            )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Alone among the processes that change this study; freed by a holder's death."""
        self.check()  # a lock makes the folder that it is in
        with FileLock(self.path / "study.lock"):
            yield
