"""Benchmarks from local JSONL, where lm-eval would ask the hub.

    <local_data>/<task>/<split>.jsonl[.zst]

Rows keep the hub's field names, which the task definitions read. One file holds all of MMLU
(`subject` names the part) and all of BLiMP (`UID`). A training split that is not there is replaced
by validation, as a source of shots only; lm-eval keeps an item out of its own shots.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ablate.data import corpus
from ablate.errors import UserError

# (hub path, configuration or None for any) -> folder
_PLACES: dict[tuple[str, str | None], str] = {
    ("Rowan/hellaswag", None): "hellaswag",
    ("baber/piqa", None): "piqa",
    ("allenai/winogrande", None): "winogrande",
    ("aps/super_glue", "boolq"): "boolq",
    ("aps/super_glue", "copa"): "copa",
    ("aps/super_glue", "cb"): "cb",
    ("lighteval/siqa", None): "social_iqa",
    ("tau/commonsense_qa", None): "commonsense_qa",
    ("allenai/ai2_arc", "ARC-Easy"): "arc_easy",
    ("allenai/ai2_arc", "ARC-Challenge"): "arc_challenge",
    ("allenai/openbookqa", None): "openbookqa",
    ("EleutherAI/race", "high"): "race",
    ("EleutherAI/lambada_openai", "default"): "lambada_openai",
    ("cimec/lambada", None): "lambada_standard",
    ("nyu-mll/blimp", None): "blimp",
    ("cais/mmlu", None): "mmlu",
    ("openai/gsm8k", None): "gsm8k",
    ("google-research-datasets/nq_open", None): "nq_open",
    ("truthfulqa/truthful_qa", "multiple_choice"): "truthfulqa",
    ("EleutherAI/wikitext_document_level", None): "wikitext",
    ("nyu-mll/glue", "mrpc"): "glue_mrpc",
    ("nyu-mll/glue", "rte"): "glue_rte",
    ("nyu-mll/glue", "sst2"): "glue_sst2",
    ("bigbio/pubmed_qa", None): "pubmedqa",
    ("lighteval/squad_v2", None): "squadv2",
}
# folder -> split -> stem of its file, where they differ
_STEMS = {
    "truthfulqa": {"validation": "validation_multiple_choice"},
    "wikitext": {"test": "test_raw"},
}
_FIELDS = {"blimp": "UID", "mmlu": "subject"}  # that name the configuration
_SPLITS = ("train", "validation", "dev", "test")


class NoLocalData(LookupError):
    """A benchmark whose data is not here or cannot be used; its text is what the user reads."""


def check(folder: str) -> Path:
    """The folder of evaluate.local_data; UserError when it is none."""
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise UserError(f"evaluate.local_data '{folder}' is not a folder of <task>/<split>.jsonl")
    return path


@contextlib.contextmanager
def local_data(root: Path) -> Iterator[list[str]]:
    """Inside, lm-eval reads its data from `root`; yields notes on what stands in for what."""
    import datasets

    notes: list[str] = []
    original = datasets.load_dataset

    def load(path: str, name: str | None = None, **options: Any) -> Any:
        if path == "json":
            return original(path, name, **options)
        return _load(root, path, name, notes)

    datasets.load_dataset = load
    try:
        yield notes
    finally:
        datasets.load_dataset = original


def as_dataset(rows: Sequence[Mapping[str, Any]]) -> Any:
    """A datasets.Dataset of rows that JSON can hold, with the fields of the first.

    Its fingerprint is a hash of the rows. `Dataset.from_list` would pickle the table to get one,
    and pyarrow cannot be pickled where packages are in a folder that is not site-packages.
    """
    import datasets
    import pyarrow

    content = hashlib.blake2b(digest_size=8)
    for row in rows:
        content.update(json.dumps(row).encode())
    table = pyarrow.Table.from_pylist(rows)
    return datasets.Dataset(table, fingerprint=content.hexdigest())


def _load(root: Path, path: str, name: str | None, notes: list[str]) -> Any:
    import datasets

    folder = _PLACES.get((path, name)) or _PLACES.get((path, None))
    if folder is None:
        raise NoLocalData(f"evaluate.local_data has no place for '{path}'")
    stems, field = _STEMS.get(folder, {}), _FIELDS.get(folder)
    files = {s: f for s in _SPLITS if (f := _file(root / folder, stems.get(s, s))) is not None}
    if not files:
        raise NoLocalData(f"no {root / folder}/<split>.jsonl in evaluate.local_data")
    splits: dict[str, Any] = {}
    for split, file in files.items():
        rows = _rows(file)
        if field is not None:
            if rows and field not in rows[0]:
                raise NoLocalData(f"the rows of {file} have no field '{field}'")
            rows = [row for row in rows if row[field] == name]
        if rows:
            splits[split] = as_dataset(rows)
    if not splits:
        of = "" if field is None else f" with {field} '{name}'"
        raise NoLocalData(f"there are no rows{of} in {root / folder}")
    if "train" not in splits and "validation" in splits:
        splits["train"] = splits["validation"]
        notes.append(f"{folder}: no training split here, shots come from validation")
    return datasets.DatasetDict(splits)


def _file(folder: Path, stem: str) -> Path | None:
    for suffix in (".jsonl", ".jsonl.zst"):
        path = folder / f"{stem}{suffix}"
        if path.is_file():
            return path
    return None


@functools.lru_cache(maxsize=6)
def _rows(path: Path) -> list[dict[str, Any]]:
    """Objects with the same fields: a row that lacks one would be scored with nothing in it."""
    try:
        raw = b"".join(block for block, _ in corpus.blocks(path))
    except (OSError, UserError) as error:
        raise NoLocalData(f"{path} cannot be read ({error})") from None
    rows: list[dict[str, Any]] = []
    # by bytes: only a line feed ends a row, not what else Unicode calls a line's end
    for number, line in enumerate(raw.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise NoLocalData(f"line {number} of {path} is not JSON ({error})") from None
        if not isinstance(row, dict):
            raise NoLocalData(f"line {number} of {path} is not a JSON object")
        if rows and row.keys() != rows[0].keys():
            other = sorted(row.keys() ^ rows[0].keys())[0]
            what = "lacks" if other in rows[0] else "alone has"
            raise NoLocalData(f"line {number} of {path} {what} the field '{other}'")
        rows.append(row)
    return rows
