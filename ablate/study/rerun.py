"""One finished trial trained again from its own config, and its losses compared."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ablate import config
from ablate.errors import UserError
from ablate.run import RunFolder
from ablate.study.child import child_environment

OTHER_TOLERANCE = 5e-3  # nats, where bits may differ: other hardware, versions, code


@dataclass(frozen=True)
class Rerun:
    """Losses on validation A and B, before and now, in nats; tolerance 0 means bit for bit."""

    old: dict[str, float]
    new: dict[str, float]
    tolerance: float
    why: str

    @property
    def same(self) -> bool:
        return all(abs(self.old[k] - self.new[k]) <= self.tolerance for k in self.old)


def compare(folder: Path | str) -> Rerun:
    """Train a run folder's config once more, in a process and folder of its own.

    Raises UserError when the run is not finished or its config is missing.
    """
    run = RunFolder(Path(folder))
    tree, result = run.config(), run.result()
    if tree is None:
        raise UserError(f"'{folder}' is not a run folder: it has no readable config.yaml")
    if result is None:
        raise UserError(f"'{folder}' is not finished: there are no losses to compare with")
    cfg = config.load(tree)
    with tempfile.TemporaryDirectory(prefix="ablate-rerun-") as path:
        again = RunFolder(Path(path) / run.key)
        again.create(config.override(tree, {"tracker.kind": "none"}))
        code = subprocess.run(
            [sys.executable, "-m", "ablate.study.rerun", str(again.path)],
            env=child_environment(cfg.train.threads),
            check=False,
        ).returncode
        new = again.result()
        if new is None:
            cause = again.status().get("cause") or f"exit code {code}"
            raise UserError(f"the run '{folder}' failed when trained again: {cause}")
        tolerance, why = _tolerance(cfg, run.environment(), again.environment())
    splits = [name for name in ("val_a", "val_b") if name in result and name in new]
    return Rerun(
        {name: float(result[name]["loss"]) for name in splits},
        {name: float(new[name]["loss"]) for name in splits},
        tolerance,
        why,
    )


def rerun(folder: Path | str, console: Console | None = None) -> int:
    """`compare`, printed and kept in the run folder (evaluation/rerun.json: every rerun so far); 0
    when the losses agree within the tolerance, 1 when not."""
    console = console or Console()
    found, run = compare(folder), RunFolder(Path(folder))
    before = (run.evaluation("rerun") or {}).get("reruns", {})
    reruns = {**before, str(len(before) + 1): {**asdict(found), "same": found.same}}
    run.write_evaluation("rerun", {"task": "rerun", "reruns": reruns})
    for name, old in found.old.items():
        new = found.new[name]
        console.print(f"{name} loss: {old!r} then, {new!r} now, difference {new - old:+.3g}")
    console.print(f"tolerance: {found.tolerance:g} ({found.why})", highlight=False)
    console.print("the same" if found.same else "NOT the same", style="bold")
    return 0 if found.same else 1


def _tolerance(cfg: config.Config, old: dict[str, Any], new: dict[str, Any]) -> tuple[float, str]:
    if cfg.train.seconds is not None:
        return 0.05, "the budget is in seconds, so the number of steps differs"
    for name in ("numerics", "hardware", "versions"):
        if _without_measurements(old, name) != _without_measurements(new, name):
            return OTHER_TOLERANCE, f"{name} are not those of the first time"
    if old.get("commit") != new.get("commit") or old.get("dirty") or new.get("dirty"):
        return OTHER_TOLERANCE, "the code is not, or may not be, that of the first time"
    if cfg.train.deterministic:
        return 0.0, "bit for bit: deterministic, and all else is equal"
    return OTHER_TOLERANCE, "train.deterministic is false"


def _without_measurements(environment: dict[str, Any], name: str) -> dict[str, Any]:
    return {k: v for k, v in (environment.get(name) or {}).items() if k != "peak_flops"}


def _main(folder: RunFolder) -> None:
    from ablate.train import train

    tree = folder.config()
    assert tree is not None
    train(config.load(tree), folder)


if __name__ == "__main__":
    _main(RunFolder(Path(sys.argv[1])))
