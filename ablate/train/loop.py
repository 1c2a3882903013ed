"""The one training loop.

    train(cfg)              result as a dict, nothing kept
    train(cfg, folder)      the same in a run folder: resumes there, and ends with its result.json

Notable: the order of data is a function of (seed, step), so that resuming is nothing but weights,
moments and a step; every figure that a step makes stays on the device until a line is logged; one
validation, checkpoint or log line never changes what the next step computes.
"""

from __future__ import annotations

import functools
import gc
import logging
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from ablate.arch.spec import Architecture
from ablate.config import Config, flatten, load, science
from ablate.data import (
    Batch,
    TokenSet,
    TrainStream,
    check_epochs,
    model_vocab,
    prefetched,
    prepare,
    writers,
)
from ablate.data.tokenizer import Tokenizer
from ablate.data.worker import Pool
from ablate.errors import UserError
from ablate.layers.registry import own_sources
from ablate.run import RunFolder, StaleWriter, process_age
from ablate.train import checkpoint
from ablate.train.budget import Budget
from ablate.train.clock import Clock
from ablate.train.engine import Engine
from ablate.train.environment import attention_forms, device_of, environment, numerics, uses_bf16
from ablate.train.micro_batch import Shape
from ablate.train.optim import group_table, load_state_tensors, state_tensors
from ablate.train.peak import peak_flops
from ablate.train.ranks import Ranks, from_torchrun, ignore_signals, launch
from ablate.train.schedule import lr_scale
from ablate.train.step import Reading
from ablate.train.stop import OUT_OF_MEMORY, Interrupts, Pruned, TrialFailed, cause_of
from ablate.train.tracker import Tracker
from ablate.train.validation import RecallScore, TextScore, Validator

log = logging.getLogger(__name__)

VALIDATIONS = 5  # over the budget, unless train.eval_every says otherwise
MAX_SKIPPED = 20  # steps in a row that are not finite, after which the run has diverged
MAX_SKIPPED_LAST = 5  # the same of a run's last steps: whether it would have gone on is not known
MAX_SKIPPED_SHARE = 0.5  # of all steps: a run that skipped more has not trained on its budget
REPORT_SECONDS = 0.3  # at most so often on_progress is called between log steps
CHECKPOINT_SHARE = 0.05  # of the time at most goes into checkpoints
_LOADED = process_age()  # what this process took to start and to import torch; counted once

Progress = Callable[[dict[str, Any]], None]
ShouldPrune = Callable[[int, float], bool]
Evaluate = Callable[..., dict[str, Any]]


def train(
    cfg: Config | Mapping[str, Any],
    folder: RunFolder | None = None,
    *,
    on_progress: Progress | None = None,
    should_prune: ShouldPrune | None = None,
    evaluate: Evaluate | None = None,
) -> dict[str, Any]:
    """Train, validate, and return the content of result.json.

    cfg: a Config, or a plain dict that makes one.
    folder: taken under its lock; a run that was begun there goes on from its newest undamaged
        checkpoint, and a finished one returns its result at once. None: a temporary folder.
    on_progress: called with {phase, step, steps, tokens, loss, lr, tokens_per_second, mfu,
        seconds_left} a few times a second and at log steps; figures not known yet are None.
    should_prune: called with (step, loss on validation A) after each validation; True ends the run.
    evaluate: called with (cfg, folder, model, token_set, bf16=…, check=…) after the last
        validation; what it returns stands under "evaluation" in the result. `check` is to be called
        now and then, and may raise to stop.

    With `train.devices` above 1 the processes of the other devices are started here, or are those
    of torchrun, in which every process calls this and gets the result; hooks are rank 0's alone.
    A run that is out of memory goes on once with fewer rows a pass, as its result says.

    However it ends, status.json says so. Raises UserError for a config that cannot be run (before
    any compute), Pruned, TrialFailed with the cause (out of memory, disk full, diverged, a bug),
    KeyboardInterrupt after SIGINT or SIGTERM and a checkpoint, StaleWriter when another process
    took the run over, filelock.Timeout when a live process holds the folder.
    """
    if not isinstance(cfg, Config):
        cfg = load(cfg)
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="ablate-") as path:
            temporary = RunFolder(Path(path) / "run")
            return train(
                cfg,
                temporary,
                on_progress=on_progress,
                should_prune=should_prune,
                evaluate=evaluate,
            )
    ranks = from_torchrun(cfg.train)
    if ranks.rank:
        released_with = _follow(cfg, ranks)
        ranks.leave()
        return released_with
    ranks.agree(folder.result())
    result = None
    try:
        result = _lead(cfg, folder, ranks, (on_progress, should_prune, evaluate))
    finally:
        ranks.end(result)
    return result


