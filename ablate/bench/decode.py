"""`python -m ablate bench decode NAME…`: tokens a second and bytes of state against context.

    python -m ablate bench decode transformer_8b mamba2_hybrid_8b mamba2_8b --contexts 1024,131072
    python -m ablate bench decode --pattern M-x6.*- --pattern "*-x12" --d-model 512

Architectures stand side by side with random weights, which decode as fast as trained ones: what is
read is the same. Caches of the whole context are allocated and filled with a state as of that many
tokens, without a prefill; the step is the one that `generate` runs, one CUDA graph on a GPU. The
bytes are those of the real caches, checked against the cost contract. Without a GPU nothing is
measured unless --device cpu asks for it.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from ablate.arch.spec import Architecture
from ablate.config import ArchConfig
from ablate.errors import UserError, did_you_mean
from ablate.model import Decoder, LanguageModel, cast_weights
from ablate.study.show import plain_console

Section = Callable[[str], ArchConfig]
CONTEXTS = (1024, 4096, 16384, 65536, 131072)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Row:
    """One architecture at one context: NaN figures where the memory is too small."""

    name: str
    context: int
    batch: int
    tokens_per_second: float
    state_bytes: int  # of one sequence


def measure(
    name: str,
    arch: Architecture,
    contexts: Sequence[int],
    *,
    batch: int,
    steps: int,
    device: torch.device,
    dtype: torch.dtype,
) -> list[Row]:
    """Rows of one architecture; its weights are made on the device and freed afterwards."""
    with torch.device(device):
        model = LanguageModel(arch, seed=None)
    with torch.no_grad():
        generator = torch.Generator(device).manual_seed(0)
        for parameter in model.parameters():  # the values do not matter, but must be finite
            parameter.normal_(0.0, 0.02, generator=generator)
    cast_weights(model, dtype)
    rows = []
    for context in contexts:
        # of one sequence's caches, by the layers' contracts
        expected = sum(o.state_bytes(context, dtype.itemsize) for o in arch.layer_options)
        try:
            speed = _speed(model, context, batch, steps, dtype, expected)
        except torch.cuda.OutOfMemoryError:
            speed = float("nan")
        rows.append(Row(name, context, batch, speed, expected))
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def _speed(
    model: LanguageModel, context: int, batch: int, steps: int, dtype: torch.dtype, expected: int
) -> float:
    """Tokens a second of all rows together, at the end of the context."""
    decoder = Decoder(model, batch, context, cache_dtype=dtype)
    if decoder.state.nbytes != batch * expected:
        raise AssertionError(
            f"the caches have {decoder.state.nbytes} bytes, the cost contract says "
            f"{batch * expected}"
        )
    token = torch.zeros(batch, dtype=torch.long, device=decoder.device)
    cuda = decoder.device.type == "cuda"

    def run(n: int) -> float:
        # Stand n + 1 tokens before the end, so that the last step sees the whole context.
        decoder.state.position_B.fill_(max(0, context - n - 1))
        if cuda:
            torch.cuda.synchronize()
        begun = time.perf_counter()
        for _ in range(n):
            decoder.step(token)
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    run(min(3, context - 1))
    n = min(steps, context - 1)
    return batch * n / run(n)


def _architectures(
    options: argparse.Namespace, known: Sequence[str], section_of: Section
) -> dict[str, Architecture]:
    found = {}
    for name in options.names:
        if name not in known:
            raise UserError(
                f"bench decode: there is no architecture '{name}'{did_you_mean(name, known)}; "
                f"there are {', '.join(known)}"
            )
        arch = section_of(name)
        found[name] = Architecture.from_config(arch, arch.vocab_size or options.vocab_size)
    for pattern in options.pattern or []:
        found[pattern] = Architecture(
            pattern, d_model=options.d_model, vocab_size=options.vocab_size
        )
    if not found:
        raise UserError(f"bench decode needs architectures or --pattern; {', '.join(known)}")
    return found


def _whole(text: str, least: int = 2) -> int:
    value = int(text)
    if value < least:
        raise argparse.ArgumentTypeError(f"{text} must be {least} or more")
    return value


def _rows(text: str) -> int:
    return _whole(text, 1)


def _contexts(text: str) -> list[int]:
    return [_whole(part) for part in text.split(",")]


def run(
    args: Sequence[str],
    *,
    known: Sequence[str],
    section_of: Section,
    console: Console | None = None,
) -> int:
    """Print a row for each context with every architecture beside the first; 0.

    known: names of published architectures; section_of: their `arch` section by name.
    """
    parser = argparse.ArgumentParser(prog="python -m ablate bench decode", description=__doc__)
    parser.add_argument("names", nargs="*", help="published architectures: `ablate cost --help`")
    parser.add_argument("--pattern", action="append", help="a pattern of one's own")
    parser.add_argument("--d-model", type=_whole, default=512, help="width of the patterns")
    parser.add_argument("--vocab-size", type=_whole, default=50304, help="where none is given")
    parser.add_argument("--contexts", type=_contexts, default=list(CONTEXTS))
    parser.add_argument("--batch", type=_rows, default=1, help="sequences at a time")
    parser.add_argument("--steps", type=_whole, default=64, help="tokens that are timed")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args(args)
    architectures = _architectures(options, known, section_of)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "bench decode needs a GPU, and torch sees none here; give --device cpu to measure on "
            "the CPU, whose memory must hold the weights"
        )
    device = torch.device(options.device)
    dtype = DTYPES[options.dtype or ("bf16" if device.type == "cuda" else "fp32")]
    rows: list[Row] = []
    names = []
    for name, arch in architectures.items():
        names.append(name)
        with contextlib.suppress(torch.cuda.OutOfMemoryError):
            rows += measure(
                name,
                arch,
                options.contexts,
                batch=options.batch,
                steps=options.steps,
                device=device,
                dtype=dtype,
            )
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    console = console or plain_console()
    console.print(_table(rows, names, f"{place}, batch {options.batch}, {dtype}"))
    return 0


def _table(rows: Sequence[Row], names: Sequence[str], title: str) -> Table:
    table = Table(title=f"Decoding: {title}", title_justify="left")
    table.add_column("context", justify="right")
    for name in names:
        table.add_column(f"{name}\ntokens/s", justify="right")
        table.add_column("state", justify="right")
        if name != names[0]:
            table.add_column(f"against\n{names[0]}", justify="right")
    at = {(row.name, row.context): row for row in rows}
    for context in dict.fromkeys(row.context for row in rows):
        cells = [f"{context:,}"]
        speeds = []
        for name in names:
            row = at.get((name, context))
            speeds.append(row.tokens_per_second if row else math.nan)
            cells.append(f"{speeds[-1]:,.4g}" if math.isfinite(speeds[-1]) else "no memory")
            cells.append(f"{row.state_bytes / 2**20:,.1f} MiB" if row else "")
            if name != names[0]:
                ratio = speeds[-1] / speeds[0]
                cells.append(f"{ratio:.2f}x" if math.isfinite(ratio) else "")
        table.add_row(*cells)
    return table
