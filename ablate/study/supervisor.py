"""The process that runs a study: it hands trials to children and records what became of them.

A slot trains one trial at a time in a child process of its own, and has the next child importing
torch meanwhile. A trial is claimed by its run folder's lock, which the child holds and its death
frees; so any number of invocations of the same command may work on one study, and a kill at any
moment leaves nothing to clean up. The run folders say what is finished; Optuna is told.

A study with `study.tune` has two stages. The trials of the first are known from the start; once all
of them have ended, the learning rates are fitted, written to study.json, and the trials of the
second join the others. Every process comes to the same rates, as they follow from the results.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import optuna
import torch
from filelock import FileLock
from rich.console import Console
from rich.table import Table

from ablate import config
from ablate.config import Config
from ablate.data import TokenSet, TrainStream, check_epochs, prepare
from ablate.data.tokens import usable_cores
from ablate.errors import UserError
from ablate.evaluate.length import check_longest
from ablate.layers.registry import own_sources
from ablate.run import RunFolder, find_runs
from ablate.study import space
from ablate.study.child import child_environment
from ablate.study.folder import StudyFolder, is_held
from ablate.study.progress import Display, Running, Snapshot
from ablate.study.show import plain_console
from ablate.study.space import Cell
from ablate.study.store import Store, objective, open_storage
from ablate.study.tune import Run, Tuning, tune
from ablate.train import checkpoint
from ablate.train.environment import commit
from ablate.train.stop import OUT_OF_MEMORY

STOP_SECONDS = 10.0  # what children get to write a checkpoint after the first Ctrl-C
KILL_PAUSE = 0.5  # a child's death by a signal counts once this process has outlived it so long
LOOK_AGAIN = 2.0  # seconds between looks at trials that another process holds
REPEATS = 50  # proposals in a row that are known already, before a search counts as exhausted


@dataclass(frozen=True)
class StudyOutcome:
    """What became of a study.

    causes: key -> why it failed; unfinished: keys that still wait (after a stop or a deadline);
    problems: why the learning rates of the first stage cannot be confirmed.
    exit_code: 0 all done, 1 some failed or wait, 130 after Ctrl-C, 143 after SIGTERM.
    """

    folder: Path
    cells: list[Cell]
    done: list[str]
    causes: dict[str, str]
    unfinished: list[str]
    exit_code: int
    problems: list[str] = field(default_factory=list)


def run_study(
    tree: Mapping[str, Any],
    *,
    console: Console | None = None,
    child_command: Sequence[str] | None = None,
    words: Sequence[str] | None = None,
) -> StudyOutcome:
    """Run what is not finished of the study that a composed config describes.

    words: of the command line that asked for it, which the report repeats.
    Raises UserError, before anything is written, when any of its trials cannot be run.
    """
    console = console or plain_console()
    cells = space.cells(tree)
    cfg = config.load(tree)
    space.check_words(words or (), cells, cfg.study)
    command = list(child_command or (sys.executable, "-m", "ablate.study.child"))
    return _Supervisor(space.full(tree), cfg, cells, console, command, words).run()


@dataclass
class _Child:
    """A child process; `cell` is None until a trial is handed to it."""

    process: subprocess.Popen[bytes]
    slot: int
    errors: BinaryIO
    ready: bool = False
    cell: Cell | None = None
    begun: bool = False
    number: int | None = None
    running: Running | None = None
    end: dict[str, Any] | None = None
    rest: bytes = b""
    stop_sent: bool = False

    def send(self, **message: Any) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(OSError, ValueError):
            self.process.stdin.write((json.dumps(message) + "\n").encode())
            self.process.stdin.flush()

    def kill(self) -> None:
        with contextlib.suppress(OSError):
            self.process.kill()


@dataclass
class _Supervisor:
    tree: dict[str, Any]
    cfg: Config
    cells: list[Cell]
    console: Console
    command: list[str]
    words: Sequence[str] | None = None
    done: set[str] = field(default_factory=set)
    causes: dict[str, str] = field(default_factory=dict)
    pruned: set[str] = field(default_factory=set)
    retried: dict[str, int] = field(default_factory=dict)  # key -> generation that failed before
    shrunk: set[str] = field(default_factory=set)  # keys that begin again with fewer rows a pass
    held_until: dict[str, float] = field(default_factory=dict)
    children: list[_Child] = field(default_factory=list)
    slots: list[str | None] = field(default_factory=list)  # the GPUs of each
    signals: list[int] = field(default_factory=list)
    stop_at: float | None = None
    too_long: set[str] = field(default_factory=set)  # keys that do not end before the deadline
    n_proposals: int = 0
    exhausted: bool = False
    repeats: int = 0
    start_failures: int = 0
    seconds: dict[str, float] = field(default_factory=dict)  # key -> what the trial took
    training: dict[str, float] = field(default_factory=dict)  # key -> how much of that was steps
    arms: list[Cell] = field(default_factory=list)  # of a study that tunes: at their own rate
    tuned: dict[str, Any] | None = None  # what the first stage came to, as study.json has it

    def __post_init__(self) -> None:
        if self.cfg.study.tune.points:
            self.arms, self.cells = self.cells, space.tuning(self.cfg, self.cells)
        self.folder = StudyFolder(Path(self.cfg.study.folder).expanduser() / self.cfg.study.name)
        self.there = self.folder.path.is_dir()
        self.selector = selectors.DefaultSelector()
        self.display = Display(self.console, self.cfg.study.name)
        self.started = time.monotonic()

    # --- the whole ------------------------------------------------------------------------------

    def run(self) -> StudyOutcome:
        self._load_proposals()
        for line in _remarks(self.cells):
            self.display.say(line)
        self._look_at_disk(self.cells)
        self._note_evaluations()
        self._advance()
        work = bool(self._missing() or self._may_propose())
        try:
            if work:
                if self.cfg.study.storage is not None:  # a mistake in it, before the text is made
                    open_storage(self.folder, self.cfg.study.storage)
                self.slots = self._slots()
                for slot in range(len(self.slots)):
                    self._spawn(slot)  # they import torch while the text is prepared
                try:
                    self._prepare_data()
                except KeyboardInterrupt:
                    self.signals.append(signal.SIGINT)
            lock = self._open_folder()
            if work:
                with self._signals(), self.display:
                    self._loop()
        finally:
            self._kill_all()
        if work:
            self._finish_records()
            here = {cell.key for cell in self.cells}
            if not self.cfg.study.search and not here <= set(self.folder.index().get("cells", {})):
                with contextlib.suppress(OSError):
                    self._write_index()  # again: another process asked for fewer meanwhile
        lock.release()
        outcome = self._outcome()
        self.console.print(summary(outcome))
        for line in _causes(outcome):
            self.display.say(line)
        return outcome

    def _open_folder(self) -> FileLock:
        """Write the study's index and bring Optuna up to date; the lock of this worker."""
        if self.there:
            self.folder.check()  # what was read there is not there any more
        try:
            worker, lock = self.folder.worker()
            if worker and self._is_another(self.folder.index()):
                lock.release()
                raise UserError(
                    f"study.name: another study is at work in {self.folder.path}: give another "
                    "study.name, or wait for it"
                )
            self._write_index()
            self.store = Store(self.folder, self.cfg, worker)
            with self.folder.locked():
                self.store.reconcile(self.cells)
        except OSError as error:
            raise UserError(f"study.folder: {self.folder.path} cannot be used: {error}") from None
        self._note_commits()
        return lock

    def _is_another(self, index: Mapping[str, Any]) -> bool:
        """Whether an index has none of these trials; two such would each make orphans of the
        other's."""
        search = self.tree["study"]["search"]
        if not index or search:
            return bool(index) and index.get("search") != search
        return bool(index.get("search")) or not {cell.key for cell in self.cells} & set(
            index.get("cells") or {}
        )

    def _loop(self) -> None:
        self.slots = self._slots()  # other workers may have left less to do meanwhile
        while True:
            self.folder.check()
            self._poll_signals()
            if not self.signals:
                for slot in range(len(self.slots)):
                    self._feed(slot)
            busy = any(c.cell is not None for c in self.children)
            if not busy and (self.signals or not self._more_to_come()):
                return
            self._receive(timeout=0.2)
            self._reap()
            self.display.update(self._snapshot(len(self.slots)))

    def _more_to_come(self) -> bool:
        """Whether this process may still get work: its own, or another's should that one die."""
        if self._past_deadline():
            return False
        if self.cfg.study.search:
            self._load_proposals()
        fitting = any(cell.key not in self.too_long for cell in self._missing())
        return fitting or self._may_propose() or self._advance()

    # --- two stages -----------------------------------------------------------------------------

    def _advance(self) -> bool:
        """From tuning to confirming, once every trial of the first stage has ended."""
        if not self.arms or self.tuned is not None or self._missing() or self._untold():
            return False
        keys = sorted(cell.key for cell in self.cells)
        before = self.folder.index().get("tuned") or {}
        same = before.get("keys") == keys and not before.get("problems")
        fitted = Tuning.of(before["fit"]) if same else self._fit_rates()
        self.tuned = {"keys": keys, "fit": fitted.plain(), "problems": fitted.problems}
        added: list[Cell] = []
        if not fitted.problems:
            added = space.confirming(self.arms, fitted.rates())
            for fit in fitted.fits:
                self.display.say(f"{fit.arm}: learning rate {fit.chosen:.3g} is confirmed")
        self.cells += added
        self._look_at_disk(added)
        if hasattr(self, "store"):  # else it is all written in a moment
            try:
                self._write_index()
                with self.folder.locked():
                    self.store.reconcile(added)
            except OSError as error:
                self.display.say(
                    f"study.json was not written ({error}); the next start makes up for it"
                )
        return bool(added)

    def _untold(self) -> list[Cell]:
        """Trials of the first stage that say nothing of their rate: failed, and not diverged."""
        return [
            cell
            for cell in self.cells
            if not self.causes.get(cell.key, "diverged").startswith("diverged")
        ]

    def _fit_rates(self) -> Tuning:
        runs = []
        for cell in self.cells:
            loss = objective(self.folder.run(cell.key))
            runs.append(Run(cell.arm, cell.rate, cell.seed, math.inf if loss is None else loss))
        places = {cell.arm: space.place(cell, self.cfg.study.x) or 0.0 for cell in self.arms}
        return tune(runs, smooth=self.cfg.study.tune.smooth, places=places)

    def _problems(self) -> list[str]:
        """Why a study that tunes has not come to its second stage."""
        if not self.arms or self._missing():
            return []
        if self._untold():
            return ["the learning rates are not known until the failed trials have been run again"]
        return list((self.tuned or {}).get("problems", []))

    # --- slots ----------------------------------------------------------------------------------

    def _slots(self) -> list[str | None]:
        """The GPUs of each slot, None on a CPU, where a slot is a share of the cores."""
        gpus: list[str] = []
        devices = self.cfg.train.devices
        if self.cfg.train.device != "cpu" and torch.cuda.is_available():
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            gpus = [g for g in visible.split(",") if g] if visible else []
            gpus = gpus or [str(i) for i in range(torch.cuda.device_count())]
        groups = [
            ",".join(gpus[i : i + devices]) for i in range(0, len(gpus) - devices + 1, devices)
        ]
        if groups:
            workers = self.cfg.study.workers or len(groups)
        else:
            share = self.cfg.train.threads * devices
            workers = self.cfg.study.workers or max(1, usable_cores() // share)
        most = len(self._missing())
        if self.cfg.study.search:
            most = (self.cfg.study.n_trials or 1) * max(1, len(self.cfg.study.seeds))
        elif self.arms and not self.tuned:
            most += len(self.arms)
        workers = min(workers, max(1, most))
        return [groups[i % len(groups)] if groups else None for i in range(workers)]

    def _feed(self, slot: int) -> None:
        """Give a free slot a trial; have a spare child ready while there is more to do."""
        mine = [c for c in self.children if c.slot == slot]
        working = next((c for c in mine if c.cell is not None), None)
        spare = next((c for c in mine if c.cell is None), None)
        if self._past_deadline():
            return
        if working is not None:
            # Once the current one trains: its own start should not wait for the next one's.
            if spare is None and working.running and working.running.row and self._waiting():
                self._spawn(slot)
            return
        cell = self._next()
        if cell is None:
            return
        if spare is None:
            spare = self._spawn(slot)
            if spare is None:
                self._fail(cell, "its process cannot be started", None)
                return
        self._assign(spare, cell)

    def _spawn(self, slot: int) -> _Child | None:
        try:
            cores = max(1, usable_cores() // len(self.slots))
            errors = tempfile.TemporaryFile()  # noqa: SIM115  # what it says before it has a log
            process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=child_environment(self.cfg, self.slots[slot], cores),
                process_group=0,  # a Ctrl-C at the terminal reaches this process alone
            )
        except OSError as error:
            self.display.say(f"a child process cannot be started: {error}")
            return None
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        child = _Child(process, slot, errors)
        self.selector.register(process.stdout, selectors.EVENT_READ, child)
        self.children.append(child)
        return child

    def _assign(self, child: _Child, cell: Cell) -> None:
        run = self.folder.run(cell.key)
        child.cell = cell
        child.running = Running(cell.name, cell.seed, time.monotonic())
        child.send(
            folder=str(run.path.resolve()),
            config=cell.trial.tree,
            generation=run.status()["generation"],
            prune=self.cfg.study.prune,
        )

    # --- which trial next -----------------------------------------------------------------------

    def _missing(self) -> list[Cell]:
        """Cells that have not ended, those that are being trained included."""
        ended = self.done | self.pruned | self.causes.keys()
        return [cell for cell in self.cells if cell.key not in ended]

    def _waiting(self) -> bool:
        """Whether a free slot would find something to do, as far as this process knows."""
        return self._may_propose() or any(c.key not in self.held_until for c in self._free())

    def _free(self) -> list[Cell]:
        """Cells that have not ended and that no child of this process has."""
        taken = {child.cell.key for child in self.children if child.cell is not None}
        return [cell for cell in self._missing() if cell.key not in taken]

    def _next(self) -> Cell | None:
        now = time.monotonic()
        for cell in self._free():
            if self.held_until.get(cell.key, 0) > now:
                continue
            run = self.folder.run(cell.key)
            if self._ended_meanwhile(cell, run):
                continue
            if is_held(run):
                self.held_until[cell.key] = now + LOOK_AGAIN
                continue
            self.held_until.pop(cell.key, None)
            if self._fits_deadline(cell):
                return cell
            self.too_long.add(cell.key)
        return self._propose()

    def _ended_meanwhile(self, cell: Cell, run: RunFolder) -> bool:
        """Whether another process has ended a trial since; if so it is counted."""
        status = run.status()
        if run.result() is not None:
            self._count_done(cell, run)
        elif status["state"] == "pruned":
            self.pruned.add(cell.key)
        elif status["state"] == "failed" and self.retried.get(cell.key) != status["generation"]:
            self.causes[cell.key] = status.get("cause") or "unknown"
        else:
            return False
        return True

    def _count_done(self, cell: Cell, run: RunFolder) -> None:
        self.done.add(cell.key)
        self.causes.pop(cell.key, None)
        if run.config() is None:  # lost since; without it a report would not see the run
            with contextlib.suppress(OSError):
                run.create(cell.trial.config.model_dump(mode="json"))
        phases = (run.result() or {}).get("seconds") or {}
        known = {name: s for name, s in phases.items() if isinstance(s, int | float)}
        self.seconds[cell.key] = sum(known.values())
        self.training[cell.key] = known.get("train", 0.0)

    def _may_propose(self) -> bool:
        study = self.cfg.study
        more = self.n_proposals < (study.n_trials or 0)
        return bool(study.search) and more and not self.exhausted

    def _load_proposals(self) -> None:
        """Take over what this search has proposed so far, here, before, or in another process."""
        index = self.folder.index()
        if not self.cfg.study.search or index.get("search") != self.tree["study"]["search"]:
            return
        proposals = index.get("proposals", [])
        for proposal in proposals[self.n_proposals :]:
            if "keys" in proposal:
                self.cells += self._new(space.proposed(self.tree, proposal["factors"]))
        self.n_proposals = len(proposals)

    def _new(self, found: Sequence[Cell]) -> list[Cell]:
        known = {cell.key for cell in self.cells}
        return [cell for cell in found if cell.key not in known]

    def _propose(self) -> Cell | None:
        """Ask the sampler for a trial; None when there is none to be had now."""
        if not self._may_propose() or not self._fits_deadline(None):
            return None
        try:
            with self.folder.locked():
                self._load_proposals()
                if not self._may_propose():
                    return None
                return self._propose_alone()
        except (OSError, optuna.exceptions.OptunaError) as error:
            self.display.say(f"no trial can be proposed: {error}")
            self.exhausted = True
            return None

    def _propose_alone(self) -> Cell | None:
        index = self.folder.index()
        number, changes = self.store.propose()
        try:
            found = space.proposed(self.tree, changes)
        except UserError as error:
            self.display.say(f"a proposal cannot be run: {error}")
            self.store.impossible(number, str(error))
            index["proposals"].append({"factors": changes, "error": str(error)})
            self.folder.write_index(index)
            self.n_proposals += 1
            return None
        if not self._new(found):
            self.store.repeated(number, objective(self.folder.run(found[0].key)))
            self.repeats += 1
            if self.repeats >= REPEATS:
                self.exhausted = True
                self.display.say(
                    f"the search has nothing new to propose after {self.n_proposals} trials"
                )
            return None
        self.repeats = 0
        index["proposals"].append({"factors": changes, "keys": [cell.key for cell in found]})
        index["cells"].update(_index_cells(found))
        self.folder.write_index(index)
        self.n_proposals += 1
        self.store.bind(number, found[0])
        self.cells += self._new(found)
        return found[0]

    # --- deadline -------------------------------------------------------------------------------

    def _seconds_left(self) -> float:
        minutes = self.cfg.study.deadline
        return math.inf if minutes is None else 60 * minutes - time.monotonic() + self.started

    def _past_deadline(self) -> bool:
        return self._seconds_left() <= 0

    def _fits_deadline(self, cell: Cell | None) -> bool:
        """Whether a trial, or any that a search may propose, can end in time."""
        left = self._seconds_left()
        if left == math.inf:
            return True
        estimate = self._estimate(cell) if cell else max(self.seconds.values(), default=0.0)
        return estimate is None or estimate <= left

    def _estimate(self, cell: Cell) -> float | None:
        """Seconds that a trial takes at the slowest pace seen so far; None: nothing is known.

        Training grows with a trial's work; starting and evaluating cost what they cost.
        """
        work = {c.key: _work_of(c) for c in self.cells}
        paces = [s / work[k] for k, s in self.training.items() if s and k in work]
        beside = [s - self.training[k] for k, s in self.seconds.items()]
        for child in self.children:
            run = child.running
            if child.cell is None or run is None or not 0.05 < run.share < 1:
                continue
            left = run.row.get("seconds_left")
            if left is not None:
                training = left / (1 - run.share)
                paces.append(training / work[child.cell.key])
                beside.append(max(0.0, time.monotonic() - run.started - run.share * training))
        own = _work_of(cell) * max(paces) + max(beside) if paces else None
        floor = cell.trial.config.train.seconds
        return max(own or 0.0, floor or 0.0) or None

    # --- what children say ----------------------------------------------------------------------

    def _receive(self, timeout: float) -> None:
        if not self.children:
            time.sleep(timeout)
            return
        for selected, _ in self.selector.select(timeout):
            self._listen(selected.data)

    def _listen(self, child: _Child, *, gone: bool = False) -> None:
        """Hear what a child has said since; no more after the end of it, or when it is gone."""
        stream = child.process.stdout
        assert stream is not None
        if stream.closed:
            return
        try:
            while data := os.read(stream.fileno(), 1 << 16):
                *lines, child.rest = (child.rest + data).split(b"\n")
                for line in lines:
                    with contextlib.suppress(json.JSONDecodeError):
                        self._hear(child, json.loads(line))
        except BlockingIOError:
            if not gone:
                return
        self.selector.unregister(stream)
        stream.close()

    def _hear(self, child: _Child, message: dict[str, Any]) -> None:
        event = message.pop("event", None)
        cell = child.cell
        if event == "ready":
            child.ready = True
            self.start_failures = 0
        elif cell is None or child.end is not None:
            return
        elif event == "refused":
            if message["why"] == "held":
                self.held_until[cell.key] = time.monotonic() + LOOK_AGAIN
            child.cell = child.running = None
        elif event == "progress" and child.running is not None:
            if not child.begun:
                child.begun = True
                child.number = self._tell(lambda: self.store.begin(cell))
            child.running.row = message
        elif event == "report":
            child.send(pruned=self._should_prune(child, message))
        elif event == "end":
            child.end = message

    def _should_prune(self, child: _Child, message: dict[str, Any]) -> bool:
        number, value = child.number, message["value"]
        if number is None or child.running is None or value is None:
            return False
        # Trials are compared at the same share of their budget, whatever a step is.
        steps = child.running.row.get("steps") or message["step"]
        percent = round(100 * message["step"] / steps)
        return bool(self._tell(lambda: self.store.should_prune(number, percent, value)))

    def _tell(self, action: Any) -> Any:
        """Change the Optuna study; a disk that is full costs its entry, never the study."""
        try:
            with self.folder.locked():
                return action()
        except UserError:
            raise
        except (OSError, optuna.exceptions.OptunaError, ValueError, KeyError) as error:
            self.display.say(f"Optuna was not told ({error}); the next start makes up for it")
            return None

    def _reap(self) -> None:
        """Record the trials of children that are gone."""
        for child in list(self.children):
            code = child.process.poll()
            if code is None:
                continue
            self._listen(child, gone=True)
            self.children.remove(child)
            if child.process.stdin is not None:
                with contextlib.suppress(OSError):
                    child.process.stdin.close()
            if not child.ready or child.cell is None:
                self._not_started(child, code)
            else:
                self._record(child, child.cell, code)
            child.errors.close()

    def _record(self, child: _Child, cell: Cell, code: int) -> None:
        self.folder.check()  # a trial that lost its folder has not failed
        run = self.folder.run(cell.key)
        end = child.end or {}
        if run.result() is not None:
            self._count_done(cell, run)
            self._tell(lambda: self.store.finish(cell, "done", objective(run)))
            self._say_end(cell, "done")
            return
        state = end.get("state")
        if state == "pruned":
            self.pruned.add(cell.key)
            self._tell(lambda: self.store.finish(cell, "pruned"))
            self._say_end(cell, "pruned")
            return
        if child.stop_sent:
            self._tell(lambda: self.store.finish(cell, "interrupted", cause="interrupted"))
            return
        if code < 0 and not end:
            # Whoever kills a whole job reaches this process a moment after its children.
            time.sleep(KILL_PAUSE)
            if self.signals:
                return
        status = run.status()
        written = None  # by a process that could not come to its last line
        if status["state"] == "failed" and self.retried.get(cell.key) != status["generation"]:
            written = status.get("cause")
        cause = (
            end.get("cause")
            or written
            or ("stopped by SIGTERM" if state == "interrupted" else _death(code, child, run))
        )
        if self._has_shrunk(cell, run, cause):
            return
        self._fail(cell, cause, state)

    def _has_shrunk(self, cell: Cell, run: RunFolder, cause: str) -> bool:
        """Whether a trial on several devices left word to begin again with fewer rows a pass."""
        record = run.environment().get("micro_batch") or {}
        smaller = record.get("out_of_memory")
        may = cell.key not in self.shrunk and cell.trial.config.train.devices > 1
        if not (may and smaller and cause.startswith(OUT_OF_MEMORY)):
            return False
        self.shrunk.add(cell.key)
        self.retried[cell.key] = run.status()["generation"]
        self._tell(lambda: self.store.finish(cell, "interrupted", cause=cause))
        self.display.say(
            f"{cell.name}, seed {cell.seed}: {cause}; again with {smaller['to']} rows a pass"
        )
        return True

    def _fail(self, cell: Cell, cause: str, state: str | None) -> None:
        self.causes[cell.key] = cause
        self.retried.pop(cell.key, None)
        self._write_failure(cell, cause)
        self._tell(lambda: self.store.finish(cell, "failed", cause=cause))
        self._say_end(cell, "failed", cause)

    def _write_failure(self, cell: Cell, cause: str) -> None:
        """Put a cause into status.json, unless the child did or the disk refuses."""
        self.folder.check()
        run = self.folder.run(cell.key)
        with contextlib.suppress(OSError):
            if run.status()["state"] != "failed":
                run.create(cell.trial.tree)
                run.end("failed", run.begin(), cause)

    def _finish_records(self) -> None:
        """What a full disk refused to take when it happened, once more."""
        by_key = {cell.key: cell for cell in self.cells}
        for key, cause in self.causes.items():
            self._write_failure(by_key[key], cause)

    def _not_started(self, child: _Child, code: int) -> None:
        """A child is gone before it had a trial: no trial fails for it, unless none ever starts."""
        if child.stop_sent or self.signals:
            return
        self.start_failures += 1
        if self.start_failures >= 3:
            raise UserError(f"the processes that train do not start: {_death(code, child, None)}")

    # --- stopping -------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Count Ctrl-C and SIGTERM instead of dying from them."""
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread can; the caller handles signals
            return
        # What is ignored stays so: nohup ignores SIGHUP.
        names = [
            s
            for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
            if signal.getsignal(s) != signal.SIG_IGN
        ]
        before = {s: signal.signal(s, lambda n, _: self.signals.append(n)) for s in names}
        try:
            yield
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)

    def _poll_signals(self) -> None:
        """Stop the children at the first signal or at the deadline, kill them at the second."""
        if not self.signals and not self._past_deadline():
            return
        if self.stop_at is None:
            self.stop_at = time.monotonic() + STOP_SECONDS
            if self.signals:
                self.display.say("stopping: checkpoints are being written; once more kills at once")
            for child in self.children:
                child.stop_sent = True
                if child.cell is None:
                    child.kill()
                else:
                    child.send(stop=True)
        if len(self.signals) > 1 or time.monotonic() > self.stop_at:
            for child in self.children:
                child.kill()

    def _kill_all(self) -> None:
        for child in self.children:
            child.kill()
        for child in self.children:
            child.process.wait()
            for stream in (child.process.stdin, child.process.stdout, child.errors):
                if stream is not None:
                    with contextlib.suppress(OSError):
                        stream.close()
        self.children.clear()
        self.selector.close()

    # --- the study's files ----------------------------------------------------------------------

    def _write_index(self) -> None:
        study = self.cfg.study
        factors = space.factor_names(self.cfg)
        with self.folder.locked():
            self._load_proposals()
            before = self.folder.index()
            cells = _index_cells(self.cells)
            # Runs that an edited YAML asks for no more stay, and say what they were.
            old = {**before.get("orphan_cells", {}), **before.get("cells", {})}
            orphans = sorted(run.key for run in find_runs(self.folder.path) if run.key not in cells)
            self.folder.write_index(
                {
                    "name": study.name,
                    "question": study.question,
                    "finding": study.finding,
                    "margin": study.margin,
                    "x": study.x or (factors[0] if factors else None),
                    "factors": factors,
                    "cells": cells,
                    "orphans": orphans,
                    "orphan_cells": {key: old[key] for key in orphans if key in old},
                    "search": self.tree["study"]["search"],
                    "proposals": before.get("proposals", []) if self.n_proposals else [],
                    **({"tuned": self.tuned} if self.arms else {}),
                    **commit(),
                    **self._command_line(before),
                    "config": self.tree,
                }
            )
        if orphans and not hasattr(self, "store"):
            self.display.say(
                f"{len(orphans)} runs of an earlier form of this study are kept, as orphans"
            )

    def _command_line(self, before: Mapping[str, Any]) -> dict[str, Any]:
        if self.words is not None:
            return {"command": ["python", "-m", "ablate", *self.words]}
        return {"command": before["command"]} if "command" in before else {}

    def _look_at_disk(self, cells: Sequence[Cell]) -> None:
        """Count what has ended before this start."""
        retry = self.cfg.study.retry == "failed"
        for cell in cells:
            run = self.folder.run(cell.key)
            status = run.status()
            if run.result() is not None:
                if status["state"] != "done":
                    self._tidy(cell, run)
            elif retry and status["state"] == "failed":
                self.retried[cell.key] = status["generation"]
                continue
            self._ended_meanwhile(cell, run)

    def _tidy(self, cell: Cell, run: RunFolder) -> None:
        """What its process did not get to after the result."""
        train = cell.trial.config.train
        with contextlib.suppress(OSError), run.lock():  # Timeout is an OSError
            checkpoint.finish(run.checkpoint, train.keep, train.checkpoint_steps)
            run.end("done", run.begin())

    def _note_commits(self) -> None:
        now = commit()["commit"]
        others = Counter(
            made
            for key in self.done
            if (made := self.folder.run(key).environment().get("commit")) not in (None, now)
        )
        for made, count in others.items():
            self.display.say(
                f"{count} finished trials were made by commit {made[:10]}, "
                f"the code here is at {(now or 'no commit')[:10]}: the report will say so"
            )
        changed = Counter(
            name
            for cell in self.cells
            if cell.key in self.done
            for name, digest in own_sources(cell.trial.architecture.letters).items()
            if (self.folder.run(cell.key).environment().get("layers") or {}).get(name) != digest
        )
        for name, count in changed.items():
            self.display.say(
                f"{count} finished trials were made by another source of the layers of '{name}': "
                "the report will say so, and study.name=… begins a study of its own"
            )

    def _note_evaluations(self) -> None:
        """Finished trials are not evaluated again, whatever is asked for now."""
        names = [f"evaluate.{name}" for name in ("recall", "sizes", "suites", "length")]
        other: Counter[str] = Counter()
        for cell in self.cells:
            tree = self.folder.run(cell.key).config() if cell.key in self.done else None
            for name in names if tree is not None else []:
                then, now = (config.get(t, name) or None for t in (tree or {}, cell.trial.tree))
                other[name] += then != now
        for name, count in (+other).items():
            self.display.say(
                f"{count} finished trials were evaluated with another {name}, and are not again: "
                "python -m ablate evaluate RUN_FOLDER does, where train.keep=weights kept weights"
            )

    def _prepare_data(self) -> None:
        """Build every cache once, here, so that children only open them; check budgets on it."""
        token_sets: dict[str, TokenSet] = {}
        for cell in self._missing():
            cfg = cell.trial.config
            name = cfg.data.model_dump_json()
            if name not in token_sets:
                token_sets[name] = prepare(cfg.data)
            try:
                _check_epochs(cell, token_sets[name])
                _check_length(cfg, token_sets[name])
            except UserError as error:
                raise UserError(f"cell '{cell.arm}': {error}") from None
        if not token_sets:
            prepare(self.cfg.data)

    # --- what the user sees ---------------------------------------------------------------------

    def _say_end(self, cell: Cell, state: str, cause: str | None = None) -> None:
        run = self.folder.run(cell.key)
        text = f"{cell.name}, seed {cell.seed}: {state}"
        value = objective(run)
        if state == "done" and value is not None:
            text += f", loss {value:.4f} on validation A"
        smaller = ((run.result() or {}).get("train") or {}).get("out_of_memory")
        if smaller:
            text += (
                f", out of memory with {smaller['from']} rows a pass and again with {smaller['to']}"
            )
        if cause:
            text += f" ({cause})"
        self.display.say(text)

    def _snapshot(self, slots: int) -> Snapshot:
        running = [c.running for c in self.children if c.running is not None and c.cell is not None]
        n_seeds = len(self.cfg.study.seeds) or 1
        total = (self.cfg.study.n_trials or 0) * n_seeds if self.cfg.study.search else 0
        if self.arms and self.tuned is None:
            total = len(self.cells) + len(self.arms)
        total = max(total, len(self.cells))
        ended = len(self.done) + len(self.pruned) + len(self.causes)
        left = None
        if self.seconds or any(r.row.get("seconds_left") is not None for r in running):
            mean = sum(self.seconds.values()) / len(self.seconds) if self.seconds else 0.0
            mean = mean or max(
                (
                    time.monotonic() - r.started + (r.row.get("seconds_left") or 0.0)
                    for r in running
                ),
                default=0.0,
            )
            waiting = total - ended - len(running)
            current = sum(r.row.get("seconds_left") or mean for r in running)
            left = (current + waiting * mean) / max(1, min(slots, len(running) + waiting))
        return Snapshot(
            total=total,
            done=len(self.done) + len(self.pruned),
            failed=len(self.causes),
            held=sum(t > time.monotonic() for t in self.held_until.values()),
            running=running,
            seconds_left=left,
        )

    def _outcome(self) -> StudyOutcome:
        missing = [cell.key for cell in self._missing()]
        problems = self._problems()
        # A rate at which the loss diverges is an answer of the first stage, not a failure.
        stages = {cell.key: cell.stage for cell in self.cells}
        failed = any(
            stages[key] == "confirm" or not cause.startswith("diverged")
            for key, cause in self.causes.items()
        )
        if self.signals:
            code = 128 + self.signals[0]
        else:
            nothing = not self.cells  # no proposal of a search could be run
            code = 1 if failed or missing or problems or nothing or self._may_propose() else 0
        order = [cell.key for cell in self.cells]
        return StudyOutcome(
            folder=self.folder.path,
            cells=self.cells,
            done=[key for key in order if key in self.done or key in self.pruned],
            causes=dict(self.causes),
            unfinished=missing,
            exit_code=code,
            problems=problems,
        )


