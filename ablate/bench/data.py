"""`python -m ablate bench data`: how fast the loader makes batches, on one thread.

The bar is ten times the appetite of the fastest planned training step: the 14m hybrid, expected to
train at 2.0 million tokens a second on one H200.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from ablate.config import DataConfig, MQARConfig, TokenizerConfig
from ablate.data import TrainStream, prepare

FASTEST_STEP = 2.0e6  # tokens a second
FACTOR = 10

# seq_len, batch_size, share of recall rows, document resets
SHAPES = (
    (2048, 16, 0.0, False),
    (2048, 16, 0.0, True),
    (2048, 16, 0.5, False),
    (1024, 64, 0.0, False),
    (256, 32, 0.0, False),
    (64, 64, 0.0, False),
    (64, 64, 0.5, False),
)


def tokens_per_second(stream: TrainStream, seconds: float) -> float:
    """Tokens of batches (rows × seq_len) a second, after a first batch that is not counted.

    Every step is another one, so windows come from all over the text.
    """
    stream.batch(0)
    step, begun = 1, time.perf_counter()
    while (elapsed := time.perf_counter() - begun) < seconds:
        stream.batch(step)
        step += 1
    return (step - 1) * stream.batch_size * stream.seq_len / elapsed


def run(args: Sequence[str]) -> int:
    """Print a row for each shape; 0 when every one reaches the bar, else 1."""
    parser = argparse.ArgumentParser(prog="python -m ablate bench data", description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0, help="time of each row")
    parser.add_argument("--path", help="folder or file of text; default: the standard library")
    parser.add_argument("--tokenizer", help="a tokenizer.json; default: bytes")
    parser.add_argument("--cache", default=DataConfig().cache, help="folder of tokenised text")
    options = parser.parse_args(args)
    tokenizer = TokenizerConfig()
    if options.tokenizer:
        tokenizer = TokenizerConfig(kind="file", path=options.tokenizer)
    base = DataConfig(
        source="files" if options.path else "stdlib",
        path=options.path,
        tokenizer=tokenizer,
        cache=options.cache,
    )
    token_set = prepare(base)
    bar = FASTEST_STEP * FACTOR
    unique = token_set.splits["train"].n_tokens
    table = Table(title=f"Loader on one thread, {unique:,} tokens of {token_set.meta['source']}")
    for name in ("seq_len", "batch", "recall share", "resets", "M tokens/s", "of the bar", "meets"):
        table.add_column(name, justify="right")
    met = []
    for seq_len, batch_size, share, reset in SHAPES:
        data = base.model_copy(
            update={"seq_len": seq_len, "reset_documents": reset, "mqar": MQARConfig(share=share)}
        )
        stream = TrainStream(token_set, data, batch_size=batch_size, seed=0)
        speed = tokens_per_second(stream, options.seconds)
        met.append(speed >= bar)
        table.add_row(
            f"{seq_len}",
            f"{batch_size}",
            f"{share:g}",
            "yes" if reset else "no",
            f"{speed / 1e6:.1f}",
            f"{speed / bar:.1f}x",
            "yes" if met[-1] else "NO",
        )
    console = Console()
    console.print(table)
    console.print(
        f"The bar is {bar / 1e6:.0f}M tokens/s: {FACTOR} x the {FASTEST_STEP / 1e6:.1f}M of the "
        "fastest planned training step (14m hybrid, one H200)."
    )
    return 0 if all(met) else 1
