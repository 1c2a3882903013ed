"""Where the text comes from: files on disk, read in chunks of whole documents.

Every source ends as a list of files: the standard library's `.py` files, files the user names, or
the one file that a download from the Hugging Face hub was kept in. A `.txt`, `.md` or `.py` file is
one document; a line of `.jsonl` or `.jsonl.zst` is one, its text in the field `text`. Suffixes in
capitals are the same.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import zstandard
from filelock import FileLock, Timeout

from ablate.config import DataConfig
from ablate.errors import UserError
from ablate.run import read_json, write_json

SUFFIXES = (".txt", ".md", ".jsonl", ".jsonl.zst")
CHUNK_BYTES = 1 << 20
"""Text handed to a tokenising process at a time; also what bounds the memory of a build."""

HASH_MAX = 2**64
_INSTALLED = {"site-packages", "dist-packages", "__pycache__"}
_MACHINE_FILES = ("_sysconfigdata", "sitecustomize", "usercustomize")


def say(line: str) -> None:
    """One line for the user, on stderr."""
    print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def progress_bar(label: str, total: int | None, show: bool | None) -> Iterator[Any]:
    """A function that takes bytes done, shown as a bar on stderr; None: when that is a terminal."""
    if not (sys.stderr.isatty() if show is None else show):
        yield lambda n: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(label), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda n: bar.advance(task, n)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """UserError with a path in the cache when the disk refuses: a full one names no file itself."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"data.cache: {path} cannot be written ({error.strerror or error}); "
            "choose another folder with data.cache=…"
        ) from None


@contextlib.contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold a lock file; says so when another process has it."""
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0.5)
        except Timeout:
            say(f"waiting for another process that makes {what}")
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


@dataclass(frozen=True)
class Source:
    """Files in their stable order. `lenient`: a file that is not UTF-8 is skipped, not an error.

    left_out: a line for each folder that has files of other kinds too.
    """

    name: str
    files: tuple[Path, ...]
    lenient: bool = False
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Chunk:
    """Raw bytes of whole documents: a few text files, or lines of one JSONL file."""

    names: list[str]
    blobs: list[bytes] = field(repr=False)
    jsonl: bool
    first_line: int = 1
    disk_bytes: int = 0  # read from disk for this chunk; moves the progress bar


# --- finding the files ---------------------------------------------------------------------------


def sources(data: DataConfig) -> dict[str, Source]:
    """`text`, and `val_a` and `val_b` where files for them are given.

    Raises UserError for a path that is missing, empty or of an unknown kind.
    """
    found: dict[str, Source] = {}
    for side in ("val_a", "val_b"):
        path = getattr(data, f"{side}_path")
        if path is not None:
            found[side] = _files(path, f"data.{side}_path")
    if data.source == "stdlib":
        text = _stdlib()
    elif data.source == "files":
        assert data.path is not None  # checked by the config
        text = _files(data.path, "data.path")
    else:
        from ablate.data.hub import download

        text = Source("data.hub", (download(data),))
    given = {file.resolve() for source in found.values() for file in source.files}
    kept = text.files
    if given:
        kept = tuple(file for file in text.files if file.resolve() not in given)
    if not kept:
        raise UserError(f"{text.name} holds only the validation files, so nothing is left to train")
    found["text"] = replace(text, files=kept)
    return found


def _stdlib() -> Source:
    """The `.py` files of the running interpreter's standard library."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [f for f in _walk(root, (".py",))[0] if not f.name.startswith(_MACHINE_FILES)]
    if not files:
        raise UserError(
            f"data.source is 'stdlib' but {root} holds no .py files; "
            "give text with data=files data.path=…"
        )
    return Source("stdlib", tuple(files), lenient=True)


def _walk(root: Path, suffixes: tuple[str, ...]) -> tuple[list[Path], Counter[str]]:
    """Files below a folder in the order of their path's parts, and how many of which other kinds
    there are; none hidden, none installed."""
    found: list[tuple[str, ...]] = []
    others: Counter[str] = Counter()
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if name not in _INSTALLED and name[0] != "."]
        parts = Path(folder).relative_to(root).parts
        for name in names:
            path = os.path.join(folder, name)
            if name[0] == ".":
                continue
            if not os.path.isfile(path) and os.path.exists(path):
                others["pipes and the like"] += 1  # whose reading need not end
            elif name.lower().endswith(suffixes):
                found.append((*parts, name))
            else:
                others[Path(name).suffix.lower() or "without a suffix"] += 1
    return [root.joinpath(*parts) for parts in sorted(found)], others


