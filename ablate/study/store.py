"""The Optuna study beside the run folders.

Every cell, of a grid or a search, is a trial of one Optuna study, so that the dashboard shows both
and the pruner knows both; a search's proposals come from its sampler. The run folders stay the
truth: `reconcile` brings Optuna in line with them on every start, so a kill between a result and
its report costs nothing, and a lost journal is rebuilt.

    user attributes of a trial: key, arm, seed, factors, cause
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from ablate.config import Config, SearchDimension, is_number
from ablate.errors import UserError
from ablate.run import RunFolder
from ablate.study.folder import StudyFolder, is_held
from ablate.study.space import Cell

# A failure that says something about the proposal; TPE learns from it as from its worst trial.
BAD_PROPOSALS = ("diverged", "out of memory")


class _JournalLock:
    """The journal's lock as a file lock, which a holder's death frees at once.

    Whoever takes it first cuts off a line that a crash or a full disk tore: a later line after it
    would make the whole journal unreadable.
    """

    def __init__(self, journal: Path) -> None:
        self._journal = journal
        self._lock = FileLock(journal.with_suffix(".lock"))

    def acquire(self) -> bool:
        self._lock.acquire()
        if self._journal.exists():
            with self._journal.open("rb+") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - 1))
                if size and file.read() != b"\n":
                    file.truncate(self._journal.read_bytes().rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        self._lock.release()


class Store:
    """One study's trials in Optuna. Every method may be called by several processes at once."""

    def __init__(self, folder: StudyFolder, cfg: Config, worker: int = 0) -> None:
        self._folder = folder
        self._search = cfg.study.search
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        storage = open_storage(folder, cfg.study.storage)
        name = f"{cfg.study.name}.{_digest(cfg)}"
        self.study = optuna.create_study(
            storage=storage, study_name=name, direction="minimize", load_if_exists=True
        )
        # A sampler's random state is not stored: without the trials so far, a restarted search
        # would propose its first points again.
        so_far = len(self.study.get_trials(deepcopy=False))
        seed = (cfg.seed + 100_003 * worker + so_far) % 2**32
        self.study.sampler = (
            optuna.samplers.RandomSampler(seed=seed)
            if cfg.study.sampler == "random"
            else optuna.samplers.TPESampler(seed=seed)
        )
        # Hybrids start slower and recall comes late: nothing is stopped in the first 40% of its
        # budget, or before five trials have ended.
        self.study.pruner = (
            optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=40, n_min_trials=3)
            if cfg.study.prune
            else optuna.pruners.NopPruner()
        )

    # Callers hold `folder.locked()` where they read and then write.

    def trials(self) -> dict[str, list[FrozenTrial]]:
        """Trials by the key of their run, oldest first."""
        by_key: dict[str, list[FrozenTrial]] = {}
        for trial in self.study.get_trials(deepcopy=False):
            key = trial.user_attrs.get("key")
            if key is not None:
                by_key.setdefault(key, []).append(trial)
        return by_key

    def reconcile(self, cells: Iterable[Cell]) -> int:
        """Bring Optuna in line with the run folders; the number of trials that had to change.

        A result on disk is a COMPLETE trial, exactly once. A trial that is RUNNING without a live
        process in its folder becomes FAIL.
        """
        changed = 0
        by_key = self.trials()
        for trial in self.study.get_trials(deepcopy=False):
            key = trial.user_attrs.get("key")
            if trial.state != TrialState.RUNNING:
                continue
            cause = "killed before it began"  # between a proposal and its cell
            if key is not None:
                folder = self._folder.run(key)
                if is_held(folder) or folder.result() is not None:
                    continue
                cause = folder.status().get("cause") or "its process was killed"
            self._tell(trial.number, TrialState.FAIL, None, cause)
            changed += 1
        for cell in cells:
            value = objective(self._folder.run(cell.key))
            states = [t.state for t in by_key.get(cell.key, [])]
            if value is not None and TrialState.COMPLETE not in states:
                self.finish(cell, "done", value)
                changed += 1
        return changed

    def begin(self, cell: Cell) -> int:
        """A RUNNING trial for a cell; its number. One that was proposed for it is taken."""
        if self._running(cell.key) is None:
            self.study.add_trial(self._template(cell, TrialState.RUNNING))
        trial = self._running(cell.key)
        assert trial is not None
        return int(trial.number)

    def propose(self) -> tuple[int, dict[str, Any]]:
        """The sampler's next proposal: the trial's number, and dotted field -> value."""
        space = {name: distribution(dim) for name, dim in self._search.items()}
        trial = self.study.ask(fixed_distributions=space)
        changes = {}
        for name, dim in self._search.items():
            value = trial.params[name]
            changes[name] = value if dim.choices is None else dim.choices[value]
        return trial.number, changes

    def bind(self, number: int, cell: Cell) -> None:
        """Say for which run a proposal stands."""
        for name, value in _attributes(cell).items():
            self._set_attribute(number, name, value)

    def impossible(self, number: int, why: str) -> None:
        """End a proposal that cannot be run; the sampler learns from it."""
        self._tell(number, TrialState.PRUNED, None, why)

    def repeated(self, number: int, value: float | None) -> None:
        """End a proposal that is known already; `value` where it has one."""
        state = TrialState.FAIL if value is None else TrialState.COMPLETE
        self._tell(number, state, value, "proposed before")

    def finish(
        self, cell: Cell, state: str, value: float | None = None, cause: str | None = None
    ) -> None:
        """Record how a cell's trial ended; a COMPLETE one is never recorded twice."""
        trials = self.trials().get(cell.key, [])
        running = next((t for t in trials if t.state == TrialState.RUNNING), None)
        complete = any(t.state == TrialState.COMPLETE for t in trials)
        if state == "done" and value is not None and math.isfinite(value):
            target = TrialState.COMPLETE
        elif state == "pruned" or (self._search and (cause or "").startswith(BAD_PROPOSALS)):
            target = TrialState.PRUNED
        else:
            target = TrialState.FAIL
        if complete:
            if running is not None:
                self._tell(running.number, TrialState.FAIL, None, "another process finished it")
            return
        value = value if target == TrialState.COMPLETE else None
        if running is not None:
            self._tell(running.number, target, value, cause)
        elif state != "interrupted":  # it ended before it could be said to have begun
            self.study.add_trial(self._template(cell, target, value))

    def should_prune(self, number: int, step: int, value: float) -> bool:
        """Report an intermediate loss; whether the pruner gives the trial up."""
        trial = optuna.trial.Trial(self.study, self._trial_id(number))
        trial.report(value, step)
        return bool(trial.should_prune())

    def _running(self, key: str) -> FrozenTrial | None:
        trials = self.trials().get(key, [])
        return next((t for t in trials if t.state == TrialState.RUNNING), None)

    def _tell(self, number: int, state: TrialState, value: float | None, cause: str | None) -> None:
        if cause:
            self._set_attribute(number, "cause", cause)
        self.study.tell(number, value, state=state)

    def _trial_id(self, number: int) -> int:
        storage = self.study._storage
        return int(storage.get_trial_id_from_study_id_trial_number(self.study._study_id, number))

    def _set_attribute(self, number: int, name: str, value: Any) -> None:
        self.study._storage.set_trial_user_attr(self._trial_id(number), name, value)

    def _template(self, cell: Cell, state: TrialState, value: float | None = None) -> FrozenTrial:
        params, distributions = _params(cell, self._search)
        return optuna.trial.create_trial(
            state=state,
            value=value,
            params=params,
            distributions=distributions,
            user_attrs=_attributes(cell),
        )


