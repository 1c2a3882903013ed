"""`python -m ablate bench data`: how fast the loader makes batches, on one thread.

The bar is ten times the appetite of the fastest planned training step: the 14m hybrid, expected to
train at 2.0 million tokens a second on one H200. Recall documents are written by processes, as in
training on a GPU; their bar is three times the 1.6 million that one was seen to take.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence

from rich.table import Table

from ablate.config import DataConfig, MQARConfig, TokenizerConfig, WrittenConfig
from ablate.data import TokenSet, TrainStream, prefetched, prepare, writers
from ablate.data.stream import WANTED
from ablate.study.show import plain_console

FASTEST_STEP = 2.0e6  # tokens a second
FACTOR = 10

# seq_len, batch_size, share of MQAR rows, document resets
SHAPES = (
    (2048, 16, 0.0, False),
    (2048, 16, 0.0, True),
    (2048, 16, 0.5, False),
    (1024, 64, 0.0, False),
    (256, 32, 0.0, False),
    (64, 64, 0.0, False),
    (64, 64, 0.5, False),
)
MIXED = (2048, 32, WrittenConfig(share=0.4, entries=[2, 100]))  # as in sweeps/recall.yaml


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


def mixed_tokens_per_second(
    token_set: TokenSet, base: DataConfig, seconds: float
) -> tuple[float, int]:
    """(tokens of batches a second, processes) of MIXED, once the processes have started."""
    seq_len, batch_size, recall = MIXED
    data = base.model_copy(update={"seq_len": seq_len, "recall": recall})
    stream = TrainStream(token_set, data, batch_size=batch_size, seed=0)
    with writers(stream) as pool, prefetched(stream, 0, sys.maxsize, pool=pool) as batches:
        assert pool is not None
        for _ in range(10 + 4 * len(pool.processes)):  # more than are made ahead
            next(batches)
        steps, begun = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - begun) < seconds:
            next(batches)
            steps += 1
    return steps * batch_size * seq_len / elapsed, len(pool.processes)


def run(args: Sequence[str]) -> int:
    """Print a row for each shape; 0 when every one reaches its bar, else 1."""
    parser = argparse.ArgumentParser(prog="python -m ablate bench data", description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0, help="time of each row")
    parser.add_argument("--path", help="folder or file of text; default: the standard library")
    parser.add_argument("--tokenizer", help="a tokenizer.json; default: bytes")
    parser.add_argument("--cache", default=DataConfig().cache, help="folder of tokenised text")
    options = parser.parse_args(args)
    if not 0 < options.seconds < math.inf:
        parser.error(f"argument --seconds: {options.seconds:g} must be above 0")
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
    for name in ("seq_len", "batch", "rows", "resets", "M tokens/s", "of the bar", "meets"):
        table.add_column(name, justify="right")
    met = []

    def add(
        seq_len: int, batch_size: int, rows: str, reset: bool, speed: float, bar: float
    ) -> None:
        met.append(speed >= bar)
        table.add_row(
            f"{seq_len}",
            f"{batch_size}",
            rows,
            "yes" if reset else "no",
            f"{speed / 1e6:.1f}",
            f"{speed / bar:.1f}x",
            "yes" if met[-1] else "NO",
        )

    for seq_len, batch_size, share, reset in SHAPES:
        data = base.model_copy(
            update={"seq_len": seq_len, "reset_documents": reset, "mqar": MQARConfig(share=share)}
        )
        stream = TrainStream(token_set, data, batch_size=batch_size, seed=0)
        speed = tokens_per_second(stream, options.seconds)
        add(seq_len, batch_size, f"{share:.0%} MQAR" if share else "text", reset, speed, bar)
    speed, processes = mixed_tokens_per_second(token_set, base, options.seconds)
    add(*MIXED[:2], f"{MIXED[2].share:.0%} recall", False, speed, WANTED)
    console = plain_console()
    console.print(table)
    console.print(
        f"The bar is {bar / 1e6:.0f}M tokens/s: {FACTOR} x the {FASTEST_STEP / 1e6:.1f}M of the "
        "fastest planned training step (14m hybrid, one H200); with recall documents, which "
        f"processes write (here {processes}), {WANTED / 1e6:.1f}M."
    )
    return 0 if all(met) else 1
