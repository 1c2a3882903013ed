"""Batches: packed rows in an order that the seed alone decides, and the validation windows.

The stream of a split is cut in windows of seq_len + 1 ids with stride seq_len: a row's inputs are
the first seq_len ids, its targets the last seq_len. A row starts with a fresh context.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import operator
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from ablate.config import DataConfig
from ablate.data import bits
from ablate.data.recall import IGNORE, check_recall, packed_recall, recall_rows
from ablate.data.tokens import Split, TokenSet, usable_cores
from ablate.data.worker import Pool, ProcessEnded, in_order
from ablate.data.written import written_count, written_rows
from ablate.errors import UserError

log = logging.getLogger(__name__)

MAX_EPOCHS = 4
"""Up to four epochs cost almost nothing against fresh text (Muennighoff et al. 2023, section 5)."""
_RECALL_BLOCK_TOKENS = 1 << 15  # recall rows are made so many tokens at a time, which is faster
_WRITTEN = 400_000  # tokens of recall documents a second that one process makes, or more

WANTED = 3 * 1.6e6
"""Tokens a second of batches with recall documents: three times what one GPU was seen to take."""
Written = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Tokens, targets and document starts of rows of recall documents."""


@dataclass(frozen=True)
class Batch:
    """Rows of a step, on the CPU until moved.

    tokens_BL, targets_BL: int64, targets -100 where nothing is scored; doc_start_BL: int32, for
    each position the index in the row of its document's first token (a document that began in an
    earlier row begins at 0 here), None when documents are not reset.
    """

    tokens_BL: torch.Tensor
    targets_BL: torch.Tensor
    doc_start_BL: torch.Tensor | None

    def to(self, device: torch.device | str) -> Batch:
        """On a device; from pinned memory the copy runs beside the GPU's work."""
        return self._map(lambda t: t.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        return self._map(torch.Tensor.pin_memory)

    def split(self, rows: int) -> list[Batch]:
        """Micro-batches of at most so many rows."""
        starts = range(0, len(self.tokens_BL), rows)
        return [self._map(operator.itemgetter(slice(i, i + rows))) for i in starts]

    def n_targets(self) -> int:
        """Scored positions."""
        return int((self.targets_BL != IGNORE).sum())

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        doc_start = None if self.doc_start_BL is None else function(self.doc_start_BL)
        return Batch(function(self.tokens_BL), function(self.targets_BL), doc_start)


def model_vocab(vocab_size: int) -> int:
    """Rows of a model's embedding: the tokenizer's ids rounded up to a multiple of 64."""
    return -(-vocab_size // 64) * 64


def check_epochs(token_set: TokenSet, data: DataConfig, text_tokens_needed: int) -> float:
    """Epochs over the text that a budget takes; UserError above four unless data.allow_repeats."""
    unique = token_set.splits["train"].n_tokens
    epochs = text_tokens_needed / unique
    if epochs > MAX_EPOCHS and not data.allow_repeats:
        raise UserError(
            f"train.tokens asks for {text_tokens_needed:,} tokens of text but there are "
            f"{unique:,} unique ones, which is {epochs:.1f} epochs and more than {MAX_EPOCHS}; "
            "give more text, fewer tokens, or data.allow_repeats=true"
        )
    return epochs


class RowCounts(NamedTuple):
    """Rows of a training batch: text, MQAR (data.mqar.share), recall documents (data.recall)."""

    text: int
    mqar: int
    written: int


def row_counts(data: DataConfig, batch_size: int) -> RowCounts:
    """How a batch is made up; UserError where shares round to no row, or leave no text."""
    mqar = recall_rows(data, batch_size)
    written = written_count(data, batch_size, mqar)
    return RowCounts(batch_size - mqar - written, mqar, written)


class TrainStream:
    """Training batches; `batch(step)` depends on the text, the sizes, the seed and the step alone.

    Epoch e visits every window of the text once, in the e-th shuffle of the seed. Recall rows
    (`data.mqar.share` of the rows, spread evenly over the batch) are new in every step, and so are
    rows of recall documents (`data.recall.share`), which follow the text rows.
    """

    def __init__(
        self, token_set: TokenSet, data: DataConfig, *, batch_size: int, seed: int
    ) -> None:
        self.token_set, self.data, self.batch_size, self.seed = token_set, data, batch_size, seed
        self.seq_len = data.seq_len
        self.text_rows, n_recall, _ = row_counts(data, batch_size)
        if n_recall:
            length = data.mqar.length or data.seq_len
            check_recall(data.mqar.pairs, length, data.mqar.queries, token_set.vocab_size)
        train = token_set.splits["train"]
        self.n_windows = train.n_tokens // self.seq_len
        if self.text_rows and not self.n_windows:
            raise UserError(
                f"data.seq_len={self.seq_len} is longer than the whole training text of "
                f"{train.n_tokens} tokens; use shorter rows or more text"
            )
        width = train.tokens.itemsize
        self._windows = np.lib.stride_tricks.as_strided(
            train.tokens,
            (self.n_windows, self.seq_len + 1),
            (self.seq_len * width, width),
            writeable=False,
        )
        is_recall = np.zeros(batch_size, bool)
        is_recall[np.arange(n_recall) * batch_size // max(n_recall, 1)] = True
        self._recall_at, rest = np.flatnonzero(is_recall), np.flatnonzero(~is_recall)
        self._text_at, self._written_at = rest[: self.text_rows], rest[self.text_rows :]
        # Makes the rows of recall documents with these numbers; pickles, for other processes.
        self.write: Callable[[np.ndarray], Written] = functools.partial(
            written_rows, seed, data=data, tokenizer=token_set.tokenizer
        )
        # of two epochs at a time, as a batch may have rows of both
        self._shuffle = functools.lru_cache(maxsize=2)(
            functools.partial(bits.permutation, seed, n=self.n_windows)
        )
        self._recall_steps = max(1, _RECALL_BLOCK_TOKENS // max(1, n_recall * self.seq_len))
        self._recall: tuple[int, np.ndarray, np.ndarray] | None = None

    def text_tokens(self, tokens: int) -> int:
        """Of so many trained tokens (rows × seq_len), those of text rows, up to whole steps."""
        steps = math.ceil(tokens / (self.batch_size * self.seq_len))
        return steps * self.text_rows * self.seq_len

    def epochs(self, tokens: int) -> float:
        """Epochs over the text after so many trained tokens."""
        return self.text_tokens(tokens) / self.token_set.splits["train"].n_tokens

    def written(self, step: int) -> np.ndarray:
        """Numbers of the rows of recall documents of a step."""
        n = len(self._written_at)
        return np.arange(step * n, (step + 1) * n)

    def batch(self, step: int, written: Written | None = None) -> Batch:
        """The rows of a step, counted from 0.

        written: `write(written(step))`, where that has been made elsewhere.
        """
        shape = (self.batch_size, self.seq_len)
        tokens, targets = np.empty(shape, np.int64), np.empty(shape, np.int64)
        reset = self.data.reset_documents
        doc_start = np.zeros(shape, np.int32) if reset else None
        if self.text_rows:
            windows = self._order(step)
            rows = self._windows[windows]
            # a slice instead of an index array where every row is text: no second copy
            at = self._text_at if self.text_rows < self.batch_size else slice(None)
            tokens[at], targets[at] = rows[:, :-1], rows[:, 1:]
            if doc_start is not None:
                offsets = self.token_set.splits["train"].doc_offsets
                doc_start[at] = document_starts(offsets, windows * self.seq_len, self.seq_len)
        if len(self._recall_at):
            tokens[self._recall_at], targets[self._recall_at] = self._recall_of(step)
            if doc_start is not None:
                length = self.data.mqar.length or self.seq_len
                position = np.arange(self.seq_len, dtype=np.int32)
                doc_start[self._recall_at] = position // length * length
        if len(self._written_at):
            made = written or self.write(self.written(step))
            tokens[self._written_at], targets[self._written_at] = made[:2]
            if doc_start is not None:
                doc_start[self._written_at] = made[2]
        return Batch(
            torch.from_numpy(tokens),
            torch.from_numpy(targets),
            None if doc_start is None else torch.from_numpy(doc_start),
        )

    def _order(self, step: int) -> np.ndarray:
        """Windows of the text rows of a step."""
        index = np.arange(step * self.text_rows, (step + 1) * self.text_rows)
        epoch, position = np.divmod(index, self.n_windows)
        first, last = int(epoch[0]), int(epoch[-1])
        if first == last:
            return self._shuffle(first)[position]
        result = np.empty_like(index)
        for e in range(first, last + 1):
            result[epoch == e] = self._shuffle(e)[position[epoch == e]]
        return result

    def _recall_of(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        block, within = divmod(step, self._recall_steps)
        n = len(self._recall_at)
        if self._recall is None or self._recall[0] != block:
            size = n * self._recall_steps
            rows = np.arange(block * size, (block + 1) * size)
            made = packed_recall(self.seed, rows, self.data, self.token_set.vocab_size)
            self._recall = (block, *made)
        part = slice(within * n, (within + 1) * n)
        return self._recall[1][part], self._recall[2][part]


def document_starts(doc_offsets: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """doc_start_BL (int32) of rows that begin at these positions of a split's stream."""
    result = np.zeros((len(starts), length), np.int32)
    first = np.searchsorted(doc_offsets, starts, side="left")
    counts = np.searchsorted(doc_offsets, starts + length, side="left") - first
    row = np.repeat(np.arange(len(starts)), counts)
    nth = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    at = doc_offsets[first[row] + nth] - starts[row]
    result[row, at] = at
    return np.maximum.accumulate(result, axis=1, out=result)


def eval_batches(
    split: Split, data: DataConfig, *, batch_size: int, max_tokens: int | None = None
) -> Iterator[tuple[Batch, torch.Tensor]]:
    """(batch, doc_index_BL) over the first documents of a split, every token scored once.

    The documents are `split.head(max_tokens)` of them, whatever seq_len and batch_size are. Windows
    follow each other in the stream; what is left of the last batch has targets of -100.
    doc_index_BL: int64, the document a target belongs to (its closing end-of-text included), -1
    where nothing is scored; `split.doc_bytes[i]` are that document's bytes.
    """
    length = data.seq_len
    total = int(split.doc_offsets[split.head(max_tokens)])
    position = np.arange(batch_size * length).reshape(batch_size, length)
    for start in range(0, total, batch_size * length):
        at = start + position
        inside = at < total
        at = np.minimum(at, total - 1)
        tokens = split.tokens[at].astype(np.int64)
        targets = np.where(inside, split.tokens[at + 1].astype(np.int64), IGNORE)
        index = np.searchsorted(split.doc_offsets, at, side="right") - 1
        doc_start = None
        if data.reset_documents:
            rows = start + position[:, 0]
            doc_start = torch.from_numpy(document_starts(split.doc_offsets, rows, length))
        yield (
            Batch(torch.from_numpy(tokens), torch.from_numpy(targets), doc_start),
            torch.from_numpy(np.where(inside, index, -1)),
        )


def writers(
    stream: TrainStream, trainers: int = 1
) -> contextlib.AbstractContextManager[Pool | None]:
    """A `Pool` that writes the stream's recall documents for `prefetched`; None where it has none.

    As many processes as keep up with a GPU three times over, where there are the cores: those of
    this process, shared by so many trainers, less the one that trains. They start in the
    background, which takes seconds, so that it is worth to have them before the model is built.
    """
    share = len(stream.written(0)) / stream.batch_size
    if not share:
        return contextlib.nullcontext()
    spare = max(1, usable_cores() // trainers - 1)
    return Pool(stream.write, min(spare, math.ceil(share * WANTED / _WRITTEN)))


@contextlib.contextmanager
def prefetched(
    stream: TrainStream,
    first: int,
    last: int,
    *,
    pin: bool = False,
    pool: Pool | None = None,
) -> Iterator[Iterator[Batch]]:
    """Batches first … last - 1 of a stream, made ahead by a thread, in pinned memory for a GPU.

    pool: of `writers`; else the thread writes recall documents too, as it does instead of a process
    that was killed. What the thread raises is raised by the iteration; what it has made at the end
    is dropped.
    """
    ahead = 4 if pool is None else 4 + 2 * len(pool.processes)
    told = False

    def make(step: int, rows: Future[Written] | None) -> Batch:
        nonlocal told
        written: Written | None = None
        try:
            written = None if rows is None else rows.result()
        except ProcessEnded as error:
            if not told:
                log.warning("%s: what it wrote is written by the training process now", error)
                told = True
        batch = stream.batch(step, written)
        return batch.pin_memory() if pin else batch

    def submit(step: int) -> Future[Batch]:
        rows = None if pool is None else pool.submit(stream.written(step))
        return thread.submit(make, step, rows)

    thread = ThreadPoolExecutor(1, "prefetch")
    try:
        yield in_order(map(submit, range(first, last)), ahead)
    finally:
        thread.shutdown(cancel_futures=True)
