"""What one model scored, for a terminal; the items are in its folder."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from ablate.report.stats import Estimate, bootstrap_ratio, share_of_items
from ablate.study.show import plain_table

_VERDICTS = {
    "floor": "at floor, which tells nothing",
    "ceiling": "at ceiling, which tells nothing",
    "cut": "longer than the model reads",
    "unended": "right numbers that go on: the model does not stop",
}


def tables(contents: Mapping[str, Mapping[str, Any]]) -> list[Table | str]:
    """Recall by cell, loss by length, and benchmarks, each score with its 95% interval over
    documents; after them, which cells tell nothing, and published figures."""
    found: list[Table | str] = []
    if recall := {n: c for n, c in contents.items() if "cells" in c}:
        found += [_recall(recall), *_uninformative(recall)]
    if "length" in contents:
        found.append(_length(contents["length"]))
    if benchmarks := [c for c in contents.values() if "shots" in c]:
        found += [_benchmarks(benchmarks), *_published(benchmarks)]
    return found


def _recall(contents: Mapping[str, Mapping[str, Any]]) -> Table:
    numbers = ["items", "tokens", "exact match", "95%", "digits"]
    table = plain_table("Recall", ["task", "cell"], numbers)
    table.columns[0].no_wrap = True
    for name, content in contents.items():
        items = content["items"]
        for label, cell in content["cells"].items():
            own = [i for i, at in enumerate(items["cell"]) if at == label]
            score, cluster = ([items[n][i] for i in own] for n in ("exact_match", "cluster"))
            digits = cell.get("digit_accuracy")
            table.add_row(
                name,
                label,
                str(cell["items"]),
                f"{cell['tokens']:.0f}",
                f"{cell['exact_match']:.1%}",
                _percent(share_of_items(score, cluster)),
                "" if digits is None else f"{digits:.1%}",
            )
    return table


def _uninformative(contents: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    for verdict, meaning in _VERDICTS.items():
        cells = [
            f"{name} {label}"
            for name, content in contents.items()
            for label, cell in content["cells"].items()
            if cell["verdict"] == verdict
        ]
        if cells:
            yield f"{meaning}: {', '.join(cells)}"


def _length(content: Mapping[str, Any]) -> Table:
    scored, n = content["scored_tokens"], content["documents"]
    title = f"Loss on the same {scored} tokens of each of {n} documents"
    table = plain_table(title, [], ["training lengths", "tokens", "loss (nats)", "95%"])
    for multiple, loss in content["by_multiple"].items():
        found = bootstrap_ratio(content["items"][multiple], np.ones(n))
        length = int(multiple) * content["training_length"]
        interval = "" if math.isnan(found.low) else f"{found.low:.4f} to {found.high:.4f}"
        table.add_row(multiple, str(length), f"{loss:.4f}", interval)
    return table


def _benchmarks(contents: Sequence[Mapping[str, Any]]) -> Table:
    numbers = ["shots", "items", "here, %", "95%"]
    table = plain_table("Benchmarks", ["task", "metric"], numbers)
    table.columns[0].no_wrap = True
    for content in contents:
        items = content["items"]
        found = share_of_items(items["score"], items["cluster"])
        # Some groups of tasks average their parts, whatever their sizes.
        same = math.isclose(found.value, content["value"], abs_tol=1e-6)
        table.add_row(
            content["task"],
            content["metric"],
            str(content["shots"]),
            str(len(items["score"])),
            f"{100 * content['value']:.2f}",
            _percent(found) if same else "",
        )
    return table


def _published(contents: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for content in contents:
        if figures := content["published"]:
            listed = ", ".join(f"{model} {value:g}" for model, value in figures.items())
            yield f"published, {content['task']}, {content['shots']} shots, %: {listed}"


def _percent(share: Estimate) -> str:
    return "" if math.isnan(share.low) else f"{100 * share.low:.1f} to {100 * share.high:.1f}"
