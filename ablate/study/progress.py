"""What the user sees while a study runs: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ablate.study.show import duration, si

PLAIN_SECONDS = 10.0


@dataclass
class Running:
    """One trial that is being trained; `row` is its newest progress event."""

    arm: str
    seed: int
    started: float
    row: dict[str, Any] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """Of the trial's steps, those that are done."""
        return _share(self.row)


@dataclass
class Snapshot:
    """States of the study's trials, counted."""

    total: int
    done: int = 0
    failed: int = 0
    held: int = 0
    running: Sequence[Running] = ()
    seconds_left: float | None = None

    @property
    def share(self) -> float:
        ended = self.done + self.failed
        return (ended + sum(r.share for r in self.running)) / max(1, self.total)


class Display:
    """A context manager; `update` may be called often and draws when it is time."""

    def __init__(self, console: Console, name: str) -> None:
        self._console = console
        self._name = name
        self._live: Live | None = None
        self._last_plain = time.monotonic()

    def __enter__(self) -> Display:
        if self._console.is_terminal:
            self._live = Live(console=self._console, refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, line: str) -> None:
        """A line that stays."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def update(self, snapshot: Snapshot) -> None:
        if self._live is not None:
            self._live.update(self._render(snapshot))
            return
        now = time.monotonic()
        if now - self._last_plain >= PLAIN_SECONDS:
            self._last_plain = now
            self.say(self._plain(snapshot))

    def _plain(self, snapshot: Snapshot) -> str:
        parts = [f"{self._name}: {_counts(snapshot)}"]
        for running in snapshot.running:
            figures = " ".join(f"{name} {text}" for name, text in _figures(running.row) if text)
            parts.append(f"[{running.arm} seed {running.seed}: {figures or 'starting'}]")
        return " ".join(parts)

    def _render(self, snapshot: Snapshot) -> RenderableType:
        head = Table.grid(padding=(0, 1))
        head.add_row(
            Text(self._name, style="bold"),
            ProgressBar(total=1.0, completed=snapshot.share, width=40),
            Text(_counts(snapshot)),
        )
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        for name in ("arm", "seed", "done", "loss", "tok/s", "MFU", "left"):
            table.add_column(name, justify="left" if name == "arm" else "right")
        for running in snapshot.running:
            figures = dict(_figures(running.row))
            table.add_row(
                running.arm,
                str(running.seed),
                figures["done"] or "starting",
                *(figures[name] for name in ("loss", "tok/s", "MFU", "left")),
            )
        return Group(head, table)


def _counts(snapshot: Snapshot) -> str:
    parts = [f"{snapshot.done} of {snapshot.total} trials done"]
    if snapshot.failed:
        parts.append(f"{snapshot.failed} failed")
    if snapshot.held:
        parts.append(f"{snapshot.held} at another process")
    if snapshot.seconds_left is not None:
        parts.append(f"about {duration(snapshot.seconds_left)} left")
    return ", ".join(parts)


def _figures(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    def text(name: str, form: str, scale: float = 1.0) -> str:
        value = row.get(name)
        return "" if value is None else form.format(value * scale)

    left = row.get("seconds_left")
    return [
        ("done", f"{_share(row):.0%}" if row.get("steps") else str(row.get("phase") or "")),
        ("loss", text("loss", "{:.4f}")),
        ("tok/s", si(speed) if (speed := row.get("tokens_per_second")) else ""),
        ("MFU", text("mfu", "{:.1f}%", 100)),
        ("left", "" if left is None else duration(left)),
    ]


def _share(row: Mapping[str, Any]) -> float:
    steps = row.get("steps")
    return min(1.0, (row.get("step") or 0) / steps) if steps else 0.0
