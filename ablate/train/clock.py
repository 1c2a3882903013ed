"""Where the seconds of a run go."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch

from ablate.run import PHASES


class Clock:
    """Seconds by phase, over all processes that worked on a run.

    Only the ends of a phase wait for the device, never a step within it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.phase = ""
        self._since = 0.0

    @contextlib.contextmanager
    def of(self, phase: str) -> Iterator[None]:
        """Count what is inside as `phase`; an outer phase stands still meanwhile."""
        outer = self.phase
        self._stop()
        self.phase, self._since = phase, time.perf_counter()
        try:
            yield
        finally:
            self._stop()
            self.phase, self._since = outer, time.perf_counter()

    def now(self, phase: str) -> float:
        """Seconds in `phase` up to this moment, without waiting for the device."""
        running = time.perf_counter() - self._since if self.phase == phase else 0.0
        return self.seconds[phase] + running

    def so_far(self) -> float:
        """Seconds in all phases up to this moment, at which the device is waited for."""
        self._wait()
        return sum(self.now(phase) for phase in PHASES)

    def _stop(self) -> None:
        if not self.phase:
            return
        self._wait()
        self.seconds[self.phase] += time.perf_counter() - self._since

    def _wait(self) -> None:
        if self.device.type == "cuda" and torch.cuda.is_initialized():
            torch.cuda.synchronize(self.device)