def _left_out(others: Counter[str], text: str) -> str:
    n, kinds = others.total(), sorted(others.items(), key=lambda kind: (-kind[1], kind[0]))
    shown = ", ".join(f"{kind} {count}" for kind, count in kinds[:5])
    more = f" and {len(kinds) - 5} kinds more" if len(kinds) > 5 else ""
    files = "1 file of another kind is" if n == 1 else f"{n:,} files of other kinds are"
    return f"{files} left out of {text!r} ({shown}{more})"


def _files(paths: str | list[str], name: str) -> Source:
    """Files of folders (recursive, hidden ones left out), globs and single files, in order."""
    left_out: dict[str, None] = {}
    result: dict[Path, None] = {}
    for text in [paths] if isinstance(paths, str) else paths:
        path = Path(text).expanduser()
        if path.is_dir():
            inside, others = _walk(path, SUFFIXES)
            if not inside:
                raise UserError(f"{name}: the folder {text!r} holds no {' '.join(SUFFIXES)} files")
            if others:
                left_out[_left_out(others, text)] = None
        elif path.is_file():
            inside = [path]
        else:
            inside = [Path(hit) for hit in sorted(glob.glob(str(path))) if Path(hit).is_file()]
            if not inside:
                raise UserError(f"{name}: there is no file or folder {text!r}")
        for file in inside:
            if not file.name.lower().endswith(SUFFIXES):
                raise UserError(
                    f"{name}: {str(file)!r} is not one of the kinds {' '.join(SUFFIXES)}"
                )
            result.setdefault(file, None)
    if not result:
        raise UserError(f"{name} is an empty list; give at least one file or folder")
    return Source(name, tuple(result), left_out=tuple(left_out))


def text_bytes(files: Iterable[Path]) -> int:
    """Bytes of text in files: of packed ones about three times what they take."""
    return sum(f.stat().st_size * (3 if is_packed(f) else 1) for f in files)


# --- the fingerprint -----------------------------------------------------------------------------


def fingerprint(source: Source, cache: Path) -> str:
    """Hash of the files' contents and kinds in their order, whatever the folder is called.

    Contents are hashed once: an index remembers each file's size, times and inode with its hash. A
    file changed less than two seconds before it was hashed is not remembered, as a second change
    could leave its times as they are (git's "racy" rule).
    """
    listing = "\n".join(str(file.absolute()) for file in source.files)
    index_path = cache / "files" / f"{_hex(listing.encode())}.json"
    known = read_json(index_path) or {}

    def entry(file: Path) -> tuple[str, list[int], str, bool]:
        try:
            stat = file.stat()
            signature = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
            row = known.get(str(file))
            if isinstance(row, dict) and row.get("signature") == signature:
                return str(file), signature, str(row["hash"]), False
            begun = time.time_ns()
            with file.open("rb") as handle:
                digest = hashlib.file_digest(handle, "blake2b").hexdigest()[:32]
        except OSError as error:
            raise UserError(
                f"{source.name}: cannot read {str(file)!r} ({error.strerror})"
            ) from None
        return str(file), signature, digest, begun - max(signature[1:3]) > 2_000_000_000

    with ThreadPoolExecutor(4) as pool:
        rows = list(pool.map(entry, source.files))
    fresh = {name: {"signature": s, "hash": h} for name, s, h, new in rows if new}
    if fresh:
        # without an index it is only slower; the build says what is wrong with the folder
        with contextlib.suppress(OSError):
            write_json(index_path, {**known, **fresh})
    kinds = ["jsonl" if _is_jsonl(file) else "text" for file in source.files]
    content = [[kind, digest] for kind, (_, _, digest, _) in zip(kinds, rows, strict=True)]
    return _hex(json.dumps([content, source.lenient]).encode())


def _hex(raw: bytes) -> str:
    return hashlib.blake2b(raw, digest_size=16).hexdigest()


