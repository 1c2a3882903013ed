"""The verbs prepare and cost: the text and the architecture of a config, before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from ablate import config
from ablate.arch import pattern as patterns
from ablate.arch.spec import Architecture
from ablate.data import prepare as prepare_text
from ablate.data.tokens import TokenSet
from ablate.study.show import plain_table, si, wide_console
from ablate.study.trial import resolve, vocabulary

LENGTHS = (1024, 4096, 16_384, 131_072)


def prepare(tree: Mapping[str, Any], console: Console | None = None) -> TokenSet:
    """Tokenise and cache the text of a config, print what it holds and the epochs of its trials."""
    console = console or wide_console()
    trial = resolve(tree)
    token_set = prepare_text(trial.config.data, tell=True)
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
            si(row["forward_flops"]),
            si(row["elementwise_flops"]),
            si(row["state_bytes"], "B"),
            si(row["decode_flops"]),
        )
    console.print(table)
    columns = ["tokens", "forward FLOPs/token", "training FLOPs/token", "state of a decoder"]
    lengths = plain_table("by length", [], columns)
    for length in LENGTHS:
        at = architecture.cost(length)
        lengths.add_row(
            f"{length:,}", si(at.forward_flops), si(at.train_flops), si(at.state_bytes, "B")
        )
    console.print(lengths)
    ours = {"params": architecture.num_params(), "seq_len": seq_len}
    for name, figure in cfg.arch.published.items():
        if name in ours and figure:
            off = ours[name] / figure - 1
            console.print(f"published {name}: {figure:,.0f}; ours {ours[name]:,} ({off:+.2%})")
        else:
            console.print(f"published {name}: {figure:,g}")
