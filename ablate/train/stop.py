"""How a run ends before its budget does."""

from __future__ import annotations

import errno
import signal
import threading
from types import FrameType
from typing import Any

import torch

OUT_OF_MEMORY = "out of memory"  # how a cause begins that fewer rows a pass may help
_NO_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Pruned(RuntimeError):
    """The caller's `should_prune` said so; the run folder's state is "pruned"."""


class TrialFailed(RuntimeError):
    """The run cannot go on; the message is the cause, as in status.json."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, here or in what led to this error."""
    chain: BaseException | None = error
    while chain is not None:
        text = str(chain)
        if isinstance(chain, torch.OutOfMemoryError | MemoryError) or any(
            words in text for words in _NO_MEMORY
        ):
            return True
        chain = chain.__cause__ or chain.__context__
    return False


def cause_of(error: BaseException) -> str:
    """One line that says what went wrong, for status.json."""
    text = " ".join(str(error).split())
    if is_out_of_memory(error):
        return f"{OUT_OF_MEMORY}, try a smaller train.micro_batch: {text or 'no more was said'}"
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        return f"disk full: {text}"
    if isinstance(error, TrialFailed):
        return text
    if "does not have a deterministic implementation" in text:
        return f"use train.deterministic=false, an operation has no deterministic form: {text}"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class Interrupts:
    """SIGINT and SIGTERM become KeyboardInterrupt, at a safe point while `deferred` is set.

    The first signal waits for `check`, a second one does not. Outside the main thread signals
    cannot be caught, and nothing happens here.
    """

    def __init__(self) -> None:
        self.deferred = False
        self.pending = False
        self.raised = False  # by a signal; what fails after that fails because of it
        self._old: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.deferred and not self.pending:
            self.pending = True
            return
        self.raised = True
        raise KeyboardInterrupt

    def check(self) -> None:
        """Raise KeyboardInterrupt if a signal came."""
        if self.pending:
            raise KeyboardInterrupt