Hooks = tuple[Progress | None, ShouldPrune | None, Evaluate | None]


def _lead(cfg: Config, folder: RunFolder, ranks: Ranks, hooks: Hooks) -> dict[str, Any]:
    """`train` in the process that has the run folder."""
    with folder.lock():
        result = folder.result()
        if result is not None:
            if folder.status().get("state") != "done":  # killed just after its last write
                _finish(cfg, folder, folder.begin())
            return result
        _create(cfg, folder)
        generation = folder.begin()
        tracker = Tracker(cfg, folder)
        run: _Run | None = None
        smaller: dict[str, Any] | None = None
        interrupts = Interrupts()

        def lost(cause: str) -> None:
            log.error("%s", cause)
            if run is not None:
                run.shrink(cause)
            _end(folder, "failed", generation, cause, run)
            _close(tracker, folder, generation)
            os._exit(1)

        try:
            with interrupts:
                if ranks.world == 1:
                    begun = time.perf_counter()
                    ranks = launch(cfg, lost)
                    ranks.agree(None)
                    _add_loading_time(time.perf_counter() - begun)
                device = device_of(cfg.train)
                with numerics(cfg.train, device):
                    start = functools.partial(
                        _Run, cfg, folder, generation, device, interrupts, ranks, tracker, *hooks
                    )
                    run = start()
                    try:
                        result = run.run()
                    except Exception as error:
                        smaller = run.smaller(cause_of(error))
                        if smaller is None or ranks.world > 1:
                            raise
                    if smaller is not None:  # outside of `except`, whose frames hold the memory
                        log.warning(
                            "%(cause)s; again with %(to)d rows a pass instead of %(from)d",
                            smaller["out_of_memory"],
                        )
                        run = None
                        gc.collect()
                        if device.type == "cuda":
                            torch.cuda.empty_cache()
                        interrupts.deferred = False
                        run = start(smaller)
                        result = run.run()
                _finish(cfg, folder, generation)
            assert result is not None
            return result
        except StaleWriter:
            raise
        except Pruned:
            checkpoint.finish(folder.checkpoint, cfg.train.keep, cfg.train.checkpoint_steps)
            _end(folder, "pruned", generation, None, run)
            raise
        except KeyboardInterrupt:
            _end(folder, "interrupted", generation, None, run)
            raise
        except UserError as error:
            _end(folder, "failed", generation, str(error), run)
            raise
        except Exception as error:
            if interrupts.raised:  # swallowed by a library, in the middle of its import
                _end(folder, "interrupted", generation, None, run)
                raise KeyboardInterrupt from error
            cause = ranks.lost(patience=1.0) or cause_of(error)
            if run is not None and ranks.world > 1:
                run.shrink(cause)
            elif smaller is not None and cause.startswith(OUT_OF_MEMORY):
                cause += f" (again, with {smaller['rows']} rows a pass)"
            _end(folder, "failed", generation, cause, run)
            if isinstance(error, TrialFailed):
                raise
            raise TrialFailed(cause) from error
        finally:
            found = folder.result()
            ranks.end(found)
            _close(tracker, folder, generation)


def _follow(cfg: Config, ranks: Ranks) -> dict[str, Any]:
    """`train` in the other processes of a run: the steps that rank 0 announces."""
    ignore_signals()
    finished = ranks.agree(None)
    if finished is not None:
        return dict(finished)
    device = device_of(cfg.train)
    with numerics(cfg.train, device):
        token_set = prepare(cfg.data)
        stream = TrainStream(token_set, cfg.data, batch_size=cfg.train.batch_size, seed=cfg.seed)
        with _writers(stream, device, ranks) as pool:
            engine = Engine(cfg, architecture_of(cfg, token_set), device, ranks)
            record, first = ranks.agree(None)
            stepper = engine.stepper(record["rows"])
            engine.share_state(stepper)
            ranks.listen()  # rank 0 has compiled it all by now
            if engine.compiled:
                stepper.warm_up(ranks.part(stream.batch(first)))
            with _batches(stream, device, first, sys.maxsize, pool) as batches:
                while (lr := ranks.awaited()) is not None:
                    stepper(next(batches), lr)
            stepper.release()
        result = ranks.agree(None)
    if result is None:
        raise TrialFailed("rank 0 ended without a result, and says why in the run folder")
    return dict(result)


def architecture_of(cfg: Config, text: TokenSet | Tokenizer) -> Architecture:
    """The architecture that a config means on a text, whose tokenizer may say the vocabulary."""
    vocab_size = cfg.arch.vocab_size or model_vocab(text.vocab_size)
    return Architecture.from_config(cfg.arch, vocab_size=vocab_size)


