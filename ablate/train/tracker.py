"""The W&B mirror of a run, which the run never depends on.

Everything W&B does happens in a thread of its own, started after the run, fed through a queue and
waited for at most a few seconds at the end. When W&B is missing, has no login or raises anywhere,
one line is logged and the mirror goes quiet; the files of the run folder are the truth.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Mapping
from typing import Any

from ablate.config import Config, flatten
from ablate.run import RunFolder, read_json

log = logging.getLogger(__name__)

FINISH_SECONDS = 10.0  # an end of a run waits this long for the mirror, and no longer


class Tracker:
    """Mirrors metric rows; with `tracker.kind` "none" every method does nothing.

    Never raises, never blocks except in `finish`.
    """

    def __init__(self, cfg: Config, folder: RunFolder) -> None:
        self._queue: queue.SimpleQueue[Mapping[str, Any] | None] = queue.SimpleQueue()
        self._summary: Mapping[str, Any] = {}
        self._thread: threading.Thread | None = None
        if cfg.tracker.kind == "wandb":
            self._thread = threading.Thread(
                target=self._work, args=(cfg, folder), name="tracker", daemon=True
            )
            self._thread.start()

    def log(self, row: Mapping[str, Any]) -> None:
        """One row of metrics.jsonl."""
        if self._thread is not None:
            self._queue.put(dict(row))

    def finish(self, summary: Mapping[str, Any] | None = None) -> None:
        """Close the mirror, with the result as its summary; waits at most FINISH_SECONDS."""
        if self._thread is None:
            return
        self._summary = dict(flatten(summary or {}))
        self._queue.put(None)
        self._thread.join(FINISH_SECONDS)
        if self._thread.is_alive():
            log.warning("W&B did not finish within %g s; its mirror is left", FINISH_SECONDS)
        self._thread = None

    def _work(self, cfg: Config, folder: RunFolder) -> None:
        run = None
        try:
            run = _start(cfg, folder)
            while (row := self._queue.get()) is not None:
                run.log(dict(row))
            run.summary.update(dict(self._summary))
            run.finish()
        except BaseException as error:  # W&B raises all kinds, SystemExit included
            message = str(error).strip().splitlines() or [""]
            log.warning("W&B mirror is off: %s: %s", type(error).__name__, message[0])


def _start(cfg: Config, folder: RunFolder) -> Any:
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    settings = wandb.Settings(
        silent=True,
        console="off",
        disable_git=True,
        disable_code=True,
        x_disable_meta=True,
        x_disable_stats=True,
        x_save_requirements=False,
        init_timeout=30,
        login_timeout=10,
    )
    run = wandb.init(
        project=cfg.tracker.project,
        entity=cfg.tracker.entity,
        group=cfg.study.name,
        name=label(folder),
        id=folder.key if cfg.tracker.mode == "online" else None,
        resume="allow" if cfg.tracker.mode == "online" else None,
        dir=str(folder.path),
        mode=cfg.tracker.mode,
        config=cfg.model_dump(mode="json"),
        settings=settings,
    )
    run.define_metric("tokens")
    run.define_metric("*", step_metric="tokens")
    return run


def label(folder: RunFolder) -> str:
    """The run's name for people: arm/seed where its study says so, else the key."""
    study = read_json(folder.path.parent / "study.json") or {}
    cell = study.get("cells", {}).get(folder.key, {})
    if cell.get("arm"):
        return f"{cell['arm']}/{cell.get('seed', 0)}"
    return folder.key
