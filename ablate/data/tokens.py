"""Tokenised text on disk: built once under a lock, opened memory-mapped, checked on open.

    <cache>/tokens/<fingerprint>/
        train.bin  val_a.bin  val_b.bin          ids, uint16 or uint32
        <split>.offsets.npy  <split>.bytes.npy   where documents start, their UTF-8 bytes
        meta.json                                what it was made of, sizes and checksums

A split is one stream: every document is an end-of-text followed by its ids, and a last end-of-text
closes the stream. The mark that ends a document thus also begins the next one, which is what the
model sees when it starts from nothing. The folder's name is a hash of the text's content, the
tokenizer and how the text is split; a folder appears whole, by a rename.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ablate.config import DataConfig
from ablate.data import corpus, worker
from ablate.data import tokenizer as tokenizers
from ablate.data.corpus import HASH_MAX, Source, locked, recipe_hash, say, writing
from ablate.data.tokenizer import Tokenizer
from ablate.errors import UserError
from ablate.run import atomic_write, read_json

SPLITS = ("train", "val_a", "val_b")
_FORMAT = 1
_PARALLEL_BYTES = 8_000_000  # less is tokenised here, sooner than a process starts
FEW = 20  # documents, of which a share may be none
_NAMES = {"val_a": "validation A", "val_b": "validation B", "train": "training"}


@dataclass(frozen=True)
class Split:
    """One stream of documents.

    tokens: (n_tokens + 1,) ids, an end-of-text before every document and after the last one;
    doc_offsets: int64 (n_docs + 1,), the position of the end-of-text before each document, and of
    the last one; doc_bytes: int64 (n_docs,), UTF-8 bytes. Validation documents are in the order of
    their content's hash, so any first part of them is a random sample.
    """

    name: str
    tokens: np.ndarray = field(repr=False)
    doc_offsets: np.ndarray = field(repr=False)
    doc_bytes: np.ndarray = field(repr=False)

    @property
    def n_tokens(self) -> int:
        """Tokens that can be predicted: all but the first end-of-text."""
        return len(self.tokens) - 1

    @property
    def n_docs(self) -> int:
        return len(self.doc_bytes)

    @property
    def n_bytes(self) -> int:
        return int(self.doc_bytes.sum())

    def head(self, max_tokens: int | None) -> int:
        """How many whole documents from the first on hold at most max_tokens, but at least one."""
        if max_tokens is None:
            return self.n_docs
        return max(1, int(np.searchsorted(self.doc_offsets, max_tokens, side="right")) - 1)


@dataclass(frozen=True)
class TokenSet:
    """The tokenised text of a config; `fingerprint` names its content."""

    tokenizer: Tokenizer
    splits: dict[str, Split]
    fingerprint: str
    meta: dict[str, Any] = field(repr=False)
    folder: Path

    @property
    def vocab_size(self) -> int:
        """Ids of the tokenizer; a model's table is `model_vocab` of it."""
        return self.tokenizer.vocab_size


