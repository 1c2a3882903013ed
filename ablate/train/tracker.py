"""The W&B mirror of a run, which the run never depends on.

Everything W&B does happens in a thread of its own, started after the run, fed through a queue and
waited for at most a few seconds at the end. When W&B is missing, has no login or raises anywhere,
one line is logged and the mirror goes quiet; the files of the run folder are the truth.

Offline, every process that worked on a run leaves a part of it, all with one id.
`WANDB_RESUME=allow wandb sync RUN_FOLDER/wandb/offline-run-*` sends them in the order in which they
began, each added to those before.
"""

from __future__ import annotations

import logging
import os
import queue
import re
import threading
from collections.abc import Mapping
from typing import Any

from ablate.config import Config, flatten
from ablate.run import RunFolder, State, read_json

log = logging.getLogger(__name__)

FINISH_SECONDS = 10.0  # an end of a run waits this long for the mirror, and no longer


class Tracker:
    """Mirrors metric rows; with `tracker.kind` "none" every method does nothing.

    WANDB_MODE=disabled does the same. Never raises, never blocks except in `finish`.
    """

    def __init__(self, cfg: Config, folder: RunFolder) -> None:
        self._queue: queue.SimpleQueue[Mapping[str, Any] | None] = queue.SimpleQueue()
        self._summary: dict[str, Any] = {}
        self._failed = False
        self._thread: threading.Thread | None = None
        if cfg.tracker.kind == "wandb" and mode(cfg) != "disabled":
            self._thread = threading.Thread(
                target=self._work, args=(cfg, folder), name="tracker", daemon=True
            )
            self._thread.start()

    def log(self, row: Mapping[str, Any]) -> None:
        """One row of metrics.jsonl."""
        if self._thread is not None:
            self._queue.put(dict(row))

    def finish(
        self, state: State, cause: str | None = None, result: Mapping[str, Any] | None = None
    ) -> None:
        """Close the mirror, with how the run ended and its result as the summary, unless another
        process goes on with it ("running"); W&B calls a run that is neither done nor pruned failed.
        Waits at most FINISH_SECONDS."""
        if self._thread is None:
            return
        self._failed = state not in ("done", "pruned", "running")
        if state != "running":
            self._summary = {"state": state, "cause": cause, **dict(flatten(result or {}))}
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
            run.summary.update(self._summary)
            run.finish(exit_code=int(self._failed))
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
    asked: Any = mode(cfg)  # W&B says what it does not know
    run = wandb.init(
        project=cfg.tracker.project,
        entity=cfg.tracker.entity,
        group=cfg.study.name,
        name=label(folder),
        id=run_id(folder),
        resume="allow",
        dir=str(folder.path),
        mode=asked,
        config=cfg.model_dump(mode="json"),
        settings=settings,
    )
    run.define_metric("tokens")
    run.define_metric("*", step_metric="tokens")
    return run


def mode(cfg: Config) -> str:
    """What W&B is to do, by the order that `TrackerConfig` gives."""
    there = os.environ.get("WANDB_MODE")
    return "disabled" if there == "disabled" else cfg.tracker.mode or there or "offline"


def run_id(folder: RunFolder) -> str:
    """The run's name for W&B: study and key, so that a resumed run goes on as one and the same
    trial of another study is another run."""
    name = f"{folder.path.resolve().parent.name}-{folder.key}"
    return re.sub(r"[^\w.-]", "_", name)[-64:]


def label(folder: RunFolder) -> str:
    """The run's name for people: arm/seed where its study says so, else the key."""
    study = read_json(folder.path.parent / "study.json") or {}
    cell = study.get("cells", {}).get(folder.key, {})
    if cell.get("arm"):
        return f"{cell['arm']}/{cell.get('seed', 0)}"
    return folder.key
