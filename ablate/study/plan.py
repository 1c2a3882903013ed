"""What would run and what it would cost, before anything does: the verbs plan, prepare, cost."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ablate import config
from ablate.arch import pattern as patterns
from ablate.arch.spec import Architecture
from ablate.data import prepare as prepare_text
from ablate.data.tokens import TokenSet
from ablate.errors import UserError
from ablate.study.folder import StudyFolder
from ablate.study.space import Cell, cells, proposed
from ablate.study.trial import Trial, resolve, vocabulary
from ablate.train.budget import Budget

LENGTHS = (1024, 4096, 16_384, 131_072)


def plan(tree: Mapping[str, Any], console: Console | None = None) -> None:
    """Print every trial that a run of this config would have; UserError as `run` would raise it."""
    console = console or _console()
    cfg = config.load(tree)
    study = cfg.study
    found = cells(tree)
    if study.search:
        middle = {name: _middle(dim) for name, dim in study.search.items()}
        found = proposed(tree, middle)
        console.print(
            f"a search of {study.n_trials} trials by {study.sampler} over "
            f"{', '.join(study.search)}; the middle of the space would be:"
        )
    folder = StudyFolder(Path(study.folder) / study.name)
    table = _table(
        f"{study.name}: {study.question}".rstrip(": "),
        ["arm", "pattern"],
        ["params", "beside emb.", "FLOPs/token", "state", "tokens", "FLOPs", "done"],
    )
    total = 0.0
    left = 0.0
    for arm, group in _arms(found).items():
        trial = group[0].trial
        flops = run_flops(trial)
        done = [c for c in group if folder.run(c.key).result() is not None]
        total += flops * len(group)
        left += flops * (len(group) - len(done))
        cost = trial.architecture.cost(trial.config.data.seq_len)
        table.add_row(
            "\n= ".join([arm, *group[0].also]),
            patterns.compress(trial.architecture.letters),
            count(cost.params),
            count(cost.non_embedding_params),
            count(cost.train_flops),
            size(cost.state_bytes),
            count(run_tokens(trial)),
            f"{flops:.2e}",
            f"{len(done)}/{len(group)}",
        )
    console.print(table)
    console.print(
        f"{len(found)} trials, {total:.2e} training FLOPs by the cost contract"
        + (f", {left:.2e} still to do" if left != total else "")
    )
    console.print(_time_left(folder, found, left))
    for warning in sorted({w for c in found for w in c.trial.warnings}):
        console.print(f"note: {warning}")


def prepare(tree: Mapping[str, Any], console: Console | None = None) -> TokenSet:
    """Tokenise and cache the text of a config, print what it holds and the epochs of its trials."""
    console = console or _console()
    trial = resolve(tree)
    token_set = prepare_text(trial.config.data)
    columns = ["documents", "tokens", "bytes", "bytes a token"]
    table = _table(f"text {token_set.fingerprint}", ["split"], columns)
    for name, split in token_set.splits.items():
        per_token = f"{split.n_bytes / split.n_tokens:.2f}" if split.n_tokens else "–"
        table.add_row(
            name, f"{split.n_docs:,}", f"{split.n_tokens:,}", f"{split.n_bytes:,}", per_token
        )
    console.print(table)
    return token_set


def cost(tree: Mapping[str, Any], console: Console | None = None) -> None:
    """Print what the architecture of a config costs, beside its published figures."""
    console = console or _console()
    cfg = config.load(tree)
    rows = cfg.arch.vocab_size or vocabulary(cfg)
    architecture = Architecture.from_config(cfg.arch, rows)
    seq_len = LENGTHS[1]
    shares = architecture.shares()
    console.print(
        f"{cfg.arch.name or 'architecture'}: {patterns.compress(architecture.letters)}, "
        f"{architecture.n_layers} layers, d_model {architecture.d_model}, "
        f"vocabulary {architecture.vocab_size:,}, "
        f"attention {shares['attention_of_layers']:.1%} of layers and "
        f"{shares['attention_of_mixers']:.1%} of mixers, MLP {shares['mlp_of_layers']:.1%}",
        highlight=False,
    )
    table = _table(
        f"at {seq_len:,} tokens; FLOPs are a token's, forward; elementwise ones of scans apart",
        ["part"],
        ["layers", "params", "FLOPs", "elementwise", "state", "decode FLOPs"],
    )
    for row in architecture.cost(seq_len).table():
        table.add_row(
            row["part"],
            str(row["layers"] or ""),
            f"{row['params']:,}",
            count(row["forward_flops"]),
            count(row["elementwise_flops"]),
            size(row["state_bytes"]),
            count(row["decode_flops"]),
        )
    console.print(table)
    columns = ["tokens", "forward FLOPs/token", "training FLOPs/token", "state of a decoder"]
    lengths = _table("by length", [], columns)
    for length in LENGTHS:
        at = architecture.cost(length)
        lengths.add_row(
            f"{length:,}", count(at.forward_flops), count(at.train_flops), size(at.state_bytes)
        )
    console.print(lengths)
    ours = {"params": architecture.num_params(), "seq_len": seq_len}
    for name, figure in cfg.arch.published.items():
        if name in ours and figure:
            off = ours[name] / figure - 1
            console.print(f"published {name}: {figure:,.0f}; ours {ours[name]:,} ({off:+.2%})")
        else:
            console.print(f"published {name}: {figure:,g}")


def _console() -> Console:
    # A pipe has no width; wide enough that no number is cut.
    return Console() if sys.stdout.isatty() else Console(width=160)


def _table(title: str, names: Sequence[str], numbers: Sequence[str]) -> Table:
    """Names fold, numbers never do."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in names:
        table.add_column(column, overflow="fold")
    for column in numbers:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def run_tokens(trial: Trial) -> int:
    """Tokens of a whole run; of a budget in seconds none are known before, which raises."""
    steps = _steps(trial)
    return steps * trial.config.train.batch_size * trial.config.data.seq_len