def summary(outcome: StudyOutcome) -> Table:
    """Arms by what became of their seeds."""
    table = Table(title=f"study {outcome.folder.name}", title_justify="left")
    table.add_column("arm")
    states = ("done", "failed", "waiting")
    for name in states:
        table.add_column(name, justify="right")
    arms: dict[str, Counter[str]] = {}
    done = set(outcome.done)
    for cell in outcome.cells:
        state = (
            "done" if cell.key in done else "failed" if cell.key in outcome.causes else "waiting"
        )
        name = cell.arm if cell.stage == "confirm" else f"{cell.arm}, tuning"
        arms.setdefault(name, Counter())[state] += 1
    for arm, counts in arms.items():
        table.add_row(arm, *(str(counts[s] or "") for s in states))
    return table


def _causes(outcome: StudyOutcome) -> Iterator[str]:
    for cell in outcome.cells:
        if cell.key in outcome.causes:
            yield f"failed: {cell.name}, seed {cell.seed} ({cell.key}): {outcome.causes[cell.key]}"
    if outcome.causes:
        yield "study.retry=failed runs the failed ones again"
    for problem in outcome.problems:
        yield f"the confirming stage has not begun: {problem}"


def _remarks(cells: Sequence[Cell]) -> Iterator[str]:
    """What is worth saying about a study before it runs."""
    merged = {cell.arm: cell.also for cell in cells if cell.also}
    for arm, also in merged.items():
        yield f"'{arm}' and {' and '.join(repr(a) for a in also)} are the same run, made once"
    yield from dict.fromkeys(warning for cell in cells for warning in cell.trial.warnings)


