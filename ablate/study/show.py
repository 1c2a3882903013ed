"""Numbers and tables for people. Imports no torch."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table


def si(value: float | None, unit: str = "") -> str:
    """1234567 -> '1.23M'; with unit 'B', bytes in powers of 1024; '–' for what is not known."""
    if value is None or not math.isfinite(value):
        return "–"
    step, prefixes = (1024.0, ["", *"KMGTP"]) if unit == "B" else (1000.0, ["", *"kMGTPE"])
    power = 0
    while abs(value) >= step and power < len(prefixes) - 1:
        value, power = value / step, power + 1
    number = f"{value:.0f}" if power == 0 or abs(value) >= 100 else f"{value:.3g}"
    if unit == "B":
        return f"{number} {prefixes[power]}{'i' if power else ''}B"
    return f"{number}{prefixes[power]}"


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3.4 h`, `17 days`."""
    for limit, unit, form in (
        *((90, 1, "{:.0f} s"), (5400, 60, "{:.0f} min")),
        *((360_000, 3600, "{:.1f} h"), (math.inf, 86_400, "{:,.0f} days")),
    ):
        if seconds < limit:
            return form.format(seconds / unit)
    return "–"


def plain_console(width: int | None = None) -> Console:
    """A terminal that prints texts as they are: names of arms and questions have brackets."""
    return Console(width=width, markup=False, emoji=False)


def wide_console() -> Console:
    # A pipe has no width; wide enough that no number is cut.
    return plain_console(None if sys.stdout.isatty() else 160)


def plain_table(title: str, names: Sequence[str], numbers: Sequence[str]) -> Table:
    """Names fold, numbers never do."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in names:
        table.add_column(column, overflow="fold")
    for column in numbers:
        table.add_column(column, justify="right", no_wrap=True)
    return table
