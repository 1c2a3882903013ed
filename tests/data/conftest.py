"""Small texts of the tests' own, and configs over them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import zstandard

from ablate.config import Config, DataConfig, load

WORDS = ["the", "of", "state", "space", "model", "attends", "to", "keys", "seen", "12", "345"]
WORDS += ["hybrid", "recurrent", "window", "layer", "between", "memory", "question", "answer"]


def make_documents(n: int, seed: int = 0, words: int = 60) -> list[str]:
    """n distinct documents of about `words` words."""
    rng = random.Random(seed)
    return [
        f"{seed}-{i} " + " ".join(rng.choices(WORDS, k=rng.randint(words // 2, 2 * words)))
        for i in range(n)
    ]


def write_jsonl(path: Path, documents: list[str]) -> Path:
    raw = "".join(json.dumps({"text": d}) + "\n" for d in documents).encode()
    path.write_bytes(zstandard.compress(raw) if path.name.endswith(".zst") else raw)
    return path


def data_config(tmp_path: Path, **fields: Any) -> DataConfig:
    """A DataConfig through the same validation as a user's, with a cache of its own."""
    tree = {"cache": str(tmp_path / "cache"), "val_share": 0.1, **fields}
    config: Config = load({"data": tree, "train": {"tokens": 1}})
    return config.data


@pytest.fixture
def texts() -> list[str]:
    return make_documents(200)


@pytest.fixture
def data(tmp_path: Path, texts: list[str]) -> DataConfig:
    """200 documents in a JSONL file, bytes, rows of 64."""
    path = write_jsonl(tmp_path / "text.jsonl", texts)
    return data_config(tmp_path, source="files", path=str(path), seq_len=64)
