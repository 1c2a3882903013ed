"""The verbs prepare and cost: the text and the architecture of a config, before anything runs."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ablate import config
from ablate.arch import pattern as patterns
from ablate.arch.spec import Architecture
from ablate.data import prepare as prepare_text
from ablate.data.tokens import TokenSet
from ablate.study.trial import resolve, vocabulary

LENGTHS = (1024, 4096, 16_384, 131_072)


def prepare(tree: Mapping[str, Any], console: Console | None = None) -> TokenSet:
    """Tokenise and cache the text of a config, print what it holds and the epochs of its trials."""
    console = console or wide_console()
    trial = resolve(tree)
    token_set = prepare_text(trial.config.data)
    columns = ["documents", "tokens", "bytes", "bytes a token"]
    table = plain_table(f"text {token_set.fingerprint}", ["split"], columns)
    for name, split in token_set.splits.items():
        per_token = f"{split.n_bytes / split.n_tokens:.2f}" if split.n_tokens else "–"
        table.add_row(
            name, f"{split.n_docs:,}", f"{split.n_tokens:,}", f"{split.n_bytes:,}", per_token
        )
    console.print(table)
    return token_set


def cost(tree: Mapping[str, Any], console: Console | None = None) -> None:
    """Print what the architecture of a config costs, beside its published figures."""
    console = console or wide_console()
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
    table = plain_table(
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
    lengths = plain_table("by length", [], columns)
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


def wide_console() -> Console:
    # A pipe has no width; wide enough that no number is cut.
    return Console() if sys.stdout.isatty() else Console(width=160)


def plain_table(title: str, names: Sequence[str], numbers: Sequence[str]) -> Table:
    """Names fold, numbers never do."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in names:
        table.add_column(column, overflow="fold")
    for column in numbers:
        table.add_column(column, justify="right", no_wrap=True)
    return table


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
    """Seconds, minutes, hours or days, whichever reads best."""
    for limit, unit, form in (
        (120, 1, "{:.0f} s"),
        (7200, 60, "{:.0f} min"),
        (360000, 3600, "{:.1f} h"),
    ):
        if seconds < limit:
            return form.format(seconds / unit)
    return f"{seconds / 86400:,.0f} days"