def run_flops(trial: Trial) -> float:
    """Training FLOPs of a whole run by the cost contract."""
    if trial.config.train.seconds is not None:
        return float("nan")
    return run_tokens(trial) * trial.architecture.cost(trial.config.data.seq_len).train_flops


def _steps(trial: Trial) -> int:
    cfg = trial.config
    per_token = trial.architecture.cost(cfg.data.seq_len).train_flops
    budget = Budget.of(cfg.train, cfg.train.batch_size * cfg.data.seq_len, per_token)
    return budget.steps or 0


def _arms(found: Sequence[Cell]) -> dict[str, list[Cell]]:
    arms: dict[str, list[Cell]] = {}
    for cell in found:
        arms.setdefault(cell.arm, []).append(cell)
    return arms


def _time_left(folder: StudyFolder, found: Sequence[Cell], left: float) -> str:
    """Time by what finished trials of this study took; nothing is guessed without one."""
    speeds = []
    for cell in found:
        result = folder.run(cell.key).result()
        if result and result["train"].get("flops") and result["train"].get("seconds"):
            total = sum(result.get("seconds", {}).values()) or result["train"]["seconds"]
            speeds.append(result["train"]["flops"] / total)
    if not speeds:
        return "time: unknown until a trial of this study has finished on this hardware"
    if not left:
        return "time: nothing is left to do"
    seconds = left / statistics.median(speeds)
    return (
        f"time: about {duration(seconds)} of trial time left, by the median speed of "
        f"{len(speeds)} finished trials ({statistics.median(speeds):.2e} FLOP/s, all phases)"
    )


def _middle(dim: config.SearchDimension) -> Any:
    if dim.choices is not None:
        return dim.choices[len(dim.choices) // 2]
    if dim.low is None or dim.high is None:
        raise UserError("a dimension of study.search needs 'low' and 'high', or 'choices'")
    value = (dim.low * dim.high) ** 0.5 if dim.log else (dim.low + dim.high) / 2
    return round(value) if dim.integer else value


def count(value: float) -> str:
    """1,234,567 as 1.23M."""
    for limit, suffix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{suffix}"
    return f"{value:.3g}" if value else "0"


def size(value: float) -> str:
    """Bytes in powers of 1024."""
    for power, suffix in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if value >= 1024**power:
            return f"{value / 1024**power:.3g} {suffix}"
    return f"{value:.0f} B" if value else "0"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, whichever reads best."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
