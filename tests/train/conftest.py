"""A run small enough to train in a fraction of a second."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ablate.config import Config, load

Make = Callable[..., Config]


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty documents of words that follow each other by a simple rule."""
    folder = tmp_path_factory.mktemp("text")
    rng = random.Random(0)
    words = ["red", "green", "blue", "one", "two", "three", "run", "walk"]
    for i in range(40):
        text = " ".join(rng.choice(words) for _ in range(rng.randrange(20, 120)))
        (folder / f"{i:02d}.txt").write_text(text + f" {i}\n")
    return folder


@pytest.fixture(scope="session")
def tiny_tree(text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {
        "arch": {
            "pattern": "M-*-",
            "d_model": 16,
            "mamba2": {"d_state": 4, "head_dim": 8},
            "attention": {"head_dim": 8, "n_heads": 2},
            "mlp": {"d_hidden": 32},
        },
        "data": {
            "source": "files",
            "path": str(text_folder),
            "seq_len": 16,
            "val_share": 0.2,
            "workers": 1,
            "allow_repeats": True,
            "cache": str(tmp_path_factory.mktemp("cache")),
            "mqar": {"share": 0.5, "pairs": 2},
        },
        "train": {"tokens": 20 * 4 * 16, "batch_size": 4, "log_every": 1, "lr": 3e-3},
        "evaluate": {"tokens": 400, "mqar_rows": 6},
        "tracker": {"kind": "none"},
    }


@pytest.fixture
def tiny(tiny_tree: dict[str, Any]) -> Make:
    """tiny(section={"field": value}, seed=3): the config with fields changed; 20 steps."""

    def make(**changes: Any) -> Config:
        tree = copy.deepcopy(tiny_tree)
        for section, fields in changes.items():
            if isinstance(fields, dict):
                tree.setdefault(section, {}).update(fields)
            else:
                tree[section] = fields
        return load(tree)

    return make


def curve(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a rerun must repeat of metrics.jsonl: all but the speed."""
    timed = ("tokens_per_second", "mfu", "seconds")
    return [{k: v for k, v in row.items() if k not in timed} for row in rows]
