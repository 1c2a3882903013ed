"""The verb plan: what a study would run, what that takes, and what it could decide.

Nothing is trained (but 20 steps of each arm with `calibrate`) and no run folder is written. Every
estimate names its source, and the noise that the power is computed with names where it is from.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from ablate import config
from ablate.arch import pattern as patterns
from ablate.data.corpus import sources
from ablate.data.stream import MAX_EPOCHS, row_counts
from ablate.data.tokens import usable_cores
from ablate.errors import UserError
from ablate.report import estimate as estimates
from ablate.report.estimate import Estimate, Machine, Speed, run_flops, run_tokens
from ablate.report.published import ATTENTION_SHARE, GROUPED_QUERIES
from ablate.report.stats import (
    ArmFit,
    fit_arms,
    minimum_detectable_effect,
    seeds_for_equivalence,
    seeds_needed,
)
from ablate.run import RunFolder, find_runs
from ablate.study import space
from ablate.study.folder import StudyFolder
from ablate.study.show import duration, plain_table, si, wide_console
from ablate.study.space import Cell
from ablate.train.stop import TrialFailed

ASSUMED_NOISE = (0.004, 0.3)  # nats a token between seeds, and the share a seed carries to all arms
BYTES_A_TOKEN = {"byte": 1.0, "bpe": 4.0, "file": 4.0}  # of text that is not tokenised yet
SEEDS = (2, 3, 4, 6, 8, 12)


@dataclass(frozen=True)
class Noise:
    """Standard deviation of single runs over seeds, in nats; the share of the variance that the
    seed carries to every arm; and where both are from."""

    sigma: float
    correlation: float
    source: str


def plan(
    tree: Mapping[str, Any],
    console: Console | None = None,
    *,
    calibrate: bool = False,
    hours: float | None = None,
    gpu: str | None = None,
) -> None:
    """Print every trial that a run of this config would have; UserError as `run` would raise it.

    calibrate: train 20 steps of each arm to know its speed. hours: GPU-hours (of one device) to say
    what they could decide. gpu: plan for a GPU of this name instead of this machine.
    """
    console = console or wide_console()
    cfg = config.load(tree)
    study = cfg.study
    arms = space.cells(tree)
    if study.search:
        middle = {name: _middle(dim) for name, dim in study.search.items()}
        arms = space.proposed(tree, middle)
        _say(
            console,
            f"a search of {study.n_trials} trials by {study.sampler} over "
            f"{', '.join(study.search)}; the middle of the space would be:",
        )
    folder = StudyFolder(Path(study.folder).expanduser() / study.name)
    here = estimates.machine(cfg, gpu)
    speeds, text = _speeds(arms, folder.path.parent, here, calibrate, console)
    stages = {"confirm": arms}
    if study.tune.points:
        stages = {"tune": space.tuning(cfg, arms), "confirm": arms}
        stages = {**stages, **_confirmed(folder, arms)}
    found = {
        stage: {c.key: estimates.estimate(c.trial, speeds[c.arm], here) for c in cells}
        for stage, cells in stages.items()
    }
    for stage, cells in stages.items():
        _table(console, cfg, stage if len(stages) > 1 else "", cells, found[stage], folder)
    _say(console, f"time on {here}, by: {_sources(speeds)}")
    if not all(math.isfinite(speed.memory) for speed in speeds.values()):
        _say(
            console,
            f"memory, where not measured: {estimates.STATE_BYTES} bytes a parameter and roughly "
            f"{estimates.ACTIVATION_BYTES} (bf16) a token, layer and channel of a micro-batch",
        )
    for line in _certificates(arms):
        _say(console, line)
    total = [
        _total(console, cfg, stages[s], found[s], folder, here, s if len(stages) > 1 else "")
        for s in stages
    ]
    if len(total) > 1:
        _say(console, f"both stages: {duration(sum(total))} of trial time")
    _say(console, _epochs(cfg, arms, folder.path.parent, text))
    for warning in sorted({w for c in arms for w in c.trial.warnings}):
        _say(console, f"note: {warning}")
    if len({c.arm for c in arms}) > 1 and not study.search:
        before = total[0] if len(total) > 1 else 0.0
        _power(console, cfg, arms, found["confirm"], before, folder, hours)
    elif hours is not None:
        raise UserError("hours says what seeds could decide between arms, but there is one arm")


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def _confirmed(folder: StudyFolder, arms: Sequence[Cell]) -> dict[str, list[Cell]]:
    """The second stage at the rates that the first has found, where it has."""
    tuned = folder.index().get("tuned") or {}
    if not tuned or tuned.get("problems"):
        return {}
    rates = {f["arm"]: f["chosen"] for f in tuned["fit"]["fits"]}
    if not {c.arm for c in arms} <= rates.keys():
        return {}
    return {"confirm": space.confirming(arms, rates)}


# --- what runs ------------------------------------------------------------------------------------


def _table(
    console: Console,
    cfg: config.Config,
    stage: str,
    cells: Sequence[Cell],
    found: Mapping[str, Estimate],
    folder: StudyFolder,
) -> None:
    study = cfg.study
    title = f"{study.name}: {study.question}".rstrip(": ")
    if stage == "tune":
        title += f"\nfirst stage: {study.tune.points} learning rates an arm, on validation A"
    elif stage:
        title += "\nsecond stage: fresh paired seeds at each arm's rate, figures from validation B"
    table = plain_table(
        title,
        ["arm", "pattern"],
        ["params", "beside emb.", "FLOPs/token", "state", "memory", "tokens", "FLOPs", "time",
         "done"],
    )  # fmt: skip
    for arm, group in by_arm(cells).items():
        trial = group[0].trial
        done = sum(folder.run(c.key).result() is not None for c in group)
        cost = trial.architecture.cost(trial.config.data.seq_len)
        own = found[group[0].key]
        table.add_row(
            "\n= ".join([arm, *group[0].also]),
            patterns.compress(trial.architecture.letters),
            si(cost.params),
            si(cost.non_embedding_params),
            si(cost.train_flops),
            si(cost.state_bytes, "B"),
            si(own.memory, "B"),
            si(run_tokens(trial)),
            _flops(run_flops(trial)),
            duration(own.seconds),
            f"{done}/{len(group)}",
        )
    console.print(table)


def _flops(value: float) -> str:
    return f"{value:.2e}" if math.isfinite(value) else "–"


def by_arm(cells: Iterable[Cell]) -> dict[str, list[Cell]]:
    arms: dict[str, list[Cell]] = {}
    for cell in cells:
        arms.setdefault(cell.arm, []).append(cell)
    return arms


def _certificates(cells: Sequence[Cell]) -> list[str]:
    lines = []
    for arm, group in by_arm(cells).items():
        certificate = group[0].certificate
        if certificate is not None:
            forced = "" if certificate.reached else " (beyond the tolerance, forced)"
            lines.append(f"matched: {arm}: {certificate.sentence()}{forced}")
    return lines


def _total(
    console: Console,
    cfg: config.Config,
    cells: Sequence[Cell],
    found: Mapping[str, Estimate],
    folder: StudyFolder,
    here: Machine,
    stage: str,
) -> float:
    """Print a stage's total; its seconds of trial time."""
    seconds = sum(found[c.key].seconds for c in cells)
    left = [c for c in cells if folder.run(c.key).result() is None]
    flops = sum(run_flops(c.trial) for c in cells)
    slots = min(_slots(cfg, here), max(1, len(left)))
    line = f"{stage}: " if stage else ""
    line += f"{len(cells)} trials, "
    line += f"{flops:.2e} training FLOPs, " if math.isfinite(flops) else ""
    line += f"{duration(seconds)} of trial time"
    if len(left) < len(cells):
        line += f"; {len(left)} still to do, {duration(sum(found[c.key].seconds for c in left))}"
    if left:
        rest = sum(found[c.key].seconds for c in left)
        line += f"; {slots} at a time: about {duration(rest / slots)}"
    _say(console, line)
    return seconds