def prepare(data: DataConfig, progress: bool | None = None, *, tell: bool = False) -> TokenSet:
    """Open the tokenised text of a config, building it first when it is not in the cache.

    progress: show a bar on stderr; None: when stderr is a terminal. tell: say what files are left
    out, as a build does, also where nothing is to be built. Raises UserError for text that cannot
    be found or read, a tokenizer that cannot be used, and a split without documents.
    """
    cache = Path(data.cache).expanduser()
    sources = corpus.sources(data)
    left_out = dict.fromkeys(line for source in sources.values() for line in source.left_out)
    if tell:
        _say_each(left_out)
    tokenizer = tokenizers.load(data, sources["text"])
    recipe = _recipe(data, sources, tokenizer, cache)
    fingerprint = recipe_hash(recipe)
    folder = cache / "tokens" / fingerprint
    found = _open(folder, tokenizer, fingerprint)
    if isinstance(found, TokenSet):
        return found
    with locked(folder.with_suffix(".lock"), "the token cache"):
        found = _open(folder, tokenizer, fingerprint)
        if isinstance(found, TokenSet):
            return found
        if folder.exists():
            say(f"the token cache {folder} is damaged ({found}) and is built again")
            shutil.rmtree(folder)
        partial = folder.with_name(f".{fingerprint}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        with writing(partial):
            partial.mkdir(parents=True)
        if not tell:
            _say_each(left_out)
        try:
            _build(partial, data, sources, tokenizer, recipe, progress)
            if recipe_hash(_recipe(data, sources, tokenizer, cache)) != fingerprint:
                raise UserError(
                    f"{sources['text'].name}: the text changed while it was read; run again"
                )
            with writing(folder):
                os.replace(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        found = _open(folder, tokenizer, fingerprint)
    if not isinstance(found, TokenSet):
        raise RuntimeError(f"the token cache {folder} was just built and cannot be opened: {found}")
    return found


def _say_each(lines: Iterable[str]) -> None:
    for line in lines:
        say(line)


def _recipe(
    data: DataConfig, sources: dict[str, Source], tokenizer: Tokenizer, cache: Path
) -> dict[str, Any]:
    """Everything that the ids and their split are a function of."""
    return {
        "format": _FORMAT,
        "sources": {name: corpus.fingerprint(s, cache) for name, s in sorted(sources.items())},
        "max_bytes": data.max_bytes,
        "tokenizer": tokenizer.fingerprint,
        "val_share": None if {"val_a", "val_b"} <= set(sources) else data.val_share,
    }


# --- opening -------------------------------------------------------------------------------------


def _open(folder: Path, tokenizer: Tokenizer, fingerprint: str) -> TokenSet | str:
    """The token set of a folder, or what is wrong with it."""
    meta = read_json(folder / "meta.json")
    if meta is None or meta.pop("check", None) != recipe_hash(meta):
        return "meta.json is missing or torn"
    for name, (size, check) in meta["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            return f"{name} is missing or of another size"
        if _check(path) != check:
            return f"{name} has other content"
    splits = {}
    for name in SPLITS:
        splits[name] = Split(
            name,
            # plain arrays over the map: np.memmap's own slicing is slow
            np.asarray(np.memmap(folder / f"{name}.bin", dtype=tokenizer.dtype, mode="r")),
            np.asarray(np.load(folder / f"{name}.offsets.npy", mmap_mode="r")),
            np.asarray(np.load(folder / f"{name}.bytes.npy", mmap_mode="r")),
        )
    return TokenSet(tokenizer, splits, fingerprint, meta, folder)


def _check(path: Path) -> str:
    """Checksum of a file up to 1 MB, of sixteen blocks spread evenly over a larger one."""
    block, count = 1 << 16, 16
    size = path.stat().st_size
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        for i in range(count):
            if size > block * count:
                file.seek((size - block) * i // (count - 1))
            digest.update(file.read(block))
    return digest.hexdigest()


# --- building ------------------------------------------------------------------------------------


class _Writer:
    """Appends documents to a split's file and remembers where they start."""

    def __init__(self, folder: Path, name: str, tokenizer: Tokenizer) -> None:
        self.folder, self.name, self.tokenizer = folder, name, tokenizer
        self.path = folder / f"{name}.bin"
        with writing(self.path):
            self.file = self.path.open("wb")
        self.lengths: list[np.ndarray] = []
        self.n_bytes: list[np.ndarray] = []
        self.hashes: list[np.ndarray] = []

    def add(self, part: worker.Encoded, wanted: np.ndarray) -> None:
        """The documents of a part where `wanted` (bool, one per document) is true."""
        if not wanted.any():
            return
        tokens = part.tokens
        if not wanted.all():
            tokens = tokens[np.repeat(wanted, part.lengths)]
        with writing(self.path):
            self.file.write(tokens.data)
        self.lengths.append(part.lengths[wanted])
        self.n_bytes.append(part.n_bytes[wanted])
        self.hashes.append(part.hashes[wanted])

    def close(self, by_hash: bool) -> dict[str, int]:
        """Finish the files; `by_hash` puts the documents in the order of their hashes."""
        lengths, n_bytes, hashes = (
            np.concatenate(parts) if parts else np.zeros(0, np.int64)
            for parts in (self.lengths, self.n_bytes, self.hashes)
        )
        with writing(self.path):
            if by_hash and len(lengths):
                self.file.close()
                order = np.argsort(hashes, kind="stable")
                ends = np.cumsum(lengths)
                old = np.memmap(self.path, dtype=self.tokenizer.dtype, mode="r")
                self.path.unlink()  # the map keeps it readable
                self.file = self.path.open("wb")
                for i in order:
                    self.file.write(old[ends[i] - lengths[i] : ends[i]].data)
                lengths, n_bytes = lengths[order], n_bytes[order]
            self.file.write(np.array([self.tokenizer.eos_id], self.tokenizer.dtype).data)
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        for name, array in (("offsets", offsets), ("bytes", n_bytes.astype(np.int64))):
            path = self.folder / f"{self.name}.{name}.npy"
            with writing(path), path.open("wb") as file:
                np.save(file, array)
                file.flush()
                os.fsync(file.fileno())
        return {
            "tokens": int(lengths.sum()),
            "documents": len(lengths),
            "bytes": int(n_bytes.sum()),
        }


def _build(
    folder: Path,
    data: DataConfig,
    sources: dict[str, Source],
    tokenizer: Tokenizer,
    recipe: dict[str, Any],
    progress: bool | None,
) -> None:
    writers = {name: _Writer(folder, name, tokenizer) for name in SPLITS}
    given = np.zeros(0, np.uint64)  # hashes of the given validation documents
    dropped = 0
    size = sum(file.stat().st_size for source in sources.values() for file in source.files)
    try:
        with corpus.progress_bar("tokenising", size, progress) as advance:
            for name in ("val_a", "val_b"):
                if name in sources:
                    for part in _encoded(data, sources[name], tokenizer):
                        writers[name].add(part, np.ones(len(part.lengths), bool))
                        advance(part.disk_bytes)
                    given = np.union1d(given, np.concatenate([given, *writers[name].hashes]))
            low = int(data.val_share * HASH_MAX)
            left = data.max_bytes
            for part in _encoded(data, sources["text"], tokenizer):
                advance(part.disk_bytes)
                wanted = np.ones(len(part.lengths), bool)
                if left is not None:  # the document that reaches the limit is still taken
                    wanted = np.cumsum(part.n_bytes) - part.n_bytes < left
                    left -= int(part.n_bytes.sum())
                fresh = wanted & ~np.isin(part.hashes, given)
                dropped += int(wanted.sum() - fresh.sum())
                in_a = fresh & (part.hashes < low) & ("val_a" not in sources)
                in_b = fresh & (part.hashes >= low) & (part.hashes < 2 * low)
                in_b &= "val_b" not in sources
                writers["val_a"].add(part, in_a)
                writers["val_b"].add(part, in_b)
                writers["train"].add(part, fresh & ~in_a & ~in_b)
                if left is not None and left <= 0:
                    break
        counts = {name: w.close(by_hash=name != "train") for name, w in writers.items()}
    finally:
        for writer in writers.values():
            with contextlib.suppress(OSError):  # what a full disk did not take is told already
                writer.file.close()
    for name in SPLITS:
        if not counts[name]["documents"]:
            total = sum(count["documents"] for count in counts.values())
            cut = name != "train" and name not in sources  # by share, from the text
            fix = f"raise data.val_share={data.val_share}" if cut else "give more text"
            if total < FEW:
                fix = "give more documents (a .txt file is one)"
            if cut:
                fix += f", or data.{name}_path"
            raise UserError(
                f"{sources.get(name, sources['text']).name}: no document of {total} "
                f"is left for {_NAMES[name]}; {fix}"
            )
    if dropped:
        say(f"left out {dropped} documents of the text that are also in the validation files")
    meta: dict[str, Any] = {
        "recipe": recipe,
        "source": sources["text"].name,
        "tokenizer": {
            "name": tokenizer.name,
            "vocab_size": tokenizer.vocab_size,
            "eos_id": tokenizer.eos_id,
            "sample_bytes": tokenizers.SAMPLE_BYTES if data.tokenizer.kind == "bpe" else None,
        },
        "splits": counts,
        "dropped_documents": dropped,
        "files": {f.name: [f.stat().st_size, _check(f)] for f in sorted(folder.iterdir())},
    }
    meta["check"] = recipe_hash(meta)
    with writing(folder / "meta.json"):
        atomic_write(folder / "meta.json", json.dumps(meta, indent=1) + "\n")


def _encoded(data: DataConfig, source: Source, tokenizer: Tokenizer) -> Iterator[worker.Encoded]:
    size = corpus.text_bytes(source.files)
    workers = data.workers or usable_cores()
    if min(size, data.max_bytes or size) < _PARALLEL_BYTES:
        workers = 1
    return worker.encode_all(corpus.read_chunks(source.files), tokenizer, source.lenient, workers)


def usable_cores() -> int:
    """Cores that this process may run on; in a study its share of them, ABLATE_CORES."""
    if share := os.environ.get("ABLATE_CORES"):
        return int(share)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
