"""The verb plan: what a study would run, what that takes, and what it could decide.

Nothing is trained (but 20 steps of each arm with `calibrate`) and no run folder is written. Every
estimate names its source, and the noise that the power is computed with names where it is from.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from ablate import config
from ablate.arch import pattern as patterns
from ablate.data.corpus import sources, text_bytes
from ablate.data.stream import MAX_EPOCHS, row_counts
from ablate.data.tokens import usable_cores
from ablate.errors import UserError
from ablate.report import estimate as estimates
from ablate.report.estimate import Estimate, Machine, Speed
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
from ablate.study.trial import Trial
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
    words: Sequence[str] = (),
) -> None:
    """Print every trial that a run of this config would have; UserError as `run` would raise it.

    calibrate: train 20 steps of each arm to know its speed. hours: GPU-hours (of one device) to say
    what they could decide. gpu: plan for a GPU of this name instead of this machine. words: of the
    command line, to be checked.
    """
    console = console or wide_console()
    for part in _parts(tree, calibrate, hours, gpu, words):
        if isinstance(part, str):
            console.print(part, markup=False, highlight=False, soft_wrap=True)
        else:
            console.print(part)


def _parts(
    tree: Mapping[str, Any],
    calibrate: bool,
    hours: float | None,
    gpu: str | None,
    words: Sequence[str],
) -> Iterator[str | Table]:
    cfg = config.load(tree)
    study = cfg.study
    arms = space.cells(tree)
    space.check_words(words, arms, cfg.study)
    if study.search:
        middle = {name: _middle(dim) for name, dim in study.search.items()}
        arms = space.proposed(tree, middle)
        yield (
            f"a search of {study.n_trials} trials by {study.sampler} over "
            f"{', '.join(study.search)}; the middle of the space would be:"
        )
    folder = StudyFolder(Path(study.folder).expanduser() / study.name)
    root = folder.path.parent
    here = estimates.machine(cfg, gpu)
    speeds: dict[str, Speed] = {}
    text: dict[str, Any] = {}
    past = [] if calibrate else estimates.history(root, here)
    for arm, group in by_arm(arms).items():
        if calibrate:
            yield f"calibrating {arm} …"
            speeds[arm], text = _calibrated(arm, group[0].trial)
        else:
            speeds[arm] = estimates.speed(group[0].trial, past, here)
    stages, compared = {"": arms}, arms
    if study.tune.points:
        compared = _confirmed(folder, arms) or arms
        stages = {"tune": space.tuning(cfg, arms), "confirm": compared}
    found = {
        c.key: estimates.estimate(c.trial, speeds[c.arm], here)
        for cells in stages.values()
        for c in cells
    }
    for stage, cells in stages.items():
        yield _table(cfg, stage, cells, found, folder)
    yield f"time on {here}, by: {_sources(speeds)}"
    if not all(math.isfinite(speed.memory) for speed in speeds.values()):
        yield (
            f"memory, where not measured: {estimates.STATE_BYTES} bytes a parameter and roughly "
            f"{estimates.ACTIVATION_BYTES} (bf16) a token, layer and channel of a micro-batch"
            + (
                "; train.micro_batch=auto cuts a batch that does not fit"
                if cfg.train.micro_batch == "auto"
                else ""
            )
        )
    yield from _certificates(arms)
    for stage, cells in stages.items():
        yield _total(cfg, stage, cells, found, folder, here)
    seconds = {s: sum(found[c.key].seconds for c in cells) for s, cells in stages.items()}
    if len(stages) > 1:
        yield f"both stages: {duration(sum(seconds.values()))} of trial time"
    yield _epochs(cfg, arms, root, text)
    yield from (f"note: {w}" for w in sorted({w for c in arms for w in c.trial.warnings}))
    if len({c.arm for c in arms}) > 1 and not study.search:
        a_seed = sum(found[group[0].key].seconds for group in by_arm(compared).values())
        yield from _power(cfg, compared, a_seed, seconds.get("tune", 0.0), folder, hours)
    elif hours is not None:
        raise UserError("hours says what seeds could decide between arms, but there is one arm")


def _confirmed(folder: StudyFolder, arms: Sequence[Cell]) -> list[Cell]:
    """The second stage at the rates that the first has found; empty where it has not."""
    tuned = folder.index().get("tuned") or {}
    if not tuned or tuned.get("problems"):
        return []
    rates = {f["arm"]: f["chosen"] for f in tuned["fit"]["fits"]}
    return space.confirming(arms, rates) if {c.arm for c in arms} <= rates.keys() else []


# --- what runs ------------------------------------------------------------------------------------


def _table(
    cfg: config.Config,
    stage: str,
    cells: Sequence[Cell],
    found: Mapping[str, Estimate],
    folder: StudyFolder,
) -> Table:
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
        cost, own = trial.cost, found[group[0].key]
        table.add_row(
            "\n= ".join([arm, *group[0].also]),
            patterns.compress(trial.architecture.letters),
            si(cost.params),
            si(cost.non_embedding_params),
            si(cost.train_flops),
            si(cost.state_bytes, "B"),
            si(own.memory, "B"),
            si(trial.tokens),
            f"{trial.flops:.2e}" if math.isfinite(trial.flops) else "–",
            duration(own.seconds),
            f"{done}/{len(group)}",
        )
    return table


def by_arm(cells: Iterable[Cell]) -> dict[str, list[Cell]]:
    arms: dict[str, list[Cell]] = {}
    for cell in cells:
        arms.setdefault(cell.arm, []).append(cell)
    return arms


def _certificates(cells: Sequence[Cell]) -> Iterator[str]:
    for arm, group in by_arm(cells).items():
        certificate = group[0].certificate
        if certificate is not None:
            forced = "" if certificate.reached else " (beyond the tolerance, forced)"
            yield f"matched: {arm}: {certificate.sentence()}{forced}"


def _total(
    cfg: config.Config,
    stage: str,
    cells: Sequence[Cell],
    found: Mapping[str, Estimate],
    folder: StudyFolder,
    here: Machine,
) -> str:
    seconds = sum(found[c.key].seconds for c in cells)
    left = [c for c in cells if folder.run(c.key).result() is None]
    rest = sum(found[c.key].seconds for c in left)
    flops = sum(c.trial.flops for c in cells)
    line = f"{stage}: " if stage else ""
    line += f"{len(cells)} trials, "
    line += f"{flops:.2e} training FLOPs, " if math.isfinite(flops) else ""
    line += f"{duration(seconds)} of trial time"
    if len(left) < len(cells):
        line += f"; {len(left)} still to do, {duration(rest)}"
    if left:
        slots = min(_slots(cfg, here), len(left))
        line += f"; {slots} at a time: about {duration(rest / slots)}"
    return line


def _slots(cfg: config.Config, here: Machine) -> int:
    if cfg.study.workers:
        return cfg.study.workers
    if here.gpu:
        return max(1, torch.cuda.device_count() // cfg.train.devices)
    return max(1, usable_cores() // (cfg.train.threads * cfg.train.devices))


# --- how long, on how much text -------------------------------------------------------------------


def _calibrated(arm: str, trial: Trial) -> tuple[Speed, dict[str, Any]]:
    """The speed of an arm, and what its calibration has found out about the text."""
    try:
        return estimates.calibrate(trial)
    except TrialFailed as error:
        raise UserError(f"arm '{arm}' cannot be trained here: {error}") from None


def _sources(speeds: Mapping[str, Speed]) -> str:
    """Each source, with its arms where there are several."""
    arms: dict[str, list[str]] = {}
    for arm, speed in speeds.items():
        arms.setdefault(speed.source, []).append(arm)
    if len(arms) == 1:
        return next(iter(arms))
    return "; ".join(f"{source} for {', '.join(names)}" for source, names in arms.items())


def _epochs(cfg: config.Config, arms: Sequence[Cell], root: Path, text: dict[str, Any]) -> str:
    """How often the text would be seen, from a calibration, an earlier run, or the files' sizes; of
    several texts, in the arm that sees its own most often."""
    base, known, seen = _text_of(cfg.model_dump(mode="json")), {}, []
    for cell in arms:
        tokens, own = _text_tokens(cell), cell.trial.config
        if not math.isfinite(tokens):
            return "epochs: unknown, as the budget is in seconds"
        wanted = _text_of(own.model_dump(mode="json"))
        key = json.dumps(wanted, sort_keys=True)
        if key not in known:
            known[key] = _unique(own, root, text if wanted == base else {})
        unique, source = known[key]
        if unique is None:
            return "epochs: unknown until the text is there; `python -m ablate prepare` fetches it"
        seen.append((tokens / unique, tokens, unique, source))
    epochs, tokens, unique, source = max(seen)
    line = f"text: {si(tokens)} tokens of {si(unique)} unique ones ({source}): "
    line += f"{epochs:.2g} epochs"
    line += " in the arm with most" if len(known) > 1 else ""
    if epochs > MAX_EPOCHS and not cfg.data.allow_repeats:
        line += f"; more than {MAX_EPOCHS} are refused without data.allow_repeats=true"
    return line


def _text_tokens(cell: Cell) -> float:
    cfg = cell.trial.config
    text = row_counts(cfg.data, cfg.train.batch_size).text
    return cell.trial.tokens * text / cfg.train.batch_size


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
    n_bytes = text_bytes(sources(cfg.data)["text"].files)
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


def noise_of(arms: Sequence[Cell], folder: StudyFolder) -> Noise:
    """From finished runs of this study, else of the earlier study nearest in size and tokens, else
    assumed."""
    here = [(c.arm, c.seed, folder.run(c.key)) for c in arms]
    own = _fit(here)
    if own is not None:
        return _noise(own, "the finished runs of this study")
    trial = arms[0].trial
    like = {
        "architecture.non_embedding_params": trial.architecture.non_embedding_params(),
        "train.tokens": trial.tokens,  # a longer training has less noise
    }
    found: list[tuple[float, ArmFit, str]] = []
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
        apart = [
            abs(math.log(float(np.median(known)) / ours))
            for field, ours in like.items()
            if (known := [float(v) for r in results if (v := config.get(r, field))])
        ]
        if fit is None or len(apart) < len(like) or max(apart) > math.log(estimates.NEAR):
            continue
        found.append((sum(apart), fit, path.name))
    if found:
        _, fit, name = min(found, key=lambda study: study[0])
        return _noise(fit, f"the earlier study {name}")
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
    cfg: config.Config,
    arms: Sequence[Cell],
    a_seed: float,
    before: float,
    folder: StudyFolder,
    hours: float | None,
) -> Iterator[str | Table]:
    """What numbers of seeds detect, and what published effects would take.

    a_seed: seconds of one seed of every arm; before: those of the first stage.
    """
    k, seeds = len(by_arm(arms)), len({c.seed for c in arms})
    noise = noise_of(arms, folder)

    def detects(n: int, comparisons: int = 1) -> float:
        return minimum_detectable_effect(
            noise.sigma, n_seeds=n, comparisons=comparisons, n_arms=k, correlation=noise.correlation
        )

    def time(n: int) -> str:
        return duration(before + n * a_seed)

    yield "what seeds detect: true differences in nats a token, at 5% with 80% power"
    columns = ["trial time", "two arms", f"any of {k - 1} from the reference"]
    table = plain_table("", ["seeds"], columns)
    for n in sorted({*SEEDS, seeds} - {1}):
        label = f"{n}{' (this study)' if n == seeds else ''}"
        table.add_row(label, time(n), f"{detects(n):.2g}", f"{detects(n, k - 1):.2g}")
    yield table
    if seeds == 1:
        yield "one seed gives no interval: this study, as it is, detects nothing"
    yield (
        f"noise: {noise.sigma:.2g} nats between seeds, {noise.correlation:.2f} of its variance "
        f"shared by all arms of a seed ({noise.source})"
    )
    effects = _effects(cfg, arms)
    for name, effect in effects.items():
        n = seeds_needed(effect, noise.sigma, n_arms=k, correlation=noise.correlation)
        yield f"published: {name}, {effect:+.2g} nats from the best: {n:,} seeds, {time(n)}"
    margin = cfg.study.margin
    if margin is not None:
        n = seeds_for_equivalence(margin, noise.sigma, n_arms=k, correlation=noise.correlation)
        yield (
            f"equal arms are called equivalent within study.margin {margin:g} by "
            f"{n:,} seeds, {time(n)}"
        )
    if hours is None:
        return
    n = math.floor((3600 * hours / cfg.train.devices - before) / a_seed)
    if n < 2:
        yield f"{hours:g} hours give no two seeds an arm, which take {time(2)}: no decision"
        return
    line = f"{hours:g} hours give {n:,} seeds an arm: a difference of {detects(n):.2g} nats "
    line += f"between two arms, {detects(n, k - 1):.2g} of any from the reference"
    if effects:
        inside = [name for name, effect in effects.items() if effect >= detects(n)]
        beyond = [name for name in effects if name not in inside]
        line += f"; decides of the published: {', '.join(inside) or 'none'}"
        line += f"; not: {', '.join(beyond)}" if beyond else ""
    yield line
