"""One finished trial trained again from its own config, and its losses compared."""

from __future__ import annotations

import math
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import stdev
from typing import Any

from scipy import stats

from ablate import config
from ablate.errors import UserError
from ablate.run import RunFolder, die_with_parent, lifeline
from ablate.study.child import child_environment
from ablate.study.show import plain_console
from ablate.train.stop import Interrupts

# Nats, where bits may differ: `bound` of six runs of one trial (`14m`, 120M tokens, 2 layers of 24
# attention) that nothing set apart but the order of sums; docs/measurements.md.
OTHER_TOLERANCE = {"val_a": 0.026, "val_b": 0.015}
ENOUGH = 5  # reruns whose `bound` is a tolerance, where train.deterministic is false


@dataclass(frozen=True)
class Rerun:
    """Losses before and now, in nats, and the largest difference for which they count as the same,
    by split (val_a, val_b); tolerance 0 means bit for bit."""

    old: dict[str, float]
    new: dict[str, float]
    tolerance: dict[str, float]
    why: str

    @property
    def same(self) -> bool:
        return all(abs(self.old[k] - self.new[k]) <= self.tolerance[k] for k in self.old)


def compare(folder: Path | str, tell: Callable[[Rerun], None] = lambda found: None) -> Rerun:
    """Train a run folder's config once more, in a process and folder of its own.

    tell: what is found, before it is kept.

    What is found is kept in the run folder (`kept`); with train.deterministic=false, once there are
    `ENOUGH` reruns their `bound` is the tolerance of later ones. The micro-batch is the recorded
    one, whatever would be chosen today.

    Raises UserError when the run is not finished or its config is missing.
    """
    run = RunFolder(Path(folder))
    tree, result = run.config(), run.result()
    if tree is None:
        raise UserError(f"'{folder}' is not a run folder: it has no readable config.yaml")
    if result is None:
        raise UserError(f"'{folder}' is not finished: there are no losses to compare with")
    run.check_writable()
    tree = config.override(tree, {"train.micro_batch": result["train"]["micro_batch"]})
    cfg = config.load(tree)
    # SIGTERM becomes an exception, so that the folder goes and the process with it
    with Interrupts(), tempfile.TemporaryDirectory(prefix="ablate-rerun-") as path:
        again = RunFolder(Path(path) / run.key)
        again.create(config.override(tree, {"tracker.kind": "none"}))
        with lifeline() as stdin:
            code = subprocess.run(
                [sys.executable, "-m", "ablate.study.rerun", str(again.path)],
                stdin=stdin,
                env=child_environment(cfg),
                check=False,
            ).returncode
        new = again.result()
        if new is None:
            cause = again.status().get("cause") or f"exit code {code}"
            raise UserError(f"the run '{folder}' failed when trained again: {cause}")
        tolerance, why = _tolerance(
            cfg,
            result,
            run.environment(),
            again.environment(),
            new.get("data", {}).get("fingerprint"),
        )
    splits: list[str] = [name for name in ("val_a", "val_b") if name in result and name in new]
    old_losses = {name: float(result[name]["loss"]) for name in splits}
    new_losses = {name: float(new[name]["loss"]) for name in splits}
    reruns = kept(run)
    before = [r["new"] for r in reruns if r["alike"]]
    alike = why == _VARIES
    if alike and len(before) >= ENOUGH:
        tolerance, why = bound(old_losses, before), f"95% bound by {len(before)} reruns"
    found = Rerun(old_losses, new_losses, {name: tolerance[name] for name in splits}, why)
    tell(found)
    reruns.append({**asdict(found), "same": found.same, "alike": alike})
    by_number = {str(i): r for i, r in enumerate(reruns, 1)}
    run.write_evaluation("rerun", {"task": "rerun", "reruns": by_number})
    return found