def _index_cells(cells: Sequence[Cell]) -> dict[str, dict[str, Any]]:
    return {
        cell.key: {
            "arm": cell.arm,
            "factors": cell.factors,
            "seed": cell.seed,
            **({"also": list(cell.also)} if cell.also else {}),
            **({"stage": cell.stage} if cell.stage == "tune" else {}),
        }
        for cell in cells
    }


def _check_epochs(cell: Cell, token_set: TokenSet) -> None:
    cfg, tokens = cell.trial.config, cell.trial.tokens
    stream = TrainStream(token_set, cfg.data, batch_size=cfg.train.batch_size, seed=cfg.seed)
    if math.isfinite(tokens):
        check_epochs(token_set, cfg.data, stream.text_tokens(int(tokens)))


def _check_length(cfg: Config, token_set: TokenSet) -> None:
    """evaluate.length needs long documents, which is better known before training than after."""
    if cfg.evaluate.length and cfg.evaluate.long_documents is None:
        ends = token_set.splits["val_b"].doc_offsets
        longest = max((int(b - a) for a, b in itertools.pairwise(ends)), default=0)
        check_longest(longest, cfg.data.seq_len, max(cfg.evaluate.length))


def _work_of(cell: Cell) -> float:
    """Training FLOPs of a trial, or its seconds where time is the budget; for comparison only."""
    return cell.trial.config.train.seconds or cell.trial.flops


def _death(code: int, child: _Child, run: RunFolder | None) -> str:
    """How a process that said nothing went."""
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = "?"
        return f"killed by signal {-code} ({name})"
    child.errors.seek(0)
    last = _last_line(child.errors.read().decode(errors="replace"))
    if run is not None and run.log.exists():
        last = _last_line(run.log.read_text(errors="replace")) or last
    return f"exit code {code}" + (f": {last}" if last else "")


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else ""
