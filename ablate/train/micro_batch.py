"""The rows of a forward pass: the fewest within 3% of the fastest that fit the memory.

Searched once a shape and GPU, and kept in the cache folder; the same file's lock makes many workers
compile a shape once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from ablate.data import Batch
from ablate.run import read_json, write_json
from ablate.train.engine import Engine
from ablate.train.environment import version
from ablate.train.step import Stepper

TOLERANCE = 0.03  # of the best speed, that fewer rows may cost
FLAT = 0.01  # twice the rows that gain less than this end the search
FEWEST_TOKENS = 8192  # in a pass, below which a search only looks for what fits


def candidates(rows: int, seq_len: int) -> list[int]:
    """Divisors of `rows`, ascending, each about twice the one before at least."""
    found: list[int] = []
    for divisor in (d for d in range(1, rows + 1) if rows % d == 0):
        if not found or divisor >= 1.5 * found[-1] or divisor == rows:
            found.append(divisor)
    return [d for d in found if d * seq_len >= FEWEST_TOKENS] or [rows]


def search(
    speed: Callable[[int], float | None], rows: int, seq_len: int
) -> tuple[int, dict[int, float | None]]:
    """The choice, and the speeds measured (None: no room).

    speed: tokens a second at so many rows, None where they do not fit.
    """
    speeds: dict[int, float | None] = {}
    best = 0.0
    for n in candidates(rows, seq_len):
        speeds[n] = found = speed(n)
        if found is None or found < (1 + FLAT) * best:
            break
        best = found
    smallest = min(speeds)
    while not any(speeds.values()) and smallest > 1:
        smallest = next(d for d in range(smallest - 1, 0, -1) if rows % d == 0)
        speeds[smallest] = speed(smallest)
    fits = {n: s for n, s in speeds.items() if s is not None}
    near = [n for n, s in fits.items() if s >= (1 - TOLERANCE) * max(fits.values())]
    return min(near, default=1), speeds


@dataclass(frozen=True)
class Shape:
    """What decides a step's code and speed, by the name of its file in the cache."""

    path: Path

    @classmethod
    def of(cls, engine: Engine) -> Shape:
        cfg, device = engine.cfg, engine.device
        hardware: list[Any] = [device.type]
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            hardware += [properties.name, properties.total_memory]
        packages = ("triton", "ablate-hybrids")
        content = {
            "arch": engine.arch.canonical(),
            "rows": cfg.train.batch_size // engine.ranks.world,
            "data": [cfg.data.seq_len, cfg.data.reset_documents],
            "how": [engine.bf16, engine.compiled, engine.captured, cfg.train.deterministic],
            "activation_checkpointing": cfg.train.activation_checkpointing,
            "hardware": hardware,
            "versions": [torch.__version__, *(version(p) or "" for p in packages)],
        }
        text = json.dumps(content, sort_keys=True)
        name = hashlib.sha256(text.encode()).hexdigest()[:16]
        return cls(Path(cfg.data.cache).expanduser() / "shapes" / f"{name}.json")

    @contextlib.contextmanager
    def alone(self, check: Callable[[], None]) -> Iterator[None]:
        """One process on this machine at a time; `check` is called while waiting, and may raise."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path.with_suffix(".lock"))
        while not lock.is_locked:
            check()
            with contextlib.suppress(Timeout):
                lock.acquire(timeout=1)
        try:
            yield
        finally:
            lock.release()

    def choose(
        self, engine: Engine, batch: Batch, check: Callable[[], None] = lambda: None
    ) -> dict[str, Any]:
        """{"rows", "source", …} for `train.micro_batch=auto`; all rows on a CPU."""
        rows = engine.cfg.train.batch_size // engine.ranks.world
        if engine.device.type != "cuda":
            return {"rows": rows, "source": "whole batch"}
        found = self._kept()
        if "rows" in found:
            return {**found, "source": "cache"}
        with self.alone(check):
            found = self._kept()
            if "rows" in found:
                return {**found, "source": "cache"}
            begun = time.perf_counter()
            part = engine.ranks.part(batch)
            best, speeds = search(lambda n: engine.speed(part, n), rows, engine.cfg.data.seq_len)
            found = {
                "rows": best,
                "tokens_per_second": {str(n): speed for n, speed in speeds.items()},
                "seconds": time.perf_counter() - begun,
            }
            write_json(self.path, {**self._kept(), **found})
        return {**found, "source": "search"}

    def warm_up(self, stepper: Stepper, batch: Batch, check: Callable[[], None]) -> None:
        """Compile, once on this machine; whoever comes later finds it in the compile caches."""
        rows = stepper.micro_batch
        with self.alone(check):
            compiled = self._kept().get("compiled", [])
            if rows not in compiled:
                stepper.warm_up(batch)
                write_json(self.path, {**self._kept(), "compiled": [*compiled, rows]})
                return
        stepper.warm_up(batch)

    def _kept(self) -> dict[str, Any]:
        return read_json(self.path) or {}
