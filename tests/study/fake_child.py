"""A child whose training is make-believe: it starts at once and misbehaves when told to.

The learning rate says what it does: see `MISDEEDS`. Every step is written down as a checkpoint, and
every beginning and end in `calls.log` of the study's folder.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import signal
import sys
import time
from typing import Any

from ablate.run import atomic_write
from ablate.study.child import main

STEPS = 8
RAISES, KILLED, EXITS, FULL, SLOW, ONCE, DEAF, DIVERGES = (0.1 + i / 1000 for i in range(1, 9))


def note(folder: Any, *words: Any) -> None:
    with (folder.path.parent / "calls.log").open("a") as file:
        file.write(" ".join(str(w) for w in (folder.key, os.getpid(), *words)) + "\n")


def misbehave(lr: float, step: int, generation: int) -> None:
    if lr == RAISES and step == 3:
        raise RuntimeError("the line says why")
    if lr == DIVERGES and step == 3:
        raise RuntimeError("diverged: the loss is not finite")
    if lr == KILLED and step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    if lr == EXITS and step == 3:
        os.write(2, b"something on stderr\n")
        os._exit(7)
    if lr == FULL and step == 3:
        raise OSError(errno.ENOSPC, "No space left on device")
    if lr == DEAF:
        end = time.monotonic() + 100
        while time.monotonic() < end:
            with contextlib.suppress(KeyboardInterrupt):
                time.sleep(1)
    if lr == ONCE and step == 3 and generation == 1:
        raise ValueError("only the first time")


def train(cfg: Any, folder: Any, *, on_progress: Any, should_prune: Any) -> dict[str, Any]:
    with folder.lock():
        generation = folder.begin()
        saved = folder.checkpoint / "step"
        first = int(saved.read_text()) if saved.exists() else 0
        note(folder, "begins", first)
        seconds = float(os.environ.get("FAKE_STEP_SECONDS", "0.02"))
        lr, loss = cfg.train.lr, math.inf
        try:
            for step in range(first + 1, STEPS + 1):
                time.sleep(seconds * (100 if lr == SLOW else 1))
                misbehave(lr, step, generation)
                folder.check(generation)
                loss = 3 + (math.log10(lr) + 2.5) ** 2 + 0.01 * cfg.seed + 1 / step
                atomic_write(saved, str(step))
                print("printed by the trial at step", step, flush=True)
                left = seconds * (STEPS - step)
                on_progress({"step": step, "steps": STEPS, "loss": loss, "seconds_left": left})
                if should_prune is not None and should_prune(step, loss):
                    folder.end("pruned", generation)
                    raise RuntimeError("the caller said so")
        except (RuntimeError, ValueError) as error:
            if lr == DIVERGES:
                folder.end("failed", generation, str(error))
            elif folder.status()["state"] == "running":
                folder.end("failed", generation, f"{type(error).__name__}: {error}")
            raise
        except KeyboardInterrupt:
            folder.end("interrupted", generation)
            raise
        result = {"val_a": {"loss": loss}, "val_b": {"loss": loss}, "seconds": {"train": 1.0}}
        folder.write_result(result, generation)
        folder.end("done", generation)
        note(folder, "ends")
        return result


if __name__ == "__main__":
    if os.environ.get("FAKE_DOES_NOT_START"):
        sys.exit("cannot import the trainer")
    main(train=train)