def objective(folder: RunFolder) -> float | None:
    """What a search minimises: the loss on validation A; B is kept for the figures."""
    result = folder.result()
    value = (result or {}).get("val_a", {}).get("loss")
    return float(value) if value is not None else None


def _attributes(cell: Cell) -> dict[str, Any]:
    return {"key": cell.key, "arm": cell.arm, "seed": cell.seed, "factors": cell.factors}


def distribution(dim: SearchDimension) -> BaseDistribution:
    """The Optuna distribution that `space.suggest` draws a dimension from."""
    if dim.choices is not None:
        return CategoricalDistribution(range(len(dim.choices)))
    assert dim.low is not None
    assert dim.high is not None
    if dim.integer:
        step = max(1, int(dim.step or 1))
        return IntDistribution(int(dim.low), int(dim.high), log=dim.log, step=step)
    return FloatDistribution(dim.low, dim.high, log=dim.log, step=dim.step)


def _params(
    cell: Cell, search: Mapping[str, SearchDimension]
) -> tuple[dict[str, Any], dict[str, BaseDistribution]]:
    """A cell's factors as Optuna parameters; of a grid, the numbers among them."""
    if search:
        space = {name: distribution(dim) for name, dim in search.items()}
        values = {
            name: search[name].choices.index(value)  # type: ignore[union-attr]
            if search[name].choices is not None
            else value
            for name, value in cell.factors.items()
        }
        return values, space
    numbers = {name: float(value) for name, value in cell.factors.items() if is_number(value)}
    # A range of its own for every trial is allowed for numbers, and for nothing else.
    return numbers, {name: FloatDistribution(v, v) for name, v in numbers.items()}


def _digest(cfg: Config) -> str:
    """Names the search space: an edited one is a new Optuna study in the same storage."""
    space = {name: dim.model_dump() for name, dim in cfg.study.search.items()} or "grid"
    return hashlib.sha256(json.dumps(space, sort_keys=True).encode()).hexdigest()[:8]


def open_storage(folder: StudyFolder, url: str | None) -> optuna.storages.BaseStorage:
    if url is not None:
        try:
            return optuna.storages.get_storage(url)
        except Exception as error:  # every database driver raises its own
            reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise UserError(f"study.storage '{url}' cannot be opened: {reason}") from None
    folder.path.mkdir(parents=True, exist_ok=True)
    lock = _JournalLock(folder.journal)
    for attempt in (1, 2):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                lock.acquire()
                lock.release()
                return optuna.storages.JournalStorage(
                    JournalFileBackend(str(folder.journal), lock_obj=lock)
                )
        except (ValueError, KeyError, TypeError) as error:
            if attempt == 2:
                raise
            # Nothing in it is needed: the run folders and study.json say the same.
            folder.journal.rename(folder.journal.with_suffix(".damaged"))
            warnings.warn(f"the Optuna journal was damaged and is rebuilt: {error}", stacklevel=2)
    raise AssertionError
