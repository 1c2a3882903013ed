"""Text from the Hugging Face hub, kept in one local file so that it is fetched once."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import zstandard

from ablate.config import DataConfig
from ablate.data.corpus import locked, progress_bar, recipe_hash, say, writing
from ablate.errors import UserError


def download(data: DataConfig) -> Path:
    """The file with the dataset's text, at most `data.max_bytes`, streamed if it is not there.

    A kept file is used again without a look at the network, whatever has been published since.
    Raises UserError when the package, the network or the dataset is missing.
    """
    hub = data.hub
    key = recipe_hash([hub.model_dump(), data.max_bytes])
    folder = Path(data.cache).expanduser() / "hub"
    target = folder / f"{hub.name.replace('/', '--')}-{key}.jsonl.zst"
    if target.is_file():
        return target
    with locked(folder / f"{target.name}.lock", f"the copy of {hub.name}"):
        if target.is_file():
            return target
        partial = target.with_name(f".{target.name}.partial")
        try:
            with writing(target):
                _stream(data, partial)
                os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
    return target


def _stream(data: DataConfig, path: Path) -> None:
    hub = data.hub
    try:
        import datasets
    except ImportError:
        raise UserError(
            "data.source is 'hub', which needs the package 'datasets': "
            "pip install 'ablate-hybrids[hub]'"
        ) from None

    def rows() -> Iterator[dict[str, Any]]:
        try:
            yield from datasets.load_dataset(
                hub.name, hub.subset, split=hub.split, revision=hub.revision, streaming=True
            )
        # The library and its transports raise dozens of kinds; the user needs the one reason.
        except Exception as error:
            raise _failure(data, error) from None

    size = documents = 0
    limit = data.max_bytes
    say(f"fetching {hub.name} from the Hugging Face hub, {limit or 'all its'} bytes")
    with (
        path.open("wb") as raw,
        zstandard.ZstdCompressor(level=3).stream_writer(raw) as file,
        progress_bar("fetching", limit, None) as advance,
    ):
        for row in rows():
            if limit is not None and size >= limit:
                break
            text = row.get(hub.text_field)
            if not isinstance(text, str):
                raise UserError(
                    f"data.hub.text_field is {hub.text_field!r}, which is no text column of "
                    f"{hub.name}; its columns are {', '.join(map(str, row))}"
                )
            file.write(json.dumps({"text": text}).encode() + b"\n")
            n_bytes = len(text.encode("utf-8", "replace"))
            size += n_bytes
            advance(n_bytes)
            documents += 1
    if not documents:
        raise UserError(f"data.hub.name {hub.name!r} has no rows in split {hub.split!r}")


def _failure(data: DataConfig, error: Exception) -> UserError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    cause = lines[0][:200] if lines else type(error).__name__
    return UserError(
        f"data.hub: {data.hub.name!r} (subset {data.hub.subset!r}, split {data.hub.split!r}) "
        f"could not be fetched ({cause}); check the name and the network, or use data=stdlib or "
        "data=files"
    )