def recipe_hash(recipe: Any) -> str:
    """Of what something in the cache is made from, for its name."""
    text = json.dumps(recipe, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def document_hash(raw: bytes) -> int:
    """64 bits of a document's content; decides its split, so equal documents stay together."""
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "big")


# --- reading -------------------------------------------------------------------------------------


def _is_jsonl(file: Path) -> bool:
    return file.name.lower().endswith((".jsonl", ".jsonl.zst"))


def is_packed(file: Path) -> bool:
    return file.name.lower().endswith(".zst")


def read_chunks(files: Iterable[Path]) -> Iterator[Chunk]:
    """The files' raw documents in order, about CHUNK_BYTES at a time."""
    names: list[str] = []
    blobs: list[bytes] = []
    size = 0
    for file in files:
        if not _is_jsonl(file):
            names.append(str(file))
            blobs.append(file.read_bytes())
            size += len(blobs[-1])
        if names and (_is_jsonl(file) or size >= CHUNK_BYTES):
            yield Chunk(names, blobs, jsonl=False, disk_bytes=size)
            names, blobs, size = [], [], 0
        if _is_jsonl(file):
            yield from _read_jsonl(file)
    if names:
        yield Chunk(names, blobs, jsonl=False, disk_bytes=size)


def _read_jsonl(file: Path) -> Iterator[Chunk]:
    """Blocks that end at line ends."""
    rest, line, read = b"", 1, 0
    for block, disk_bytes in blocks(file):
        read += disk_bytes
        cut = block.rfind(b"\n") + 1
        if not cut:
            rest += block
            continue
        whole = rest + block[:cut]
        rest = block[cut:]
        if len(whole) < CHUNK_BYTES // 2:
            rest = whole + rest
            continue
        yield Chunk([str(file)], [whole], jsonl=True, first_line=line, disk_bytes=read)
        line, read = line + whole.count(b"\n"), 0
    if rest or read:
        yield Chunk([str(file)], [rest], jsonl=True, first_line=line, disk_bytes=read)


def blocks(file: Path) -> Iterator[tuple[bytes, int]]:
    """(plain bytes, bytes read from disk) of a file, decompressed when it ends in .zst."""
    packed = is_packed(file)
    unpacker: Any = None
    with file.open("rb") as handle:
        while block := handle.read(CHUNK_BYTES if not packed else CHUNK_BYTES // 4):
            if not packed:
                yield block, len(block)
                continue
            plain, data = [], block
            try:
                while data:
                    if unpacker is None:
                        unpacker = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
                    plain.append(unpacker.decompress(data))
                    data = unpacker.unused_data if unpacker.eof else b""
                    unpacker = None if unpacker.eof else unpacker
            except zstandard.ZstdError as error:
                raise UserError(f"{str(file)!r} is not a whole .zst file: {error}") from None
            yield b"".join(plain), len(block)
    if unpacker is not None:
        raise UserError(f"{str(file)!r} is not a whole .zst file: it ends in the middle of a frame")


def documents(chunk: Chunk, lenient: bool = False) -> Iterator[tuple[str, bytes]]:
    """(text, its UTF-8 bytes) of each document that is not empty.

    Raises UserError with file and line for text that is not UTF-8 and lines that are no document;
    `lenient` skips files that are not UTF-8.
    """
    if not chunk.jsonl:
        for name, raw in zip(chunk.names, chunk.blobs, strict=True):
            try:
                content = raw.decode()
            except UnicodeDecodeError as error:
                if lenient:
                    continue
                raise UserError(
                    f"{name!r} is not UTF-8 at byte {error.start}; convert it or leave it out"
                ) from None
            if raw:
                yield content, raw
        return
    for number, row in enumerate(chunk.blobs[0].split(b"\n"), start=chunk.first_line):
        if not row.strip():
            continue
        try:
            text: Any = json.loads(row)["text"]
        except (ValueError, KeyError, TypeError):
            text = None
        if not isinstance(text, str):
            raise UserError(
                f"{chunk.names[0]!r} line {number} is not a JSON object with a string field 'text'"
            )
        try:
            raw = text.encode()
        except UnicodeEncodeError:  # half of a surrogate pair, which JSON allows
            raw = text.encode("utf-8", "replace")
            text = raw.decode()
        if raw:
            yield text, raw
