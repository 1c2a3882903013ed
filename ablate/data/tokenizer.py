"""Text to ids: bytes, a BPE trained once on the corpus, or a given `tokenizer.json`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ablate.config import DataConfig
from ablate.data.corpus import (
    HASH_MAX,
    Source,
    document_hash,
    documents,
    fingerprint,
    is_packed,
    locked,
    read_chunks,
    recipe_hash,
    say,
    writing,
)
from ablate.errors import UserError
from ablate.run import atomic_write

EOS = "<|endoftext|>"
EOS_NAMES = (EOS, "</s>", "<|end_of_text|>", "<eos>", "<|eos|>", "<|end|>", "<|im_end|>", "[EOS]")
SAMPLE_BYTES = 32_000_000
"""Text that a BPE is trained on at most; BPE training holds its words in memory."""
_TRAINING = 1  # raise it when the training below changes, so that old cached ones are not used


class Tokenizer:
    """Byte-level when `definition` is None, else the `tokenizers` package's JSON."""

    def __init__(self, name: str, definition: str | None = None) -> None:
        self.name = name
        self.definition = definition
        self._inner: Any = None
        if definition is None:
            self.vocab_size, self.eos_id = 257, 256
            return
        import tokenizers

        self._inner = tokenizers.Tokenizer.from_str(definition)
        self._inner.no_padding()
        self._inner.no_truncation()
        self._inner.encode_special_tokens = True  # "<|endoftext|>" in a text is just text
        added = {t.content: i for i, t in self._inner.get_added_tokens_decoder().items()}
        eos = next((added[name] for name in EOS_NAMES if name in added), None)
        if eos is None:
            raise UserError(
                f"data.tokenizer.path: {name} has no end-of-text token among its added tokens; "
                f"one of {', '.join(EOS_NAMES)} is needed"
            )
        self.eos_id = int(eos)
        self.vocab_size = max(self._inner.get_vocab(with_added_tokens=True).values()) + 1

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[str, str | None]]:
        return Tokenizer, (self.name, self.definition)  # for the processes of the loader

    @property
    def fingerprint(self) -> str:
        """Hash of what decides the ids."""
        return hashlib.blake2b((self.definition or "byte").encode(), digest_size=16).hexdigest()

    @property
    def dtype(self) -> type[np.uint16] | type[np.uint32]:
        """The smallest type that holds every id."""
        return np.uint16 if self.vocab_size <= 2**16 else np.uint32

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without an end-of-text."""
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, on as many cores as TOKENIZERS_PARALLELISM lets the package use."""
        if self._inner is None:
            return [list(text.encode()) for text in texts]
        found = self._inner.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in found]

    def encode_documents(self, texts: list[str], raws: list[bytes]) -> list[np.ndarray]:
        """Ids of each text; `raws` are the same texts as UTF-8."""
        if self._inner is None:
            return [np.frombuffer(raw, np.uint8).astype(self.dtype) for raw in raws]
        return [np.array(ids, self.dtype) for ids in self.encode_all(texts)]

    def decode(self, ids: list[int]) -> str:
        """Text of ids; end-of-text is left out, bytes that are not UTF-8 become U+FFFD."""
        if self._inner is None:
            return bytes(i for i in ids if i < 256).decode("utf-8", "replace")
        return str(self._inner.decode(ids, skip_special_tokens=True))


def load(data: DataConfig, text: Source) -> Tokenizer:
    """The tokenizer a config asks for; trains a BPE when it is not in the cache."""
    options = data.tokenizer
    if options.kind == "byte":
        return Tokenizer("byte")
    if options.kind == "bpe":
        return _bpe(data, text)
    path = Path(str(options.path)).expanduser()
    try:
        return Tokenizer(str(options.path), path.read_text())
    except UserError:
        raise
    except OSError as error:
        raise UserError(
            f"data.tokenizer.path: cannot read {options.path!r} ({error.strerror})"
        ) from None
    except Exception as error:  # the package raises bare Exception for what it cannot parse
        raise UserError(
            f"data.tokenizer.path: {options.path!r} is not a tokenizer.json ({error})"
        ) from None


def _bpe(data: DataConfig, text: Source) -> Tokenizer:
    cache = Path(data.cache).expanduser()
    size = data.tokenizer.vocab_size
    given = (data.val_a_path is not None, data.val_b_path is not None)
    recipe = [
        _TRAINING,
        SAMPLE_BYTES,
        size,
        fingerprint(text, cache),
        data.max_bytes,
        None if all(given) else [data.val_share, given],
    ]
    path = cache / "tokenizers" / f"bpe-{size}-{recipe_hash(recipe)}.json"
    name = f"bpe-{size}"
    with locked(path.with_suffix(".lock"), "the tokenizer"):
        if path.is_file():
            try:
                return Tokenizer(name, path.read_text())
            except Exception:  # torn by a crash of the machine, or edited
                say(f"the cached tokenizer {path} is damaged and is trained again")
        sample: dict[str, int] = {}
        definition = _train(size, _sample(data, text, sample))
        with writing(path):
            atomic_write(path, definition)
    tokenizer = Tokenizer(name, definition)
    said = f"trained a BPE of {tokenizer.vocab_size} entries on {sample['bytes'] / 1e6:.1f} MB"
    if tokenizer.vocab_size < size:
        said += f"; this text has no more pairs to merge for {size}"
    say(said)
    return tokenizer


def _train(size: int, texts: Iterator[str]) -> str:
    from tokenizers import Tokenizer as Inner
    from tokenizers import decoders, models, pre_tokenizers, trainers

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    inner = Inner(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return str(inner.to_str())


def _sample(data: DataConfig, text: Source, stats: dict[str, int]) -> Iterator[str]:
    """Training documents, at most SAMPLE_BYTES: a share of each file, files in a random order.

    `max_bytes` binds here only through the number of bytes; validation documents are left out.
    """
    budget = min(SAMPLE_BYTES, data.max_bytes or SAMPLE_BYTES)
    files = text.files
    total = sum(file.stat().st_size for file in files)
    whole = total <= budget and not any(map(is_packed, files))
    if not whole and data.max_bytes is None:
        files = tuple(sorted(files, key=lambda f: document_hash(f.name.encode())))
    stats["bytes"] = 0
    for file in files:
        share = budget if whole or data.max_bytes else budget * file.stat().st_size / total
        taken = 0
        inside = (pair for chunk in read_chunks([file]) for pair in documents(chunk, text.lenient))
        for document, raw in inside:
            if taken >= share or stats["bytes"] >= budget:
                break
            if side(data, document_hash(raw)) == "train":
                taken += len(raw)
                stats["bytes"] += len(raw)
                yield document
        if stats["bytes"] >= budget:
            return


def side(data: DataConfig, content_hash: int) -> str:
    """The split of a document of the text: its hash cut at val_share and twice val_share."""
    position = content_hash / HASH_MAX
    if position < data.val_share:
        return "val_a" if data.val_a_path is None else "train"
    if position < 2 * data.val_share:
        return "val_b" if data.val_b_path is None else "train"
    return "train"
