"""Processes that a test started, and those that they did."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ablate.run import python_path


def waited_for(there: Callable[[], Any]) -> Any:
    """What a function returns once it is true."""
    for _ in range(1200):
        if found := there():
            return found
        time.sleep(0.05)
    raise AssertionError("not within a minute")


def children(pid: int) -> list[int]:
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def alive(pid: int) -> bool:
    try:  # a dead one that nobody has waited for yet is a zombie
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def left_behind(
    code: str, words: Sequence[str], number: signal.Signals, folder: Path, under_way: str
) -> list[Path]:
    """Send a signal to a process whose child is under way, check that the child ends too, and
    return what the two leave of their temporary files, which lie in the folder.

    code, words: a program and its arguments. under_way: a pattern of files in the folder.
    """
    environment = {**os.environ, "TMPDIR": str(folder), "PYTHONPATH": python_path()}
    parent = subprocess.Popen([sys.executable, "-c", code, *words], env=environment)
    started = []
    try:
        waited_for(lambda: any(folder.glob(under_way)) or parent.poll() is not None)
        started = children(parent.pid)
        assert started
        parent.send_signal(number)
        assert parent.wait(60) != 0
        waited_for(lambda: not any(alive(pid) for pid in started))
    finally:
        for pid in (parent.pid, *started):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        parent.wait()
    return list(folder.iterdir())