def _writers(
    stream: TrainStream, device: torch.device, ranks: Ranks
) -> AbstractContextManager[Pool | None]:
    """Processes for the loader, where they pay: on a CPU they would take the core that trains."""
    return nullcontext() if device.type == "cpu" else writers(stream, ranks.world)


@contextmanager
def _batches(
    stream: TrainStream, device: torch.device, first: int, last: int, pool: Pool | None
) -> Iterator[Iterator[Batch]]:
    if device.type == "cpu":  # a thread would take the core that trains
        yield (stream.batch(step) for step in range(first, sys.maxsize))
        return
    with prefetched(stream, first, last, pin=True, pool=pool) as batches:
        yield batches


def _create(cfg: Config, folder: RunFolder) -> None:
    """Write config.yaml; UserError when the folder belongs to another config."""
    folder.create(cfg.model_dump(mode="json"))
    there = folder.config()
    if there is not None and science(load(there)) != science(cfg):
        raise UserError(f"run folder {folder.path} belongs to another config, see its config.yaml")


def _finish(cfg: Config, folder: RunFolder, generation: int) -> None:
    """What follows the result; done again by the next call if this one is cut short."""
    checkpoint.finish(folder.checkpoint, cfg.train.keep, cfg.train.checkpoint_steps)
    folder.end("done", generation)


def _end(
    folder: RunFolder, state: Any, generation: int, cause: str | None, run: _Run | None
) -> None:
    figures = {} if run is None else run.figures()
    try:
        folder.end(state, generation, cause, **figures)
    except OSError:  # a full disk must not hide the cause that is on its way
        return


def _close(tracker: Tracker, folder: RunFolder, generation: int) -> None:
    status = folder.status()
    if status.get("generation") == generation:
        tracker.finish(status["state"], status.get("cause"), folder.result())
    else:  # another process goes on with the run, and with its mirror
        tracker.finish("running")


def _too_many_skipped(reading: Reading, steps: int, last: bool) -> str | None:
    """Which steps were skipped, where a run that skipped them has diverged."""
    if reading.worst_streak >= MAX_SKIPPED:
        return f"{reading.worst_streak} steps in a row"
    if last and reading.streak >= MAX_SKIPPED_LAST:
        return f"the last {reading.streak} steps"
    if last and reading.skipped > MAX_SKIPPED_SHARE * steps:
        return f"{reading.skipped} of {steps} steps"
    return None


def check_branch(trunk: Config, branch: Config) -> None:
    """UserError where a branch's config differs from its trunk's in what it must not."""
    a, b = dict(flatten(science(trunk))), dict(flatten(science(branch)))
    for name in sorted(a.keys() | b.keys()):
        if a.get(name) != b.get(name) and not name.startswith(_BRANCH_MAY_DIFFER):
            raise UserError(
                f"train.branch_from: the trunk has another {name}, "
                "but a branch may differ in its budget, its decay and its evaluation only"
            )


_BRANCH_MAY_DIFFER = (
    *("evaluate.", "train.tokens", "train.flops", "train.seconds", "train.schedule"),
    *("train.warmup", "train.decay", "train.min_lr_ratio", "train.branch_"),
)


def _add_loading_time(seconds: float) -> None:
    global _LOADED
    _LOADED += seconds


def set_loading_time(seconds: float) -> None:
    """What the next run waited for its process to load, where that is not the process's age: one
    that loaded while the trial before still trained cost its slot nothing."""
    global _LOADED
    _LOADED = seconds


def _take_loading_time() -> float:
    """Seconds this process took to load, for the first run that asks."""
    global _LOADED
    taken, _LOADED = _LOADED, 0.0
    return taken


def _queues(device: torch.device) -> bool:
    """Whether the host runs ahead of the device."""
    return device.type == "cuda"


# Of a run, in its checkpoints.
_KEPT = (
    *("lr_scale", "timed_tokens", "validated_step", "validated_progress"),
    *("peak_memory", "to_first_step", "latest"),
)