def _slots(cfg: config.Config, here: Machine) -> int:
    if cfg.study.workers:
        return cfg.study.workers
    if here.gpu:
        return max(1, torch.cuda.device_count() // cfg.train.devices)
    return max(1, usable_cores() // (cfg.train.threads * cfg.train.devices))


# --- how long, on how much text -------------------------------------------------------------------


def _speeds(
    arms: Sequence[Cell], root: Path, here: Machine, calibrate: bool, console: Console
) -> tuple[dict[str, Speed], dict[str, Any]]:
    """The speed of each arm, and what a calibration found out about the text."""
    if not calibrate:
        past = estimates.history(root, here)
        return {a: estimates.speed(g[0].trial, past, here) for a, g in by_arm(arms).items()}, {}
    speeds: dict[str, Speed] = {}
    text: dict[str, Any] = {}
    for arm, group in by_arm(arms).items():
        _say(console, f"calibrating {arm} …")
        try:
            speeds[arm], text = estimates.calibrate(group[0].trial)
        except TrialFailed as error:
            raise UserError(f"arm '{arm}' cannot be trained here: {error}") from None
    return speeds, text


def _sources(speeds: Mapping[str, Speed]) -> str:
    """Each source, with its arms where there are several."""
    arms: dict[str, list[str]] = {}
    for arm, speed in speeds.items():
        arms.setdefault(speed.source, []).append(arm)
    if len(arms) == 1:
        return next(iter(arms))
    return "; ".join(f"{source} for {', '.join(names)}" for source, names in arms.items())


def _epochs(cfg: config.Config, arms: Sequence[Cell], root: Path, text: dict[str, Any]) -> str:
    """How often the text would be seen, from a calibration, an earlier run, or the files' sizes."""
    most = max((_text_tokens(c) for c in arms), default=math.nan)
    if not math.isfinite(most):
        return "epochs: unknown, as the budget is in seconds"
    unique, source = _unique(cfg, root, text)
    if unique is None:
        return "epochs: unknown until the text is there; `python -m ablate prepare` fetches it"
    epochs = most / unique
    line = f"text: {si(most)} tokens of {si(unique)} unique ones ({source}): "
    line += f"{epochs:.2g} epochs"
    if epochs > MAX_EPOCHS and not cfg.data.allow_repeats:
        line += f"; more than {MAX_EPOCHS} are refused without data.allow_repeats=true"
    return line


def _text_tokens(cell: Cell) -> float:
    cfg = cell.trial.config
    text = row_counts(cfg.data, cfg.train.batch_size).text
    return run_tokens(cell.trial) * text / cfg.train.batch_size


def _unique(cfg: config.Config, root: Path, text: dict[str, Any]) -> tuple[float | None, str]:
    if text.get("unique_tokens"):
        return float(text["unique_tokens"]), "counted"
    wanted = _text_of(cfg.model_dump(mode="json"))
    for study in sorted(root.iterdir()) if root.is_dir() else []:
        for run in find_runs(study):
            unique = ((run.result() or {}).get("data") or {}).get("unique_tokens")
            if unique and _text_of(run.config() or {}) == wanted:
                return float(unique), f"counted by {study.name}"
    if cfg.data.source == "hub":
        return None, ""
    n_bytes = sum(file.stat().st_size for file in sources(cfg.data)["text"].files)
    n_bytes = min(n_bytes, cfg.data.max_bytes or n_bytes)
    kept = 1 - cfg.data.val_share * ((cfg.data.val_a_path is None) + (cfg.data.val_b_path is None))
    per = BYTES_A_TOKEN[cfg.data.tokenizer.kind]
    return n_bytes * kept / per, f"from the files' sizes, at {per:g} bytes a token"


def _text_of(tree: Mapping[str, Any]) -> dict[str, Any]:
    names = ("source", "path", "hub", "val_a_path", "val_b_path", "val_share", "max_bytes")
    return {name: config.get(tree, f"data.{name}") for name in (*names, "tokenizer")}


def _middle(dim: config.SearchDimension) -> Any:
    if dim.choices is not None:
        return dim.choices[len(dim.choices) // 2]
    assert dim.low is not None
    assert dim.high is not None
    value = (dim.low * dim.high) ** 0.5 if dim.log else (dim.low + dim.high) / 2
    return round(value) if dim.integer else value


# --- what it could decide -------------------------------------------------------------------------


def noise_of(cfg: config.Config, arms: Sequence[Cell], folder: StudyFolder) -> Noise:
    """From finished runs of this study, else of the earlier study nearest in size, else assumed."""
    here = [(c.arm, c.seed, folder.run(c.key)) for c in arms]
    own = _fit(here)
    if own is not None:
        return _noise(own, "the finished runs of this study")
    params = arms[0].trial.architecture.non_embedding_params()
    best: tuple[float, ArmFit, str] | None = None
    root = folder.path.parent
    for path in sorted(root.iterdir()) if root.is_dir() else []:
        cells = StudyFolder(path).index().get("cells") or {}
        runs = [
            (str(c["arm"]), int(c["seed"]), RunFolder(path / key))
            for key, c in cells.items()
            if c.get("stage", "confirm") == "confirm"
        ]
        fit = _fit(runs) if path != folder.path else None
        results = [r for _, _, run in runs if (r := run.result())]
        sizes = [config.get(r, "architecture.non_embedding_params") for r in results]
        known = [float(s) for s in sizes if s]
        if fit is None or not known:
            continue
        off = abs(math.log(float(np.median(known)) / params))
        if off <= math.log(estimates.NEAR) and (best is None or off < best[0]):
            best = (off, fit, path.name)
    if best is not None:
        return _noise(best[1], f"the earlier study {best[2]}")
    return Noise(*ASSUMED_NOISE, "assumed, as no finished study of this size is here to go by")


def _fit(runs: Sequence[tuple[str, int, RunFolder]]) -> ArmFit | None:
    rows = []
    for arm, seed, run in runs:
        loss = ((run.result() or {}).get("val_b") or {}).get("loss")
        if isinstance(loss, int | float) and math.isfinite(loss):
            rows.append((arm, seed, float(loss)))
    if len(rows) < 4:
        return None
    fit = fit_arms([r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows])
    return fit if fit.df >= 2 and fit.sigma > 0 else None


def _noise(fit: ArmFit, source: str) -> Noise:
    correlation = fit.seed_correlation().value
    known = correlation if math.isfinite(correlation) else 0.0
    source = f"{source}, {fit.df:g} degrees of freedom"
    return Noise(fit.total_sigma(), min(max(known, 0.0), 0.95), source)


def _effects(cfg: config.Config, arms: Sequence[Cell]) -> dict[str, float]:
    """Published differences that the study is about, nats a token by name."""
    if cfg.study.finding == "attention_share":
        shares = {c.trial.architecture.shares()["attention_of_layers"] for c in arms}
        at, excess = np.array(list(ATTENTION_SHARE)), np.array(list(ATTENTION_SHARE.values()))
        found = {s: float(np.interp(s, at, excess)) for s in sorted(shares)}
        return {f"{100 * s:.3g}% attention": e for s, e in found.items() if e > 5e-4}
    if cfg.study.finding == "gqa":
        return {"grouped queries": GROUPED_QUERIES}
    return {}


def _power(
    console: Console,
    cfg: config.Config,
    arms: Sequence[Cell],
    found: Mapping[str, Estimate],
    before: float,
    folder: StudyFolder,
    hours: float | None,
) -> None:
    """Print what numbers of seeds detect, and what published effects would take."""
    groups = by_arm(arms)
    k, seeds = len(groups), len({c.seed for c in arms})
    a_seed = sum(found[g[0].key].seconds for g in groups.values())
    noise = noise_of(cfg, arms, folder)
    given = {"n_arms": k, "correlation": noise.correlation}

    def detects(n: int, comparisons: int = 1) -> float:
        return minimum_detectable_effect(
            noise.sigma, n_seeds=n, comparisons=comparisons, n_arms=k, correlation=noise.correlation
        )

    _say(console, "what seeds detect: true differences in nats a token, at 5% with 80% power")
    table = plain_table(
        "",
        ["seeds"],
        ["trial time", "two arms", f"any of {k - 1} from the reference"],
    )
    for n in sorted({*SEEDS, seeds} - {1}):
        table.add_row(
            f"{n}{' (this study)' if n == seeds else ''}",
            duration(before + n * a_seed),
            f"{detects(n):.2g}",
            f"{detects(n, k - 1):.2g}",
        )
    console.print(table)
    if seeds == 1:
        _say(console, "one seed gives no interval: this study, as it is, detects nothing")
    _say(
        console,
        f"noise: {noise.sigma:.2g} nats between seeds, {noise.correlation:.2f} of its variance "
        f"shared by all arms of a seed ({noise.source})",
    )
    effects = _effects(cfg, arms)
    for name, effect in effects.items():
        n = seeds_needed(effect, noise.sigma, **given)  # type: ignore[arg-type]
        line = f"published: {name}, {effect:+.2g} nats from the best: {n:,} seeds"
        _say(console, f"{line}, {duration(before + n * a_seed)}")
    if cfg.study.margin is not None:
        n = seeds_for_equivalence(cfg.study.margin, noise.sigma, **given)  # type: ignore[arg-type]
        _say(
            console,
            f"equal arms are called equivalent within study.margin {cfg.study.margin:g} by "
            f"{n:,} seeds, {duration(before + n * a_seed)}",
        )
    if hours is not None:
        _hours(console, hours, before, a_seed, detects, effects, k)


def _hours(
    console: Console,
    hours: float,
    before: float,
    a_seed: float,
    detects: Any,
    effects: Mapping[str, float],
    k: int,
) -> None:
    n = math.floor((3600 * hours - before) / a_seed)
    if n < 2:
        least = duration(before + 2 * a_seed)
        _say(console, f"{hours:g} hours give no two seeds an arm, which take {least}: no decision")
        return
    line = f"{hours:g} hours give {n:,} seeds an arm: a difference of {detects(n):.2g} nats "
    line += f"between two arms, {detects(n, k - 1):.2g} of any from the reference"
    inside = [name for name, effect in effects.items() if effect >= detects(n)]
    beyond = [name for name in effects if name not in inside]
    if effects:
        line += f"; decides of the published: {', '.join(inside) or 'none'}"
        line += f"; not: {', '.join(beyond)}" if beyond else ""
    _say(console, line)