def kept(run: RunFolder) -> list[dict[str, Any]]:
    """Every rerun so far (evaluation/rerun.json), oldest first: the fields of `Rerun` (of an older
    one, one tolerance for all splits), whether it was the same, and whether it was alike but for
    what train.deterministic=false leaves open."""
    return list((run.evaluation("rerun") or {}).get("reruns", {}).values())


def bound(old: dict[str, float], reruns: list[dict[str, float]]) -> dict[str, float]:
    """What two more such runs differ by at most, in 95 of 100 cases, in nats by split: Student's t
    times the standard deviation of a difference."""
    columns = {name: [old[name], *(run[name] for run in reruns)] for name in old}
    t = float(stats.t.ppf(0.975, len(reruns)))
    return {name: t * math.sqrt(2) * stdev(losses) for name, losses in columns.items()}


def rerun(folder: Path | str, times: int = 1) -> int:
    """`compare` so many times, printed; 0 when all losses agree within the tolerance, else 1."""
    console = plain_console()
    same = True

    def tell(found: Rerun) -> None:
        for name, old in found.old.items():
            new = found.new[name]
            console.print(f"{name} loss: {old!r} then, {new!r} now, difference {new - old:+.3g}")
        console.print(f"tolerance: {by_split(found.tolerance)} ({found.why})", highlight=False)
        console.print("the same" if found.same else "NOT the same", style="bold")

    for _ in range(times):
        found = compare(folder, tell)
        same = same and found.same
    runs = [r["new"] for r in kept(RunFolder(Path(folder))) if r["alike"]]
    if runs:
        apart = by_split(bound(found.old, runs))
        console.print(
            f"two such runs differ by at most (95%, by {len(runs)} reruns): {apart}",
            highlight=False,
        )
    return 0 if same else 1


def by_split(nats: dict[str, float]) -> str:
    """As 0.026 on val_a, 0.015 on val_b."""
    return ", ".join(f"{value:.3g} on {name}" for name, value in nats.items())


_VARIES = f"train.deterministic is false; times={ENOUGH} measures by how much runs differ"


def _tolerance(
    cfg: config.Config, result: dict[str, Any], old: dict[str, Any], new: dict[str, Any], text: Any
) -> tuple[dict[str, float], str]:
    if cfg.train.seconds is not None:
        why = "the budget is in seconds, so the number of steps differs"
        return dict.fromkeys(OTHER_TOLERANCE, 0.05), why
    for name in ("numerics", "hardware", "versions"):
        if _without_measurements(old, name) != _without_measurements(new, name):
            return OTHER_TOLERANCE, f"not the {name} of the first time"
    if old.get("commit") != new.get("commit") or old.get("dirty") or new.get("dirty"):
        return OTHER_TOLERANCE, "the code is not, or may not be, that of the first time"
    if result.get("data", {}).get("fingerprint") != text:
        return OTHER_TOLERANCE, "the text is not that of the first time"
    if old.get("layers") != new.get("layers"):
        return OTHER_TOLERANCE, "the source of own layers is not that of the first time"
    flag = result["train"].get("out_of_memory")
    step = flag.get("step", "not known") if flag else 0  # an import does not know it
    if step:
        return OTHER_TOLERANCE, f"the micro-batch changed at step {step}: out of memory"
    if cfg.train.deterministic:
        why = "bit for bit: deterministic, and all else is equal"
        return dict.fromkeys(OTHER_TOLERANCE, 0.0), why
    return OTHER_TOLERANCE, _VARIES


def _without_measurements(environment: dict[str, Any], name: str) -> dict[str, Any]:
    return {k: v for k, v in (environment.get(name) or {}).items() if k != "peak_flops"}


def _main(folder: RunFolder) -> None:
    from ablate.train import train

    tree = folder.config()
    assert tree is not None
    try:
        train(config.load(tree), folder)
    except UserError:  # the run's status has its sentence, which the parent tells
        sys.exit(2)


if __name__ == "__main__":
    die_with_parent()
    _main(RunFolder(Path(sys.argv[1])))