class _Run:
    """One process's work on one run."""

    def __init__(
        self,
        cfg: Config,
        folder: RunFolder,
        generation: int,
        device: torch.device,
        interrupts: Interrupts,
        ranks: Ranks,
        tracker: Tracker,
        on_progress: Progress | None,
        should_prune: ShouldPrune | None,
        evaluate: Evaluate | None,
        smaller: dict[str, Any] | None = None,
    ) -> None:
        self.cfg, self.folder, self.generation, self.device = cfg, folder, generation, device
        self.interrupts, self.ranks, self.tracker = interrupts, ranks, tracker
        self.on_progress = on_progress or (lambda progress: None)
        self.should_prune = should_prune or (lambda step, loss: False)
        self.evaluate = evaluate
        self.clock = Clock(device)
        self.clock.seconds["start_up"] += _take_loading_time()
        # How a batch is cut, as environment.json has it; given where memory ran out before.
        self.micro_batch: dict[str, Any] | None = smaller
        self.bf16 = uses_bf16(cfg.train, device)
        self.step = 0  # steps taken, skipped ones included
        self.first_step = 0  # where this process began
        self.progress = 0.0  # share of the budget behind
        self.timed_tokens = 0  # trained in seconds["train"], over all processes
        self.logged_tokens, self.logged_seconds = 0, 0.0  # of those, at the last line
        self.validated_step, self.validated_progress = 0, 0.0
        self.last_validation_seconds = 0.0
        self.last_checkpoint, self.checkpoint_time, self.checkpoint_cost = 0, 0.0, 0.0
        self.peak_memory = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self.warmup = cfg.train.warmup
        self.branch: dict[str, Any] | None = None
        self.lr_scale = 0.0  # of the last step
        self.to_first_step: float | None = None  # seconds of this process up to the end of one
        self.latest: dict[str, Any] = {}  # newest figures, for on_progress
        self._reported = 0.0

    # --- the order of things -------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        with self.clock.of("start_up"):
            self.report("start_up", force=True)
            peak, peak_source = peak_flops(self.device.type, self.bf16, self.cfg.train.threads)
            self.peak = peak * self.ranks.world
            surroundings = environment(self.cfg.train, self.device)
            surroundings["hardware"] |= {"peak_flops": peak, "peak_source": peak_source}
        with self.clock.of("data"):
            self.report("data", force=True)
            self.token_set = prepare(self.cfg.data)
            self.stream = TrainStream(
                self.token_set,
                self.cfg.data,
                batch_size=self.cfg.train.batch_size,
                seed=self.cfg.seed,
            )
        with _writers(self.stream, self.device, self.ranks) as pool:  # start behind the build
            with self.clock.of("build"):
                self.report("build", force=True)
                self.build()
                self.restore()
                self.describe(surroundings)
                self.share_state()
            self.interrupts.deferred = True
            try:
                self.loop(pool)
            finally:
                self.stepper.release()  # evaluation may need the memory
        result = self.final()
        self.interrupts.deferred = False
        return result

    def build(self) -> None:
        cfg = self.cfg
        self.arch = architecture_of(cfg, self.token_set)
        self.cost = self.arch.cost(cfg.data.seq_len)
        self.flops_per_token = float(self.cost.train_flops)
        self.step_tokens = cfg.train.batch_size * cfg.data.seq_len
        self.budget = Budget.of(cfg.train, self.step_tokens, self.flops_per_token)
        if self.budget.steps is not None:
            self.check_epochs(self.budget.steps)
        self.engine = Engine(cfg, self.arch, self.device, self.ranks)
        self.model, self.optimizer = self.engine.model, self.engine.optimizer
        self.group_rows = group_table(self.model, self.engine.groups)
        self.shape = Shape.of(self.engine)
        if self.micro_batch is None:
            self.micro_batch = self.choose_micro_batch()
        self.stepper = self.engine.stepper(self.micro_batch["rows"])
        self.validator = Validator(
            cfg,
            self.token_set,
            self.model,
            self.stepper.autocast,
            self.between_batches,
            self.stepper.micro_batch,
        )
        self.decay_start = self.budget.decay_start(cfg.train.decay, None)

    def choose_micro_batch(self) -> dict[str, Any]:
        """What this run was begun with, else what the config says, else the best one here."""
        asked = self.cfg.train.micro_batch
        before = self.folder.environment().get("micro_batch") or {}
        record = {"asked": asked, "devices": self.ranks.world}
        if record.items() <= before.items():
            return dict(before)
        if asked == "auto":
            batch = self.stream.batch(0)
            return {**record, **self.shape.choose(self.engine, batch, self.interrupts.check)}
        rows = asked or self.cfg.train.batch_size // self.ranks.world
        return {**record, "rows": rows, "source": "config"}

    def smaller(self, cause: str) -> dict[str, Any] | None:
        """How to cut a batch after this; None where that would not help, or did not before."""
        record = self.micro_batch
        if record is None or record.get("out_of_memory") or not cause.startswith(OUT_OF_MEMORY):
            return None
        rows = record["rows"]
        fewer = [d for d in range(1, rows // 2 + 1) if rows % d == 0]
        if not fewer:
            return None
        flag = {
            "cause": cause,
            "from": rows,
            "to": fewer[-1],
            "step": self.step,
            "seconds": sum(self.clock.seconds.values()),
        }
        return {**record, "rows": fewer[-1], "out_of_memory": flag}

    def shrink(self, cause: str) -> None:
        """Leave word in the run folder for the next processes, where these cannot begin again:
        some wait for a device that will not answer."""
        smaller = self.smaller(cause)
        if smaller is not None:
            self.folder.write_environment({**self.folder.environment(), "micro_batch": smaller})

    def share_state(self) -> None:
        """Bring the other ranks to where this one begins."""
        if self.ranks.world > 1:
            self.ranks.agree((self.micro_batch, self.step))
            self.engine.share_state(self.stepper)

    def check_epochs(self, steps: int) -> None:
        tokens = self.stream.text_tokens(steps * self.step_tokens)
        check_epochs(self.token_set, self.cfg.data, tokens)

    def loop(self, pool: Pool | None) -> None:
        if self.validation_due():  # an interrupt had cut it short
            self.validate()
        if self.engine.compiled and self.progress < 1:
            with self.clock.of("first_step"):
                batch = self.ranks.part(self.stream.batch(self.step))
                self.shape.warm_up(self.stepper, batch, self.interrupts.check)
        self.ranks.listen()
        self.checkpoint_time = time.perf_counter()
        last = self.budget.steps or sys.maxsize
        with _batches(self.stream, self.device, self.step, last, pool) as batches:
            while self.progress < 1:
                self.interrupts.check()
                # The first steps compile and capture, so a budget in seconds does not pay for them.
                cold = self.step < self.first_step + self.stepper.cold_steps
                with self.clock.of("first_step" if cold else "train"):
                    self.train_steps(batches, 1 if cold else sys.maxsize)
                if self.progress < 1 and not self.interrupts.pending and self.validation_due():
                    self.validate()
                if self.interrupts.pending or self.checkpoint_due():
                    self.save()

    def train_steps(self, batches: Iterator[Batch], most: int) -> None:
        """Up to `most` steps, until something other than a step is to be done.

        A line is written once the next step is under way, so that the device never waits for it.
        """
        train = self.cfg.train
        line: Callable[[], None] | None = None
        for i in range(most):
            self.lr_scale = lr_scale(
                train.schedule,
                self.budget.progress(self.step + 0.5, self.clock.now("train")),
                warmup=self.warmup,
                decay_start=self.decay_start,
                min_ratio=train.min_lr_ratio,
            )
            lr = self.lr_scale * train.lr
            with self.ranks.step(lr):
                self.stepper(next(batches), lr)
            if line is not None:
                line()
                line = None
            self.step += 1
            if self.to_first_step is None:
                self.to_first_step = self.clock.so_far()
            if self.step > self.first_step + self.stepper.cold_steps:
                self.timed_tokens += self.step_tokens
            self.progress = self.budget.progress(self.step, self.clock.now("train"))
            if self.step % train.log_every == 0 or self.progress >= 1:
                line = self.log_line()
                if not _queues(self.device):
                    line()
                    line = None
            self.report("train")
            if (
                self.progress >= 1
                or self.interrupts.pending
                or self.validation_due()
                or self.checkpoint_due()
                or i + 1 == most
            ):
                if line is not None:
                    line()
                return

    def final(self) -> dict[str, Any]:
        at_stake = time.perf_counter() - self.checkpoint_time
        worth_it = at_stake > 0.1 * self.cfg.train.checkpoint_seconds
        if self.step > self.last_checkpoint and (worth_it or self.cfg.train.keep != "none"):
            self.save()
        val_a = self.validate()
        with self.clock.of("validation"):
            val_b = self.validator.text("val_b")
            recall = self.validator.recall(final=True)
        self.folder.check(self.generation)
        for name, score in (("val_a", val_a), ("val_b", val_b), ("mqar", recall)):
            if score is not None:
                self.folder.write_evaluation(name, {**score.summary(), **score.items()})
        evaluation: dict[str, Any] = {}
        if self.evaluate is not None:
            with self.clock.of("evaluation"):
                self.report("evaluation", force=True)
                evaluation = self.evaluate(
                    self.cfg,
                    self.folder,
                    self.model,
                    self.token_set,
                    bf16=self.bf16,
                    check=self.between_batches,
                )
        result = self.result(val_a, val_b, recall)
        if evaluation:
            result["evaluation"] = evaluation
        self.folder.write_result(result, self.generation)
        return result

    # --- beginning and going on ----------------------------------------------------------------

    def restore(self) -> None:
        """Go on from this folder's newest checkpoint, or from a trunk's, or from nothing."""
        train = self.cfg.train
        found = checkpoint.load_newest(self.folder.checkpoint)
        branch = None if train.branch_from is None else self.trunk(Path(train.branch_from))
        if branch is not None:
            # The whole of what follows the trunk is decay; its warm-up is the trunk's.
            self.warmup = 0.0
            self.decay_start = self.budget.decay_start(train.decay, branch.step)
            self.branch = {"from": Path(train.branch_from or "").name, "at": branch.step}
        source = found or branch
        if source is not None:
            self.load(source)
        if found is not None:
            for phase, seconds in found.state["seconds"].items():
                self.clock.seconds[phase] += seconds
            for name in _KEPT:
                setattr(self, name, found.state.get(name))
        elif branch is not None:
            self.validated_step = branch.step
            self.validated_progress = self.budget.progress(branch.step, 0.0)
        self.first_step = self.last_checkpoint = self.step
        self.progress = self.budget.progress(self.step, self.clock.seconds["train"])
        self.logged_tokens, self.logged_seconds = self.timed_tokens, self.clock.seconds["train"]
        self.folder.rewind_metrics(self.step)

    def load(self, source: checkpoint.Checkpoint) -> None:
        if source.state["data"] != self.token_set.fingerprint:
            raise UserError(
                f"checkpoint {source.path} was trained on other text (fingerprint "
                f"{source.state['data']}, now {self.token_set.fingerprint}); "
                "remove the run folder to begin again"
            )
        with torch.no_grad():
            for name, tensor in self.model_tensors().items():
                tensor.copy_(source.model[name])
        load_state_tensors(self.model, self.optimizer, source.optimizer)
        self.stepper.running.copy_(source.optimizer["run/running"])
        torch.set_rng_state(source.optimizer["run/rng_cpu"])
        if self.device.type == "cuda" and "run/rng_cuda" in source.optimizer:
            torch.cuda.set_rng_state(source.optimizer["run/rng_cuda"], self.device)
        self.step = source.step

    def trunk(self, path: Path) -> checkpoint.Checkpoint:
        """The checkpoint that a branch begins from; UserError when it does not fit this run."""
        train = self.cfg.train
        trunk = RunFolder(path)
        tree = trunk.config()
        if tree is None:
            raise UserError(f"train.branch_from: there is no run folder at '{path}'")
        there = checkpoint.steps(trunk.checkpoint)
        step = train.branch_at if train.branch_at is not None else max(there, default=0)
        if step not in there:
            kept = ", ".join(map(str, there)) or "none"
            raise UserError(f"train.branch_at is {step}, but the trunk's kept steps are {kept}")
        check_branch(load(tree), self.cfg)
        try:
            found = checkpoint.load(trunk.checkpoint, step)
        except ValueError as error:
            raise UserError(f"train.branch_from: {error}") from None
        if found.state["lr_scale"] != 1.0:
            raise UserError(
                f"train.branch_at is {step}, where the trunk's learning rate is at "
                f"{found.state['lr_scale']:.2f} of its peak; branch between warm-up and decay"
            )
        if self.budget.steps is not None and self.budget.steps <= step:
            raise UserError(
                f"the budget of {self.budget.steps} steps, which counts the trunk's part, must be "
                f"more than the {step} steps of train.branch_at"
            )
        return found

    def describe(self, surroundings: dict[str, Any]) -> None:
        """Write environment.json; a resumed run remembers the commits that worked on it, and
        the sources of own layers."""
        before = self.folder.environment()
        commits = list(before.get("commits", []))
        if surroundings["commit"] not in commits:
            commits.append(surroundings["commit"])
        meta = self.token_set.meta
        data = {"fingerprint": self.token_set.fingerprint, "splits": meta.get("splits")}
        forms = attention_forms(self.arch, self.cfg.data, self.cfg.train, self.device)
        more: dict[str, Any] = {
            "micro_batch": self.micro_batch,
            "attention": forms,
            "parameter_groups": self.group_rows,
        }
        layers = before.get("layers") or {}
        for name, digest in own_sources(self.arch.letters).items():
            made = [*layers[name].split(", "), digest] if name in layers else [digest]
            more.setdefault("layers", {})[name] = ", ".join(dict.fromkeys(made))
        self.folder.write_environment({**surroundings, "commits": commits, "data": data, **more})
        definition = self.token_set.tokenizer.definition
        if self.cfg.train.keep != "none" and definition is not None:
            self.folder.write_tokenizer(definition)  # weights without it could not read a text
        for row in self.group_rows:
            log.info(
                "AdamW %s: weight decay %g, %d parameters in %d tensors, %s: %s",
                *(row[name] for name in ("group", "weight_decay", "params", "tensors", "dtype")),
                ", ".join(row["names"]),
            )

    # --- between steps -------------------------------------------------------------------------

    def validation_due(self) -> bool:
        every = self.cfg.train.eval_every
        if every is not None:
            return self.step // every > self.validated_step // every
        marks = int(self.progress * VALIDATIONS + 1e-9)
        return marks > int(self.validated_progress * VALIDATIONS + 1e-9)

    def validate(self) -> TextScore:
        """Score validation A, log it, and let the caller prune."""
        started = time.perf_counter()
        with self.clock.of("validation"):
            self.report("validation", force=True)
            score = self.validator.text("val_a")
            recall = self.validator.recall(final=False)
        loss = score.summary()["loss"]
        if not loss - loss == 0:
            raise TrialFailed(f"diverged: the loss on validation A is {loss} at step {self.step}")
        row = {"step": self.step, "tokens": self.tokens, "val_a_loss": loss}
        if recall is not None:
            row["mqar_accuracy"] = recall.summary()["accuracy"]
        self.latest |= {name: row[name] for name in row if name not in ("step", "tokens")}
        self.validated_step, self.validated_progress = self.step, self.progress
        self.last_validation_seconds = time.perf_counter() - started
        self.folder.check(self.generation)
        logged = (r for r in self.folder.metrics() if r.get("step") == self.step)
        if not any("val_a_loss" in r for r in logged):  # a killed process may have been here
            self.folder.append_metrics(row)
            self.tracker.log(row)
        if self.should_prune(self.step, loss) and self.progress < 1:
            raise Pruned(f"pruned at step {self.step} with a loss of {loss:.4f} on validation A")
        return score

    def log_line(self) -> Callable[[], None]:
        """What writes the line of this step."""
        row: dict[str, Any] = {
            "step": self.step,
            "tokens": self.tokens,
            "lr": self.lr_scale * self.cfg.train.lr,
        }
        read, timed_tokens = self.stepper.note(), self.timed_tokens
        last = self.progress >= 1

        def write() -> None:
            reading = read()
            which = _too_many_skipped(reading, row["step"], last)
            if which is not None:
                raise TrialFailed(
                    f"diverged: {which} had a loss or gradient that is not finite, up to step "
                    f"{row['step']}"
                )
            seconds = self.clock.now("train")
            tokens = timed_tokens - self.logged_tokens
            speed = tokens / (seconds - self.logged_seconds) if tokens else None
            self.logged_tokens, self.logged_seconds = timed_tokens, seconds
            figures = {
                "loss": reading.loss,
                "grad_norm": reading.grad_norm,
                "tokens_per_second": speed,
                "mfu": speed and speed * self.flops_per_token / self.peak,
                "seconds": self.trained_seconds(),
                "skipped": reading.skipped,
            }
            line = {**row, **figures}
            self.latest |= line
            self.folder.append_metrics(line)
            self.tracker.log(line)
            if self.budget.steps is None:
                self.check_epochs(row["step"])
            self._reported = 0.0

        return write

    def checkpoint_due(self) -> bool:
        if self.step == self.last_checkpoint:
            return False
        if self.step in self.cfg.train.checkpoint_steps:
            return True
        pause = max(self.cfg.train.checkpoint_seconds, self.checkpoint_cost / CHECKPOINT_SHARE)
        return time.perf_counter() - self.checkpoint_time > pause

    def save(self) -> None:
        started = time.perf_counter()
        with self.clock.of("checkpoint"):
            self.report("checkpoint", force=True)
            self.folder.check(self.generation)
            self.track_memory()
            moments = state_tensors(self.model, self.optimizer)
            moments |= {"run/running": self.stepper.running, "run/rng_cpu": torch.get_rng_state()}
            if self.device.type == "cuda":
                moments["run/rng_cuda"] = torch.cuda.get_rng_state(self.device)
            state = {
                "data": self.token_set.fingerprint,
                "seconds": self.clock.seconds,
                **{name: getattr(self, name) for name in _KEPT},
            }
            root = self.folder.checkpoint
            checkpoint.save(root, self.step, self.model_tensors(), moments, state)
            checkpoint.tidy(root, self.cfg.train.checkpoint_steps)
        self.last_checkpoint, self.checkpoint_time = self.step, time.perf_counter()
        self.checkpoint_cost = self.checkpoint_time - started

    def model_tensors(self) -> dict[str, torch.Tensor]:
        """Parameters (a tied one once) and persistent buffers, by name."""
        kept = self.model.state_dict(keep_vars=True)
        buffers = {n: b for n, b in self.model.named_buffers() if n in kept}
        return dict(self.model.named_parameters()) | buffers

    def between_batches(self) -> None:
        """Called by the validator: an interrupt leaves a validation, and comes back to it."""
        if self.interrupts.pending:
            if self.step > self.last_checkpoint:
                self.save()
            self.interrupts.check()

    # --- figures -------------------------------------------------------------------------------

    @property
    def tokens(self) -> int:
        return self.step * self.step_tokens

    def trained_seconds(self) -> float:
        """Seconds in steps, over all processes, the first step of each included."""
        return self.clock.now("train") + self.clock.now("first_step")

    def report(self, phase: str, *, force: bool = False) -> None:
        now = time.perf_counter()
        if not force and now - self._reported < REPORT_SECONDS:
            return
        self._reported = now
        figures = ("loss", "lr", "tokens_per_second", "mfu", "val_a_loss")
        row: dict[str, Any] = {name: self.latest.get(name) for name in figures}
        row |= {"phase": phase, "step": self.step, "steps": None, "tokens": 0, "seconds_left": None}
        if hasattr(self, "budget"):
            steps = self.budget.total_steps(self.step, self.clock.now("train"))
            row |= {"steps": steps, "tokens": self.tokens, "seconds_left": self.seconds_left(steps)}
        self.on_progress(row)

    def seconds_left(self, steps: int) -> float | None:
        """Of training and of the validations to come; None before there is anything to go by."""
        seconds = self.clock.now("train")
        if not self.timed_tokens or seconds <= 0:
            return None
        training = (steps - self.step) * seconds * self.step_tokens / self.timed_tokens
        every = self.cfg.train.eval_every or max(1, steps // VALIDATIONS)
        validations = (steps - self.step) / every + 2
        return training + validations * self.last_validation_seconds

    def figures(self) -> dict[str, Any]:
        """The last figures, for the status of a run that ended without a result."""
        return {"step": self.step, **{k: v for k, v in self.latest.items() if k != "step"}}

    def track_memory(self) -> None:
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
        else:
            unit = 1 if sys.platform == "darwin" else 1024
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        self.peak_memory = max(self.peak_memory, peak)

    def result(
        self, val_a: TextScore, val_b: TextScore, recall: RecallScore | None
    ) -> dict[str, Any]:
        """The content of result.json."""
        self.track_memory()
        timed = self.clock.seconds["train"]
        speed = self.timed_tokens / timed if self.timed_tokens and timed else None
        train = {
            "steps": self.step,
            "tokens": self.tokens,
            "text_tokens": self.stream.text_tokens(self.tokens),
            "flops": self.tokens * self.flops_per_token,
            "seconds": self.trained_seconds(),
            "tokens_per_second": speed,
            "mfu": speed and speed * self.flops_per_token / self.peak,
            "loss": self.latest.get("loss"),
            "skipped_steps": self.latest.get("skipped", 0),
            "peak_memory_bytes": self.peak_memory,
            "micro_batch": self.stepper.micro_batch,
            "out_of_memory": (self.micro_batch or {}).get("out_of_memory"),
            "seconds_to_first_step": self.to_first_step,
            "lr": self.cfg.train.lr,
            "branch": self.branch,
        }
        result: dict[str, Any] = {
            "architecture": self.architecture(),
            "train": train,
            "val_a": val_a.summary(),
            "val_b": val_b.summary(),
            "data": {
                "fingerprint": self.token_set.fingerprint,
                "unique_tokens": self.token_set.splits["train"].n_tokens,
                "epochs": self.stream.epochs(self.tokens),
                "tokenizer": self.token_set.tokenizer.name,
                "vocab_size": self.token_set.vocab_size,
            },
            "seconds": dict(self.clock.seconds),
        }
        if recall is not None:
            result["mqar"] = recall.summary()
        return result

    def architecture(self) -> dict[str, Any]:
        arch, cost = self.arch, self.cost
        return {
            "pattern": arch.pattern,
            "n_layers": arch.n_layers,
            "d_model": arch.d_model,
            "vocab_size": arch.vocab_size,
            "params": cost.params,
            "non_embedding_params": cost.non_embedding_params,
            "forward_flops_per_token": cost.forward_flops,
            "train_flops_per_token": cost.train_flops,
            "state_bytes": cost.state_bytes,
            **arch.shares(),
            "match": self.cfg.match.certificate,
        }
